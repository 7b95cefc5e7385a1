"""Rows of data files as Python values, streamed, with the place of each. A reader is one entry in ``READERS``.

The number of a row counts from 1: in .jsonl and .txt it is the line, in .csv the record after the header.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_ext.data.sources.json_array import elements, first_character
from megatron_ext.data.sources.opening import CHUNK_BYTES, Place, line_blocks, named_faults, open_bytes, open_seekable
from megatron_ext.data.sources.places import Source, as_source, require_file
from megatron_ext.errors import DatasetFormatError, EmptyFileError

Row = tuple[int, Any]
"""Number of the row in its file, and its value (an object, if the file fits any format)."""
OnBad = Callable[[int, DatasetFormatError], None]
"""Takes the number of a row that cannot be read, and why."""
COLUMNAR_BATCH, COLUMNAR_BYTES = 256, 2 << 20
"""Rows of a columnar file that become Python values at once, at most, and about the bytes that they hold."""
TEXT_COLUMN = "text"


def read_rows(
    source: Source | str | Path, columns: Collection[str] = (), start: int = 0, on_bad: OnBad | None = None
) -> Iterator[Row]:
    """Stream the rows of one file, in its order.

    Args:
        source: a file of one of ``places.KINDS``, compressed or not. A line of a .txt file is a document, as in
            Hugging Face's ``text`` loader; blank lines are none.
        columns: fields of interest; a columnar file is read only there (all of it when it has none of them).
        start: skip the rows up to this number, without decoding them where the kind of file allows.
        on_bad: told of a row that is broken by itself (a line that is not JSON or not UTF-8, a csv record of a
            wrong length) instead of the error; what damages the file as a whole is an error always.

    Raises:
        SourceError: the file is missing, unreadable, or of an unsupported kind.
        DatasetFormatError: the file is empty or broken; names file and row.
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

    with named_faults(place):
        for row in READERS[source.kind](place, columns, start, bad):
            empty = False
            yield row
    if empty:
        raise EmptyFileError(f"{source} holds no rows; remove it from the list or fill it")


def holds_lines(source: Source) -> bool:
    """Whether the file is JSON lines: by its name, or a .json file that does not start an array."""
    if source.kind == ".jsonl":
        return True
    if source.kind != ".json":
        return False
    place = Place(source)
    with named_faults(place), open_bytes(source) as stream:
        return first_character(stream, place) == "{"


# --- JSON -------------------------------------------------------------------------------------------------------


def _read_json(place: Place, columns: Collection[str], start: int, bad: OnBad) -> Iterator[Row]:
    """An array, or JSON lines, which some tools write under this name."""
    if holds_lines(place.source):
        yield from _read_jsonl(place, columns, start, bad)
        return
    with open_bytes(place.source) as stream:
        for row in elements(stream, place):
            if place.row > start:
                yield place.row, row


def _read_jsonl(place: Place, columns: Collection[str], start: int, bad: OnBad) -> Iterator[Row]:
    for number, block in numbered_blocks(place, start):
        yield from json_lines(block, number, place, bad)


def json_lines(block: bytes, number: int, place: Place, bad: OnBad) -> Iterator[Row]:
    """The rows of whole lines; ``number`` is the first line's."""
    for at, line in enumerate(block.split(b"\n"), number):
        try:
            text = line.decode()
            row = json.loads(text)
        except ValueError as error:
            if line and not line.isspace():
                bad(at, _line_error(place, at, error))
        except RecursionError:
            bad(at, place.error("the line is nested too deeply", at))
        else:
            place.row = at
            yield at, row


def _line_error(place: Place, number: int, error: ValueError) -> DatasetFormatError:
    if isinstance(error, UnicodeDecodeError):
        return place.error(f"is not UTF-8 ({error.reason} at byte {error.start} of the line); convert it", number)
    hint = "; a .json file holds an array of rows, or one row a line" if place.source.kind == ".json" else ""
    return place.error(f"the line is not valid JSON ({error}){hint}", number)


