"""Conversations to text, with the character spans that the assistant wrote: those, and only those, are trained.

A template with ``{% generation %}`` says itself which spans these are; they are taken as transformers takes them.
From any other template they are derived from what it renders: assistant turn i starts where the prompt for it ends
(the rendering of all earlier messages with ``add_generation_prompt``) and ends behind its end marker.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from megatron_ext.data.chat_templates import TemplateSource
from megatron_ext.data.formats import Conversation, Message, Preference, says_something
from megatron_ext.data.skeletons import Inspected, Skeleton, Span
from megatron_ext.data.templating import Program, compiled
from megatron_ext.data.tool_use import ToolUse, probed_tool_use, spelled
from megatron_ext.data.watching import Watched, watched
from megatron_ext.errors import ChatTemplateError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
USER, ASSISTANT, SYSTEM = "mflowprobeuser", "mflowprobeassistant", "mflowprobesystem"
SEQUENCES, VARIANTS = 1024, 8
"""Sequences of roles that are remembered, and skeletons of each: what a template asks about contents divides them."""


class Rendered(NamedTuple):
    """A conversation as text, and the spans ``[start, end)`` of its characters that are trained, ascending."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """A compiled chat template, and the rule which of its text is trained.

    Args:
        source: the template.
        tokens: special tokens by name (``bos_token``, …), which templates read.
        last_turn_only: train the last assistant turn of a conversation alone.
        train_on_prompt: train the whole text of a conversation.
        now: what ``strftime_now`` writes; all processes that render one dataset should be given the same.

    Raises:
        ChatTemplateError: the template is not valid Jinja, or writes a token that the tokenizer does not name.
    """

    def __init__(
        self,
        source: TemplateSource,
        tokens: dict[str, str],
        *,
        last_turn_only: bool = False,
        train_on_prompt: bool = False,
        now: datetime | None = None,
    ) -> None:
        now = now or datetime.now()
        self.name = source.name
        self.last_turn_only, self.train_on_prompt = last_turn_only, train_on_prompt
        self.writes_date = "strftime_now" in source.text
        self.marks_generation = bool(GENERATION.search(source.text))
        self._program = compiled(source, tokens, now)
        self._watched = watched(source, tokens, now)
        self._skeletons: dict[tuple[Any, ...], list[Skeleton | None]] = {}
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
        self.drops_system = self._drops_system(answered)
        """Whether a system message is left out of what is rendered, without a word."""
        self.trains_end_marker = True
        if self.marks_generation and self.end_marker:
            rendered = self._by_jinja(self._program, Conversation(answered), last_only=False)
            self.trains_end_marker = any(rendered.text[:end].endswith(self.end_marker) for _, end in rendered.spans)

    def _drops_system(self, answered: list[Message]) -> bool:
        try:
            return SYSTEM not in self.text([{"role": "system", "content": SYSTEM}, *answered])
        except ChatTemplateError:
            return False

    def text(self, messages: list[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """The messages as text; with ``prompt`` up to where the assistant's next answer would start.

        Raises:
            ChatTemplateError: the template refuses them.
        """
        return self._program.text(messages, tools, prompt=prompt)

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as text, and the spans to train: assistant turns from ``trained_from`` on.

        Raises:
            ChatTemplateError: the template refuses the messages, or its assistant turns cannot be told apart.
        """
        rendered = self._rendered(conversation, self.last_turn_only)
        if not self.train_on_prompt:
            return rendered
        return Rendered(rendered.text, self._all_but_untrained(conversation, len(rendered.text)))

    def is_empty(self, parsed: Conversation | Preference) -> bool:
        """Whether nothing but words of the template would be trained."""
        if isinstance(parsed, Preference):
            return not any(map(says_something, parsed.chosen))
        trained = parsed.answers(last_only=self.last_turn_only)
        if self.train_on_prompt:
            trained = [n for n in range(len(parsed.messages)) if n not in parsed.untrained]
        return not any(says_something(parsed.messages[number]) for number in trained)

    def render_pair(self, preference: Preference) -> tuple[Rendered, Rendered]:
        """Chosen and rejected, each with the prompt in front; the answer is trained, whatever the options say.

        Raises:
            ChatTemplateError: as ``render``.
        """
        chosen, rejected = preference.conversations()
        return self._rendered(chosen, False), self._rendered(rejected, False)

    @cached_property
    def tool_use(self) -> ToolUse:
        """Which parts of a conversation with tools appear in what the template renders, and how calls are spelled."""
        return probed_tool_use(self.text)

    def takes_tools(self) -> bool:
        """Whether tools, tool calls and tool answers all appear in what the template renders."""
        return self.tool_use.tools and self.tool_use.calls

    # --- by skeleton, where there is one ------------------------------------------------------------------------

    def _rendered(self, conversation: Conversation, last_only: bool) -> Rendered:
        if self._watched is not None and conversation.tools is None:
            messages = conversation.messages
            rule = (last_only, conversation.trained_from, conversation.untrained)
            key = (*rule, *[m["role"] for m in messages if len(m) == 2])
            if len(key) == len(messages) + len(rule):
                skeletons = self._skeletons.get(key, ())
                for skeleton in skeletons:
                    if skeleton is not None and (filled := skeleton.filled(messages)):
                        return Rendered(*filled)
                if len(skeletons) < VARIANTS and (skeletons or len(self._skeletons) < SEQUENCES):
                    rendered = self._by_jinja(self._program, conversation, last_only)
                    skeleton = self._skeleton(self._watched, conversation, last_only)
                    right = skeleton is not None and skeleton.filled(messages) == rendered
                    self._skeletons.setdefault(key, []).append(skeleton if right else None)
                    return rendered
        if any(message.get("tool_calls") for message in conversation.messages):
            conversation = replace(conversation, messages=spelled(conversation.messages, self.tool_use))
        return self._by_jinja(self._program, conversation, last_only)

    def _all_but_untrained(self, conversation: Conversation, length: int) -> list[Span]:
        """The spans between the turns of which the row says that they are not trained."""
        if not conversation.untrained:
            return [(0, length)]
        others = frozenset(range(len(conversation.messages))) - conversation.untrained
        flipped = replace(conversation, trained_from=0, untrained=others)
        spans = self._rendered(flipped, False).spans
        edges = [0, *(edge for span in spans for edge in span), length]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def _skeleton(self, watched: Watched, conversation: Conversation, last_only: bool) -> Skeleton | None:
        """The skeleton of conversations like this one, or None if there is none."""
        messages = conversation.messages
        trace = watched.start([message["content"] for message in messages])
        marked = [{"role": m["role"], "content": trace.mark(number)} for number, m in enumerate(messages)]
        try:
            like = replace(conversation, messages=marked)
            return Skeleton.of(*self._by_jinja(watched.program, like, last_only), trace)
        except (Inspected, ChatTemplateError):
            return None

    # --- by Jinja -----------------------------------------------------------------------------------------------

    def _by_jinja(self, program: Program, conversation: Conversation, last_only: bool) -> Rendered:
        messages, tools = conversation.messages, conversation.tools
        answers = conversation.answers(last_only=last_only)
        text = program.text(messages, tools)
        if not self.marks_generation:
            return Rendered(text, self._derived(program, text, messages, tools, answers))
        found = program.generated
        if any(not text.startswith(body, start) for start, body in found):
            raise ChatTemplateError(
                f"chat template {self.name!r} has {{% generation %}} where its place in the text is unknown "
                "(in a macro or a captured block); move it to the top level of the template"
            )
        if last_only or conversation.trained_from or conversation.untrained:
            found = self._of_answers(program, found, text, messages, tools, answers)
        return Rendered(text, [(start, start + len(body)) for start, body in found if body])

    def _of_answers(
        self,
        program: Program,
        found: list[tuple[int, str]],
        text: str,
        messages: list[Message],
        tools: list[Any] | None,
        answers: list[int],
    ) -> list[tuple[int, str]]:
        """The generation blocks of some of the assistant's turns."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(turns) == len(found):
            return [block for number, block in zip(turns, found, strict=True) if number in answers]
        if not answers:
            return []
        prompt = program.text(messages[: answers[0]], tools, prompt=True) if answers[0] else ""
        if turns[-len(answers) :] != answers or not text.startswith(prompt):
            raise ChatTemplateError(
                f"chat template {self.name!r} writes {len(found)} generation blocks for {len(turns)} assistant turns, "
                "so it cannot be told which belong to the answer; give each turn one block"
            )
        return [block for block in found if block[0] >= len(prompt)]

    def _derived(
        self, program: Program, text: str, messages: list[Message], tools: list[Any] | None, answers: list[int]
    ) -> list[Span]:
        spans: list[Span] = []
        for number in answers:
            at = spans[-1][1] if spans else 0
            start, end = (
                self._by_prefix(program, text, messages, tools, number)
                or self._by_sentinel(program, text, messages, tools, number)
                or (0, 0)
            )
            if not at <= start < end:
                raise ChatTemplateError(
                    f"chat template {self.name!r} renders message {number + 1} (assistant) such that its place in the "
                    "text cannot be found; put {% generation %} around what the assistant writes"
                )
            spans.append((start, end))
        return spans

    def _by_prefix(
        self, program: Program, text: str, messages: list[Message], tools: list[Any] | None, number: int
    ) -> Span | None:
        """Span of a message where the text before and up to it does not depend on what follows."""
        if number == 0:
            return None
        last = number == len(messages) - 1
        try:
            before = program.text(messages[:number], tools, prompt=True)
            through = text if last else program.text(messages[: number + 1], tools)
        except ChatTemplateError:
            return None
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            return None
        start = len(before)
        if not self.generation_prompt:  # the template may write a header first that is no prompt for it
            located = self._by_sentinel(program, text, messages, tools, number)
            if located is None and (messages[number]["content"] or "").strip():
                return None
            if located is not None and text[start : located[0]].strip():
                start = located[0]
        if not self.end_marker:
            return start, len(through)
        trimmed = through.rstrip()
        return (start, len(trimmed)) if trimmed.endswith(self.end_marker) and len(trimmed) > start else None

    def _by_sentinel(
        self, program: Program, text: str, messages: list[Message], tools: list[Any] | None, number: int
    ) -> Span | None:
        """Span of a message found by writing something else in its place: what changes is the message."""
        changed = [*messages]
        changed[number] = {**messages[number], "content": ASSISTANT}
        try:
            before, found, after = program.text(changed, tools).partition(ASSISTANT)
        except ChatTemplateError:
            return None
        end = len(text) - len(after)
        if not (found and text.startswith(before) and text.endswith(after) and len(before) <= end):
            return None
        if self.end_marker and after.startswith(self.end_marker):
            end += len(self.end_marker)
        return len(before), end
