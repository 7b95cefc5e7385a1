"""The table of dataset formats, reading a row by one of them, and deciding which one rows have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.data.formats.chat import (
    parse_alpaca,
    parse_messages,
    parse_prompt_completion,
    parse_sharegpt,
    parse_text,
)
from megatron_ext.data.formats.fields import kind_in_words
from megatron_ext.data.formats.preference import parse_preference
from megatron_ext.data.formats.values import Parsed, RowError
from megatron_ext.errors import DatasetFormatError, RowFormatError, unknown

if TYPE_CHECKING:
    from megatron_ext.data.sources import Source

AUTO = "auto"
SNIFFED_ROWS = 100
NO_COLUMNS: Mapping[str, str] = {}
ROOT = re.compile(r"[^.\[]+")


@dataclass(frozen=True)
class Format:
    """How rows of one shape are read.

    Attributes:
        fields: every field it reads; others are ignored.
        shape: what a row must have, in words.
        fits: whether a row has that shape (its key fields only).
        parse: what the row holds, or ``RowError``.
        rank: of several formats that fit a row, ``auto`` takes the highest; a preference may hold a conversation,
            and a conversation may stand beside its own plain text.
    """

    fields: tuple[str, ...]
    shape: str
    fits: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], Parsed]
    rank: int = 1


def parse_row(
    row: Any, format: str, source: Source | Path | str, number: int, columns: Mapping[str, str] = NO_COLUMNS
) -> Parsed:
    """What ``row`` holds, which is number ``number`` of ``source``: a Text, a Conversation or a Preference.

    Args:
        row: the row.
        format: a name in ``FORMATS``.
        source, number: its place, for the error.
        columns: field of the format -> its name in the file, where it differs.

    Raises:
        RowFormatError: the row does not fit; names file, row and field.
    """
    try:
        if type(row) is not dict:
            raise RowFormatError(source, number, None, f"is {kind_in_words(row)}, not an object with fields")
        return FORMATS[format].parse(renamed(row, columns) if columns else row)
    except RowError as error:
        field, hint = error.field, ""
        if columns:
            field = ROOT.sub(lambda name: columns.get(name[0], name[0]), field, count=1)
        if format != "preference" and {"chosen", "rejected"} <= row.keys():
            hint = "; it has chosen and rejected, which format preference reads"
        raise RowFormatError(source, number, field, f"{error.problem}{hint} (format {format})") from None


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the format's names for its fields; a column that stands for another field is only that."""
    taken = {*columns, *columns.values()}
    result = {name: value for name, value in row.items() if name not in taken}
    result.update({field: row[name] for field, name in columns.items() if name in row})
    return result


def detect_format(
    rows: Iterable[tuple[int, Any]], source: Source | Path, columns: Mapping[str, str] = NO_COLUMNS
) -> tuple[str, str]:
    """Which format the first rows of a file have, and why.

    Returns:
        Name of the format; a sentence that says what decided.

    Raises:
        DatasetFormatError: no format fits, or several fit equally well; lists the formats.
    """
    sample = [renamed(row, columns) if isinstance(row, dict) else row for _, row in rows]
    counts = dict.fromkeys(FORMATS, 0)
    for row in sample:
        for name in _formats_of(row):
            counts[name] += 1
    best = max(counts.values())
    named = [name for name, count in counts.items() if count == best]
    known = "; ".join(f"{name}: {format.shape}" for name, format in FORMATS.items())
    if best == 0:
        raise DatasetFormatError(f"{source} fits no known format: {_found(sample, columns)}. Known: {known}")
    if len(named) > 1:
        raise DatasetFormatError(f"{source} fits {' and '.join(named)} alike; name one with --format. Known: {known}")
    share = "all" if best == len(sample) else f"{best}"
    why = f"{source.name}: {share} of the first {len(sample)} rows have {FORMATS[named[0]].shape}"
    return named[0], why + (f" ({_mapped(columns)})" if columns else "")


