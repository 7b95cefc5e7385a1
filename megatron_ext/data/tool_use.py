"""What a chat template does with tools, and how it wants tool calls spelled: found by rendering a short conversation.

Templates differ in what they take a call for: its arguments as an object, which they write as JSON themselves, or as
JSON text, which they join to other words; beside the call an empty content, or none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

from megatron_ext.data.formats import Conversation, Message, Preference
from megatron_ext.errors import ChatTemplateError

CALL_ID = "mflow0001"
"""Mistral's templates take ids of nine letters and digits alone."""
NAME, KEY, VALUE, ANSWER, TOOL, AFTER = (
    f"mflowprobe{word}" for word in ("call", "key", "value", "back", "tool", "end")
)


class ToolUse(NamedTuple):
    """What becomes of tools.

    Attributes:
        tools: whether the tools that may be called are rendered.
        calls: whether calls and their answers are.
        text_arguments: arguments are to be JSON text, not an object.
        null_content: a turn without a text of its own is to have no content, not an empty one.
        refusal: what the template said of the first spelling if it took none.
    """

    tools: bool = False
    calls: bool = False
    text_arguments: bool = False
    null_content: bool = False
    refusal: str = ""

    def lacks(self, parsed: Conversation | Preference) -> str:
        """What of a conversation has no place in the template, in words; empty if nothing."""
        if parsed.tools and not self.tools:
            return "tools"
        return "" if self.calls or not parsed.calls_tools else "tool calls or tool answers"


def probed_tool_use(render: Callable[[list[Message], list[Any] | None], str]) -> ToolUse:
    """Render a conversation with tools in every spelling, and take the first that all of it appears in."""
    parameters = {"type": "object", "properties": {}}
    tools = [{"type": "function", "function": {"name": TOOL, "description": TOOL, "parameters": parameters}}]
    best, refusal = ToolUse(), ""
    for null_content, text_arguments in product((False, True), repeat=2):
        use = ToolUse(False, False, text_arguments, null_content)
        try:
            text = render(spelled(_conversation(), use), tools)
        except ChatTemplateError as error:
            refusal = refusal or str(error)
            continue
        shown = use._replace(tools=TOOL in text, calls=all(word in text for word in (NAME, KEY, VALUE, ANSWER, AFTER)))
        if (shown.calls, shown.tools) > (best.calls, best.tools):
            best = shown
    return best if best.calls else best._replace(refusal=refusal)


def spelled(messages: list[Message], use: ToolUse) -> list[Message]:
    """The messages with their tool calls as the template wants them."""
    if not (use.text_arguments or use.null_content):
        return messages
    return [_spelled(message, use) if message.get("tool_calls") else message for message in messages]


def _spelled(message: Message, use: ToolUse) -> Message:
    message = {**message}
    if use.null_content and not message["content"]:
        message["content"] = None
    if use.text_arguments:
        message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return message


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _conversation() -> list[Message]:
    call = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    return [
        {"role": "user", "content": "mflowprobeuser"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": NAME, "tool_call_id": CALL_ID, "content": ANSWER},
        {"role": "assistant", "content": AFTER},
    ]
