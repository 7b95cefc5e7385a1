"""Rows that become one document: plain text, and conversations in four shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_ext.data.formats.fields import (
    any_message,
    as_list,
    openai_message,
    sharegpt_message,
    system_in,
    text_in,
    tools_in,
    turns_in,
    untrained_in,
    with_system,
)
from megatron_ext.data.formats.values import Conversation, Message, RowError, Text


def parse_text(row: Mapping[str, Any]) -> Text:
    """``text``: a document for pretraining."""
    return Text(text_in(row, "text"))


def parse_alpaca(row: Mapping[str, Any]) -> Conversation:
    """``instruction``, ``output``, and where there are any ``input``, ``system`` and ``history``."""
    messages = alpaca_prompt(row)
    messages.append({"role": "assistant", "content": text_in(row, "output")})
    return Conversation(messages)


def alpaca_prompt(row: Mapping[str, Any]) -> list[Message]:
    """Everything before the answer; the input stands on a line of its own under the instruction, if both are there."""
    messages = system_in(row)
    for number, pair in enumerate(as_list(row.get("history"), "history")):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise RowError(f"history[{number}]", "is not a pair [question, answer] of texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction, more = text_in(row, "instruction"), text_in(row, "input", optional=True)
    messages.append({"role": "user", "content": "\n".join(part for part in (instruction, more) if part)})
    return messages


def parse_sharegpt(row: Mapping[str, Any]) -> Conversation:
    """``conversations`` of ``from`` and ``value``; ``system`` and ``tools`` may be there."""
    return _conversation(row, "conversations", sharegpt_message)


def parse_messages(row: Mapping[str, Any]) -> Conversation:
    """``messages`` (or ``conversations``) of ``role`` and ``content`` as OpenAI has them; ``system``, ``tools`` too."""
    name = "conversations" if "messages" not in row and "conversations" in row else "messages"
    return _conversation(row, name, openai_message)


def parse_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """``prompt`` and ``completion``, texts or lists of turns; only the completion is trained."""
    prompt, completion = messages_in(row, "prompt", "user"), messages_in(row, "completion", "assistant")
    messages = with_system(row, [*prompt, *completion])
    start = len(messages) - len(completion)
    if not any(message["role"] == "assistant" for message in completion):
        raise RowError("completion", "has no assistant turn, so there is nothing to train on")
    answers = row["completion"] if isinstance(row["completion"], list) else [row["completion"]]
    return Conversation(messages, tools_in(row), start, untrained_in(answers, "completion", messages))


def messages_in(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """A field that holds a text (of ``role``), one turn, or a list of turns in either spelling."""
    value = row.get(name)
    if isinstance(value, dict):
        return [any_message(value, name)]
    if isinstance(value, list):
        return [any_message(turn, f"{name}[{number}]") for number, turn in enumerate(turns_in(row, name))]
    return [{"role": role, "content": text_in(row, name)}]


def _conversation(row: Mapping[str, Any], name: str, read: Callable[[Any, str], Message]) -> Conversation:
    """The turns of a field and what stands beside it."""
    turns = turns_in(row, name)
    own = [read(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]
    if not any(message["role"] == "assistant" for message in own):
        raise RowError(name, "has no assistant turn, so there is nothing to train on")
    messages = with_system(row, own)
    return Conversation(messages, tools_in(row), 0, untrained_in(turns, name, messages))
