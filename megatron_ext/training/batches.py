"""Micro batches: several sequences of a step laid one after the other in a single row of tokens.

Legend: T tokens of the row. Every sample is a segment of its own, so neither packing nor the micro batch size
changes what is computed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.data.idxmap import Idxmap
from megatron_ext.model.attention import packed_segments
from megatron_ext.training.plan import Plan


@dataclass(frozen=True)
class Batch:
    """One micro batch of one data-parallel rank."""

    tokens: torch.Tensor  # (1, T) int64
    labels: torch.Tensor  # (1, T) int64: the token that follows in the same sample
    loss_mask: torch.Tensor  # (T,) bool: whether that label is trained
    positions: torch.Tensor  # (1, T) int64, restart with each sample
    segments: PackedSeqParams


class Batches:
    """Micro batches of a plan for one data-parallel rank; ``step(n)`` needs no history.

    Args:
        multiple: rows are padded to a multiple of this many tokens, as a segment of their own that trains nothing.
        fused: for Transformer Engine, which takes segment bounds (``thd``); else the index tables of SDPA attention.
    """

    def __init__(
        self, plan: Plan, dataset: Path, *, micro_batch_size: int, rank: int, ranks: int, multiple: int, fused: bool
    ) -> None:
        self.plan, self.multiple, self.fused = plan, multiple, fused
        self.tokens, self.mask = Idxmap(dataset / "tokens"), Idxmap(dataset / "loss_mask")
        share = plan.global_batch_size // ranks
        self.mine = slice(rank * share, (rank + 1) * share)
        self.micro_batch_size, self.count = micro_batch_size, share // micro_batch_size

    def step(self, step: int) -> Iterator[Batch]:
        """The ``count`` micro batches of optimizer step ``step``."""
        mine = self.plan.sequences(step)[self.mine]
        for sequences in mine.reshape(self.count, self.micro_batch_size).tolist():
            yield self._batch(np.concatenate([self.plan.samples(s) for s in sequences]))

    def _batch(self, samples: np.ndarray) -> Batch:
        device = torch.cuda.current_device()
        lengths = self.plan.lengths[samples].tolist()
        documents = self.plan.documents[samples].tolist()
        tokens = [self.tokens[d][:n] for d, n in zip(documents, lengths, strict=True)]
        masks = [self.mask[d][:n] for d, n in zip(documents, lengths, strict=True)]
        segments = [n - 1 for n in lengths]
        padding = -sum(segments) % self.multiple
        filler = [np.zeros(padding + 1, dtype=np.uint8)] if padding else []
        segments += [padding] if padding else []
        inputs = np.concatenate([t[:-1] for t in [*tokens, *filler]]).astype(np.int64)
        labels = np.concatenate([t[1:] for t in [*tokens, *filler]]).astype(np.int64)
        trained = np.concatenate([m[1:] for m in [*masks, *filler]]).astype(bool)
        positions = np.concatenate([np.arange(n) for n in segments])
        return Batch(
            tokens=torch.from_numpy(inputs)[None].to(device),
            labels=torch.from_numpy(labels)[None].to(device),
            loss_mask=torch.from_numpy(trained).to(device),
            positions=torch.from_numpy(positions)[None].to(device),
            segments=_thd(segments, device) if self.fused else packed_segments(segments, device),
        )


def _thd(lengths: list[int], device: torch.device | str) -> PackedSeqParams:
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
