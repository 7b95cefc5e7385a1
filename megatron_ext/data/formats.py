"""Dataset formats: how a row becomes a conversation. A format is one entry in ``FORMATS``.

A conversation is a list of messages as chat templates take them: ``role``, ``content`` (text), and for tools
``tool_calls``. Contents pass through unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import DatasetFormatError, unknown

Message = dict[str, Any]
AUTO = "auto"
SNIFFED_ROWS = 100


class RowError(Exception):
    """A row does not fit; ``field`` says where. Becomes a ``DatasetFormatError`` with file and row."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")


@dataclass(frozen=True)
class Conversation:
    """One training document before rendering."""

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages)


@dataclass(frozen=True)
class Format:
    """How rows of one shape are read.

    Attributes:
        fields: every field it reads; others are ignored.
        turns: the field that holds the assistant's turns.
        shape: what a row must have, in words.
        fits: whether a row has that shape (its key fields only).
        parse: the row's conversation, or ``RowError``.
    """

    fields: tuple[str, ...]
    turns: str
    shape: str
    fits: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], Conversation]


def parse_row(row: Any, format: str, path: Path, number: int) -> Conversation:
    """The conversation in ``row``, which is number ``number`` of ``path``.

    Raises:
        DatasetFormatError: names file, row and field.
    """
    try:
        if not isinstance(row, dict):
            raise DatasetFormatError(f"{path}, row {number}: is {kind_in_words(row)}, not an object with fields")
        conversation = FORMATS[format].parse(row)
        if not any(m["role"] == "assistant" for m in conversation.messages):
            problem = "has no assistant turn, so there is nothing to train on"
            raise RowError(FORMATS[format].turns, problem + _hint(row))
        return conversation
    except RowError as error:
        raise DatasetFormatError(f"{path}, row {number}: {error} (format {format})") from None


def detect_format(rows: Iterable[tuple[int, Any]], path: Path) -> tuple[str, str]:
    """Which format the first rows of a file have, and why.

    Returns:
        Name of the format; a sentence that says what decided.

    Raises:
        DatasetFormatError: no format fits, or several fit equally well; lists the formats.
    """
    sample = [row for _, row in rows]
    counts = {
        name: sum(1 for row in sample if isinstance(row, dict) and format.fits(row)) for name, format in FORMATS.items()
    }
    best = max(counts.values())
    named = [name for name, count in counts.items() if count == best]
    known = "; ".join(f"{name}: {format.shape}" for name, format in FORMATS.items())
    if best == 0:
        first = sample[0]
        found = (
            f"has the fields {', '.join(sorted(first)) or '(none)'}"
            if isinstance(first, dict)
            else f"is {kind_in_words(first)}"
        )
        raise DatasetFormatError(f"{path} fits no known format: row 1 {found}{_hint(first)}. Known: {known}")
    if len(named) > 1:
        raise DatasetFormatError(f"{path} fits {' and '.join(named)} alike; name one with --format. Known: {known}")
    share = "all" if best == len(sample) else f"{best}"
    return named[0], f"{path.name}: {share} of the first {len(sample)} rows have {FORMATS[named[0]].shape}"


def require_format(name: str) -> str:
    """``name`` if it is a format or ``auto``, else ``DatasetFormatError`` with what there is."""
    if name not in (AUTO, *FORMATS):
        raise DatasetFormatError(
            unknown("dataset format", name, [AUTO, *FORMATS], "add one in megatron_ext/data/formats.py")
        )
    return name


def _hint(row: Any) -> str:
    pairs = isinstance(row, dict) and {"chosen", "rejected"} <= row.keys()
    return "; preference pairs (chosen, rejected) are not conversations to fine-tune on" if pairs else ""


# --- alpaca -----------------------------------------------------------------------------------------------------


def _parse_alpaca(row: Mapping[str, Any]) -> Conversation:
    messages = _system(row)
    for number, pair in enumerate(_list(row.get("history"), "history")):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise RowError(f"history[{number}]", "is not a pair [question, answer] of texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction, more = _text(row, "instruction"), _text(row, "input", optional=True)
    messages.append({"role": "user", "content": f"{instruction}\n{more}" if more else instruction})
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return Conversation(messages)


# --- sharegpt ---------------------------------------------------------------------------------------------------

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "tool_calls", "observation": "tool", "tool": "tool",
}  # fmt: skip


def _parse_sharegpt(row: Mapping[str, Any]) -> Conversation:
    messages = _system(row)
    for number, turn in enumerate(_turns(row, "conversations")):
        place = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise RowError(place, f"is {kind_in_words(turn)}, not an object with from and value")
        speaker = turn.get("from")
        if speaker not in SHAREGPT_ROLES:
            raise RowError(f"{place}.from", "holds an " + unknown("speaker", speaker, SHAREGPT_ROLES))
        role, value = SHAREGPT_ROLES[speaker], _text(turn, "value", within=place)
        if role == "tool_calls":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(value, f"{place}.value")})
        else:
            messages.append({"role": role, "content": value})
    return Conversation(messages, _tools(row))


