"""Core attention on ``scaled_dot_product_attention``, for layers without Transformer Engine.

It is causal, with grouped queries, a sliding window and packed segments, and never holds a (T, T) mask.
Legend: T tokens of a micro batch, B batch, A query heads and G query groups on this rank, D head_dim, N segments,
W tokens of the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_ext.model import context_parallel

WASTE = 0.25
"""Segments share one attention call while padding them to the longest wastes less than this part of its area."""


@dataclass
class PackedSegments(PackedSeqParams):
    """Segments of one row that must not see each other, with the index tables that attention needs.

    Segments of similar length are computed in one call, padded to the longest of them. That is exact: the padding
    comes after a segment's own tokens, so causal attention never looks at it, and its outputs are dropped.
    """

    positions: torch.Tensor | None = None  # (T,) position of each token in its segment
    calls: list[tuple[int, int]] = field(default_factory=list)  # (N, longest) of each attention call
    into_calls: torch.Tensor | None = None  # (P,) token in each padded place of all calls
    out_of_calls: torch.Tensor | None = None  # (T,) padded place of each token
    padding: torch.Tensor | None = None  # padded places that hold no token


def packed_segments(lengths: list[int], device: torch.device | str) -> PackedSegments:
    """Tables for segments of ``lengths`` that lie one after the other in a row of ``sum(lengths)`` tokens."""
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(-sizes, kind="stable")
    calls, places, real = [], [], []
    for group in _groups(sizes[order]):
        members = order[group]
        longest = int(sizes[members[0]])
        calls.append((len(members), longest))
        within = np.arange(longest)[None, :]
        real.append((within < sizes[members, None]).ravel())
        places.append((starts[members, None] + np.minimum(within, sizes[members, None] - 1)).ravel())
    into, held = np.concatenate(places), np.concatenate(real)
    out = np.empty(int(sizes.sum()), dtype=np.int64)
    out[into[held]] = np.flatnonzero(held)
    bounds = torch.tensor([0, *np.cumsum(sizes).tolist()], dtype=torch.int32, device=device)
    positions = np.arange(len(out)) - np.repeat(starts, sizes)
    return PackedSegments(
        qkv_format="sbhd",  # the rotary embedding is applied to the whole row at once
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=int(sizes.max()),
        max_seqlen_kv=int(sizes.max()),
        positions=torch.from_numpy(positions).to(device),
        calls=calls,
        into_calls=torch.from_numpy(into).to(device),
        out_of_calls=torch.from_numpy(out).to(device),
        padding=torch.from_numpy(np.flatnonzero(~held)).to(device),
    )


def _groups(descending: np.ndarray) -> list[slice]:
    """Cut lengths, longest first, into runs that waste less than ``WASTE`` of the attention area."""
    groups, first, used = [], 0, 0
    for i, length in enumerate(descending.tolist()):
        used += length * length
        area = (i + 1 - first) * int(descending[first]) ** 2
        if used < (1 - WASTE) * area:
            groups.append(slice(first, i))
            first, used = i, length * length
    return [*groups, slice(first, len(descending))]


class _IntoCalls(torch.autograd.Function):
    """(T, …) tokens -> (P, …) padded places; no gradient comes back from padding."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
        ctx.packed = packed
        return tokens.index_select(0, packed.into_calls)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.packed.out_of_calls), None


class _OutOfCalls(torch.autograd.Function):
    """(P, …) padded places -> (T, …) tokens; what padding computed is dropped and gets gradient zero."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
        ctx.packed = packed
        return places.index_select(0, packed.out_of_calls)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        result = gradient.index_select(0, ctx.packed.into_calls)
        return result.index_fill_(0, ctx.packed.padding, 0.0), None


class SDPACoreAttention(MegatronModule):
    """Takes the place of ``core_attention`` in a layer spec."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> torch.Tensor:
        """query (T, B, A, D), key and value (T, B, G, D) -> (T, B, A·D). B is 1 when packed."""
        if self.config.context_parallel_size > 1:
            return context_parallel.attend(query, key, value, self.scale).flatten(2)
        if packed_seq_params is None:
            mixed = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return mixed.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
        parts = [_IntoCalls.apply(x.squeeze(1), packed_seq_params) for x in (query, key, value)]
        sizes = [count * longest for count, longest in packed_seq_params.calls]
        mixed = []
        for (count, longest), *qkv in zip(packed_seq_params.calls, *(part.split(sizes) for part in parts), strict=True):
            one = self._attend(*(x.view(count, longest, *x.shape[1:]).transpose(1, 2) for x in qkv))
            mixed.append(one.transpose(1, 2).reshape(count * longest, -1))
        return _OutOfCalls.apply(torch.cat(mixed), packed_seq_params).unsqueeze(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query (B, A, T, D), key and value (B, G, T, D) -> (B, A, T, D)."""
        if self.window is None or query.size(2) <= self.window:
            return self._sdpa(query, key, value, is_causal=True, enable_gqa=key.size(1) != query.size(1))
        return self._attend_in_window(query, key, value, self.window)

    def _attend_in_window(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int
    ) -> torch.Tensor:
        """The first W queries see all before them. The others go in blocks, each with the W keys before the block.

        The queries of a group stand in one row after the other, so that no key head is copied for its query heads.
        """
        (batch, heads, length, size), groups = query.shape, key.size(1)
        block = min(length - window, math.ceil(window / 2))
        count = math.ceil((length - window) / block)
        padding = (0, 0, 0, count * block - (length - window))
        first = self._sdpa(
            *(x[:, :, :window] for x in (query, key, value)), is_causal=True, enable_gqa=groups != heads
        )  # fmt: skip
        rows = F.pad(query[:, :, window:], padding).view(batch, groups, -1, count, block, size)
        rows = rows.permute(0, 3, 1, 2, 4, 5).reshape(batch * count, groups, -1, size)
        seen = torch.ones(block, window + block, dtype=torch.bool, device=query.device).triu(1).tril(window)
        keys, values = (_blocks(F.pad(x, padding), window + block, block) for x in (key, value))
        mixed = self._sdpa(rows, keys, values, attn_mask=seen.repeat(heads // groups, 1))
        mixed = mixed.view(batch, count, groups, -1, block, size).permute(0, 2, 3, 1, 4, 5)
        return torch.cat((first, mixed.reshape(batch, heads, -1, size)[:, :, : length - window]), dim=2)

    def _sdpa(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **mask: Any) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0:
            return F.scaled_dot_product_attention(query, key, value, scale=self.scale, **mask)
        with get_cuda_rng_tracker().fork():  # heads differ between tensor-parallel ranks, so must their dropout
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale, **mask)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """It has no weights."""
        return {}


def _blocks(heads: torch.Tensor, size: int, step: int) -> torch.Tensor:
    """(B, G, T, D) -> (B·blocks, G, size, D): overlapping blocks of tokens, each ``step`` after the one before."""
    return heads.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)
