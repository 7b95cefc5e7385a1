"""Megatron-LM's per-rank layout, written in a stream at any tensor-, pipeline- and expert-parallel size.

Every rank's file is laid out before the first row comes; the rows then go to their places in all files that hold them.
Experts are split by tensor parallelism like the rest of the model (Megatron-LM's default).
"""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_ext.errors import ConfigError, ParallelismError
from megatron_ext.families.base import Architecture, Weight
from megatron_ext.folders import require_space
from megatron_ext.weights.files import PlacedFile
from megatron_ext.weights.megatron_names import FILE, LINEAR, Naming, Sizes
from megatron_ext.weights.megatron_ranks import EMBEDDING, OUTPUT, cut
from megatron_ext.weights.torch_zip import Announced, ZipLayout, lay_out
from megatron_ext.weights.vocab import padded_vocab_size

CHECKPOINT_VERSION = 3.0


class RankLayout(NamedTuple):
    """How a per-rank checkpoint is written."""

    sizes: Sizes = Sizes()
    naming: Naming = Naming()
    make_vocab_size_divisible_by: int = 128


def asked_layout(layout: str, **options: Any) -> RankLayout | None:
    """The layout that a command line asks for; None is torch_dist. An option that is None was not given.

    Raises:
        ConfigError: an option of the files of ranks without them.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if layout == "torch_dist":
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ConfigError(
                f"--{option} is for files of ranks: add --layout mp_rank, or leave it out (torch_dist fits any sizes)"
            )
        return None
    sizes, naming = ({name: given[name] for name in kind._fields if name in given} for kind in (Sizes, Naming))
    rest = {name: value for name, value in given.items() if name in RankLayout._fields}
    return RankLayout(Sizes(**sizes), Naming(**naming), **rest)


class MegatronRanksWriter:
    """Takes rows of the whole model's weights, in any order and from several threads, and gives each rank its share.

    ``folder`` is the iteration's folder, ``dtypes`` the type of each torch_dist key of ``plan``. Rows of the vocabulary
    up to the padded size are zeros.

    Raises:
        ParallelismError: a size does not divide what it splits; nothing was written.
        DiskSpaceError: the disk has too little room for all ranks; nothing was written.
    """

    def __init__(
        self,
        folder: Path,
        plan: Sequence[Weight],
        dtypes: Mapping[str, torch.dtype],
        architecture: Architecture,
        layout: RankLayout,
    ) -> None:
        check_sizes(plan, architecture, layout)
        self._sizes, self._dtypes = layout.sizes, dtypes
        padded = vocab_rows(architecture, layout)
        args = megatron_args(architecture, layout, dtypes)
        self._rows = {weight.key: padded if weight.padded_vocabulary else weight.own_shape[0] for weight in plan}
        self._missing = {(weight.key, weight.index): weight.own_shape[0] for weight in plan}
        self._lock = threading.Lock()
        models = _models(plan, dtypes, architecture, layout)
        layouts = {rank: lay_out(_state(model, args), Path(FILE).stem) for rank, model in models.items()}
        require_space(folder.parent, sum(zipped.size for zipped in layouts.values()), "the checkpoint of all ranks")
        folder.mkdir(parents=True)
        self._files = {rank: _created(folder / layout.sizes.folder(*rank), layouts[rank]) for rank in models}
        self._places: dict[tuple[int, int, int], dict[tuple[str, tuple[int, ...]], int]] = {
            rank: {place: layouts[rank].places[tensor] for place, (_, tensor) in model.items()}
            for rank, model in models.items()
        }

    def write(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """The rows of ``weight``, of its layer and expert, from ``start`` on."""
        place = weight.key, weight.index
        if rows.dtype != self._dtypes[weight.key]:
            raise ValueError(f"{weight.key} was announced as {self._dtypes[weight.key]}, not {rows.dtype}")
        for rank, own, piece in self._shares(weight, start, rows):
            offset = own * prod(piece.shape[1:]) * piece.itemsize
            for numbers, places in self._places.items():
                if place in places and rank in (None, numbers[0]):
                    self._files[numbers].put(places[place] + offset, piece)
        with self._lock:
            self._missing[place] -= len(rows)

    def sync(self) -> None:
        """Wait until what was written before this call is on the disk, while other threads go on writing."""
        for file in self._files.values():
            file.sync()

    def abandon(self) -> None:
        """Let go of the files; what was written is no checkpoint."""
        for file in self._files.values():
            file.close()

    def close(self) -> None:
        """Check that every row came, and give the files their names."""
        self.abandon()
        if missing := [place for place, left in self._missing.items() if left]:
            raise ValueError(f"{len(missing)} weights were not written whole, the first is {missing[0]}")
        for file in self._files.values():
            file.path.rename(file.path.with_name(FILE))

    def _shares(self, weight: Weight, start: int, rows: torch.Tensor) -> Iterator[tuple[int | None, int, torch.Tensor]]:
        """(tensor-parallel rank, or None for all; its first row; what it gets) of the rows from ``start`` on."""
        split, tp = weight.rule.split, self._sizes.tp
        if split is None:
            yield None, start, rows
        elif split.axis == 1:
            for rank, columns in enumerate(rows.chunk(tp, dim=1)):
                yield rank, start, columns.contiguous()
        else:
            share = self._rows[weight.key] // (split.blocks * tp)
            for rank, own, first, count in cut(start, len(rows), share, tp):
                yield rank, own, rows[first : first + count]


def vocab_rows(architecture: Architecture, layout: RankLayout) -> int:
    """Rows of the embedding of all tensor-parallel ranks together."""
    return padded_vocab_size(architecture.vocab_size, layout.sizes.tp, layout.make_vocab_size_divisible_by)


def check_sizes(plan: Sequence[Weight], architecture: Architecture, layout: RankLayout) -> None:
    """Refuse sizes that do not divide what they split.

    Raises:
        ParallelismError: names the size and what it does not divide.
        ConfigError: a size is less than 1.
    """
    tp, pp, ep = layout.sizes
    options = {"tp": tp, "pp": pp, "ep": ep, "make-vocab-size-divisible-by": layout.make_vocab_size_divisible_by}
    if small := [f"--{name} must be at least 1, not {size}" for name, size in options.items() if size < 1]:
        raise ConfigError(small[0])
    if layout.naming.moe_grouped_gemm and layout.naming.transformer_impl == "local":
        raise ConfigError(
            "--moe-grouped-gemm names experts as Transformer Engine does; leave --transformer-impl local out"
        )
    experts, groups = architecture.num_moe_experts, architecture.num_query_groups
    if ep > 1 and not experts:
        raise ParallelismError(f"--ep {ep} splits experts, but the model has none; leave --ep out")
    for option, size, name, value in (
        ("tp", tp, "num_attention_heads", architecture.num_attention_heads),
        ("pp", pp, "num_layers", architecture.num_layers),
        ("ep", ep, "num_moe_experts", experts or ep),
    ):
        if value % size:
            raise ParallelismError(f"--{option} {size} does not divide {name} {value}; choose a divisor of it")
    if groups % tp and tp % groups:
        raise ParallelismError(f"--tp {tp} is no divisor and no multiple of num_query_groups {groups}; choose one")
    for weight in plan:
        split = weight.rule.split
        if split and not weight.padded_vocabulary and weight.own_shape[split.axis] % (split.blocks * tp):
            size = weight.own_shape[split.axis] // split.blocks
            raise ParallelismError(f"--tp {tp} does not divide {size}, the size of {weight.key} that it splits")


def megatron_args(architecture: Architecture, layout: RankLayout, dtypes: Mapping[str, torch.dtype]) -> Namespace:
    """The settings that Megatron-LM compares with its own, or takes with ``--use-checkpoint-args``."""
    a, scaling = architecture, architecture.rope_scaling or {}
    types = set(dtypes.values())
    dtype = types.pop() if len(types) == 1 else torch.float32
    return Namespace(
        num_layers=a.num_layers, hidden_size=a.hidden_size, ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_attention_heads, num_query_groups=a.num_query_groups,
        group_query_attention=a.num_query_groups != a.num_attention_heads, kv_channels=a.kv_channels,
        max_position_embeddings=a.max_position_embeddings, seq_length=a.max_position_embeddings,
        vocab_size=a.vocab_size, padded_vocab_size=vocab_rows(a, layout),
        make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by, tokenizer_type="HuggingFaceTokenizer",
        position_embedding_type="rope", add_position_embedding=True, use_rotary_position_embeddings=True,
        rotary_base=int(a.rotary_base), rotary_percent=1.0, rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=scaling.get("factor") if scaling.get("rope_type") == "linear" else None,
        use_rope_scaling=scaling.get("rope_type") == "llama3", rope_scaling_factor=scaling.get("factor", 8.0),
        normalization=a.normalization, norm_epsilon=a.layernorm_epsilon, layernorm_epsilon=a.layernorm_epsilon,
        apply_layernorm_1p=False, qk_layernorm=a.qk_layernorm, swiglu=a.gated_linear_unit, squared_relu=False,
        add_bias_linear=a.add_bias_linear, add_qkv_bias=a.add_qkv_bias,
        untie_embeddings_and_output_weights=not a.share_embeddings_and_output_weights,
        window_size=(a.window_size - 1, 0) if a.window_size else None,
        window_attn_skip_freq=list(a.window_attn_skip_freq) if a.window_attn_skip_freq else None,
        attention_dropout=0.0, hidden_dropout=0.0, apply_query_key_layer_scaling=False,
        num_experts=a.num_moe_experts, moe_ffn_hidden_size=a.moe_ffn_hidden_size, moe_layer_freq=1,
        moe_router_topk=a.moe_router_topk, moe_router_pre_softmax=a.moe_router_pre_softmax,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=a.moe_aux_loss_coeff,
        moe_grouped_gemm=layout.naming.moe_grouped_gemm, transformer_impl=layout.naming.transformer_impl,
        params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
        tensor_model_parallel_size=layout.sizes.tp, pipeline_model_parallel_size=layout.sizes.pp,
        virtual_pipeline_model_parallel_size=None, expert_model_parallel_size=layout.sizes.ep,
        expert_tensor_parallel_size=layout.sizes.tp, context_parallel_size=1, sequence_parallel=False,
        ckpt_format="torch", use_dist_ckpt=False, iteration=0, consumed_train_samples=0, consumed_valid_samples=0,
    )  # fmt: skip


def _state(model: Mapping[Any, tuple[str, Announced]], args: Namespace) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for name, tensor in model.values():
        parameters[name] = tensor
        if match := LINEAR.fullmatch(name):  # an object that Megatron's linear layers keep beside their weight
            parameters[f"{match[1]}._extra_state"] = None
    return {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, "model": parameters}


Model = dict[tuple[str, tuple[int, ...]], tuple[str, Announced]]
"""(key, index) in the whole model -> the rank's name and share of it."""


