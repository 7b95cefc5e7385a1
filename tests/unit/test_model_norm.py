"""RMSNorm: torch's own bits forward, and its gradients by fewer operations."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.model.norm import RMSNorm, _RMSNorm


def test_gradients_agree_with_finite_differences() -> None:
    x = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: _RMSNorm.apply(*given, 1e-5), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3, 12), (7, 1, 4, 12), (0, 12)])
def test_it_is_torch_s_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    own, plain = RMSNorm(12, eps=1e-6, dtype=dtype), torch.nn.RMSNorm(12, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        own.weight.copy_(torch.randn(12))
        plain.weight.copy_(own.weight)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    result, expected = own(x), plain(y)
    assert torch.equal(result, expected)
    weights = torch.randn_like(expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, theirs in ((x, y), (own.weight, plain.weight)):
        torch.testing.assert_close(mine.grad, theirs.grad)