def numbered_blocks(place: Place, start: int, size: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Pieces of whole lines after line ``start``, each with the number of its first line."""
    number = 1
    with open_bytes(place.source) as stream:
        for block in line_blocks(stream, size):
            lines = line_ends(block)
            if number > start:
                yield number, block
            elif number + lines > start:
                at = 0
                for _ in range(start + 1 - number):
                    at = block.index(b"\n", at) + 1
                if at < len(block):
                    yield start + 1, block[at:]
            number += lines


def line_ends(block: bytes) -> int:
    """Number of line ends; ten times as fast as ``bytes.count``."""
    import numpy as np

    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))


# --- text and csv -----------------------------------------------------------------------------------------------


def _read_txt(place: Place, columns: Collection[str], start: int, bad: OnBad) -> Iterator[Row]:
    for number, block in numbered_blocks(place, start):
        yield from text_lines(block, number, place, bad)


def text_lines(block: bytes, number: int, place: Place, bad: OnBad) -> Iterator[Row]:
    """Every line of whole lines that is not blank, without its line break; ``number`` is the first line's."""
    for at, line in enumerate(block.split(b"\n"), number):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            bad(at, _line_error(place, at, error))
            continue
        if text and not text.isspace():
            place.row = at
            yield at, {TEXT_COLUMN: text}


def _read_csv(place: Place, columns: Collection[str], start: int, bad: OnBad) -> Iterator[Row]:
    """Records under the header; every value is text. Fields in quotes may hold commas and line breaks."""
    csv.field_size_limit(sys.maxsize)
    with open_bytes(place.source) as stream:
        buffered = io.BufferedReader(_Chunks(stream), CHUNK_BYTES)
        # an undecodable byte becomes a lone surrogate, so that its record can be named
        text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="")
        records = csv.reader(text, strict=True)
        header = _next_record(records, place, 0)
        if header is None:
            return
        if repeated := {name for name in header if header.count(name) > 1}:
            raise place.error(f"the header names {', '.join(sorted(repeated))} more than once")
        number = 0
        while True:
            number += 1
            try:
                values = _next_record(records, place, number)
            except DatasetFormatError as error:  # the next record starts with the next line
                if number > start:
                    bad(number, error)
                continue
            if values is None:
                return
            if number <= start:
                continue
            if len(values) != len(header):
                problem = f"has {len(values)} values, but the header names {len(header)} columns"
                bad(number, place.error(problem, number))
            elif _undecodable(values):
                bad(number, place.error("is not UTF-8; convert the file to UTF-8", number))
            else:
                place.row = number
                yield number, dict(zip(header, values, strict=True))


def _next_record(records: Iterator[list[str]], place: Place, number: int) -> list[str] | None:
    """The next record that is no empty line, or None at the end."""
    try:
        return next(filter(None, records), None)
    except csv.Error as error:
        raise place.error(f"not valid csv ({error}); is a quote left open?", number) from None


def _undecodable(values: Iterable[str]) -> bool:
    try:
        for value in values:
            value.encode()
    except UnicodeEncodeError:
        return True
    return False


