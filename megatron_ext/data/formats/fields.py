"""Fields of a row, checked: texts, lists, turns of either spelling, tools and tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_ext.data.formats.values import REASONING, Message, RowError
from megatron_ext.errors import unknown

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "tool_calls", "observation": "tool", "tool": "tool",
}  # fmt: skip
OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""``function`` is what ``tool`` was called before; see ``openai_message``."""
TRAINS = ("weight", "train", "training")
"""Of an answer, 0 or false: it is context, not trained. OpenAI's name, then axolotl's."""
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}


def kind_in_words(value: Any) -> str:
    """What JSON calls the type of ``value``, for errors."""
    return _KINDS.get(type(value), "an object")


def text_in(row: Mapping[str, Any], name: str, *, optional: bool = False, within: str = "") -> str:
    """The text in a field, as it is; where it is optional, nothing is the empty text."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    if optional and value is None:
        return ""
    place = f"{within}.{name}" if within else name
    raise RowError(place, "is missing" if name not in row else f"is {kind_in_words(value)}, not text")


def as_list(value: Any, name: str) -> list[Any]:
    """A list, also as the JSON text of one (csv has no lists); nothing is the empty list."""
    if isinstance(value, list):
        return value
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(name, f"is not valid JSON ({error})") from None
    raise RowError(name, f"is {kind_in_words(value)}, not a list")


def turns_in(row: Mapping[str, Any], name: str) -> list[Any]:
    """The turns in a field that must hold some."""
    if name not in row:
        raise RowError(name, "is missing")
    turns = as_list(row[name], name)
    if not turns:
        raise RowError(name, "is empty")
    return turns


def system_in(row: Mapping[str, Any]) -> list[Message]:
    """The system message in field ``system``, if there is one."""
    system = text_in(row, "system", optional=True)
    return [{"role": "system", "content": system}] if system else []


def with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, behind what field ``system`` says unless one of them is a system message already."""
    if any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [*system_in(row), *messages]


def untrained_in(turns: list[Any], name: str, messages: list[Message]) -> frozenset[int]:
    """Indices in ``messages`` of the answers that say of themselves, as ``turns`` of field ``name``, not to be trained.

    The turns are the last of the messages.
    """
    shift = len(messages) - len(turns)
    said = [number for number, turn in enumerate(turns) if not _trains(turn, f"{name}[{number}]")]
    return frozenset(shift + number for number in said if messages[shift + number]["role"] == "assistant")


def sharegpt_message(turn: Any, place: str) -> Message:
    """A turn of ``from`` and ``value``."""
    if not isinstance(turn, dict):
        raise RowError(place, f"is {kind_in_words(turn)}, not an object with from and value")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise RowError(f"{place}.from", "holds an " + unknown("speaker", speaker, SHAREGPT_ROLES))
    role, value = SHAREGPT_ROLES[speaker], text_in(turn, "value", within=place)
    if role == "tool_calls":
        return {"role": "assistant", "content": "", "tool_calls": _sharegpt_calls(value, f"{place}.value")}
    return {"role": role, "content": value}


def openai_message(message: Any, place: str) -> Message:
    """A turn of ``role`` and ``content``; keys without a value are left out, others are kept for the template.

    Reasoning gets the names that templates read, as transformers gives them; OpenAI's older ``function_call`` and role
    ``function`` become a tool call and its answer.
    """
    if not isinstance(message, dict):
        raise RowError(place, f"is {kind_in_words(message)}, not an object with role and content")
    role = message.get("role")
    if role not in OPENAI_ROLES:
        raise RowError(f"{place}.role", "holds an " + unknown("role", role, OPENAI_ROLES))
    kept = {key: value for key, value in message.items() if value is not None and key not in TRAINS}
    kept["role"] = "tool" if role == "function" else role
    calls, call = kept.pop("tool_calls", None), kept.pop("function_call", None)
    if calls and call:
        raise RowError(f"{place}.function_call", "stands beside tool_calls; which of them is meant cannot be told")
    if calls:
        kept["tool_calls"] = _openai_calls(calls, f"{place}.tool_calls")
    elif call:
        calls = [{"type": "function", "function": call}]
        kept["tool_calls"] = _openai_calls(calls, f"{place}.function_call")
    kept["content"] = _content(message, place, optional=bool(calls))
    if len(kept) > 2 and (reasoning := next((kept[name] for name in REASONING if name in kept), None)) is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    return kept


def any_message(turn: Any, place: str) -> Message:
    """A turn of either spelling."""
    if isinstance(turn, dict) and "from" in turn:
        return sharegpt_message(turn, place)
    return openai_message(turn, place)


def tools_in(row: Mapping[str, Any]) -> list[Any] | None:
    """The row's tools in OpenAI's form, or None; the field holds a list or the JSON text of one.

    The field is ``tools``, or ``functions`` as OpenAI called it before.
    """
    name = "tools" if row.get("tools") else "functions"
    tools = row.get(name)
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError(name, f"is not valid JSON ({error})") from None
    tools = as_list(tools, name)
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(name, "holds something that is not an object")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools] or None


def _trains(turn: Any, place: str) -> bool:
    for name in TRAINS:
        value = turn.get(name) if isinstance(turn, dict) else None
        if value is not None and value not in (0, 1):
            raise RowError(f"{place}.{name}", f"is {value!r:.40}; it can be 1 (trained) or 0 (not)")
        if value is not None and not value:
            return False
    return True


def _content(message: Mapping[str, Any], place: str, optional: bool) -> str:
    content = message.get("content")
    if not isinstance(content, list):
        return text_in(message, "content", optional=optional, within=place)
    for number, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise RowError(f"{place}.content[{number}]", 'is not a text part {"type": "text", "text": ...}')
    return "".join(part["text"] for part in content)


def _sharegpt_calls(text: str, place: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form from the JSON text of one call or of a list of calls."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(place, f"is not the JSON of a function call ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise RowError(place, "is not a function call: it needs an object with name and arguments")
    return [
        {"type": "function", "function": {"name": c["name"], "arguments": _arguments(c.get("arguments", {}))}}
        for c in calls
    ]


def _openai_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    result = []
    for number, call in enumerate(as_list(calls, place)):
        function = call.get("function") if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise RowError(f"{place}[{number}]", "is not a tool call: it needs function.name and function.arguments")
        result.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments", {}))}})
    return result


def _arguments(value: Any) -> Any:
    """Arguments as an object: chat templates write them with ``tojson``, which would quote a JSON text twice."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
