"""Conversions and exports of a small model with their gate, and damage to what they wrote."""

from pathlib import Path

import torch
from tiny import write_model

from megatron_ext.events import Events
from megatron_ext.families.base import Architecture
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.verify import verify

WEIGHTS = "model.safetensors"
OUT_PROJECTION = "model.layers.1.self_attn.o_proj.weight"
DOWN_PROJECTION = "model.layers.0.mlp.down_proj.weight"


def write_pristine(place: Path) -> Path:
    """``hf``, and its conversion ``checkpoint``."""
    write_model(place / "hf", num_hidden_layers=2)
    converted(place / "hf", place / "checkpoint")
    return place


def converted(model: Path, out: Path, **options) -> Path:
    out.mkdir()
    convert(model, out, **({"dtype": None, "verify": "digest"} | options), events=Events())
    return out


def exported(checkpoint: Path, model: Path, out: Path, **options) -> Path:
    out.mkdir()
    export(checkpoint, model, out, **({"dtype": None, "verify": "digest"} | options), events=Events())
    return out


def verified(checkpoint: Path, model: Path):
    return verify(checkpoint, model, level="digest", events=Events())


def damage(checkpoint: Path, tensor: torch.Tensor, row: int, column: int) -> None:
    """Flip the lowest bit of one value, where the files of the checkpoint hold ``tensor``'s row."""
    wanted = tensor[row].contiguous().view(torch.uint8).numpy().tobytes()
    for path in checkpoint.rglob("*.distcp"):
        content = path.read_bytes()
        if (place := content.find(wanted)) >= 0:
            place += column * tensor.element_size()
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            return
    raise AssertionError("no file of the checkpoint holds this row")


def architecture() -> Architecture:
    """Of ``write_model`` with two layers."""
    return Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=2, kv_channels=8,
        vocab_size=512, max_position_embeddings=512, layernorm_epsilon=1e-6,
    )  # fmt: skip
