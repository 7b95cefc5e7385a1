"""Megatron-LM's settings, saved as ``args`` in files of ranks, held against the model that config.json describes.

Weights of the right names and shapes are another model where these settings differ. Some change what the stored numbers
stand for; others only what is computed from them, and converters do not always save those of the model.
Source: megatron/training/arguments.py, and load_args_from_checkpoint in megatron/training/checkpointing.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.errors import CheckpointError
from megatron_ext.events import Events
from megatron_ext.families.base import Architecture
from megatron_ext.weights.megatron_names import FILE
from megatron_ext.weights.megatron_writer import RankLayout, megatron_args
from megatron_ext.weights.vocab import padded_vocab_size

SHAPING = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "num_experts")
"""Settings that say where one weight ends and the next begins."""
MEANING = ("apply_layernorm_1p", "normalization", "rotary_interleaved", "rotary_percent", "squared_relu", "swiglu")
"""Settings that say what the numbers stand for."""
COMPUTING = ("norm_epsilon", "rotary_base", "window_size", "use_rope_scaling", "add_qkv_bias")
ROUTING = ("moe_router_topk", "moe_router_pre_softmax")
"""Settings that change what is computed; the latter in a mixture of experts."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core computes for ``use_rope_scaling``; only the factor is a setting."""


def compare_settings(args: Any, architecture: Architecture, checkpoint: Path, events: Events) -> None:
    """Refuse ``args`` of another model than ``architecture``, and note what may be; what they do not name passes.

    Raises:
        CheckpointError: names the setting, both values and the remedy.
    """
    for name, allowed in _required(architecture).items():
        theirs = getattr(args, name, None)
        if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
            theirs = getattr(args, "num_attention_heads", None)
        if theirs is not None and theirs not in allowed:
            raise CheckpointError(
                f"{_said(checkpoint, name, theirs, allowed[0])}; give --model the folder of this checkpoint's model, "
                f"or correct args in each {FILE} if the weights are not of such a model"
            )
    ours = megatron_args(architecture, RankLayout(), {})
    for name in (*COMPUTING, *(ROUTING if architecture.num_moe_experts else ())):
        expected = getattr(ours, name)
        theirs = getattr(args, name, expected)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if theirs != expected and (theirs is not None or name == "window_size"):
            events.note(
                f"{_said(checkpoint, name, theirs, expected)}: if the weights were trained so, the exported model "
                "computes something else"
            )


def check_vocabulary(
    args: Any, architecture: Architecture, tp: int, rows: int, checkpoint: Path, events: Events
) -> None:
    """Refuse rows of tokens that the model does not have, which would be dropped as padding; ``rows`` are on disk.

    Raises:
        CheckpointError: names both sizes and the remedy.
    """
    ours, theirs = architecture.vocab_size, getattr(args, "vocab_size", None)
    remedy = "give --model the folder with the tokenizer and config.json of the model that has those tokens"
    if theirs is not None and theirs > ours:
        raise CheckpointError(f"{_said(checkpoint, 'vocab_size', theirs, ours)}; {remedy}")
    if rows <= ours:
        return
    surplus = f"the embedding of {checkpoint} has {rows} rows, {rows - ours} more than vocab_size {ours} of config.json"
    if divisor := getattr(args, "make_vocab_size_divisible_by", None):
        if rows != (padded := padded_vocab_size(ours, tp, divisor)):
            raise CheckpointError(
                f"{surplus}: padding it as its args say (make_vocab_size_divisible_by {divisor}, {tp} tensor-parallel "
                f"ranks) makes {padded}, so the rest are rows of tokens; {remedy}"
            )
    else:
        events.note(f"{surplus}: they are taken for padding and left out")


def other_rope(architecture: Architecture) -> str | None:
    """Why Megatron-LM would compute other positions from the ``args`` that we write; None if it would not."""
    scaling = architecture.rope_scaling or {}
    kind, what = scaling.get("rope_type"), None
    if kind == "yarn":
        what = "rope_type yarn"
    elif kind == "llama3" and (other := [f"{n} {scaling[n]:g}" for n, value in LLAMA3.items() if scaling[n] != value]):
        what = f"rope_type llama3 with {', '.join(other)}"
    elif architecture.rotary_base % 1:
        what = f"rope_theta {architecture.rotary_base!r}"
    return what and (
        f"config.json asks for {what}, which the settings in files of ranks cannot say: Megatron-LM with "
        "--use-checkpoint-args computes other positions unless its code is told; mflow reads them from the manifest"
    )


def _required(architecture: Architecture) -> dict[str, tuple[Any, ...]]:
    """Setting -> the values that fit, the model's own first."""
    ours = megatron_args(architecture, RankLayout(), {})
    width = "moe_ffn_hidden_size" if architecture.num_moe_experts else "ffn_hidden_size"
    required: dict[str, tuple[Any, ...]] = {name: (getattr(ours, name),) for name in (*SHAPING, width, *MEANING)}
    yarn = (architecture.rope_scaling or {}).get("rope_type") == "yarn"
    required["position_embedding_type"] = ("rope", "yarn") if yarn else ("rope",)
    if architecture.num_moe_experts:
        required |= {"moe_router_score_function": ("softmax",), "moe_router_topk_scaling_factor": (1.0,)}
    return required


def _said(checkpoint: Path, name: str, theirs: Any, expected: Any) -> str:
    return f"{checkpoint} was written with {name} {theirs} (its args), but config.json of the model implies {expected}"
