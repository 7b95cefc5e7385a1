"""The gate of an MLP for layers without Transformer Engine; megatron-core's own, unfused, copies it several times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """(…, 2F) gate and up, one after the other -> (…, F) silu(gate) · up. Source: GLU Variants Improve Transformer."""
    return _SwiGLU.apply(both)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        opened = F.silu(gate)
        ctx.save_for_backward(both, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        both, opened = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        result = torch.empty_like(both)
        of_gate, of_up = result.chunk(2, -1)
        torch.mul(gradient, opened, out=of_up)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return result
