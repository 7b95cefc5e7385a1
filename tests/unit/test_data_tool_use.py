"""Own chat templates that take tools in their own spelling; templates that lose what they are given."""

import pytest
from chat_data import CHATS, TOOL, TOOL_CHAT, write_chat_tokenizer

from megatron_ext.data.chat_templates import TemplateSource, named_templates
from megatron_ext.data.formats import Conversation
from megatron_ext.data.rendering import ChatTemplate
from megatron_ext.data.tokenization import remarks
from megatron_ext.data.tokenizers import load_tokenizer

NINE = (
    "{%- for m in messages %}{%- if m.tool_calls is defined %}[CALLS]{% for c in m.tool_calls %}"
    "{%- if c.id is not defined or c.id|length != 9 %}{{ raise_exception('ids have 9 characters!') }}{% endif %}"
    "{{ c.function|tojson }}{% endfor %}</s>{% elif m.role == 'tool' %}"
    "{%- if m.tool_call_id is not defined or m.tool_call_id|length != 9 %}{{ raise_exception('ids!') }}{% endif %}"
    "[RESULTS]{{ m.content }}[/RESULTS]{% elif m.role=='user' %}{{ (tools|tojson) if tools else '' }}[INST]"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
"""As Mistral-7B-Instruct-v0.3 and Nemo ask for ids."""
TEXT = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and m.content is none %}<|A|>{% for c in m.tool_calls %}"
    "{{ c['type'] + '<sep>' + c['function']['name'] + '\\n```json\\n' + c['function']['arguments'] + '\\n```' }}"
    "{% endfor %}</s>{% elif m.role == 'tool' %}<out>{{ m.content }}</out>{% elif m.role == 'user' %}<|U|>"
    "{{ m.content }}{% else %}<|A|>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|>{% endif %}"
)
"""As DeepSeek-R1-Distill joins the arguments of a call without content; it leaves tools out."""
LOSES_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ system if system and loop.last }}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
"""As Mistral-7B-Instruct-v0.3 writes the system message into a last turn that is the user's."""


def template(text, name="own"):
    return ChatTemplate(TemplateSource(name, text), {"bos_token": "<s>", "eos_token": "</s>"})


def with_ids(arguments):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "search", "arguments": arguments}}
    answer = {"role": "tool", "content": "3", "tool_call_id": "abcdefghi"}
    return [
        {"role": "user", "content": "find"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        answer,
        {"role": "assistant", "content": "three"},
    ]


def trained(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_a_template_that_asks_for_ids_of_nine_characters_takes_tools():
    own = template(NINE)
    assert own.takes_tools()
    rendered = own.render(Conversation(with_ids({"q": "é"}), [TOOL]))
    assert trained(rendered) == ['[CALLS]{"name": "search", "arguments": {"q": "é"}}</s>', " three</s>"]


def test_a_template_that_joins_arguments_gets_them_as_text():
    own = template(TEXT)
    assert (own.tool_use.calls, own.tool_use.tools) == (True, False)
    for arguments in ({"q": "é"}, '{"q": "é"}'):
        rendered = own.render(Conversation(with_ids(arguments)))
        assert trained(rendered) == ['function<sep>search\n```json\n{"q": "é"}\n```</s>', "three</s>"]
    assert not own.tool_use.lacks(Conversation(with_ids({})))
    assert own.tool_use.lacks(Conversation(with_ids({}), [TOOL])) == "tools"


def test_a_template_without_a_place_for_calls_lacks_it_and_says_why():
    assert (
        template(named_templates()["chatml"].read_text())
        .tool_use.lacks(Conversation(TOOL_CHAT))
        .startswith("tool calls")
    )
    strict = template(named_templates()["llama2"].read_text(), "llama2").tool_use
    assert "needs the turns user, assistant" in strict.refusal
    assert not strict.lacks(Conversation(CHATS[0]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_chat_tokenizer(tmp_path_factory.mktemp("model")))


def test_a_template_that_loses_the_system_message_is_noted(tokenizer):
    said = " ".join(remarks(template(LOSES_SYSTEM), tokenizer))
    assert "'own' leaves out the system message" in said
    for name in named_templates():
        assert not template(named_templates()[name].read_text(), name).drops_system, name
