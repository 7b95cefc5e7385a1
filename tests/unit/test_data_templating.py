"""Templates that are none, that refuse a conversation or that reach for what is not theirs: told, in one line."""

import json

import pytest
from chat_data import chat

from megatron_ext.data.chat_templates import TemplateSource, named_templates
from megatron_ext.data.rendering import ChatTemplate
from megatron_ext.errors import ChatTemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def template(text, tokens=TOKENS, name="test"):
    return ChatTemplate(TemplateSource(name, text), tokens)


def test_a_template_refuses_with_its_own_words():
    with pytest.raises(
        ChatTemplateError, match=r"'llama2' refuses the conversation: .*needs the turns user, assistant"
    ):
        template(named_templates()["llama2"].read_text(), name="llama2").text(chat("a", "b") + chat("c", "d")[1:])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ raise_exception('two\nlines') }}", "refuses the conversation: two lines$"),
        ("{{ cycler().next() }}", "refuses the conversation: at least one item"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "never ends$"),
        ("{{ messages[0].content / 0 }}", "refuses the conversation: unsupported operand"),
    ],
)
def test_whatever_a_template_raises_is_told_in_one_line(text, problem):
    with pytest.raises(ChatTemplateError, match=problem):
        template(text).text(chat("a", "b"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for m in %}", "line 1 is not valid Jinja"),
        ("{% generation %}{{ messages }}", "is not valid Jinja"),
        ("{% break %}", "is not valid Jinja: 'break' outside loop"),
        ("{{ 10 ** 100000 }}", "is not valid Jinja: Exceeds the limit"),
    ],
)
def test_a_broken_template_is_refused(text, problem):
    with pytest.raises(ChatTemplateError, match=problem):
        template(text)


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(ChatTemplateError, match="unsafe"):
        template("{{ messages.__class__.__mro__ }}").text(chat("a", "b"))
    with pytest.raises(ChatTemplateError, match="refuses the conversation"):
        template("{{ messages.append(1) }}").text(chat("a", "b"))


def test_a_missing_eos_token_is_refused_before_anything_is_rendered():
    with pytest.raises(ChatTemplateError, match=r"set eos_token in tokenizer_config\.json"):
        template("{{ messages[0].content + eos_token }}", {})


@pytest.mark.parametrize("name", ["llama3", "mistral-instruct-v1", "mistral-instruct-v2", "mistral-instruct-v3"])
def test_a_missing_bos_token_is_refused_where_the_template_writes_it(name):
    text = named_templates()[name].read_text()
    with pytest.raises(ChatTemplateError, match=r"bos_token, but .*; set bos_token in tokenizer_config\.json"):
        template(text, {"eos_token": "</s>"}, name)
    template(named_templates()["chatml"].read_text(), {})


@pytest.mark.parametrize(
    "start",
    [
        "{{ bos_token if bos_token is defined }}",
        "{% if bos_token %}{{ bos_token }}{% endif %}",
        "{{ bos_token | default('') }}",
    ],
)
def test_a_template_that_asks_whether_there_is_a_bos_token_does_without(start):
    assert template(start + "{{ messages[0].content }}", {}).text(chat("a", "b")) == "a"


@pytest.mark.parametrize("name", ["mistral-instruct-v2", "mistral-instruct-v3"])
@pytest.mark.parametrize(
    ("result", "written"),
    [
        ('{"found": 3}', '{"found": 3}'),
        ("[1, 2]\n", "[1, 2]\n"),
        ("42", "42"),
        ("-1.5", "-1.5"),
        ("true", "true"),
        ('sunny, 20 "C"', r'"sunny, 20 \"C\""'),
        ("007", '"007"'),
        ("room 5", '"room 5"'),
        ("{open", '"{open"'),
        ("", '""'),
    ],
)
def test_a_tool_result_of_mistral_is_json(name, result, written):
    messages = [*chat("q", "a"), {"role": "tool", "content": result}]
    text = template(named_templates()[name].read_text(), name=name).text(messages)
    said = text.partition("[TOOL_RESULTS]")[2].partition("[/TOOL_RESULTS]")[0]
    assert f'"content": {written}}}' in said
    json.loads(said)
