"""One text column of a data file as Arrow arrays, a block at a time: the fast path, without a Python string a row.

What Arrow cannot read, or what holds no text, goes through the row reader of the same kind of file, which names the
row. A reader is one entry in ``READERS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.data.formats import kind_in_words
from megatron_ext.data.sources.opening import Place, named_faults, open_bytes, open_seekable
from megatron_ext.data.sources.places import Source, as_source, require_file
from megatron_ext.data.sources.quotes import Quotes
from megatron_ext.data.sources.rows import (
    TEXT_COLUMN,
    OnBad,
    Row,
    arrow_batches,
    groups_after,
    holds_lines,
    json_lines,
    line_ends,
    numbered_blocks,
    read_rows,
    tell_rows,
    text_lines,
)
from megatron_ext.errors import DatasetFormatError, EmptyFileError

if TYPE_CHECKING:
    import numpy
    import pyarrow

BLOCK_BYTES = 16 << 20
"""About how much text a batch holds; one document may be longer."""
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
"""Makes up the number of lines for a line with two rows."""
COLUMNAR_ROWS = 8192
"""Rows in a parquet batch at most: the size of a column in its metadata is that of its distinct values."""


@dataclass(frozen=True)
class ColumnBatch:
    """Texts of some rows, in the order of the file.

    Attributes:
        first_row: number of the first row, counted as ``read_rows`` does.
        values: (N,) ``StringArray`` or ``LargeStringArray`` without nulls, valid UTF-8; may be a slice (``offset``).
        numbers: (N,) int64 row numbers where they are not ``first_row``, ``first_row + 1``, … (blank lines, or rows
            left out by ``on_bad``); else None.
    """

    first_row: int
    values: pyarrow.StringArray | pyarrow.LargeStringArray
    numbers: numpy.ndarray | None = None

    def row(self, index: int) -> int:
        """Number of the row that value ``index`` came from."""
        return self.first_row + index if self.numbers is None else int(self.numbers[index])

    @property
    def last_row(self) -> int:
        """Number of the last row; with it as ``start`` the next call goes on behind this batch."""
        return self.row(len(self.values) - 1)


def column_batches(
    source: Source | str | Path,
    column: str,
    block_bytes: int = BLOCK_BYTES,
    start: int = 0,
    on_bad: OnBad | None = None,
) -> Iterator[ColumnBatch]:
    """Stream one text column of a file.

    Args:
        source: as for ``read_rows``; a .txt file has the column ``text`` alone, whatever ``column`` says.
        column: its name.
        block_bytes: about how many bytes of the file a batch covers; where batches end depends on it and ``start``.
        start: skip the rows up to this number.
        on_bad: told of a row without text in the column, or broken by itself, instead of the error.

    Raises:
        SourceError: the file is missing, unreadable, or of an unsupported kind.
        DatasetFormatError: the file is empty or broken, or a row has no text there; names file, row and field.
    """
    source = as_source(source)
    require_file(source)
    place, empty = Place(source), start == 0

    def bad(number: int, error: DatasetFormatError) -> None:
        nonlocal empty
        empty = False
        if on_bad is None:
            raise error
        on_bad(number, error)

    kind = ".jsonl" if holds_lines(source) else source.kind
    with named_faults(place):
        for batch in READERS[kind](place, column, block_bytes, start, bad):
            if len(batch.values):
                empty = False
                place.row = batch.last_row
                yield batch
    if empty:
        raise EmptyFileError(f"{source} holds no rows; remove it from the list or fill it")


# --- from rows --------------------------------------------------------------------------------------------------


def _from_rows(rows: Iterable[Row], column: str, block_bytes: int, place: Place, bad: OnBad) -> Iterator[ColumnBatch]:
    """Batches of rows read one by one; a row without text is named."""
    texts: list[bytes] = []
    numbers: list[int] = []
    size = 0
    for number, row in rows:
        if problem := missing_text(row, column):
            bad(number, place.error(problem, number, column if isinstance(row, dict) else None))
            continue
        try:
            text = row[column].encode()
        except UnicodeEncodeError:
            problem = "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
            bad(number, place.error(problem, number, column))
            continue
        texts.append(text)
        numbers.append(number)
        size += len(text)
        if size >= block_bytes:
            yield _batch(texts, numbers)
            texts, numbers, size = [], [], 0
    if texts:
        yield _batch(texts, numbers)


def missing_text(row: Any, column: str) -> str | None:
    """Why ``row`` has no text in ``column``, or None where it has."""
    if not isinstance(row, dict):
        return f"is {kind_in_words(row)}, not an object with fields"
    value = row.get(column)
    if isinstance(value, str):
        return None
    if column not in row:
        return f"is missing; the row has {', '.join(map(repr, row)) or 'no fields'}"
    return f"is {kind_in_words(value)}, not text"


def _batch(texts: list[bytes], numbers: list[int]) -> ColumnBatch:
    import numpy as np
    import pyarrow

    consecutive = numbers[-1] - numbers[0] + 1 == len(numbers)
    values = pyarrow.array(texts, pyarrow.large_binary()).cast(pyarrow.large_string())
    return ColumnBatch(numbers[0], values, None if consecutive else np.array(numbers, dtype=np.int64))


def _read_by_row(place: Place, column: str, block_bytes: int, start: int, bad: OnBad) -> Iterator[ColumnBatch]:
    rows = read_rows(place.source, (column,), start, bad)
    return _from_rows(rows, column, block_bytes, place, bad)


# --- lines ------------------------------------------------------------------------------------------------------


def _read_jsonl(place: Place, column: str, block_bytes: int, start: int, bad: OnBad) -> Iterator[ColumnBatch]:
    for number, block in numbered_blocks(place, start, block_bytes):
        values = _parsed_lines(block, column)
        lines = line_ends(block) + (not block.endswith(b"\n"))
        if values is not None and len(values) == lines and not BLANK_LINE.search(block):
            yield ColumnBatch(number, values)
            continue
        yield from _from_rows(json_lines(block, number, place, bad), column, len(block), place, bad)


def _parsed_lines(block: bytes, column: str) -> pyarrow.StringArray | None:
    """The column of JSON lines; None where the lines do not all hold text there."""
    import pyarrow
    from pyarrow import json

    if block.isspace():
        return None
    try:
        table = json.read_json(
            pyarrow.BufferReader(block),
            json.ReadOptions(use_threads=False, block_size=min(len(block) + 1, (1 << 31) - 1)),
            json.ParseOptions(
                explicit_schema=pyarrow.schema([(column, pyarrow.string())]), unexpected_field_behavior="ignore"
            ),
        )
    except pyarrow.ArrowException:
        return None
    (values,) = table.column(column).chunks or [None]
    return _checked(values) if values is not None and values.null_count == 0 else None


def _checked(values: pyarrow.StringArray) -> pyarrow.StringArray | None:
    """``values`` if they are UTF-8, which Arrow's readers do not look at."""
    import pyarrow

    try:
        values.validate(full=True)
    except pyarrow.ArrowInvalid:
        return None
    return values


