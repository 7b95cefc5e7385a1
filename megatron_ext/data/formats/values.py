"""What a row becomes: a text, a conversation, or a preference; and the error of a row that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")
Message = dict[str, Any]
"""As chat templates take it: ``role``, ``content`` (text), and for tools ``tool_calls``."""


class RowError(Exception):
    """A row does not fit; ``field`` says where. Becomes a ``RowFormatError`` with file and row."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field, self.problem = field, problem


@dataclass(frozen=True, slots=True)
class Text:
    """A document of plain text: trained as a whole, without a template. It may be empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: turns in order; contents are as in the row.
        tools: tools in OpenAI's form, or None.
        trained_from: index of the first message whose assistant turns are trained; those before belong to the prompt.
        untrained: indices of turns that are never trained, because the row says so.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    trained_from: int = 0
    untrained: frozenset[int] = frozenset()

    def answers(self, *, last_only: bool) -> list[int]:
        """Indices of the assistant turns that are trained; ``last_only`` leaves the last one, if it is."""
        turns = range(self.trained_from, len(self.messages))
        answers = [number for number in turns if self.messages[number]["role"] == "assistant"]
        return [number for number in answers[-1 if last_only else 0 :] if number not in self.untrained]

    @property
    def calls_tools(self) -> bool:
        return any(message["role"] == "tool" or message.get("tool_calls") for message in self.messages)

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or self.calls_tools


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer.

    Attributes:
        prompt: what both answers follow; empty if the answers start the conversation.
        chosen, rejected: the answers, each one assistant turn or more (with tool calls and answers between them).
        tools: tools in OpenAI's form, or None.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None

    def conversations(self) -> tuple[Conversation, Conversation]:
        """The prompt with each answer, chosen first; only the answer is trained."""
        start = len(self.prompt)
        return (
            Conversation([*self.prompt, *self.chosen], self.tools, start),
            Conversation([*self.prompt, *self.rejected], self.tools, start),
        )

    @property
    def calls_tools(self) -> bool:
        return any(conversation.calls_tools for conversation in self.conversations())

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or self.calls_tools


def says_something(message: Message) -> bool:
    """Whether anything is in a message: a text, a tool call or reasoning."""
    return any(message.get(name) for name in ("content", "tool_calls", *REASONING))


Parsed = Text | Conversation | Preference