class _Chunks(io.RawIOBase):
    """A stream as ``io.TextIOWrapper`` wants it, which Arrow's is not."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self.stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


# --- columnar ---------------------------------------------------------------------------------------------------


def _read_parquet(place: Place, columns: Collection[str], start: int, bad: OnBad) -> Iterator[Row]:
    from pyarrow import parquet

    with open_seekable(place.source) as stored, parquet.ParquetFile(stored) as file:
        wanted = [index for index, name in enumerate(file.schema_arrow.names) if name in columns]
        names = [file.schema_arrow.names[index] for index in wanted] or None
        groups, number = groups_after(file, start)
        tell_rows(place.source, lambda: file.metadata.num_rows)
        rows = _rows_at_once(file.metadata, columns)
        for batch in file.iter_batches(batch_size=rows, columns=names, row_groups=groups):
            yield from _batch_rows(batch, number, start, place, bad)
            number += len(batch)


def _rows_at_once(metadata: Any, columns: Collection[str]) -> int:
    """Rows that hold about ``COLUMNAR_BYTES`` in the wanted columns, if no value of theirs repeats."""
    leaves = [n for n in range(metadata.num_columns) if metadata.schema.column(n).path.split(".")[0] in columns]
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    size = sum(group.column(n).total_uncompressed_size for group in groups for n in leaves)
    return max(1, min(COLUMNAR_BATCH, COLUMNAR_BYTES * metadata.num_rows // max(size, 1)))


def tell_rows(source: Source, count: Callable[[], int]) -> None:
    """Count the rows of a compressed columnar file, now that it is unpacked; of others ``SourceFacts`` counts them."""
    if source.meter is not None and source.compression is not None:
        source.meter.rows = count()


def groups_after(file: Any, start: int) -> tuple[list[int], int]:
    """The row groups of a parquet file that hold rows after ``start``, and how many rows come before them."""
    before = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if before + rows > start:
            return list(range(group, file.metadata.num_row_groups)), before
        before += rows
    return [], before


def _read_arrow(place: Place, columns: Collection[str], start: int, bad: OnBad) -> Iterator[Row]:
    number = 0
    with open_seekable(place.source) as stored:
        tell_rows(place.source, lambda: sum(map(len, arrow_batches(stored, ()))))
        for batch in arrow_batches(stored, columns):
            yield from _batch_rows(batch, number, start, place, bad)
            number += len(batch)


def arrow_batches(stored: Any, columns: Collection[str]) -> Iterator[Any]:
    """Record batches of an IPC file or stream with the wanted columns (with all, when it has none of them)."""
    from pyarrow import ipc

    stored.seek(0)
    is_file = stored.read(6) == b"ARROW1"
    opened = ipc.open_file if is_file else ipc.open_stream
    stored.seek(0)
    with opened(stored) as reader:
        wanted = [index for index, name in enumerate(reader.schema.names) if name in columns]
    stored.seek(0)
    with opened(stored, options=ipc.IpcReadOptions(included_fields=wanted or None)) as reader:
        yield from map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader


def _batch_rows(batch: Any, before: int, start: int, place: Place, bad: OnBad) -> Iterator[Row]:
    skipped = min(max(start - before, 0), len(batch))
    rows = max(1, min(COLUMNAR_BATCH, COLUMNAR_BYTES * len(batch) // max(batch.nbytes, 1)))
    for at in range(skipped, len(batch), rows):
        for number, row in _values(batch.slice(at, rows), before + at + 1, place, bad):
            place.row = number
            yield number, row


def _values(batch: Any, number: int, place: Place, bad: OnBad) -> Iterator[Row]:
    """The rows of a batch; ``number`` is the first one's. One that is not UTF-8 is told alone."""
    from pyarrow import types

    nested = [name for name, type in zip(batch.schema.names, batch.schema.types, strict=True) if types.is_nested(type)]
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) > 1:
            for at in range(len(batch)):
                yield from _values(batch.slice(at, 1), number + at, place, bad)
        else:
            bad(number, place.error(f"is not UTF-8 ({error.reason} at byte {error.start} of a value)", number))
        return
    for at, row in enumerate(rows, number):
        for name in nested:
            row[name] = _said(row[name])
        yield at, row


def _said(value: Any) -> Any:
    """A nested value without members that are null: Arrow gives every struct of a column the members of all others."""
    if isinstance(value, dict):
        return {name: _said(member) for name, member in value.items() if member is not None}
    return [_said(member) for member in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Place, Collection[str], int, OnBad], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}
"""Kind of a file -> its reader; ``bad`` raises where the caller gave no ``on_bad``."""
