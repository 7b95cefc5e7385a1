"""Micro batches of a data-parallel rank: samples laid one after the other in a row, or one beside the other.

Legend: B rows, T places of a row. In a packed row every sample is a segment of its own, so neither packing nor the
micro batch size changes what is computed for it. A segment ends with padding up to a multiple of ``pack_alignment``:
no token of the sample looks at what comes after it, and no label is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.packing import aligned
from megatron_ext.data.samples import Answer, PreferencePairs, Samples
from megatron_ext.model.attention import packed_segments
from megatron_ext.model.context_parallel import own_places
from megatron_ext.training.plan import Plan


@dataclass(frozen=True)
class Batch:
    """One micro batch. Of a pair, the chosen answer is segment 2p and the rejected one 2p + 1."""

    tokens: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B·T,) int64: the token that follows in the same sample
    loss_mask: torch.Tensor  # (B·T,) bool: whether that label is trained
    positions: torch.Tensor  # (B, T) int64, restart with each sample
    segment: torch.Tensor  # (B·T,) int64: number of the segment that a place belongs to
    segments: int  # how many there are, without padding of the row's end
    packed: PackedSeqParams | None  # None if each row is one sample
    documents: np.ndarray  # (N,) number in the dataset of each sample; -1 for one that fills up a last step
    sizes: np.ndarray  # (2, segments) int64: tokens and trained labels, on all context-parallel ranks together
    sequences: np.ndarray  # (segments,) int64: the sequence of the micro batch that a segment is in


class Batches:
    """Micro batches of a plan for one data-parallel rank; ``step(n)`` needs no history.

    Args:
        multiple: rows are padded to a multiple of this many places, as a segment of their own that trains nothing.
        fused: for Transformer Engine, which takes segment bounds (``thd``); else the index tables of SDPA attention.
        dense: lay samples beside each other, each padded to ``seq_length``, and give this context-parallel rank its
            places of them.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: Path,
        *,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        multiple: int,
        fused: bool,
        dense: bool,
    ) -> None:
        self.plan, self.multiple, self.fused, self.dense = plan, multiple, fused, dense
        self.read, self.rank, self.ranks = _reader(plan, dataset), rank, ranks
        share = plan.global_batch_size // ranks
        self.mine = slice(rank * share, (rank + 1) * share)
        self.micro_batch_size, self.count = micro_batch_size, share // micro_batch_size

    def step(self, step: int) -> Iterator[Batch]:
        """The ``count`` micro batches of optimizer step ``step``."""
        mine = self.plan.sequences(step)[self.mine]
        for sequences in mine.reshape(self.count, self.micro_batch_size).tolist():
            yield self.of(sequences)

    def sweep(self, count: int) -> Iterator[Iterator[Batch]]:
        """Every sequence once, ``count`` micro batches of each rank at a time; what fills up the end trains nothing."""
        total, step = len(self.plan.packing), count * self.micro_batch_size
        for start in range(self.rank * step, total + self.rank * step, self.ranks * step):
            numbers = np.arange(start, start + step).reshape(count, self.micro_batch_size)
            yield (self.of(np.where(row < total, row, -1).tolist()) for row in numbers)

    @property
    def shape(self) -> tuple[int, int]:
        """(T, B) that pipeline stages send each other, where all rows are equally long."""
        length = self.plan.packing.seq_length
        return (length, self.micro_batch_size) if self.dense else (length * self.micro_batch_size, 1)

    def of(self, sequences: list[int]) -> Batch:
        """The micro batch of some of the plan's sequences; -1 stands for one that trains nothing."""
        parts = [self.plan.samples(max(s, 0)) for s in sequences]
        real = np.repeat([s >= 0 for s in sequences], [len(part) for part in parts])
        samples = np.concatenate(parts)
        documents = self.plan.documents[samples]
        answers = [
            answer if counts else answer._replace(trained=np.zeros_like(answer.trained))
            for n, length, counts in zip(documents.tolist(), self.plan.lengths[samples].tolist(), real, strict=True)
            for answer in self.read(n, length)
        ]
        arrange = self._beside if self.dense else self._packed
        sizes = np.asarray([(len(answer.tokens) - 1, int(answer.trained[1:].sum())) for answer in answers]).T
        owners = np.repeat(np.arange(len(parts)), [len(part) * (len(answers) // len(samples)) for part in parts])
        return Batch(*arrange(answers), np.where(real, documents, -1), sizes, owners)

    def _packed(self, answers: list[Answer]) -> tuple[Any, ...]:
        device = torch.cuda.current_device()
        places = aligned(np.asarray([len(answer.tokens) - 1 for answer in answers]), self.plan.alignment).tolist()
        padding = -sum(places) % self.multiple
        segments = [*places, padding] if padding else places
        rows = _laid(answers, places, sum(segments))
        positions = np.concatenate([np.arange(n) for n in segments])
        packed = _thd(segments, device) if self.fused else packed_segments(segments, device)
        owners = np.repeat(np.arange(len(segments)), segments)
        return _batch([*rows, positions, owners], (1, len(owners)), len(answers), packed)

    def _beside(self, answers: list[Answer]) -> tuple[Any, ...]:
        length, count = self.plan.packing.seq_length, len(answers)
        rows = _laid(answers, [length] * count, length * count)
        positions, owners = np.tile(np.arange(length), count), np.repeat(np.arange(count), length)
        mine = own_places(length, parallel_state.get_context_parallel_rank(), _context_ranks())
        cut = [values.reshape(count, length)[:, mine].ravel() for values in (*rows, positions, owners)]
        return _batch(cut, (count, len(mine)), count, None)


def _reader(plan: Plan, dataset: Path) -> Callable[[int, int], tuple[Answer, ...]]:
    """From a sample's number and kept length to its segments."""
    opened = open_dataset(dataset)
    if opened.kind == "preference":
        pairs = PreferencePairs(opened)
        return lambda number, _: tuple(pairs.read(number, plan.answer_limit))
    samples = Samples(opened, plan.stream)
    return lambda number, length: (samples.read(number, length),)


def _laid(answers: list[Answer], places: list[int], total: int) -> list[np.ndarray]:
    """Inputs, labels and trained labels of ``answers``, each in its ``places`` of ``total``."""
    inputs, labels = np.zeros((2, total), dtype=np.int64)
    trained, at = np.zeros(total, dtype=bool), 0
    for answer, room in zip(answers, places, strict=True):
        end = at + len(answer.tokens) - 1
        inputs[at:end], labels[at:end], trained[at:end] = answer.tokens[:-1], answer.tokens[1:], answer.trained[1:]
        at += room
    return [inputs, labels, trained]


def _batch(
    values: list[np.ndarray], shape: tuple[int, int], segments: int, packed: PackedSeqParams | None
) -> tuple[Any, ...]:
    """The fields of a Batch from ``tokens`` to ``packed``."""
    device = torch.cuda.current_device()
    inputs, labels, trained, positions, owners = (torch.from_numpy(value).to(device) for value in values)
    return inputs.view(shape), labels, trained, positions.view(shape), owners, segments, packed


def _context_ranks() -> int:
    return parallel_state.get_context_parallel_world_size()


def _thd(lengths: list[int], device: torch.device | str) -> PackedSeqParams:
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
