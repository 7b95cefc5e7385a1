"""Norms for layers without Transformer Engine; megatron-core's own refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch


class Norm:
    """RMSNorm or LayerNorm of torch whose gradients are summed over tensor-parallel ranks where they must be."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
