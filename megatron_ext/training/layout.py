"""Parallel sizes and room on the disk, checked before anything starts. Torch-free."""

from __future__ import annotations

import math

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.errors import ParallelismError
from megatron_ext.families.base import Architecture

BYTES_A_PARAMETER = 16
"""fp32 weights, gradients' place excluded: weight, main weight and two moments of Adam in a resumable checkpoint."""


def check_layout(
    architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig, world_size: int | None = None
) -> None:
    """Refuse parallel sizes that cannot run.

    Args:
        world_size: processes on all nodes, when a torchrun has started them; ``runtime.nproc_per_node`` by default.

    Raises:
        ParallelismError: names the value, what it must divide, and the remedy.
    """
    tp, pp = runtime.tensor_model_parallel_size, runtime.pipeline_model_parallel_size
    world = world_size or runtime.nproc_per_node
    cp = runtime.context_parallel_size
    if world % (tp * pp * cp):
        place = "torchrun's number of processes" if world_size else "runtime.nproc_per_node"
        raise ParallelismError(
            f"{place} {world} is not a multiple of tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp} x context_parallel_size {cp}; start {tp * pp * cp} processes or a "
            "multiple"
        )
    splits = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "hidden_size": architecture.hidden_size,
    }
    mlp = "moe_ffn_hidden_size" if architecture.num_moe_experts else "ffn_hidden_size"
    splits[mlp] = getattr(architecture, mlp)
    if shared := architecture.moe_shared_expert_intermediate_size:
        splits["moe_shared_expert_intermediate_size"] = shared
    for name, value in splits.items():
        if value % tp:
            fitting = [n for n in range(1, tp) if all(v % n == 0 for v in splits.values())]
            raise ParallelismError(
                f"runtime.tensor_model_parallel_size {tp} does not divide the model's {name} {value}; "
                f"this model takes {', '.join(map(str, fitting))}"
            )
    if architecture.num_layers % pp:
        fitting = [n for n in range(1, architecture.num_layers + 1) if architecture.num_layers % n == 0]
        raise ParallelismError(
            f"runtime.pipeline_model_parallel_size {pp} does not divide the model's {architecture.num_layers} layers; "
            f"this model takes {', '.join(map(str, fitting))}"
        )
    data_parallel = world // (tp * pp * cp)
    _check_overlap(runtime)
    _check_virtual_pipeline(architecture, train, runtime, data_parallel)
    _check_context_parallel(architecture, train, runtime)
    if runtime.sequence_parallel and tp == 1:
        raise ParallelismError(
            "runtime.sequence_parallel needs tensor_model_parallel_size of 2 or more, which is 1; switch one of them"
        )
    _check_experts(architecture, runtime, data_parallel)
    if train.global_batch_size % (runtime.micro_batch_size * data_parallel):
        raise ParallelismError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of runtime.micro_batch_size "
            f"{runtime.micro_batch_size} x data-parallel size {data_parallel} (= {world} processes "
            f"/ ({tp} x {pp} x {cp})); change the micro batch size or the number of processes"
        )


def _check_overlap(runtime: RuntimeConfig) -> None:
    for name in ("overlap_grad_reduce", "use_distributed_optimizer"):
        if runtime.overlap_param_gather and not getattr(runtime, name):
            raise ParallelismError(
                f"runtime.overlap_param_gather needs {name}, which is false; set it to true, or overlap_param_gather "
                "to false"
            )


def _check_context_parallel(architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig) -> None:
    cp = runtime.context_parallel_size
    if cp == 1:
        return
    name = f"runtime.context_parallel_size {cp}"
    if architecture.window_size is not None:
        raise ParallelismError(
            f"{name} is not built for a model with a sliding window (of {architecture.window_size} tokens); set it to 1"
        )
    if train.attention_dropout:
        raise ParallelismError(
            f"{name} is not built for train.attention_dropout {train.attention_dropout}; set it to 0, or the other to 1"
        )
    if train.loss_normalization == "sequence":
        raise ParallelismError(f"{name} is not built for train.loss_normalization sequence; set one of them back")
    shares = 2 * cp * (runtime.tensor_model_parallel_size if runtime.sequence_parallel else 1)
    if train.seq_length % shares:
        raise ParallelismError(
            f"{name} cuts sequences into {shares} shares, which do not divide train.seq_length {train.seq_length}; "
            f"take {train.seq_length // shares * shares or shares}"
        )


