"""Attention: segments computed together give what each gives alone, and a window hides what lies before it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

LENGTHS = [40, 3, 41, 20, 1, 23, 23, 2, 128]
WINDOWS = [1, 2, 7, 23, 64, 127, 128]


def build(window: int | None = None, pattern: list[int] | None = None, layer: int = 1):
    from megatron_ext.model.attention import SDPACoreAttention

    size = None if window is None else (window - 1, 0)
    config = SimpleNamespace(
        context_parallel_size=1, attention_dropout=0.0, window_size=size, window_attn_skip_freq=pattern
    )
    return SDPACoreAttention(config, layer, None, "self")


@pytest.fixture(scope="module")
def qkv():
    """Query (T, 1, 4, 16), key and value (T, 1, 2, 16), and the weights of a scalar to differentiate."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), 1, heads, 16) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return tensors, torch.randn(sum(LENGTHS), 1, 64, generator=generator)


def gradients(output, qkv):
    """What attention gave, and the gradients of query, key and value."""
    import torch

    tensors, weight = qkv
    return [output.detach(), *torch.autograd.grad((output * weight[: len(output)]).sum(), tensors)]


def masked(query, key, value, window: int):
    """Attention with the mask written out: token i sees j if i - window < j <= i."""
    import torch

    places = torch.arange(len(query))
    distance = places[:, None] - places[None, :]
    heads = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    mask = (distance >= 0) & (distance < window)
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    return mixed.permute(2, 0, 1, 3).flatten(2)


def assert_close(left, right) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, *WINDOWS])
def test_packed_segments_equal_segments_alone_forward_and_backward(window, qkv) -> None:
    import torch

    from megatron_ext.model.attention import packed_segments

    attention, packed = build(window), packed_segments(LENGTHS, "cpu")
    together = gradients(attention(*qkv[0], None, packed_seq_params=packed), qkv)
    parts = zip(*(x.split(LENGTHS) for x in qkv[0]), strict=True)
    assert_close(together, gradients(torch.cat([attention(q, k, v, None) for q, k, v in parts]), qkv))
    assert len(packed.calls) < len(LENGTHS)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_equals_its_mask_forward_and_backward(window, qkv) -> None:
    assert_close(gradients(build(window)(*qkv[0], None), qkv), gradients(masked(*qkv[0], window), qkv))


@pytest.mark.parametrize(("batch", "tokens"), [(3, 20), (2, 47), (1, 8), (2, 9)])
def test_a_window_equals_its_mask_in_a_batch(batch, tokens) -> None:
    import torch

    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(tokens, batch, heads, 4, generator=generator) for heads in (6, 2, 2))
    assert_close([build(8)(query, key, value, None)], [masked(query, key, value, 8)])


def test_only_the_layers_of_the_pattern_have_the_window(qkv) -> None:
    whole, windowed = (build(5, pattern=[0, 1], layer=layer)(*qkv[0], None) for layer in (1, 2))
    assert_close([whole], [build()(*qkv[0], None)])
    assert_close([windowed], [build(5)(*qkv[0], None)])


def test_no_tensor_of_a_window_grows_with_the_square_of_the_tokens() -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                if isinstance(one, torch.Tensor):
                    self.largest = max(self.largest, one.numel())
            return result

    query, key, value = (torch.randn(4096, 1, heads, 8, requires_grad=True) for heads in (2, 1, 1))
    with Sizes() as sizes:
        build(128)(query, key, value, None).sum().backward()
    assert 0 < sizes.largest < 4096 * 128 < 4096**2


def test_positions_restart_and_every_token_has_one_place() -> None:
    from megatron_ext.model.attention import packed_segments

    packed = packed_segments(LENGTHS, "cpu")
    assert packed.positions.tolist() == [p for n in LENGTHS for p in range(n)]
    assert sum(count for count, _ in packed.calls) == len(LENGTHS)
    places = packed.into_calls[packed.out_of_calls]
    assert places.tolist() == list(range(sum(LENGTHS)))
    assert len(packed.padding) == sum(count * longest for count, longest in packed.calls) - sum(LENGTHS)
