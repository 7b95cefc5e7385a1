"""Conversations to text, with the character spans that the assistant wrote: those, and only those, are trained.

A template with ``{% generation %}`` says itself which spans these are; they are taken as transformers takes them.
From any other template they are derived from what it renders: assistant turn i starts where the prompt for it ends
(the rendering of all earlier messages with ``add_generation_prompt``) and ends behind its end marker.

Source: ``transformers.utils.chat_template_utils`` (environment, filters, globals, tracking of generation blocks).
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ext.data.chat_templates import TemplateSource
from megatron_ext.data.formats import Conversation, Message
from megatron_ext.errors import ChatTemplateError

Span = tuple[int, int]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
USER, ASSISTANT = "mflowprobeuser", "mflowprobeassistant"
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template can raise on messages it was not written for."""


class Rendered(NamedTuple):
    """A conversation as text, and the spans ``[start, end)`` of its characters that are trained, ascending."""

    text: str
    spans: list[Span]


class _Generation(Extension):
    """The ``{% generation %}`` block: notes where its output starts in the text rendered so far."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.length = 0
        self.found: list[tuple[int, str]] = []
        environment.extend(generation=self)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        self.found.append((self.length, text))
        return text


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template.
        tokens: special tokens by name (``bos_token``, …), which templates read.

    Raises:
        ChatTemplateError: the template is not valid Jinja, or writes an ``eos_token`` that the tokenizer lacks.
    """

    def __init__(self, source: TemplateSource, tokens: dict[str, str]) -> None:
        self.name = source.name
        now = datetime.now()  # one moment for all documents of a dataset
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=now.strftime)
        self._generation: _Generation = environment.extensions[_Generation.identifier]  # type: ignore[assignment]
        try:
            names = meta.find_undeclared_variables(environment.parse(source.text))
            self._template = environment.from_string(source.text)
        except jinja2.TemplateError as error:
            line = f" line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ChatTemplateError(f"chat template {self.name!r}{line} is not valid Jinja: {error}") from None
        if "eos_token" in names and "eos_token" not in tokens:
            raise ChatTemplateError(
                f"chat template {self.name!r} ends turns with eos_token, but the tokenizer names none; "
                "set eos_token in tokenizer_config.json or choose another template"
            )
        # ready-made, because Template.generate() would gather the globals anew for every document
        self._variables = {**self._template.globals, **tokens, "documents": None}
        self.writes_date = "strftime_now" in source.text
        self.marks_generation = bool(GENERATION.search(source.text))
        self._learn()

    def _learn(self) -> None:
        """Probe what a turn looks like: the prompt for an answer, and the marker that ends one."""
        question = [{"role": "user", "content": USER}]
        answered = [*question, {"role": "assistant", "content": ASSISTANT}]
        try:
            plain, prompt, full = self.text(question), self.text(question, prompt=True), self.text(answered)
            self.probed = True
        except ChatTemplateError:  # a template for conversations of a special kind
            plain = prompt = full = ""
            self.probed = False
        self.generation_prompt = prompt[len(plain) :] if prompt.startswith(plain) else ""
        self.end_marker = full.partition(ASSISTANT)[2].rstrip()
        """What follows an answer, white space at the end left out; empty when the template writes nothing there."""
        self.trains_end_marker = True
        if self.marks_generation and self.end_marker:
            rendered = self.render(Conversation(answered))
            self.trains_end_marker = any(rendered.text[:end].endswith(self.end_marker) for _, end in rendered.spans)

    def text(self, messages: list[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """The messages as text; with ``prompt`` up to where the assistant's next answer would start.

        Raises:
            ChatTemplateError: the template refuses them.
        """
        return "".join(self._blocks(messages, tools, prompt))

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as text, and the spans to train.

        Raises:
            ChatTemplateError: the template refuses the messages, or its assistant turns cannot be told apart.
        """
        messages, tools = conversation.messages, conversation.tools
        if not self.marks_generation:
            text = self.text(messages, tools)
            return Rendered(text, self._derived(text, messages, tools))
        text = self.text(messages, tools)
        spans = [(start, start + len(body)) for start, body in self._generation.found if body]
        if any(not text.startswith(body, start) for start, body in self._generation.found):
            raise ChatTemplateError(
                f"chat template {self.name!r} has {{% generation %}} where its place in the text is unknown "
                "(in a macro or a captured block); move it to the top level of the template"
            )
        return Rendered(text, spans)

    def takes_tools(self) -> bool:
        """Whether tools, tool calls and tool answers all appear in what the template renders."""
        name, argument, value, answer, tool = (f"mflowprobe{word}" for word in ("call", "key", "value", "back", "tool"))
        call = {"type": "function", "function": {"name": name, "arguments": {argument: value}}}
        messages = [
            {"role": "user", "content": USER},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": answer},
            {"role": "assistant", "content": ASSISTANT},
        ]
        parameters = {"type": "object", "properties": {}}
        tools = [{"type": "function", "function": {"name": tool, "description": tool, "parameters": parameters}}]
        try:
            text = self.text(messages, tools)
        except ChatTemplateError:
            return False
        return all(word in text for word in (name, argument, value, answer, tool, ASSISTANT))

    def _blocks(self, messages: list[Message], tools: list[Any] | None, prompt: bool) -> list[str]:
        generation = self._generation
        generation.length, generation.found = 0, []
        blocks = []
        variables = {**self._variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            for block in self._template.root_render_func(self._template.new_context(variables, shared=True)):
                generation.length += len(block)
                blocks.append(block)
        except TEMPLATE_FAULTS as error:
            raise ChatTemplateError(f"chat template {self.name!r} refuses the conversation: {error}") from None
        except RecursionError:
            raise ChatTemplateError(f"chat template {self.name!r} never ends") from None
        return blocks

    def _derived(self, text: str, messages: list[Message], tools: list[Any] | None) -> list[Span]:
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            at = spans[-1][1] if spans else 0
            start, end = (
                self._by_prefix(text, messages, tools, number)
                or self._by_sentinel(text, messages, tools, number)
                or (0, 0)
            )
            if not at <= start < end:
                raise ChatTemplateError(
                    f"chat template {self.name!r} renders message {number + 1} (assistant) such that its place in the "
                    "text cannot be found; put {% generation %} around what the assistant writes"
                )
            spans.append((start, end))
        return spans

    def _by_prefix(self, text: str, messages: list[Message], tools: list[Any] | None, number: int) -> Span | None:
        """Span of a message where the text before and up to it does not depend on what follows."""
        if number == 0:
            return None
        last = number == len(messages) - 1
        try:
            before = self.text(messages[:number], tools, prompt=True)
            through = text if last else self.text(messages[: number + 1], tools)
        except ChatTemplateError:
            return None
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            return None
        start = len(before)
        if not self.generation_prompt and (content := messages[number]["content"].strip()):
            at = text.find(content, start)
            if at < 0:
                return None
            if text[start:at].strip():  # a template without a prompt for answers writes their header first
                start = at
        if not self.end_marker:
            return start, len(through)
        trimmed = through.rstrip()
        return (start, len(trimmed)) if trimmed.endswith(self.end_marker) and len(trimmed) > start else None

    def _by_sentinel(self, text: str, messages: list[Message], tools: list[Any] | None, number: int) -> Span | None:
        """Span of a message found by writing something else in its place: what changes is the message."""
        changed = [*messages]
        changed[number] = {**messages[number], "content": ASSISTANT}
        try:
            before, found, after = self.text(changed, tools).partition(ASSISTANT)
        except ChatTemplateError:
            return None
        end = len(text) - len(after)
        if not (found and text.startswith(before) and text.endswith(after) and len(before) <= end):
            return None
        if self.end_marker and after.startswith(self.end_marker):
            end += len(self.end_marker)
        return len(before), end


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
