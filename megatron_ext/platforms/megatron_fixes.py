"""Bugs of megatron-core 0.16, each repaired in one function. Another version is refused: look at each of them first."""

from __future__ import annotations

import functools
import logging
import queue
import types
from typing import Any

from megatron_ext.errors import PlatformError

SERIES = (0, 16)


def apply(platform: str) -> None:
    """Repair the installed megatron-core for ``platform``, after it was imported and before a model is built.

    Raises:
        PlatformError: it is of another series, in which these bugs may be mended, moved or joined by others.
    """
    from megatron.core import package_info

    if (package_info.MAJOR, package_info.MINOR) != SERIES:
        raise PlatformError(
            f"megatron-core {package_info.__version__} is installed, of which megatron-flows knows nothing; "
            "install megatron-core 0.16.1"
        )
    _own_step_for_each_parameter()
    _restore_states_without_gradient()
    _cut_states_of_several_buckets()
    _write_in_this_process()
    _route_without_transformer_engine()
    _give_the_padding_mask_to_every_layer()
    if platform == "cpu":
        _random_state_on_cpu()
        _dispatch_on_cpu()
        _exchange_uneven_parts_on_cpu()
        _leave_a_rank_alone_on_cpu()
        _accumulate_gradients_on_cpu()
        _rotate_without_copies_on_cpu()


def _random_state_on_cpu() -> None:
    """Not a bug, a limit: the RNG tracker reads the state of a CUDA generator."""
    import torch
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _restore_states_without_gradient() -> None:
    """``_set_main_param_and_optimizer_states`` writes into leaves that require grad, and asks for a ``step`` that
    torch's AdamW keeps in the state but the checkpoint keeps in the parameter group.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def restore(self: Any, parameter: Any, tensors: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        current = self._get_main_param_and_optimizer_states(parameter)
        if "step" in current:
            tensors = {**tensors, "step": current["step"]}
        return original(self, parameter, tensors, *arguments, **named)

    DistributedOptimizer._set_main_param_and_optimizer_states = restore


def _own_step_for_each_parameter() -> None:
    """After a load all parameters share one ``step`` tensor, which torch's AdamW then advances once a parameter:
    the bias correction is silently wrong. Each parameter gets its own copy.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.load_state_dict

    def load(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].detach().clone()

    DistributedOptimizer.load_state_dict = load