def _models(
    plan: Sequence[Weight], dtypes: Mapping[str, torch.dtype], architecture: Architecture, layout: RankLayout
) -> dict[tuple[int, int, int], Model]:
    """What each rank (tp, pp, ep) holds."""
    sizes = layout.sizes
    models: dict[tuple[int, int, int], Model] = {
        (tp, pp, ep): {} for pp in range(sizes.pp) for ep in range(sizes.ep) for tp in range(sizes.tp)
    }
    layers, experts = architecture.num_layers // sizes.pp, (architecture.num_moe_experts or 0) // sizes.ep
    padded = vocab_rows(architecture, layout)
    last = sizes.pp - 1
    for weight in plan:
        place, shape = (weight.key, weight.index), list(weight.own_shape)
        if weight.padded_vocabulary:
            shape[0] = padded
        if weight.rule.split:
            shape[weight.rule.split.axis] //= sizes.tp
        layer, expert = (*weight.index, None, None)[:2]
        name = layout.naming(
            weight.rule.mcore,
            None if layer is None else layer % layers,
            None if expert is None else expert % experts,
        )
        stage = (0 if weight.key == EMBEDDING else last) if layer is None else layer // layers
        for rank, model in models.items():
            held = rank[1] == stage and (expert is None or rank[2] == expert // experts)
            tied = weight.key == EMBEDDING and rank[1] == last > 0 and architecture.share_embeddings_and_output_weights
            if held or tied:  # the last stage of a tied model computes the logits with a copy of the embedding
                model[place] = OUTPUT if tied else name, Announced(dtypes[weight.key], tuple(shape))
    return models


def _created(folder: Path, layout: ZipLayout) -> PlacedFile:
    folder.mkdir()
    file = PlacedFile(folder / f".{FILE}.partial", layout.size)
    for offset, content in layout.pieces:
        file.put(offset, content)
    return file
