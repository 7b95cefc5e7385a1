"""Names in the per-rank layout of Megatron-LM: folders of ranks, and parameters of one rank's part of the model.

A rank numbers its own layers and experts from 0. Transformer Engine's layers and megatron-core's own name the norms
differently, and there are three ways to keep experts; all are read, the first two are written.
Source: ``get_checkpoint_name`` of Megatron-LM; ``state_dict`` of megatron-core's TransformerLayer, SequentialMLP,
TEGroupedMLP and GroupedMLP.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

TransformerImpl = Literal["transformer_engine", "local"]
FILE = "model_optim_rng.pt"
FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Norms that Transformer Engine fuses into the linear layer after them -> their names in megatron-core's own layers."""
EXPERTS = "mlp.experts.experts.{e}."
STACKS = {"mlp.experts.weight1": EXPERTS + "linear_fc1.weight", "mlp.experts.weight2": EXPERTS + "linear_fc2.weight"}
"""GroupedMLP's two tensors of all experts of a rank -> what they hold of one expert."""
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")
NO_WEIGHTS = ("_extra_state", "rotary_pos_emb.inv_freq")
"""Endings of what a rank keeps beside its weights."""
LINEAR = re.compile(r"(.+\.linear_(?:qkv|proj|fc1|fc2))\.weight\d*")


class Sizes(NamedTuple):
    """Numbers of tensor-, pipeline- and expert-parallel ranks."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def folder(self, tp: int, pp: int, ep: int) -> str:
        """Folder of one rank: the numbers that are always 0 are left out."""
        name = f"mp_rank_{tp:02d}"
        if self.pp > 1:
            name += f"_{pp:03d}"
        return name + (f"_{ep:03d}" if self.ep > 1 else "")


class Naming(NamedTuple):
    """How a rank names its parameters."""

    transformer_impl: TransformerImpl = "transformer_engine"
    moe_grouped_gemm: bool = False

    def __call__(self, mcore: str, layer: int | None = None, expert: int | None = None) -> str:
        """Name of the weight of rule name ``mcore`` in a rank that counts the layer and the expert so."""
        name = mcore
        if self.transformer_impl == "local":
            for fused, own in LOCAL_NORMS.items():
                name = name.replace(fused, own)
        if self.moe_grouped_gemm and EXPERTS in name:
            name = name.replace(EXPERTS, "mlp.experts.") + str(expert)
        name = name.replace(EXPERTS, f"mlp.experts.local_experts.{expert}.")
        return name.replace("{i}", str(layer))


class Found(NamedTuple):
    """A parameter of a rank under its rule's name; ``expert`` and ``layer`` are the rank's own numbers.

    ``stacked`` is set for a tensor that holds all experts of the rank.
    """

    mcore: str
    layer: int | None = None
    expert: int | None = None
    stacked: bool = False


def understood(name: str) -> Found:
    """The rule's name of a rank's parameter ``name``, whichever way it was written; an unknown name stays as it is."""
    match = LAYER.fullmatch(name)
    if not match:
        return Found(name)
    layer, tail = int(match[1]), match[2]
    prefix = "decoder.layers.{i}."
    if tail in STACKS:
        return Found(prefix + STACKS[tail], layer, stacked=True)
    if found := SEQUENTIAL.fullmatch(tail):
        return Found(f"{prefix}{EXPERTS}{found[2]}", layer, int(found[1]))
    if found := GROUPED.fullmatch(tail):
        return Found(f"{prefix}{EXPERTS}{found[1]}.{found[2]}", layer, int(found[3]))
    return Found(prefix + tail, layer)


def fused_norm(mcore: str) -> str:
    """Name of a norm under Transformer Engine's layers for its name under megatron-core's own; else ``mcore``."""
    for fused, own in LOCAL_NORMS.items():
        if mcore == "decoder.layers.{i}." + own:
            return "decoder.layers.{i}." + fused
    return mcore


def is_ranks_folder(folder: Path) -> bool:
    """Whether an iteration's folder is in the per-rank layout."""
    return any(FOLDER.fullmatch(path.name) for path in folder.glob("mp_rank_*"))
