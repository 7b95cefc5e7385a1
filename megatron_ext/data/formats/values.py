"""What a row becomes: a text, a conversation, or a preference; and the error of a row that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """

    messages: list[Message]
    tools: list[Any] | None = None
    trained_from: int = 0

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages)


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
    def uses_tools(self) -> bool:
        return any(conversation.uses_tools for conversation in self.conversations())


Parsed = Text | Conversation | Preference
