"""What a chat template writes around the contents of a conversation, found once for each sequence of roles.

Most templates only put contents between fixed words. Then the text of a conversation is a skeleton, which depends on
the roles alone, with the contents (stripped or not) in its gaps, and filling it is far faster than running Jinja.

That this holds is not assumed: the template is run with a mark in place of every content, in a copy whose syntax tree
watches each use of a value. Writing, joining and stripping contents is let through; whatever else could see what a
content says (a comparison, a condition, a filter, a method, an index, …) raises ``Inspected``, and conversations of
these roles are rendered by Jinja one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import accumulate
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from megatron_ext.data.chat_templates import TemplateSource
from megatron_ext.data.formats import Message
from megatron_ext.data.templating import Program, Sandbox

Span = tuple[int, int]
MARK, END, LEFT, RIGHT = "\U0010fc00", "\U0010fc01", "\u2003", "\u2002"
"""A mark is LEFT MARK number END RIGHT: a private name between two kinds of white space, which stripping takes away."""
MARKED = re.compile(f"({LEFT}?){MARK}(\\d+){END}({RIGHT}?)")
PLAIN = (str, int, float, type(None), Undefined, LoopContext, Macro, Namespace)
TYPE_TESTS = {"defined", "undefined", "none", "string", "mapping", "number", "integer", "float", "boolean",
              "sequence", "iterable", "callable", "true", "false"}  # fmt: skip
STRUCTURE_FILTERS = {"length", "count", "first", "last", "list", "reverse"}
SAME, STRIP, LEFT_STRIP, RIGHT_STRIP = range(4)
STRIPPERS: dict[int, Callable[[str], str]] = {STRIP: str.strip, LEFT_STRIP: str.lstrip, RIGHT_STRIP: str.rstrip}


class Inspected(Exception):
    """The template looks at what a content says."""


def mark(number: int) -> str:
    """What stands for the content of message ``number``."""
    return f"{LEFT}{MARK}{number}{END}{RIGHT}"


class Skeleton(NamedTuple):
    """Fixed words and gaps in turn, and where the trained spans lie among them.

    Attributes:
        pieces: words; a gap is the empty text.
        gaps: index in ``pieces``, message, and how its content is stripped.
        spans: each as (piece, offset) of its start and of its end.
    """

    pieces: list[str]
    gaps: list[tuple[int, int, int]]
    spans: list[tuple[int, int, int, int]]

    @classmethod
    def of(cls, text: str, spans: list[Span]) -> Skeleton:
        """The skeleton in a text rendered with marks.

        Raises:
            Inspected: a span starts or ends inside a mark.
        """
        pieces: list[str] = []
        gaps: list[tuple[int, int, int]] = []
        starts: list[int] = []
        at = 0
        for found in MARKED.finditer(text):
            starts += [at, found.start()]
            pieces += [text[at : found.start()], ""]
            stripped = {(True, True): SAME, (False, True): LEFT_STRIP, (True, False): RIGHT_STRIP}
            how = stripped.get((bool(found[1]), bool(found[3])), STRIP)
            gaps.append((len(pieces) - 1, int(found[2]), how))
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

        return cls(pieces, gaps, [(*locate(start), *locate(end)) for start, end in spans])

    def filled(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Text and spans with the contents of ``messages``; spans without a character are left out."""
        pieces = self.pieces.copy()
        for at, number, how in self.gaps:
            content = messages[number]["content"]
            pieces[at] = STRIPPERS[how](content) if how else content
        starts = list(accumulate(map(len, pieces), initial=0))
        spans = [(starts[a] + x, starts[b] + y) for a, x, b, y in self.spans]
        return "".join(pieces), [span for span in spans if span[0] < span[1]]


def watched(source: TemplateSource, tokens: dict[str, str], now: datetime) -> Program | None:
    """A copy of a valid template that raises ``Inspected`` where it looks at a mark; None where that is not certain."""
    if any(character in text for text in (source.text, *tokens.values()) for character in (MARK, END, LEFT, RIGHT)):
        return None
    environment = Sandbox(now)
    environment.filters.update(WATCHERS)
    try:
        tree = _Watcher().visit(environment.parse(source.text))
        tree.set_environment(environment)
        return Program(source.name, environment, tree, tokens)
    except (Inspected, jinja2.TemplateError):
        return None


# --- watchers: each returns its value, or raises Inspected -------------------------------------------------------


def _text(value: Any) -> Any:
    """For what looks at a text, and takes a list or an object apart without looking at the texts in it."""
    if isinstance(value, str) and MARK in value:
        raise Inspected
    return value


def _any(value: Any) -> Any:
    """For what looks at everything."""
    if any(MARK in text for text in _texts(value)):
        raise Inspected
    return value


def _keys(value: Any) -> Any:
    """For the right side of ``in``: of an object it looks at the keys alone."""
    return value if isinstance(value, dict) else _any(value)


def _written(value: Any) -> Any:
    """For what is written or joined: a text is, but not what holds one."""
    return value if isinstance(value, str) else _any(value)


def _added(value: Any) -> Any:
    """For sums: texts and lists are joined."""
    return value if isinstance(value, str | list) else _any(value)


