"""A copy of a chat template that knows every use it makes of a content; see ``skeletons``.

Its syntax tree has a watcher before each use of a value. Writing and joining marks is let through; stripping and
splitting one makes a new mark; a question about one is answered and noted; all else raises ``Inspected``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from megatron_ext.data.chat_templates import TemplateSource
from megatron_ext.data.skeletons import END, MARK, MARKED, Inspected, Trace
from megatron_ext.data.templating import Program, Sandbox

TYPE_TESTS = {"defined", "undefined", "none", "string", "mapping", "number", "integer", "float", "boolean",
              "sequence", "iterable", "callable", "true", "false"}  # fmt: skip
STRUCTURE_FILTERS = {"length", "count", "first", "last", "list", "reverse"}
"""Of a list of messages they look at the list alone."""
ATTRIBUTE_FILTERS = {"selectattr", "rejectattr"}
CHANGES = {"strip", "lstrip", "rstrip"}
QUESTIONS = {"startswith", "endswith"}
METHODS = CHANGES | QUESTIONS | {"split"}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}  # fmt: skip
OPAQUE = (int, float, type(None), Undefined, LoopContext, Macro, Namespace)
"""Values in which no text can be seen by comparing or writing them."""


class Watched:
    """A template under watch.

    Attributes:
        program: the copy; it may be run between ``start`` and the next one.
    """

    def __init__(self, source: TemplateSource, tokens: dict[str, str], now: datetime) -> None:
        environment = Sandbox(now)
        environment.filters.update({f"mflow_{name}": getattr(self, name) for name in WATCHERS})
        tree = _Watcher().visit(environment.parse(source.text))
        tree.set_environment(environment)
        self.program = Program(source.name, environment, tree, tokens)
        self.trace = Trace([])

    def start(self, contents: list[str]) -> Trace:
        """A new trace, for a conversation with these contents."""
        self.trace = Trace(contents)
        return self.trace

    def unseen(self, value: Any) -> Any:
        """For what looks at a text, and takes a list or an object apart without looking at the texts in it."""
        if isinstance(value, str) and MARK in value:
            raise Inspected
        return value

    def free(self, value: Any) -> Any:
        """For what looks at everything."""
        if _holds_mark(value):
            raise Inspected
        return value

    def written(self, value: Any) -> Any:
        """For what is written or joined: a text is, but not what holds one."""
        return value if isinstance(value, str) else self.free(value)

    def added(self, value: Any) -> Any:
        """For sums: texts and lists are joined."""
        return value if isinstance(value, str | list) else self.free(value)

    def truth(self, value: Any) -> Any:
        """For conditions."""
        if isinstance(value, str) and MARK in value:
            return self.trace.asked(_gap(value), ("truth",), bool)
        return value

    def compare(self, left: Any, comparison: str, right: Any) -> Any:
        """For comparisons: of a mark with what holds none."""
        compare = COMPARISONS[comparison]
        if isinstance(left, str) and MARK in left:
            other = self.free(right)
            return self.trace.asked(_gap(left), (comparison, "", repr(other)), lambda text: compare(text, other))
        if isinstance(right, str) and MARK in right:
            first = self.free(left)
            return self.trace.asked(_gap(right), (comparison, repr(first), ""), lambda text: compare(first, text))
        if not (comparison in ("in", "notin") and isinstance(right, dict)):  # of an object, `in` sees the keys
            self.free(right)
        return compare(self.free(left), right)

    def method(self, value: Any, name: str, *arguments: Any) -> Any:
        """For ``value.name(*arguments)`` of a text."""
        if not isinstance(value, str):
            raise Inspected
        call = operator.methodcaller(name, *self.free(arguments))
        if MARK not in value:
            return call(value)
        if name in CHANGES:
            return self.trace.changed(_gap(value), (name, repr(arguments)), call)
        if name in QUESTIONS:
            return self.trace.asked(_gap(value), (name, repr(arguments)), call)
        return _Split(self.trace, _gap(value), repr(arguments), call)


WATCHERS = ("unseen", "free", "written", "added", "truth", "compare", "method")


def watched(source: TemplateSource, tokens: dict[str, str], now: datetime) -> Watched | None:
    """A valid template under watch; None where it cannot be."""
    if any(sign in text for text in (source.text, *tokens.values()) for sign in (MARK, END)):
        return None
    try:
        return Watched(source, tokens, now)
    except (Inspected, jinja2.TemplateError):
        return None


class _Split:
    """What ``split`` made of a mark; its parts are marks."""

    def __init__(self, trace: Trace, gap: int, arguments: str, split: Callable[[str], list[str]]) -> None:
        self.trace, self.gap, self.arguments, self.split = trace, gap, arguments, split

    def __getitem__(self, index: Any) -> str:
        if not isinstance(index, int):
            raise Inspected
        split = self.split
        return self.trace.changed(self.gap, ("split", self.arguments, index), lambda text: split(text)[index])

    def __iter__(self) -> Iterator[str]:
        raise Inspected

    __len__ = __bool__ = __iter__  # type: ignore[assignment]


def _gap(value: str) -> int:
    """The gap that a mark alone stands for."""
    if not (found := MARKED.fullmatch(value)):
        raise Inspected
    return int(found[1])


def _holds_mark(value: Any) -> bool:
    if isinstance(value, str):
        return MARK in value
    if isinstance(value, dict):
        return any(_holds_mark(key) or _holds_mark(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return any(map(_holds_mark, value))
    return not isinstance(value, OPAQUE)


def _by(watcher: str, node: Any, *arguments: Any) -> Any:
    """``node`` seen by a watcher."""
    return nodes.Filter(node, f"mflow_{watcher}", list(arguments), [], None, None, lineno=node.lineno)


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

    def _condition(self, node: Any) -> Any:
        """An expression of which the truth alone counts."""
        if isinstance(node, nodes.And | nodes.Or):
            node.left, node.right = self._condition(node.left), self._condition(node.right)
            return node
        if isinstance(node, nodes.Not):
            return self.visit_Not(node)
        return _by("truth", self.visit(node))

    def visit_Not(self, node: nodes.Not) -> nodes.Node:
        node.node = self._condition(node.node)
        return node

    def visit_If(self, node: nodes.If | nodes.CondExpr | nodes.For) -> Any:
        test = node.test and self._condition(node.test)
        node.test = None  # type: ignore[assignment]
        node = self._children(node)
        node.test = test  # type: ignore[assignment]
        return node

    visit_CondExpr = visit_If

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self.visit_If(node)
        node.iter = _by("unseen", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node = self._children(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else _by("written", part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self._children(node)
        node.nodes = [_by("written", part) for part in node.nodes]
        return node

    def visit_Add(self, node: nodes.BinExpr, watcher: str = "added") -> nodes.Node:
        node = self._children(node)
        node.left, node.right = _by(watcher, node.left), _by(watcher, node.right)
        return node

    def visit_And(self, node: nodes.BinExpr) -> nodes.Node:
        return self.visit_Add(node, "unseen")

    visit_Or = visit_And

    def visit_Mod(self, node: nodes.BinExpr) -> nodes.Node:
        return self.visit_Add(node, "free")

    visit_Sub = visit_Mul = visit_Div = visit_FloorDiv = visit_Pow = visit_Mod

    def visit_Neg(self, node: nodes.UnaryExpr) -> nodes.Node:
        node = self._children(node)
        node.node = _by("free", node.node)
        return node

    visit_Pos = visit_Neg

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node = self._children(node)
        if len(node.ops) == 1:
            (operand,) = node.ops
            return _by("compare", node.expr, nodes.Const(operand.op), operand.expr)
        node.expr = _by("free", node.expr)
        for operand in node.ops:
            operand.expr = _by("free", operand.expr)
        return node

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:
        node = self._children(node)
        node.node = _by("unseen", node.node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node = self._children(node)
        node.node = _by("unseen", node.node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = _by("free", node.arg)
        return node

    def visit_Slice(self, node: nodes.Slice) -> nodes.Node:
        node = self._children(node)
        for part in ("start", "stop", "step"):
            if (value := getattr(node, part)) is not None:
                setattr(node, part, _by("free", value))
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        node = self._children(node)
        if node.name not in TYPE_TESTS:
            node.node = _by("free", node.node)
            self._watch_arguments(node)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.node is None or node.name == "random":  # a captured block; chance
            raise Inspected
        node = self._children(node)
        if node.name == "trim" and self._only_positional(node):
            return _by("method", node.node, nodes.Const("strip"), *node.args)
        attribute = node.args[0] if node.name in ATTRIBUTE_FILTERS and node.args else None
        by_attribute = isinstance(attribute, nodes.Const) and attribute.value == "role"
        structural = node.name in STRUCTURE_FILTERS or by_attribute
        node.node = _by("unseen" if structural else "free", node.node)
        self._watch_arguments(node)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        node = self._children(node)
        function = node.node
        if isinstance(function, nodes.Getattr) and function.attr in METHODS and self._only_positional(node):
            return _by("method", _unwatched(function.node), nodes.Const(function.attr), *node.args)
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
    def _only_positional(node: Any) -> bool:
        return not (node.kwargs or node.dyn_args or node.dyn_kwargs)

    @staticmethod
    def _watch_arguments(node: Any) -> None:
        node.args = [_by("free", argument) for argument in node.args]
        for keyword in node.kwargs:
            keyword.value = _by("free", keyword.value)
        for name in ("dyn_args", "dyn_kwargs"):
            if (value := getattr(node, name)) is not None:
                setattr(node, name, _by("free", value))


def _unwatched(node: Any) -> Any:
    """What ``visit_Getattr`` put a watcher before."""
    return node.node
