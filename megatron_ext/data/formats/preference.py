"""Rows that hold a better and a worse answer: ``chosen`` and ``rejected``, in the shapes of three projects.

- LLaMA-Factory: the prompt in ``conversations`` (from, value) or in ``instruction`` (``input``, ``history``); the
  answers are one turn each, or texts.
- TRL: the prompt in ``prompt``, as text or turns, and the answers likewise; or no prompt of its own: then what both
  answers start with is the prompt.
- AutoAlign (dummy_dpo), and UltraFeedback alike: ``prompt`` is there as text, but both answers are whole conversations.
  These are taken; the text is left aside.

Source: LLaMA-Factory ``data/README.md``; TRL ``docs/source/dataset_formats.md``, ``extract_prompt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from megatron_ext.data.formats.chat import alpaca_prompt, messages_in
from megatron_ext.data.formats.fields import any_message, tools_in, turns_in, with_system
from megatron_ext.data.formats.values import Message, Preference, RowError


def parse_preference(row: Mapping[str, Any]) -> Preference:
    """``chosen`` and ``rejected`` with their prompt, which is one of the shapes above."""
    chosen, rejected = (messages_in(row, name, "assistant") for name in ("chosen", "rejected"))
    prompt: list[Message] = []
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        prompt, chosen, rejected = _split_turns(chosen, rejected)
    elif (given := _given_prompt(row)) is not None:
        prompt = given
    elif isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        prompt, chosen, rejected = _split_texts(row["chosen"], row["rejected"])
    prompt = with_system(row, prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            raise RowError(name, "does not go on with an assistant turn where the prompt ends")
    if chosen == rejected:
        raise RowError("rejected", "is the same as chosen, so nothing is preferred")
    if prompt and prompt[-1]["role"] == "assistant":
        raise RowError("chosen", "follows a prompt that ends with an assistant turn already")
    return Preference(prompt, chosen, rejected, tools_in(row))


def _given_prompt(row: Mapping[str, Any]) -> list[Message] | None:
    """The prompt that a field of its own holds, or None."""
    if row.get("prompt") is not None:
        return messages_in(row, "prompt", "user")
    for name in ("conversations", "messages"):
        if row.get(name) is not None:
            return [any_message(turn, f"{name}[{number}]") for number, turn in enumerate(turns_in(row, name))]
    return alpaca_prompt(row) if row.get("instruction") is not None else None


def _split_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers of two conversations that start alike."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if not shared:
        raise RowError("rejected", "starts with another turn than chosen, so there is no prompt that both answer")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_texts(chosen: str, rejected: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers of two texts that start alike; a space before the first difference belongs to the answers."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    prompt = [{"role": "user", "content": chosen[:shared]}] if shared else []
    return prompt, *([{"role": "assistant", "content": text[shared:]}] for text in (chosen, rejected))  # type: ignore[return-value]