def _stripped(method: Callable[[str], str]) -> Callable[[Any], Any]:
    def strip(value: Any) -> Any:
        """Strips a text without marks, or one that is a mark alone."""
        if not isinstance(value, str) or (MARK in value and not MARKED.fullmatch(value)):
            raise Inspected
        return method(value)

    return strip


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for pair in value.items() for part in pair for text in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part))
    elif isinstance(value, str):
        yield value
    elif not isinstance(value, PLAIN):
        raise Inspected


WATCHERS: dict[str, Callable[..., Any]] = {
    "mflow_text": _text, "mflow_any": _any, "mflow_keys": _keys, "mflow_written": _written, "mflow_added": _added,
    "mflow_strip": _stripped(str.strip), "mflow_lstrip": _stripped(str.lstrip), "mflow_rstrip": _stripped(str.rstrip),
}  # fmt: skip


def _by(watcher: str, node: Any) -> Any:
    """``node`` seen by a watcher."""
    return nodes.Filter(node, f"mflow_{watcher}", [], [], None, None, lineno=node.lineno)


class _Watcher(NodeTransformer):
    """Puts a watcher before every use of a value. A kind of node that is not named here gives up."""

    AS_THEY_ARE = (
        nodes.Template, nodes.TemplateData, nodes.Const, nodes.Name, nodes.NSRef, nodes.List, nodes.Tuple, nodes.Dict,
        nodes.Pair, nodes.Keyword, nodes.Operand, nodes.Assign, nodes.Macro, nodes.Scope, nodes.With, nodes.Break,
        nodes.Continue, nodes.ExtensionAttribute,
    )  # fmt: skip
    """They take or hand on values without a look at them."""

    def generic_visit(self, node: nodes.Node, *args: Any, **options: Any) -> nodes.Node:
        if not isinstance(node, self.AS_THEY_ARE):
            raise Inspected
        return super().generic_visit(node, *args, **options)

    def _children(self, node: Any) -> Any:
        return super().generic_visit(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node = self._children(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else _by("written", part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self._children(node)
        node.nodes = [_by("written", part) for part in node.nodes]
        return node

    def visit_If(self, node: nodes.If | nodes.CondExpr) -> nodes.Node:
        node = self._children(node)
        node.test = _by("text", node.test)
        return node

    visit_CondExpr = visit_If

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self._children(node)
        node.iter = _by("text", node.iter)
        node.test = node.test and _by("text", node.test)
        return node

    def visit_Add(self, node: nodes.BinExpr, watcher: str = "added") -> nodes.Node:
        node = self._children(node)
        node.left, node.right = _by(watcher, node.left), _by(watcher, node.right)
        return node

    def visit_And(self, node: nodes.BinExpr) -> nodes.Node:
        return self.visit_Add(node, "text")

    visit_Or = visit_And

    def visit_Mod(self, node: nodes.BinExpr) -> nodes.Node:
        return self.visit_Add(node, "any")

    visit_Sub = visit_Mul = visit_Div = visit_FloorDiv = visit_Pow = visit_Mod

    def visit_Not(self, node: nodes.UnaryExpr) -> nodes.Node:
        node = self._children(node)
        node.node = _by("any" if isinstance(node, nodes.Neg | nodes.Pos) else "text", node.node)
        return node

    visit_Neg = visit_Pos = visit_Not

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node = self._children(node)
        node.expr = _by("any", node.expr)
        for operand in node.ops:
            operand.expr = _by("keys" if operand.op in ("in", "notin") else "any", operand.expr)
        return node

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:
        node = self._children(node)
        node.node = _by("text", node.node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node = self._children(node)
        node.node = _by("text", node.node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = _by("any", node.arg)
        return node

    def visit_Slice(self, node: nodes.Slice) -> nodes.Node:
        node = self._children(node)
        for part in ("start", "stop", "step"):
            if (value := getattr(node, part)) is not None:
                setattr(node, part, _by("any", value))
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        node = self._children(node)
        if node.name not in TYPE_TESTS:
            node.node = _by("any", node.node)
            self._watch_arguments(node)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.node is None or node.name == "random":  # a captured block; chance
            raise Inspected
        node = self._children(node)
        if node.name == "trim" and not self._has_arguments(node):
            return _by("strip", node.node)
        node.node = _by("text" if node.name in STRUCTURE_FILTERS else "any", node.node)
        self._watch_arguments(node)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        function = node.node if isinstance(node.node, nodes.Getattr) and not self._has_arguments(node) else None
        if function is not None and function.attr in ("strip", "lstrip", "rstrip"):
            return _by(function.attr, self.visit(function.node))
        node = self._children(node)
        self._watch_arguments(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        """``{% generation %}``, and nothing else that calls with a block."""
        if not isinstance(node.call.node, nodes.ExtensionAttribute):
            raise Inspected
        node.body = [part for child in node.body for part in self.visit_list(child)]
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        """``{% set x %}…{% endset %}`` without a filter hands its text on."""
        if node.filter is not None:
            raise Inspected
        return self._children(node)

    @staticmethod
    def _has_arguments(node: Any) -> bool:
        return bool(node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)

    @staticmethod
    def _watch_arguments(node: Any) -> None:
        node.args = [_by("any", argument) for argument in node.args]
        for keyword in node.kwargs:
            keyword.value = _by("any", keyword.value)
        for name in ("dyn_args", "dyn_kwargs"):
            if (value := getattr(node, name)) is not None:
                setattr(node, name, _by("any", value))
