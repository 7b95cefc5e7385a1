"""Skeletons: a template that only puts contents between words is filled without Jinja, never otherwise than by it."""

import random

import pytest
from chat_data import TOOL, TOOL_CHAT, chat

from megatron_ext.data.chat_templates import TemplateSource, named_templates
from megatron_ext.data.formats import Conversation
from megatron_ext.data.rendering import ChatTemplate
from megatron_ext.data.skeletons import END, MARK
from megatron_ext.errors import ChatTemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HEAD, TAIL = "{% for m in messages %}<|{{ m.role }}|>", "<|end|>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
THINK = (
    "{% if '</think>' in m.content and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}"
)

PLAIN = {
    "written": "{{ m.content }}",
    "item": "{{ m['content'] }}",
    "method get": "{{ m.get('content') }}",
    "joined": "{{ 'a ' ~ m.content ~ '\n' + 'b' }}",
    "trim": "{{ m.content | trim }}",
    "strip": "{{ m.content.strip() + 'x' }}",
    "rstrip": "{{ 'x' + m.content.rstrip() }}",
    "lstrip": "{{ m.content.lstrip() }}",
    "rstrip of lstrip": "{{ m.content.lstrip().rstrip() }}",
    "variable": "{% set x = 'a' + m.content | trim %}{% if loop.first %}{% set x = bos_token + x %}{% endif %}{{ x }}",
    "captured": "{% set x %}a{{ m.content }}{% endset %}{{ x }}",
    "twice": "{{ m.content }}{{ m.content | trim }}",
    "previous": "{% if not loop.first %}{{ loop.previtem.content }}{% endif %}{{ m.content }}",
    "namespace": "{% set n = namespace(i=0) %}{% set n.i = n.i + loop.index %}{{ n.i }}{{ m.content }}",
    "length of the list": "{{ messages | length }}{{ messages[-1].content }}{{ m.content }}",
    "tools are tested": "{% if m.calls or 'tools' in m or tools %}{{ m.content.upper() }}{% endif %}{{ m.content }}",
    "content in a branch not taken": "{% if m.role == 'tool' %}{{ m.content | length }}{% endif %}{{ m.content }}",
    "type": "{% if m.content is string and m.content is defined %}{{ m.content }}{% endif %}",
    "choice": "{{ m.content if m.role == 'user' else m.content + '!' }}",
    "rest": "{% if loop.first %}{% for x in messages[1:] %}{{ x.content }}{% endfor %}{% endif %}{{ m.content }}",
}
ASKING = {
    "condition": "{% if m.content %}{{ m.content }}{% endif %}",
    "not": "{% if not m.content %}-{% endif %}{{ m.content }}",
    "and": "{{ '' if (m.content and true) else 'x' }}{{ m.content }}",
    "choice": "{{ 'x' if m.content else 'y' }}{{ m.content }}",
    "equal": "{% if m.content == 'a' %}A{% endif %}{{ m.content }}",
    "in a text": "{% if m.content in 'abc' %}A{% endif %}{{ m.content }}",
    "text in it": "{% if 'a' in m.content %}A{% endif %}{{ m.content }}",
    "in a list": "{% if m.content in ['a', 'b'] %}A{% endif %}{{ m.content }}",
    "stripped of letters": "{{ m.content.strip('a') }}",
    "trimmed letters": "{{ m.content | trim('a') }}",
    "captured": "{% set x %}{{ m.content }}{% endset %}{% if x == 'a' %}A{% endif %}{{ x }}",
    "thinking": THINK,
    "selected": "{% for x in messages if x.content == 'a' %}A{% endfor %}{{ m.content }}",
    "starts": "{% if m.content.startswith('a') or m.content.endswith('b') %}A{% endif %}{{ m.content }}",
    "split": "{{ m.content.split('</think>')[-1].strip('\n') }}",
    "second part": "{% if 'b' in m.content %}{{ m.content.split('b')[1] }}{% endif %}{{ m.content }}",
    "stripped and asked": "{% if m.content.strip() == 'a' %}A{% endif %}{{ m.content | trim }}",
    "not equal": "{% if m.content != '' and not (m.content == 'a' or m.content > 'b') %}A{% endif %}{{ m.content }}",
    "selected by role": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ m.content }}",
}
LOOKING = {
    "variable": "{% set x = 'a' + m.content %}{{ x | length }}{{ m.content }}",
    "or": "{{ m.content or 'nothing' }}",
    "key": "{{ {'a': 'A', '': 'E'}[m.content] }}{{ m.content }}",
    "upper": "{{ m.content | upper }}",
    "replace": "{{ m.content | replace('a', 'b') }}",
    "replaced by it": "{{ 'xay' | replace('a', m.content) }}",
    "method with it": "{{ 'abc'.startswith(m.content) }}{{ m.content }}",
    "format": "{{ '%s-%s' % (m.content, 1) }}",
    "format method": "{{ '{:>9}'.format(m.content) }}",
    "slice": "{{ m.content[:2] }}{{ m.content }}",
    "index": "{{ m.content[0] }}{{ m.content }}",
    "length": "{{ m.content | length }}{{ m.content }}",
    "iteration": "{% for c in m.content %}{{ c }}.{% endfor %}{{ m.content }}",
    "repetition": "{{ m.content * 2 }}{{ m.content }}",
    "stripped sum": "{{ ('Q: ' + m.content) | trim }}{{ m.content }}",
    "stripped join": "{{ (m.content ~ '.').strip() }}{{ m.content }}",
    "captured filter": "{% set x | upper %}{{ m.content }}{% endset %}{{ x }}{{ m.content }}",
    "filter block": "{% filter upper %}{{ m.content }}{% endfilter %}{{ m.content }}",
    "namespace": "{% set n = namespace(c=m.content) %}{% if n.c == 'a' %}A{% endif %}{{ m.content }}",
    "tojson": "{{ m.content | tojson }}{{ m.content }}",
    "message as json": "{{ m | tojson }}{{ m.content }}",
    "message written": "{{ m }}{{ m.content }}",
    "messages joined": "{{ messages | map(attribute='content') | join('+') }}{{ m.content }}",
    "message compared": "{% if m == messages[-1] %}last{% endif %}{{ m.content }}",
    "message in messages": "{% if m in messages[:1] %}first{% endif %}{{ m.content }}",
    "items": "{% for k, v in m.items() %}{{ v | length }}{% endfor %}{{ m.content }}",
    "macro": "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(m.content) }}{{ m.content }}",
    "changed": "{% if loop.changed(m.content) %}new{% endif %}{{ m.content }}",
    "chance": "{{ [1, 1] | random }}{{ m.content }}",
}
CONTENTS = [
    *("", " ", "a", "b", "  a\n", "\n\n", "abc", "<|end|>", "a</think>b", "<|assistant|>", "x" * 50),
    *("日本 \u2003é", f"{MARK}0{END}", "{{ 1 }}", "0", "\x1c a \x85"),
]
UNDERIVABLE = {"length of the list", "rest", "twice"}
"""Without a generation block, the place of an answer cannot be found, by Jinja neither."""


