"""What a chat template writes around the contents of a conversation, found once for each sequence of roles.

Most templates only put contents between fixed words. Then the text of a conversation is a skeleton, which depends on
the roles alone, with the contents (stripped or not) in its gaps, and filling it is far faster than running Jinja.

That this holds is not assumed: the template is run with a mark in place of every content, and each use of a mark is
watched (``watching``). A template may also ask about a content (``'</think>' in content``): the skeleton then holds for
contents that give the same answers. What else looks at a content is left to Jinja, conversation by conversation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from megatron_ext.data.formats import Message

Span = tuple[int, int]
MARK, END = "\U0010fc00", "\U0010fc01"
MARKED = re.compile(f"{MARK}(\\d+){END}")


class Inspected(Exception):
    """The template looks at what a content says."""


class Gap(NamedTuple):
    """A content, or what becomes of another gap.

    Attributes:
        source: number of the message or, with a step, of the other gap.
        step: what is done with the other gap's text; None for a content as it is.
    """

    source: int
    step: Callable[[str], str] | None = None


class Guard(NamedTuple):
    """What a template asked about the text of a gap, and what it was told."""

    gap: int
    question: Callable[[str], bool]
    answer: bool


class Trace:
    """What one run of a template did with contents; gap n is the content of message n.

    Args:
        contents: the contents of the conversation that the questions are answered for.
    """

    def __init__(self, contents: list[str]) -> None:
        self.texts = contents.copy()
        self.gaps = [Gap(number) for number in range(len(contents))]
        self.guards: dict[tuple[Any, ...], Guard] = {}
        self._changes: dict[tuple[Any, ...], int] = {}

    @staticmethod
    def mark(gap: int) -> str:
        """What stands for a gap in the text."""
        return f"{MARK}{gap}{END}"

    def changed(self, gap: int, key: tuple[Any, ...], step: Callable[[str], str]) -> str:
        """The mark of what becomes of a gap, the same for the same change; ``key`` names it."""
        if (gap, *key) not in self._changes:
            try:
                self.texts.append(step(self.texts[gap]))
            except LookupError:
                raise Inspected from None
            self.gaps.append(Gap(gap, step))
            self._changes[gap, *key] = len(self.gaps) - 1
        return self.mark(self._changes[gap, *key])

    def asked(self, gap: int, key: tuple[Any, ...], question: Callable[[str], bool]) -> bool:
        """The answer to a question; ``key`` names it."""
        answer = bool(question(self.texts[gap]))
        self.guards.setdefault((gap, *key), Guard(gap, question, answer))
        return answer


class Skeleton(NamedTuple):
    """Fixed words and gaps in turn, and where the trained spans lie among them.

    Attributes:
        pieces: words; a gap is the empty text.
        holes: index in ``pieces``, and the gap that goes there.
        spans: each as (piece, offset) of its start and of its end.
        gaps: what goes into the holes.
        guards: what must be true of the contents.
    """

    pieces: list[str]
    holes: list[tuple[int, int]]
    spans: list[tuple[int, int, int, int]]
    gaps: list[Gap]
    guards: list[Guard]

    @classmethod
    def of(cls, text: str, spans: list[Span], trace: Trace) -> Skeleton:
        """The skeleton in a text rendered with marks.

        Raises:
            Inspected: a span starts or ends inside a mark.
        """
        pieces: list[str] = []
        holes: list[tuple[int, int]] = []
        starts: list[int] = []
        at = 0
        for found in MARKED.finditer(text):
            starts += [at, found.start()]
            pieces += [text[at : found.start()], ""]
            holes.append((len(pieces) - 1, int(found[1])))
            at = found.end()
        pieces.append(text[at:])
        starts.append(at)
        if MARK in "".join(pieces):
            raise Inspected

        def locate(position: int) -> tuple[int, int]:
            """An edge of a gap belongs to the words beside it."""
            for piece in range(0, len(pieces), 2):
                if starts[piece] <= position <= starts[piece] + len(pieces[piece]):
                    return piece, position - starts[piece]
            raise Inspected

        located = [(*locate(start), *locate(end)) for start, end in spans]
        return cls(pieces, holes, located, trace.gaps, list(trace.guards.values()))

    def filled(self, messages: list[Message]) -> tuple[str, list[Span]] | None:
        """Text and spans with the contents of ``messages``; None where the skeleton does not hold for them."""
        texts: list[str] = []
        try:
            for source, step in self.gaps:
                texts.append(messages[source]["content"] if step is None else step(texts[source]))
        except LookupError:
            return None
        for gap, question, answer in self.guards:
            if question(texts[gap]) is not answer:
                return None
        pieces = self.pieces.copy()
        for at, gap in self.holes:
            pieces[at] = texts[gap]
        starts = list(accumulate(map(len, pieces), initial=0))
        spans = [(starts[a] + x, starts[b] + y) for a, x, b, y in self.spans]
        for start, end in spans:
            if start >= end:  # an empty answer without an end marker
                return None
        return "".join(pieces), spans
