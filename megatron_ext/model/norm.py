"""Norms for layers without Transformer Engine; megatron-core's own refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch


class Norm:
    """RMSNorm or LayerNorm of torch whose gradients are summed over tensor-parallel ranks where they must be."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        kind = RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's, with a backward pass of a third of the operations where torch has no kernel for it: fp32 on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, H) -> (…, H), the same bits as torch's."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """Source: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = gradient * normed
        along = product.matmul(weight).unsqueeze(-1) / -normed.size(-1)
        return (gradient * weight).addcmul_(normed, along).mul_(scale), product.flatten(0, -2).sum(0), None
