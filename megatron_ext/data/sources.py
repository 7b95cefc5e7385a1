"""Rows of JSON, JSONL and parquet files, streamed, with the place of each row.

A reader is one entry in ``READERS``. The number of a row counts from 1; in a JSONL file it is the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from megatron_ext.errors import DatasetFormatError, SourceError

Row = tuple[int, Any]
"""Number of the row in its file, and its value (an object, if the file fits any format)."""

SPACE = re.compile(r"[ \t\r\n]*")
PARQUET_BATCH = 1024


def require_file(path: Path) -> None:
    """Refuse a path that no reader can read, without opening it.

    Raises:
        SourceError: missing, a folder, or of an unsupported kind.
    """
    if path.is_dir():
        raise SourceError(f"{path} is a folder; name the files in it ({', '.join(READERS)})")
    if path.suffix.lower() not in READERS:
        raise SourceError(f"{path} is of no supported kind; supported: {', '.join(READERS)}")
    if not path.exists():
        raise SourceError(f"data file {path} does not exist; check the path")


def read_rows(path: Path, columns: Collection[str] = ()) -> Iterator[Row]:
    """Stream the rows of one file.

    Args:
        path: a .json, .jsonl or .parquet file.
        columns: fields of interest; a columnar file is read only there (all of it when it has none of them).

    Raises:
        SourceError: the file is missing, unreadable, or of an unsupported kind.
        DatasetFormatError: the file is empty or broken; names the place.
    """
    require_file(path)
    empty = True
    try:
        for row in READERS[path.suffix.lower()](path, columns):
            empty = False
            yield row
    except OSError as error:
        raise SourceError(f"cannot read data file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DatasetFormatError(f"{path} is not UTF-8 ({error}); convert it to UTF-8") from None
    if empty:
        raise DatasetFormatError(f"{path} holds no rows; remove it from the list or fill it")


def _read_jsonl(path: Path, columns: Collection[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, _decoded(line, path, number)


def _decoded(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        hint = "; a .json file holds an array of rows, or one row a line" if path.suffix == ".json" else ""
        raise DatasetFormatError(f"{path}, row {number}: the line is not valid JSON ({error}){hint}") from None
    except RecursionError:
        raise DatasetFormatError(f"{path}, row {number}: the line is nested too deeply") from None


def _read_json(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """Elements of an array, decoded one by one, so that the file's text is held but not all its objects.

    A file that starts with an object is read as JSON lines, which some tools write under this name.
    """
    text = path.read_text(encoding="utf-8-sig")
    at = _skip_space(text, 0)
    if text.startswith("{", at):
        yield from _read_jsonl(path, columns)
        return
    if at == len(text):
        return
    if text[at] != "[":
        raise DatasetFormatError(
            f"{path} starts with {text[at]!r}; a .json file holds an array of rows: [{{...}}, ...]"
        )
    decoder, number, at = json.JSONDecoder(), 0, _skip_space(text, at + 1)
    while not text.startswith("]", at):
        number += 1
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise DatasetFormatError(f"{path}, row {number}: not valid JSON ({error})") from None
        except RecursionError:
            raise DatasetFormatError(f"{path}, row {number}: nested too deeply") from None
        yield number, row
        at = _skip_space(text, at)
        if text.startswith(",", at):
            at = _skip_space(text, at + 1)
            if not text.startswith("]", at):
                continue
            raise DatasetFormatError(f"{path}: a comma without a row follows row {number}")
        if not text.startswith("]", at):
            raise DatasetFormatError(f"{path}: the array is not closed after row {number}; is the file truncated?")
    if (rest := _skip_space(text, at + 1)) < len(text):
        raise DatasetFormatError(f"{path}: text follows the end of the array, at character {rest}")


def _skip_space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _read_parquet(path: Path, columns: Collection[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in columns]
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetFormatError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from None


READERS: dict[str, Callable[[Path, Collection[str]], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""Suffix of a file name -> its reader."""
