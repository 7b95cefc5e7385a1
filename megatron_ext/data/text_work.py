"""Blocks of plain text: read as Arrow columns, encoded in threads, never a Python string."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.data.counts import Counts
from megatron_ext.data.documents import Batch, Finish
from megatron_ext.data.engine_proof import FIRST_BYTES, Comparison
from megatron_ext.data.engines import GigatokenEngine, ReferenceEngine, Texts
from megatron_ext.data.sources import ColumnBatch, Source, column_batches
from megatron_ext.errors import DatasetFormatError

BLOCK_BYTES = 4 << 20
SHARD_BLOCKS = 16


@dataclass
class Done:
    """A block of rows that was worked on.

    Attributes:
        source: number of its file.
        row: the last row that it covers.
        ends_source: whether the file ends here.
        sides: the documents, a batch for each side of the dataset.
        counts: what was read and left out.
        comparison: what the reference must give, too, before the block counts as done.
    """

    source: int
    row: int
    ends_source: bool = False
    sides: list[Batch] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    comparison: Comparison | None = None


class Skipped:
    """Rows that cannot be read, counted until a block takes them along; an error where rows must not be skipped.

    Attributes:
        row: number of the last of them, up to which a block that takes them along goes.
    """

    def __init__(self, skip: bool) -> None:
        self.on_bad: Callable[[int, DatasetFormatError], None] | None = self._note if skip else None
        self.row = 0
        self._counts = Counts()

    def _note(self, number: int, error: DatasetFormatError) -> None:
        self.row = number
        self._counts.add(Counts(rows=1, skipped=1, named=[str(error)]))

    def take(self) -> Counts:
        """What was skipped since the last call."""
        taken, self._counts = self._counts, Counts()
        return taken


@dataclass
class TextBlock:
    """Rows of one file with text, and what was skipped among them; without rows at the end of a file.

    The ``first`` bytes of the text are the start of the data.
    """

    source: int
    place: str
    row: int
    batch: ColumnBatch | None
    skipped: Counts
    first: int = 0

    @property
    def ends_source(self) -> bool:
        """Whether the file ends here."""
        return self.batch is None


def text_blocks(sources: list[Source], column: str, position: tuple[int, int], *, skip: bool) -> Iterator[TextBlock]:
    """The blocks of all files, from behind ``position`` (source, row)."""
    first = FIRST_BYTES if position == (0, 0) else 0  # of the first shard, which is made whole or again
    for number, source in enumerate(sources):
        start = position[1] if number == position[0] else 0
        if number < position[0]:
            continue
        skipped, row = Skipped(skip), start
        for held, batch in enumerate(column_batches(source, column, BLOCK_BYTES, start, skipped.on_bad), start=1):
            row = max(batch.last_row, skipped.row)
            yield TextBlock(number, str(source), row, batch, skipped.take(), first)
            if first:
                first = max(0, first - int(Texts.of_arrow(batch.values).sizes.sum())) if held < SHARD_BLOCKS else 0
        first = 0
        yield TextBlock(number, str(source), max(row, skipped.row), None, skipped.take())


class TextWorker:
    """Encodes blocks of text; threads may share it."""

    def __init__(self, engine: GigatokenEngine | ReferenceEngine, finish: Finish) -> None:
        self._engine, self._finish = engine, finish

    def work(self, block: TextBlock) -> Done:
        """The documents of a block."""
        counts = block.skipped
        if block.batch is None:
            return Done(block.source, block.row, True, counts=counts)
        texts = Texts.of_arrow(block.batch.values)
        ids = self._engine.encode(texts)
        counts.reference_documents += ids.from_reference
        comparison = None
        if isinstance(self._engine, GigatokenEngine):
            comparison = Comparison.of(texts, ids, _rows(block.batch), block.place, first=block.first)
            counts.compared_documents = comparison.texts.count
            counts.compared_bytes = int(comparison.texts.bounds[-1])
        batch = Batch(ids.values, None, ids.lengths)
        filled = batch.lengths > 0
        counts.rows += len(filled)
        counts.empty += len(filled) - int(filled.sum())
        sides, cuts = self._finish.apply([batch.select(filled)], text=True)
        counts.add(cuts)
        return Done(block.source, block.row, sides=sides, counts=counts, comparison=comparison)


def _rows(batch: ColumnBatch) -> np.ndarray:
    if batch.numbers is not None:
        return batch.numbers
    return np.arange(batch.first_row, batch.first_row + len(batch.values), dtype=np.int64)