def both(text, **options):
    """The template as it is, and one that always runs Jinja."""
    fast, slow = (ChatTemplate(TemplateSource("test", text), TOKENS, **options) for _ in range(2))
    slow._watched = None
    return fast, slow


def result(template, conversation):
    try:
        return template.render(conversation)
    except ChatTemplateError as error:
        return str(error)


def require_same(fast, slow, seed=0):
    """Every shape of conversation with many contents; the first ones decide whether there is a skeleton."""
    rng = random.Random(seed)
    for _ in range(40):
        contents = [rng.choice(CONTENTS) for _ in range(rng.choice([2, 2, 4, 6]))]
        system = rng.choice([None, None, *CONTENTS])
        conversation = Conversation(chat(*contents, system=system), None, rng.choice([0, 0, 0, len(contents) - 1]))
        assert result(fast, conversation) == result(slow, conversation), conversation


def skeletons(template):
    return [skeleton for variants in template._skeletons.values() for skeleton in variants if skeleton]


def generation(body):
    answer = f"{{% generation %}}{body}{{% endgeneration %}}"
    return f"{HEAD}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{body}{{% endif %}}{TAIL}"


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("marked", [True, False])
def test_a_template_that_writes_contents_is_filled_and_gives_what_jinja_gives(name, marked):
    fast, slow = both(generation(PLAIN[name]) if marked else HEAD + PLAIN[name] + TAIL + PROMPT)
    if marked or name not in UNDERIVABLE:
        assert fast.render(Conversation(chat("q", "a"))) == slow.render(Conversation(chat("q", "a")))
        assert skeletons(fast), "no skeleton was found"
    require_same(fast, slow)


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("marked", [True, False])
def test_a_template_that_asks_about_contents_is_filled_where_the_answers_are_the_same(name, marked):
    fast, slow = both(generation(ASKING[name]) if marked else HEAD + ASKING[name] + TAIL + PROMPT)
    require_same(fast, slow)
    assert skeletons(fast)


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("marked", [True, False])
def test_a_template_that_looks_at_contents_is_left_to_jinja(name, marked):
    fast, slow = both(generation(LOOKING[name]) if marked else HEAD + LOOKING[name] + TAIL + PROMPT)
    require_same(fast, slow)
    assert not skeletons(fast)


@pytest.mark.parametrize("options", [{}, {"last_turn_only": True}, {"train_on_prompt": True}])
@pytest.mark.parametrize("name", sorted(named_templates()))
def test_every_named_template_is_filled_and_gives_what_jinja_gives(name, options):
    fast, slow = both(named_templates()[name].read_text(), **options)
    fast.render(Conversation(chat("q", "a")))
    assert skeletons(fast)
    require_same(fast, slow)


def test_conversations_with_tools_are_left_to_jinja():
    fast, slow = both(named_templates()["qwen2.5"].read_text())
    for tools in (None, [TOOL]):
        assert fast.render(Conversation(TOOL_CHAT, tools)) == slow.render(Conversation(TOOL_CHAT, tools))
    assert fast._skeletons == {}


def test_a_template_that_writes_the_marks_itself_is_left_to_jinja():
    for sign in (MARK, END):
        fast, slow = both(HEAD + sign + "{{ m.content }}" + TAIL + PROMPT)
        require_same(fast, slow)
        assert fast._skeletons == {}


def test_the_contents_of_the_first_conversation_do_not_decide_for_the_others():
    """A template that leaves the first word of a content out looks at it, though one conversation may not show it."""
    fast, slow = both(generation("{{ m.content.removeprefix('never ') }}"))
    for content in ("a", "b", "never c", "a"):
        conversation = Conversation(chat("q", content))
        assert fast.render(conversation) == slow.render(conversation)