def check_kind(kind: str, train: TrainConfig, runtime: RuntimeConfig) -> None:
    """Refuse what cannot be done with a dataset of some ``kind``.

    Raises:
        ParallelismError: names the setting and the remedy.
    """
    cp = runtime.context_parallel_size
    if cp > 1 and (kind == "preference" or (kind == "chat" and train.packing)):
        remedy = "set it to 1" if kind == "preference" else "set train.packing to false, or it to 1"
        raise ParallelismError(f"runtime.context_parallel_size {cp} is not built for packed sequences; {remedy}")
    tp, length = runtime.tensor_model_parallel_size, train.seq_length
    if runtime.sequence_parallel and length % tp and (kind == "text" or runtime.virtual_pipeline_model_parallel_size):
        raise ParallelismError(
            f"runtime.sequence_parallel shares sequences out over tensor_model_parallel_size {tp}, which does not "
            f"divide train.seq_length {length}; take {length // tp * tp or tp}, or set sequence_parallel to false"
        )


def _check_virtual_pipeline(
    architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig, data_parallel: int
) -> None:
    vpp, pp = runtime.virtual_pipeline_model_parallel_size, runtime.pipeline_model_parallel_size
    if vpp is None:
        return
    name = f"runtime.virtual_pipeline_model_parallel_size {vpp}"
    if pp == 1:
        raise ParallelismError(
            f"{name} needs pipeline_model_parallel_size of 2 or more, which is 1; switch one of them"
        )
    if architecture.num_layers % (pp * vpp):
        fitting = [n for n in range(2, architecture.num_layers // pp + 1) if architecture.num_layers % (pp * n) == 0]
        raise ParallelismError(
            f"{name} x pipeline_model_parallel_size {pp} does not divide the model's {architecture.num_layers} layers; "
            f"at this pipeline size it takes {', '.join(map(str, fitting)) or 'none'}"
        )
    micro_batches = train.global_batch_size // (runtime.micro_batch_size * data_parallel)
    if micro_batches % pp:
        raise ParallelismError(
            f"{name} needs a number of micro batches that pipeline_model_parallel_size {pp} divides, not "
            f"{micro_batches} (= global_batch_size / micro_batch_size / data-parallel size); change one of them"
        )


def _check_experts(architecture: Architecture, runtime: RuntimeConfig, data_parallel: int) -> None:
    ep, experts = runtime.expert_model_parallel_size, architecture.num_moe_experts
    if experts is None:
        if ep > 1:
            raise ParallelismError(
                f"runtime.expert_model_parallel_size {ep} needs a mixture of experts; this model is dense, set it to 1"
            )
        return
    fitting = [n for n in range(1, data_parallel + 1) if experts % n == 0 and data_parallel % n == 0]
    for name, value in {"the model's num_moe_experts": experts, "the data-parallel size": data_parallel}.items():
        if value % ep:
            raise ParallelismError(
                f"runtime.expert_model_parallel_size {ep} does not divide {name} {value}; this model takes "
                f"{', '.join(map(str, fitting))} at data-parallel size {data_parallel}"
            )
    if runtime.tensor_model_parallel_size > 1 and not runtime.sequence_parallel:
        raise ParallelismError(
            f"runtime.tensor_model_parallel_size {runtime.tensor_model_parallel_size} trains a mixture of experts with "
            "sequence_parallel only; set runtime.sequence_parallel true"
        )


def parameters(architecture: Architecture) -> int:
    """Weights of a model of this shape, norms and biases included."""
    a = architecture
    qkv = a.kv_channels * (a.num_attention_heads + 2 * a.num_query_groups)
    attention = a.hidden_size * qkv + a.kv_channels * a.num_attention_heads * a.hidden_size
    ffn = a.ffn_hidden_size if a.num_moe_experts is None else a.moe_ffn_hidden_size or a.ffn_hidden_size
    mlp = (3 if a.gated_linear_unit else 2) * a.hidden_size * ffn
    if a.num_moe_experts is not None:
        mlp = a.num_moe_experts * (mlp + a.hidden_size)  # each expert, and its row of the router
    if a.moe_shared_expert_intermediate_size:
        mlp += (3 * a.moe_shared_expert_intermediate_size + 1) * a.hidden_size  # and its gate
    bias = (qkv if a.add_qkv_bias or a.add_bias_linear else 0) + 2 * a.hidden_size
    bias += 2 * a.kv_channels if a.qk_layernorm else 0
    embeddings = a.vocab_size * a.hidden_size * (1 if a.share_embeddings_and_output_weights else 2)
    return a.num_layers * (attention + mlp + bias) + embeddings + a.hidden_size


def disk_needed(architecture: Architecture, runtime: RuntimeConfig | None = None, iterations: int | None = None) -> int:
    """Bytes that a training holds at most at one time: resumable checkpoints and the final weights.

    ``keep_last`` and the one being written, those of ``keep_every`` where ``iterations`` is known, the full state.
    """
    runtime = runtime or RuntimeConfig()
    whole = runtime.keep_last + 1
    if iterations is not None:
        whole = min(whole, max(1, (iterations - 1) // runtime.save_interval) + 1)
        if runtime.keep_every:
            whole += iterations // math.lcm(runtime.keep_every, runtime.save_interval)
    whole += runtime.keep_final_state
    return (whole * BYTES_A_PARAMETER + 4) * parameters(architecture)
