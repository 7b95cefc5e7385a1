"""A linear layer adds its weight's gradient to ``main_grad``, and hands the hooks what they expect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model.linear import linear


@pytest.fixture
def weight() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(6, 4))
    parameter.main_grad = torch.randn(6, 4)
    parameter.grad_added_to_main_grad = False
    return parameter


@pytest.mark.parametrize("biased", [False, True])
def test_products_and_gradients_are_torch_s(weight, biased: bool) -> None:
    bias = torch.randn(6, requires_grad=True) if biased else None
    inputs, before = torch.randn(5, 3, 4, requires_grad=True), weight.main_grad.clone()
    result = linear(inputs, weight, bias)
    result.sin().sum().backward()
    plain = [x if x is None else x.detach().clone().requires_grad_() for x in (inputs, weight, bias)]
    expected = F.linear(*plain)
    expected.sin().sum().backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(inputs.grad, plain[0].grad)
    torch.testing.assert_close(weight.main_grad - before, plain[1].grad)
    assert weight.grad_added_to_main_grad
    if biased:
        torch.testing.assert_close(bias.grad, plain[2].grad)


def test_a_weight_of_another_type_than_its_sum(weight) -> None:
    half = torch.nn.Parameter(weight.detach().bfloat16())
    half.main_grad = torch.zeros(6, 4)
    inputs = torch.randn(5, 3, 4, dtype=torch.bfloat16)
    linear(inputs, half, None).sum().backward()
    wanted = torch.ones(15, 6).t() @ inputs.flatten(0, 1).float()
    torch.testing.assert_close(half.main_grad, wanted, rtol=2e-2, atol=2e-2)


def test_a_weight_that_is_an_embedding_too_keeps_the_embedding_s_gradient(weight) -> None:
    weight.zero_out_wgrad = True
    before, ids = weight.main_grad.clone(), torch.tensor([1, 1, 5])
    (F.embedding(ids, weight).sum() + linear(torch.ones(2, 4), weight, None).sum()).backward()
    assert torch.equal(weight.grad, F.one_hot(ids, 6).sum(0)[:, None].expand(6, 4).float())  # which the hooks add
    torch.testing.assert_close(weight.main_grad - before, torch.full((6, 4), 2.0))
