"""Weights without a family and models without a tokenizer, for tests of readers and writers alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_ext.families.base import Part, Weight
from megatron_ext.weights.rules import Copy, Move
from megatron_ext.weights.streams import HFReader


def bare_weight(key: str, shape: tuple[int, ...], index: tuple[int, ...] = ()) -> Weight:
    """A weight of the checkpoint's tensor ``key``, copied from the Hugging Face tensor of the same name."""
    own = shape[len(index) :]
    return Weight(Copy(key, key, "H"), index, key, shape, (Part(key, own),), (Move(0, 0, 0, own[0]),))


def bare_model(folder: Path, layers: int, dtype: str = "bfloat16") -> Path:
    """A llama of 12 MB a layer and a 16 MB embedding in bf16, all ones, without a tokenizer."""
    from safetensors.torch import save_file

    h, f, v = 512, 3072, 16384
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": h, "intermediate_size": f, "vocab_size": v,
        "num_attention_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    for i in range(layers):
        part = f"model.layers.{i}."
        shapes |= {part + f"self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
        shapes |= {part + f"mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
        shapes |= {part + "mlp.down_proj.weight": (h, f)}
        shapes |= {part + f"{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    tensors = {name: torch.ones(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gathered(weight: Weight, source: HFReader, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the megatron-core weight, put together from those of the Hugging Face weights."""
    pieces = []
    for part, first, target, rows in weight.moves:
        low, high = max(start, target), min(start + count, target + rows)
        if low < high:
            pieces.append(source.rows(weight.parts[part], first + low - target, high - low))
    if len(pieces) == 1:
        return pieces[0].to(dtype)
    block = torch.empty((count, *weight.own_shape[1:]), dtype=dtype)
    for target, piece in zip(block.split([len(piece) for piece in pieces]), pieces, strict=True):
        target.copy_(piece)
    return block