def _calls(text: str, place: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form from the JSON text of one call or of a list of calls."""
    try:
        calls = json.loads(text)
    except ValueError as error:
        raise RowError(place, f"is not the JSON of a function call ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise RowError(place, "is not a function call: it needs an object with name and arguments")
    return [
        {"type": "function", "function": {"name": c["name"], "arguments": _arguments(c.get("arguments", {}))}}
        for c in calls
    ]


# --- messages ---------------------------------------------------------------------------------------------------

OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool")


def _parse_messages(row: Mapping[str, Any]) -> Conversation:
    name = _messages_field(row)
    messages = []
    for number, message in enumerate(_turns(row, name)):
        place = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise RowError(place, f"is {kind_in_words(message)}, not an object with role and content")
        role = message.get("role")
        if role not in OPENAI_ROLES:
            raise RowError(f"{place}.role", "holds an " + unknown("role", role, OPENAI_ROLES))
        kept = {key: value for key, value in message.items() if value is not None}
        if calls := kept.pop("tool_calls", None):
            kept["tool_calls"] = _openai_calls(calls, f"{place}.tool_calls")
        kept["content"] = _content(message, place, optional=bool(calls))
        messages.append(kept)
    return Conversation(messages, _tools(row))


def _content(message: Mapping[str, Any], place: str, optional: bool) -> str:
    content = message.get("content")
    if not isinstance(content, list):
        return _text(message, "content", optional=optional, within=place)
    for number, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise RowError(f"{place}.content[{number}]", 'is not a text part {"type": "text", "text": ...}')
    return "".join(part["text"] for part in content)


def _openai_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    result = []
    for number, call in enumerate(_list(calls, place)):
        function = call.get("function") if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise RowError(f"{place}[{number}]", "is not a tool call: it needs function.name and function.arguments")
        result.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments", {}))}})
    return result


def _messages_field(row: Mapping[str, Any]) -> str:
    return "conversations" if "messages" not in row and "conversations" in row else "messages"


# --- shared -----------------------------------------------------------------------------------------------------


def _arguments(value: Any) -> Any:
    """Arguments as an object: chat templates write them with ``tojson``, which would quote a JSON text twice."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _system(row: Mapping[str, Any]) -> list[Message]:
    system = _text(row, "system", optional=True)
    return [{"role": "system", "content": system}] if system else []


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The row's tools in OpenAI's form, or None; the field holds a list or the JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError("tools", f"is not valid JSON ({error})") from None
    tools = _list(tools, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools", "holds something that is not an object")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools] or None


def _turns(row: Mapping[str, Any], name: str) -> list[Any]:
    if name not in row:
        raise RowError(name, "is missing")
    turns = _list(row[name], name)
    if not turns:
        raise RowError(name, "is empty")
    return turns


def _list(value: Any, name: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(name, f"is {kind_in_words(value)}, not a list")
    return value


def _text(row: Mapping[str, Any], name: str, *, optional: bool = False, within: str = "") -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if optional and value is None:
        return ""
    place = f"{within}.{name}" if within else name
    raise RowError(place, "is missing" if name not in row else f"is {kind_in_words(value)}, not text")


def kind_in_words(value: Any) -> str:
    """What JSON calls the type of ``value``, for errors."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _first_turn_has(key: str, *names: str) -> Callable[[Mapping[str, Any]], bool]:
    def fits(row: Mapping[str, Any]) -> bool:
        turns = next((row[name] for name in names if isinstance(row.get(name), list)), None)
        return bool(turns) and isinstance(turns[0], dict) and key in turns[0]

    return fits


FORMATS: dict[str, Format] = {
    "alpaca": Format(
        fields=("instruction", "input", "output", "system", "history"),
        turns="output",
        shape="instruction and output (input, system and history may be there)",
        fits=lambda row: "instruction" in row and "output" in row,
        parse=_parse_alpaca,
    ),
    "sharegpt": Format(
        fields=("conversations", "system", "tools"),
        turns="conversations",
        shape="a list conversations of from and value",
        fits=_first_turn_has("from", "conversations"),
        parse=_parse_sharegpt,
    ),
    "messages": Format(
        fields=("messages", "conversations", "tools"),
        turns="messages",
        shape="a list messages of role and content",
        fits=_first_turn_has("role", "messages", "conversations"),
        parse=_parse_messages,
    ),
}
"""Name -> format."""

FIELDS = frozenset(name for format in FORMATS.values() for name in format.fields)
"""Every field that some format reads."""