def _read_txt(place: Place, column: str, block_bytes: int, start: int, bad: OnBad) -> Iterator[ColumnBatch]:
    import numpy as np
    import pyarrow
    from pyarrow import compute

    pc: Any = compute  # its functions are made at import, where no type checker sees them

    for number, block in numbered_blocks(place, start, block_bytes):
        offsets = np.array([0, len(block) - block.endswith(b"\n")], dtype=np.int64)
        buffers = pyarrow.py_buffer(offsets), pyarrow.py_buffer(block)
        whole = _checked(pyarrow.LargeStringArray.from_buffers(1, *buffers))
        if whole is None:
            yield from _from_rows(text_lines(block, number, place, bad), TEXT_COLUMN, len(block), place, bad)
            continue
        values = pc.split_pattern(whole, "\n").values
        if b"\r" in block:
            values = pc.replace_substring_regex(values, r"\r\z", "")
        blank = pc.or_(pc.equal(values, ""), pc.utf8_is_space(values))
        yield _without(values, blank, number)


def _without(values: Any, dropped: Any, number: int) -> ColumnBatch:
    """A batch of the values that are not dropped; ``number`` is the row of the first value."""
    from pyarrow import compute

    pc: Any = compute
    if not dropped.true_count:
        return ColumnBatch(number, values)
    kept = pc.invert(dropped)
    numbers = kept.to_numpy(zero_copy_only=False).nonzero()[0] + number
    return ColumnBatch(int(numbers[0]) if len(numbers) else number, values.filter(kept), numbers)


# --- columnar ---------------------------------------------------------------------------------------------------


