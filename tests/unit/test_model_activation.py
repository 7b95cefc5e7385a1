"""The MLP's gate computes what its formula says, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model.activation import swiglu


def test_gradients_agree_with_finite_differences() -> None:
    both = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 3, 12), (0, 12)])
def test_it_is_torch_s_silu_times_the_other_half(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    own = torch.randn(shape, dtype=dtype, requires_grad=True)
    plain = own.detach().clone().requires_grad_()
    gate, up = plain.chunk(2, -1)
    result, expected = swiglu(own), F.silu(gate) * up
    assert torch.equal(result, expected)
    weights = torch.randn_like(expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own.grad, plain.grad)
