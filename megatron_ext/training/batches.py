"""Micro batches: several sequences of a step laid one after the other in a single row of tokens.

Legend: T places of the row. Every sample is a segment of its own, so neither packing nor the micro batch size
changes what is computed for it. A segment ends with padding up to a multiple of ``pack_alignment``: no token of the
sample looks at what comes after it, and no label is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.packing import aligned
from megatron_ext.data.samples import Samples
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
        multiple: rows are padded to a multiple of this many places, as a segment of their own that trains nothing.
        fused: for Transformer Engine, which takes segment bounds (``thd``); else the index tables of SDPA attention.
    """

    def __init__(
        self, plan: Plan, dataset: Path, *, micro_batch_size: int, rank: int, ranks: int, multiple: int, fused: bool
    ) -> None:
        self.plan, self.multiple, self.fused = plan, multiple, fused
        self.samples = Samples(open_dataset(dataset), plan.stream)
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
        lengths = self.plan.lengths[samples]
        places = aligned(lengths - 1, self.plan.alignment).tolist()
        padding = -sum(places) % self.multiple
        segments = [*places, padding] if padding else places
        inputs, labels = np.zeros((2, sum(segments)), dtype=np.int64)
        trained = np.zeros(len(inputs), dtype=bool)
        at = 0
        for number, length, room in zip(self.plan.documents[samples].tolist(), lengths.tolist(), places, strict=True):
            sample, end = self.samples.read(number, length), at + length - 1
            inputs[at:end], labels[at:end], trained[at:end] = sample.tokens[:-1], sample.tokens[1:], sample.trained[1:]
            at += room
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
