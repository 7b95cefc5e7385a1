"""Rotary position embedding that follows the positions of packed tokens and Hugging Face's scaling parameters.

megatron-core hard-codes all of llama3's factors but one, and applies packed positions in a Python loop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_ext.errors import UnsupportedModelError, unknown
from megatron_ext.families.base import Architecture
from megatron_ext.model.context_parallel import own_places

SCALINGS = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """(D / 2,) fp32 inverse frequencies.

    Source: transformers ``modeling_rope_utils``.

    Raises:
        UnsupportedModelError: the scaling is none of SCALINGS.
    """
    size = architecture.kv_channels
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / (architecture.rotary_base**exponents)
    scaling = architecture.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    if kind == "yarn":
        return _yarn(frequencies, scaling, architecture)
    raise UnsupportedModelError(unknown("rope_type", kind, SCALINGS, "in the model's config.json"))


def _llama3(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelengths < context / high) & ~(wavelengths > context / low)
    return torch.where(medium, between, scaled)


def _yarn(frequencies: torch.Tensor, scaling: dict[str, Any], architecture: Architecture) -> torch.Tensor:
    """Dimensions that turn often in the original context keep their frequency, those that turn seldom are stretched by
    ``factor``, and the ones between are blended.
    """
    size, context = architecture.kv_channels, scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(architecture.rotary_base))

    low, high = dimension(scaling.get("beta_fast", 32)), dimension(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    stretched = torch.clamp((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return frequencies / scaling["factor"] * stretched + frequencies * (1 - stretched)


def attention_factor(architecture: Architecture) -> float:
    """What cosine and sine are multiplied by; other than 1 for yarn only."""
    scaling = architecture.rope_scaling or {}
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return scaling["attention_factor"]

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])
    return scale(1.0)


class PositionedRotary(RotaryEmbedding):
    """Angles for the positions in ``PackedSegments``, so that a packed row is rotated in one operation.

    ``GPTModel`` asks ``get_rotary_seq_len`` how long the row is and hands the answer to ``forward`` untouched.
    """

    def __init__(self, architecture: Architecture, device: torch.device | str) -> None:
        torch.nn.Module.__init__(self)
        self.rotary_interleaved = False
        self.seq_len_interpolation_factor = None
        self.cp_group = None
        self.inv_freq = inverse_frequencies(architecture).to(device)

    def get_rotary_seq_len(self, *arguments: Any, **named: Any) -> Any:
        packed = arguments[4] if len(arguments) > 4 else None
        positions = getattr(packed, "positions", None)
        return super().get_rotary_seq_len(*arguments, **named) if positions is None else positions

    def forward(self, positions: Any, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> torch.Tensor:
        """``positions`` (T,), or T for those of 0 … T-1 that this rank of context parallelism holds -> (T, 1, 1, D)."""
        if isinstance(positions, int):
            rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
            positions = torch.from_numpy(own_places(positions, rank, ranks)).to(self.inv_freq.device) + offset
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(T, B, A, D) queries or keys turned by (T, 1, 1, D) angles, the halves of D as real and imaginary part."""
    turns = getattr(angles, "turns", None)
    if turns is None or turns[0].dtype != heads.dtype:
        turns = angles.turns = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    return _Rotation.apply(heads, *turns)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(heads, cosine, sine, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _turned(gradient, *ctx.saved_tensors, back=True), None, None


def _turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool) -> torch.Tensor:
    result = heads * cosine
    (new_real, new_imaginary), (real, imaginary) = result.chunk(2, -1), (heads * sine).chunk(2, -1)
    new_real.sub_(imaginary, alpha=-1 if back else 1)
    new_imaginary.add_(real, alpha=-1 if back else 1)
    return result
