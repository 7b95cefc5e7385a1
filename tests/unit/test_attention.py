"""Packed attention: segments computed together give what each gives alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

LENGTHS = [40, 3, 41, 20, 1, 23, 23, 2, 128]


@pytest.fixture(scope="module")
def attention():
    from megatron_ext.model.attention import SDPACoreAttention

    return SDPACoreAttention(SimpleNamespace(attention_dropout=0.0), 1, None, "self")


def test_packed_segments_equal_segments_alone_forward_and_backward(attention) -> None:
    import torch

    from megatron_ext.model.attention import packed_segments

    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    query = torch.randn(total, 1, 4, 16, generator=generator, requires_grad=True)
    key = torch.randn(total, 1, 2, 16, generator=generator, requires_grad=True)
    value = torch.randn(total, 1, 2, 16, generator=generator, requires_grad=True)
    weight = torch.randn(total, 1, 64, generator=generator)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), (query, key, value))]

    packed = packed_segments(LENGTHS, "cpu")
    together = gradients(attention(query, key, value, None, packed_seq_params=packed))
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    alone = gradients(torch.cat([attention(q, k, v, None) for q, k, v in parts]))
    for a, b in zip(together, alone, strict=True):
        assert (a - b).abs().max() < 1e-5
    assert len(packed.calls) < len(LENGTHS)


def test_positions_restart_and_every_token_has_one_place() -> None:
    from megatron_ext.model.attention import packed_segments

    packed = packed_segments(LENGTHS, "cpu")
    assert packed.positions.tolist() == [p for n in LENGTHS for p in range(n)]
    assert sum(count for count, _ in packed.calls) == len(LENGTHS)
    places = packed.into_calls[packed.out_of_calls]
    assert places.tolist() == list(range(sum(LENGTHS)))
    assert len(packed.padding) == sum(count * longest for count, longest in packed.calls) - sum(LENGTHS)
