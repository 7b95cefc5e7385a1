"""A linear layer that adds its weight's gradient to what is there, in the product itself; for a CPU.

megatron-core's own does the same by a CUDA extension, behind checks for what a rank without tensor parallelism never
does (gathering, reducing, deferring), which a small model on a CPU waits for.
"""

from __future__ import annotations

from typing import Any

import torch


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(…, K) inputs, (N, K) weight with a ``main_grad``, (N,) bias -> (…, N)."""
    return _Linear.apply(inputs, weight, bias)


def accumulate(inputs: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
    """Add to ``total`` (N, K) the product of ``gradient`` (T, N) and ``inputs`` (T, K)."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), inputs)
    else:
        total.add_(gradient.t().matmul(inputs))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.total, ctx.has_bias = weight.main_grad, bias is not None
        product = inputs.matmul(weight.t())
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.size(-1))
        accumulate(inputs.reshape(-1, inputs.size(-1)), rows, ctx.total)
        weight.grad_added_to_main_grad = True
        # the hooks of data parallelism want a gradient, and drop it unless an embedding's is added to it
        unused = torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else weight.detach()
        return gradient.matmul(weight), unused, rows.sum(dim=0) if ctx.has_bias else None