def _cut_states_of_several_buckets() -> None:
    """The optimizer's state in the ``fully_reshardable`` format is gathered without the padding between buckets, then
    cut at places that count it: what is saved of the second bucket and all after it is shifted, without a word.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    def save(self: Any, *arguments: Any, **named: Any) -> Any:
        kept = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = _places_without_padding(buffer)
        try:
            return original(self, *arguments, **named)
        finally:
            for buffer, places in zip(self.buffers, kept, strict=True):
                buffer.param_index_map = places

    DistributedOptimizer.sharded_param_state_fully_reshardable = save


def _places_without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """First and last place and bucket of every parameter of ``buffer``, as if its buckets had no padding."""
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [sum(padding[:number]) for number in range(len(padding))]
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _write_in_this_process() -> None:
    """A checkpoint is written by forked processes behind a manager process; when a writer dies the parent waits for
    ever. For a save that is waited for anyway, writing here is faster and cannot hang.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    def write(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue) -> None:
        written: dict[int, Any] = {}
        for number, bucket in enumerate(buckets):
            answers: queue.Queue = queue.Queue()
            count: queue.Queue = queue.Queue()
            count.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answers, count, use_fsync=True)
            written[number] = answers.get_nowait()[1]
            if isinstance(written[number], Exception):
                results.put(written[number])
                return
        results.put(written)

    original = TorchDistSaveShardedStrategy.async_save

    def save(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        filesystem_async._results_queue = queue.Queue()
        return original(self, sharded_state_dict, checkpoint_dir)

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(write)
    TorchDistSaveShardedStrategy.async_save = save


def _route_without_transformer_engine() -> None:
    """The router asks for a name that is only imported where Transformer Engine is: NameError."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _give_the_padding_mask_to_every_layer() -> None:
    """Of full recomputation by block, the layers beyond the block are called without the padding mask. Recomputed ones
    bring their own, in backward too, when another micro batch may have passed since.
    """
    from megatron.core.transformer.transformer_block import TransformerBlock

    original = TransformerBlock._checkpointed_forward

    def forward(self: Any, *arguments: Any, padding_mask: Any = None, **named: Any) -> Any:
        def give(layer: Any, given: tuple[Any, ...], by_name: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return given, by_name | ({"padding_mask": padding_mask} if by_name.get("padding_mask") is None else {})

        hooks = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in self.layers]
        try:
            return original(self, *arguments, padding_mask=padding_mask, **named)
        finally:
            for hook in hooks:
                hook.remove()

    TransformerBlock._checkpointed_forward = forward


def _dispatch_on_cpu() -> None:
    """The sizes of an all-to-all become numpy arrays only on their way from a GPU; elsewhere they stay tensors, which
    ``all_to_all`` refuses.
    """
    import torch
    from megatron.core.transformer.moe import token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move


def _exchange_uneven_parts_on_cpu() -> None:
    """Not a bug, a limit of gloo: it gathers and scatters equal parts only, but tensor-parallel ranks that share the
    experts out hold parts of different lengths.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        parts = [input_.new_empty(size, *input_.shape[1:]) for size in output_split_sizes]
        parts[group.rank()] = input_.contiguous()
        for rank, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=rank)
        return torch.cat(parts)

    def scatter_sums(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        parts = [part.clone() for part in input_.split(input_split_sizes)]
        for rank, part in enumerate(parts):
            dist.reduce(part, group=group, group_dst=rank)
        return parts[group.rank()]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_parts, scatter_sums


def _leave_a_rank_alone_on_cpu() -> None:
    """Not a bug, a cost: one data-parallel rank sums and gathers its own buffers in place, which gloo does by copying
    them on threads of its own. From then on OpenMP counts more threads than cores, so that torch's sleep while they
    wait for each other: a step takes a third longer. And without tensor parallelism every linear layer has two more
    nodes of the graph that do nothing.
    """
    from megatron.core.distributed import param_and_grad_buffer as module
    from megatron.core.tensor_parallel import layers
    from megatron.core.utils import get_tensor_model_parallel_group_if_none

    gather, scatter = module.dist_all_gather_func, module.dist_reduce_scatter_func

    def gather_of_several(output: Any, own: Any, group: Any = None, async_op: bool = False) -> Any:
        return gather(output, own, group=group, async_op=async_op) if group.size() > 1 else None

    def scatter_of_several(own: Any, whole: Any, op: Any, group: Any = None, async_op: bool = False) -> Any:
        return scatter(own, whole, op=op, group=group, async_op=async_op) if group.size() > 1 else None

    def of_several(original: Any) -> Any:
        def exchange(tensor: Any, group: Any = None) -> Any:
            group = get_tensor_model_parallel_group_if_none(group)
            return original(tensor, group=group) if group.size() > 1 else tensor

        return exchange

    module.dist_all_gather_func, module.dist_reduce_scatter_func = gather_of_several, scatter_of_several
    for name in ("copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"):
        setattr(layers, name, of_several(getattr(layers, name)))


def _accumulate_gradients_on_cpu() -> None:
    """Not a bug, a limit: ``gradient_accumulation_fusion`` is written for CUDA. A BLAS adds a product to what is there
    as well, where all are of one type; and where no other rank holds a part, nothing else is to be done.
    """
    from megatron.core.tensor_parallel import layers

    from megatron_ext.model.linear import accumulate, linear

    original = layers.linear_with_grad_accumulation_and_async_allreduce

    @functools.wraps(original)  # it keeps whether it warned on the function of that name
    def apply(
        input: Any,
        weight: Any,
        bias: Any,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: Any = None,
        **named: Any,
    ) -> Any:
        exchanging = allreduce_dgrad or sequence_parallel or grad_output_buffer is not None
        if gradient_accumulation_fusion and not exchanging and hasattr(weight, "main_grad"):
            return linear(input, weight, bias)
        given = gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, grad_output_buffer
        return original(input, weight, bias, *given, **named)

    layers.linear_with_grad_accumulation_and_async_allreduce = apply
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    layers._grad_accum_fusion_available = True


def _rotate_without_copies_on_cpu() -> None:
    """Not a bug, a cost: the fused rotary embedding is written for CUDA; the other one computes the same cosines in
    every layer and copies queries and keys four times.
    """
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_ext.model.rotary import rotate

    original = rope_utils._apply_rotary_pos_emb_bshd

    def apply(heads: Any, angles: Any, rotary_interleaved: bool = False, *rest: Any, **named: Any) -> Any:
        plain = not rotary_interleaved and not rest and not named.get("multi_latent_attention")
        if plain and named.get("mscale", 1.0) == 1.0 and angles.size(-1) == heads.size(-1):
            return rotate(heads, angles)
        return original(heads, angles, rotary_interleaved, *rest, **named)

    rope_utils._apply_rotary_pos_emb_bshd = apply


def torch_adamw(optimizer: Any) -> list[Any]:
    """The torch AdamWs inside megatron-core's optimizer: none where Transformer Engine or Apex brings its own Adam."""
    import torch

    inner = [getattr(one, "optimizer", None) for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [one for one in inner if isinstance(one, torch.optim.AdamW)]


def fill_adam_state(adamw: Any) -> None:
    """Give torch's AdamW its zero state before the first step: saving or loading an empty one fails in 0.16.1."""
    import torch

    for parameter in (p for group in adamw.param_groups for p in group["params"]):
        if not adamw.state[parameter]:
            adamw.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