def _read_csv(place: Place, column: str, block_bytes: int, start: int, bad: OnBad) -> Iterator[ColumnBatch]:
    """Arrow's reader up to what it refuses, and row by row from there on.

    Arrow takes a quote that is left open for the end of the last field, and text behind a closing quote for a part of
    the field, so from such a quote on the file is read by row, too.
    """
    import pyarrow
    from pyarrow import csv

    first = next(read_rows(place.source, on_bad=lambda *_: None), None)  # checks the header
    if first and column not in first[1]:
        raise place.error(missing_text(first[1], column) or "", first[0], column)
    convert = csv.ConvertOptions(
        include_columns=[column], column_types={column: pyarrow.string()}, strings_can_be_null=False
    )
    parse, waiting, done = csv.ParseOptions(newlines_in_values=True), None, 0
    with open_bytes(place.source) as stream:
        quotes = Quotes(stream)
        try:
            options = csv.ReadOptions(use_threads=False, block_size=block_bytes)
            with csv.open_csv(quotes, options, parse, convert) as reader:
                for batch in reader:
                    if quotes.astray:
                        break
                    if waiting is not None:
                        yield _after(waiting, done, start)
                        done += len(waiting)
                    waiting = batch.column(0)
        except pyarrow.ArrowInvalid:
            quotes.astray = True
    if quotes.open or quotes.astray:
        yield from _read_by_row(place, column, block_bytes, max(start, done), bad)
    elif waiting is not None:
        yield _after(waiting, done, start)


def _after(values: Any, before: int, start: int) -> ColumnBatch:
    """The values of rows behind ``start``; ``before`` rows come before them."""
    skipped = min(max(start - before, 0), len(values))
    return ColumnBatch(before + skipped + 1, values.slice(skipped))


def _read_parquet(place: Place, column: str, block_bytes: int, start: int, bad: OnBad) -> Iterator[ColumnBatch]:
    from pyarrow import parquet

    with open_seekable(place.source) as stored, parquet.ParquetFile(stored) as file:
        index = _column_index(file.schema_arrow.names, column, place)
        _require_text(file.schema_arrow.types[index], column, place)
        groups, number = groups_after(file, start)
        metadata = file.metadata
        tell_rows(place.source, lambda: metadata.num_rows)
        leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column)
        size = sum(metadata.row_group(g).column(leaf).total_uncompressed_size for g in range(metadata.num_row_groups))
        rows = max(1, min(COLUMNAR_ROWS, block_bytes * metadata.num_rows // max(size, 1)))
        for batch in file.iter_batches(batch_size=rows, columns=[column], row_groups=groups):
            yield from _texts(batch.column(0), number, column, start, place, bad)
            number += len(batch)


def _read_arrow(place: Place, column: str, block_bytes: int, start: int, bad: OnBad) -> Iterator[ColumnBatch]:
    number = 0
    with open_seekable(place.source) as stored:
        tell_rows(place.source, lambda: sum(map(len, arrow_batches(stored, ()))))
        for batch in arrow_batches(stored, (column,)):
            values = batch.column(_column_index(batch.schema.names, column, place))
            _require_text(values.type, column, place)
            rows = max(1, block_bytes * len(values) // max(values.nbytes, 1))
            for at in range(0, len(values), rows):
                yield from _texts(values.slice(at, rows), number + at, column, start, place, bad)
            number += len(values)


def _column_index(names: list[str], column: str, place: Place) -> int:
    if column not in names:
        raise place.error(f"is missing; the file has the columns {', '.join(names) or '(none)'}", field=column)
    return names.index(column)


def _require_text(type: Any, column: str, place: Place) -> None:
    from pyarrow import types

    inner = type.value_type if types.is_dictionary(type) else type
    if not (types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)):
        raise place.error(f"is {type}, not text", field=column)


def _texts(values: Any, before: int, column: str, start: int, place: Place, bad: OnBad) -> Iterator[ColumnBatch]:
    """A batch of a column of text; ``before`` rows come before it."""
    import pyarrow
    from pyarrow import types

    rest = _after(values, before, start)
    values, number = rest.values, rest.first_row
    if types.is_dictionary(values.type) or types.is_string_view(values.type):
        values = values.cast(pyarrow.large_string())
    if _checked(values) is None:
        yield from _from_rows(_decoded(values, number, column, place, bad), column, values.nbytes, place, bad)
        return
    if values.null_count:
        missing = values.is_null()
        for index in missing.to_numpy(zero_copy_only=False).nonzero()[0].tolist():
            bad(number + index, place.error("is null, not text", number + index, column))
        yield _without(values, missing, number)
        return
    yield ColumnBatch(number, values)


def _decoded(values: Any, number: int, column: str, place: Place, bad: OnBad) -> Iterator[Row]:
    import pyarrow

    for at, value in enumerate(values.cast(pyarrow.large_binary()).to_pylist(), number):
        try:
            yield at, {column: None if value is None else value.decode()}
        except UnicodeDecodeError as error:
            bad(at, place.error(f"is not UTF-8 ({error.reason} at byte {error.start})", at, column))


READERS: dict[str, Callable[[Place, str, int, int, OnBad], Iterator[ColumnBatch]]] = {
    ".json": _read_by_row,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}
"""Kind of a file -> its reader; ``bad`` raises where the caller gave no ``on_bad``."""
