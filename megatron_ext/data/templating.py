"""Chat templates in Jinja, as transformers runs them: sandbox, tags, filters and globals, without transformers.

Source: ``transformers.utils.chat_template_utils`` (environment, filters, globals, tracking of generation blocks).
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron_ext.data.chat_templates import TemplateSource
from megatron_ext.data.formats import Message
from megatron_ext.errors import ChatTemplateError

DICT_ATTRIBUTES = frozenset(dir(dict))
TEMPLATE_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError
)  # fmt: skip
"""What a template can raise on messages it was not written for."""
NEEDED = {"bos_token": "starts a conversation with", "eos_token": "ends turns with"}
"""Tokens without which a template would write something else than the model knows; and what it does with them."""
COMPILE_FAULTS = (jinja2.TemplateError, SyntaxError, ValueError, ArithmeticError, RecursionError)
"""What a text that is no template can raise: Jinja compiles to Python, and computes what is constant."""


class Generation(Extension):
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


class TemplateNamespace(Namespace):
    """Jinja's namespace without private names."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *given = args
        values = dict(*given, **attributes)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates; a template can neither reach out of it nor change what it is given.

    Args:
        now: what ``strftime_now`` writes.
    """

    def __init__(self, now: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=now.strftime, dict=_new_dict, namespace=TemplateNamespace
        )

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox does it; a key of a dict is found without an exception on the way."""
        if type(obj) is dict and attribute not in DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


class Program:
    """A compiled template with the special tokens it may write.

    Args:
        name: the template's, for errors.
        environment: one of its own, because a generation block keeps its state there.
        template: text, or its syntax tree.
        tokens: special tokens by name.
    """

    def __init__(self, name: str, environment: Sandbox, template: str | nodes.Template, tokens: dict[str, str]) -> None:
        self.name = name
        self._generation: Generation = environment.extensions[Generation.identifier]  # type: ignore[assignment]
        self._environment = environment
        code = environment.compile(template)
        compiled = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        # ready-made, because Template.generate() would gather the globals anew for every document
        self._variables = {**compiled.globals, **tokens, "documents": None}
        self._new_context, self._render = compiled.new_context, compiled.root_render_func

    def text(self, messages: list[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        """The messages as text; with ``prompt`` up to where the assistant's next answer would start.

        Raises:
            ChatTemplateError: the template refuses them.
        """
        generation = self._generation
        generation.length, generation.found = 0, []
        blocks = []
        variables = {**self._variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            for block in self._render(self._new_context(variables, shared=True)):
                generation.length += len(block)
                blocks.append(block)
        except RecursionError:
            raise ChatTemplateError(f"chat template {self.name!r} never ends") from None
        except TEMPLATE_FAULTS as error:
            said = " ".join(str(error).split())
            raise ChatTemplateError(f"chat template {self.name!r} refuses the conversation: {said}") from None
        return "".join(blocks)

    @property
    def generated(self) -> list[tuple[int, str]]:
        """Start and text of every generation block in what ``text`` rendered last, empty ones included."""
        return self._generation.found


def compiled(source: TemplateSource, tokens: dict[str, str], now: datetime) -> Program:
    """The template, ready to render.

    Raises:
        ChatTemplateError: it is not valid Jinja, or writes a token of ``NEEDED`` that the tokenizer does not name.
    """
    environment = Sandbox(now)
    try:
        tree = environment.parse(source.text)
        names = meta.find_undeclared_variables(tree)
        program = Program(source.name, environment, source.text, tokens)
    except COMPILE_FAULTS as error:
        line = f" line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ChatTemplateError(f"chat template {source.name!r}{line} is not valid Jinja: {error}") from None
    for token, what in NEEDED.items():
        if token in names and token not in tokens and not _is_asked_for(tree, token):
            raise ChatTemplateError(
                f"chat template {source.name!r} {what} {token}, but the tokenizer names none; "
                f"set {token} in tokenizer_config.json or choose another template"
            )
    return program


def _is_asked_for(tree: nodes.Template, name: str) -> bool:
    """Whether the template itself sees to it that a variable may be missing."""
    asking: list[nodes.Node] = [test.node for test in tree.find_all(nodes.Test)]
    asking += [condition.test for condition in tree.find_all((nodes.If, nodes.CondExpr))]
    asking += [part.node for part in tree.find_all(nodes.Filter) if part.name in ("default", "d") and part.node]
    return any(
        n.name == name for part in asking for n in [part, *part.find_all(nodes.Name)] if isinstance(n, nodes.Name)
    )


def _new_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    """A dict; the type itself is not for templates."""
    return dict(*args, **values)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")


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
