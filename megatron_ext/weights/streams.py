"""Rows of weights on their way between Hugging Face and megatron-core, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, Protocol

import torch

from megatron_ext.families.base import Part, Weight
from megatron_ext.weights.rules import Move

PIECE_BYTES = 1 << 20
"""Most bytes of rows that are read, transformed and written at once, if one row is not larger: a processor's cache."""


class HFReader(Protocol):
    """Gives rows of Hugging Face weights; several threads may ask at once, for pieces of a few megabytes."""

    def rows(self, part: Part, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``part`` from ``start`` on; a tensor of their own."""
        ...


class CheckpointReader(Protocol):
    """Gives rows of megatron-core weights, whatever the layout on disk; several threads may ask at once."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def rows(self, weight: Weight, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``weight``, of its layer and expert, from ``start`` on."""
        ...

    def close(self) -> None:
        """Let go of the files."""


class CheckpointWriter(Protocol):
    """Takes rows of megatron-core weights: each row once, in any order, from several threads at once.

    So a writer lays its files out before the first row comes (``files.PlacedFile``, ``torch_zip.lay_out``).
    """

    def write(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """The rows of ``weight``, of its layer and expert, from ``start`` on."""

    def sync(self) -> None:
        """Wait until what was written before this call is on the disk, while other threads go on writing."""

    def abandon(self) -> None:
        """Let go of the files, unfinished."""

    def close(self) -> None:
        """Finish the checkpoint; before that a reader refuses it."""


class HFWriter(Protocol):
    """Takes rows of Hugging Face weights: each row once, in any order, from several threads at once."""

    def write(self, part: Part, start: int, rows: torch.Tensor) -> None:
        """The rows of ``part`` from ``start`` on."""

    def sync(self) -> None:
        """Wait until what was written before this call is on the disk, while other threads go on writing."""

    def abandon(self) -> None:
        """Let go of the files, unfinished."""

    def close(self) -> None:
        """Check that everything came, and finish."""


def row_blocks(weight: Weight, dtype: torch.dtype, most: int) -> Iterator[tuple[int, int]]:
    """(start, count) of blocks of the weight's rows, each of ``most`` bytes at most."""
    total = weight.own_shape[0]
    step = max(1, most // row_bytes(weight.own_shape, dtype))
    for start in range(0, total, step):
        yield start, min(step, total - start)


def bounded(moves: Iterable[Move], bytes_a_row: int, most: int = PIECE_BYTES) -> Iterator[Move]:
    """``moves`` cut into moves of ``most`` bytes at most."""
    step = max(1, most // bytes_a_row)
    for part, source, target, rows in moves:
        for done in range(0, rows, step):
            yield Move(part, source + done, target + done, min(step, rows - done))


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one row."""
    return prod(shape[1:]) * dtype.itemsize


def stored_bytes(plan: Iterable[Weight], dtypes: dict[str, Any]) -> int:
    """Bytes of all tensors of the checkpoint."""
    return sum(prod(shape) * dtypes[key].itemsize for key, shape in {w.key: w.shape for w in plan}.items())