def require_format(name: str) -> str:
    """``name`` if it is a format or ``auto``, else ``DatasetFormatError`` with what there is."""
    if name not in (AUTO, *FORMATS):
        raise DatasetFormatError(
            unknown("dataset format", name, [AUTO, *FORMATS], "add one in megatron_ext/data/formats/table.py")
        )
    return name


def require_columns(columns: Mapping[str, str], format: str) -> None:
    """Refuse a mapping of a field that the format does not read, or of one column to two fields.

    Raises:
        DatasetFormatError: names the field and what the format reads.
    """
    fields = FIELDS if format == AUTO else FORMATS[format].fields
    whose = "any format" if format == AUTO else f"format {format}"
    for field, column in columns.items():
        if field not in fields:
            raise DatasetFormatError(f"columns: {unknown('field', field, fields, f'fields of {whose}')}")
        if list(columns.values()).count(column) > 1:
            raise DatasetFormatError(f"columns: {column!r} stands for several fields; name it once")


def wanted_columns(format: str, columns: Mapping[str, str] = NO_COLUMNS) -> frozenset[str]:
    """The columns of a file that a format (or ``auto``) reads."""
    fields = FIELDS if format == AUTO else FORMATS[format].fields
    return frozenset(columns.get(field, field) for field in fields)


def _formats_of(row: Any) -> list[str]:
    """The formats that fit a row, those of the highest rank only."""
    fitting = [name for name, format in FORMATS.items() if format.fits(row)] if isinstance(row, dict) else []
    highest = max((FORMATS[name].rank for name in fitting), default=0)
    return [name for name in fitting if FORMATS[name].rank == highest]


def _found(sample: list[Any], columns: Mapping[str, str]) -> str:
    if not sample or not isinstance(sample[0], dict):
        return f"row 1 is {kind_in_words(sample[0])}" if sample else "it has no rows"
    mapped = f", with {_mapped(columns)}" if columns else "; name columns that are called otherwise with --columns"
    return f"row 1 has the fields {', '.join(sorted(sample[0])) or '(none)'}{mapped}"


def _mapped(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{field} from {column}" for field, column in columns.items())


def _first_turn_has(key: str, *names: str) -> Callable[[Mapping[str, Any]], bool]:
    def fits(row: Mapping[str, Any]) -> bool:
        turns = next((row[name] for name in names if row.get(name)), None)
        if isinstance(turns, str):  # a csv holds the JSON text of a list
            return turns.lstrip().startswith("[") and f'"{key}"' in turns
        return isinstance(turns, list) and isinstance(turns[0], dict) and key in turns[0]

    return fits


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


FORMATS: dict[str, Format] = {
    "text": Format(
        fields=("text",),
        shape="text, a document of plain text",
        fits=lambda row: isinstance(row.get("text"), str),
        parse=parse_text,
        rank=0,
    ),
    "alpaca": Format(
        fields=("instruction", "input", "output", "system", "history"),
        shape="instruction and output (input, system and history may be there)",
        fits=lambda row: "instruction" in row and "output" in row,
        parse=parse_alpaca,
    ),
    "sharegpt": Format(
        fields=("conversations", "system", "tools", "functions"),
        shape="a list conversations of from and value",
        fits=_first_turn_has("from", "conversations"),
        parse=parse_sharegpt,
    ),
    "messages": Format(
        fields=("messages", "conversations", "system", "tools", "functions"),
        shape="a list messages of role and content",
        fits=_first_turn_has("role", "messages", "conversations"),
        parse=parse_messages,
    ),
    "prompt_completion": Format(
        fields=("prompt", "completion", "system", "tools", "functions"),
        shape="prompt and completion, texts or lists of turns",
        fits=_has("prompt", "completion"),
        parse=parse_prompt_completion,
    ),
    "preference": Format(
        fields=(
            *("chosen", "rejected", "prompt", "conversations", "messages"),
            *("instruction", "input", "history", "system", "tools", "functions"),
        ),
        shape="chosen and rejected (prompt, conversations or instruction may be there)",
        fits=_has("chosen", "rejected"),
        parse=parse_preference,
        rank=2,
    ),
}
"""Name -> format."""

FIELDS = frozenset(name for format in FORMATS.values() for name in format.fields)
"""Every field that some format reads."""
