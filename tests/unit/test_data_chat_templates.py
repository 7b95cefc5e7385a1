"""Chat templates: which one is meant, what it renders, and which part of the text the assistant wrote."""

import json
from datetime import datetime

import pytest
from chat_data import TOOL, TOOL_CHAT, chat

from megatron_ext.data.chat_templates import (
    TemplateSource,
    chat_template_identity,
    find_template,
    named_templates,
    special_tokens,
)
from megatron_ext.data.formats import Conversation, Preference
from megatron_ext.data.rendering import ChatTemplate
from megatron_ext.errors import ChatTemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def template(text, tokens=TOKENS):
    return ChatTemplate(TemplateSource("test", text), tokens)


def named(name):
    return ChatTemplate(TemplateSource(name, named_templates()[name].read_text()), TOKENS)


def trained(template, messages, tools=None):
    rendered = template.render(Conversation(messages, tools))
    return [rendered.text[start:end] for start, end in rendered.spans]


# --- which template --------------------------------------------------------------------------------------------


def write_config(folder, **values):
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def test_the_models_own_template_is_taken_and_the_jinja_file_wins(tmp_path):
    write_config(tmp_path, chat_template="from config")
    assert find_template(None, tmp_path).text == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert find_template(None, tmp_path).text == "from file"


def test_of_several_own_templates_the_default_is_taken_and_others_by_name(tmp_path):
    templates = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    write_config(tmp_path, chat_template=templates)
    assert find_template(None, tmp_path).text == "one"
    assert find_template("tool_use", tmp_path).text == "two"


def test_a_named_template_wins_over_the_models_own_and_a_file_can_be_given(tmp_path):
    write_config(tmp_path, chat_template="own")
    assert "<|im_start|>" in find_template("chatml", tmp_path).text
    (tmp_path / "mine.jinja").write_text("mine")
    assert find_template(str(tmp_path / "mine.jinja"), tmp_path) == TemplateSource("mine.jinja", "mine")


PROMISED = {
    *("chatml", "qwen2.5", "llama2", "llama3", "alpaca", "plain"),
    *("mistral-instruct", "mistral-instruct-v1", "mistral-instruct-v2", "mistral-instruct-v3"),
    *("modellink-alpaca", "autoalign-chatml", "autoalign-chatml-idsys", "autoalign-vicuna"),
}


def test_the_promised_templates_are_there():
    assert named_templates().keys() >= PROMISED


def test_an_unknown_template_is_named_with_the_nearest_and_all_known(tmp_path):
    with pytest.raises(
        ChatTemplateError, match=r"unknown chat template 'qwen25'; did you mean 'qwen2.5'\? Available: "
    ):
        find_template("qwen25", tmp_path)


def test_a_model_without_template_says_what_to_do(tmp_path):
    with pytest.raises(ChatTemplateError, match="no chat template of its own; name one with --chat-template"):
        find_template(None, write_config(tmp_path))
    write_config(tmp_path, chat_template=[{"name": "tool_use", "template": "two"}])
    with pytest.raises(ChatTemplateError, match="it has tool_use, name one of them"):
        find_template(None, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ChatTemplateError, match=r"cannot read chat template .*gone\.jinja: No such file"):
        find_template(str(tmp_path / "gone.jinja"), tmp_path)


def test_identity_follows_the_text_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    text = named_templates()["chatml"].read_text()
    write_config(tmp_path / "a", chat_template=text)
    (tmp_path / "b" / "copy.jinja").write_text(text)
    identity = chat_template_identity("chatml", tmp_path)
    assert chat_template_identity(None, tmp_path / "a") == identity
    assert chat_template_identity(str(tmp_path / "b" / "copy.jinja"), tmp_path) == identity
    assert chat_template_identity("llama3", tmp_path) != identity


def test_special_tokens_are_read_in_both_spellings(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<old>", "unk_token": "<unk>"}))
    write_config(tmp_path, bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", pad_token=None)
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


# --- what it renders --------------------------------------------------------------------------------------------

TWO_TURNS = chat("Hi", "Hello", "Bye", " See you \n")


@pytest.mark.parametrize(
    ("name", "text", "spans"),
    [
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n See you \n<|im_end|>\n",
            ["Hello<|im_end|>", " See you \n<|im_end|>"],
        ),
        (
            "qwen2.5",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n See you \n<|im_end|>\n",
            ["Hello<|im_end|>", " See you \n<|im_end|>"],
        ),
        (
            "llama2",
            "<s>[INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST]  See you \n </s>",
            [" Hello </s>", "  See you \n </s>"],
        ),
        (
            "llama3",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
            "\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\n See you \n<|eot_id|>",
            ["Hello<|eot_id|>", " See you \n<|eot_id|>"],
        ),
        (
            "mistral-instruct-v3",
            "<s>[INST] Hi[/INST] Hello</s>[INST] Bye[/INST]  See you \n</s>",
            [" Hello</s>", "  See you \n</s>"],
        ),
        (
            "modellink-alpaca",
            "\nBelow is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request. Please note that you need to think through "
            "your response logically and step by step.\n### Instruction:\nHi\n### Response:\nHello\n</s>"
            "### Instruction:\nBye\n### Response:\n See you \n\n</s>",
            ["Hello\n</s>", " See you \n\n</s>"],
        ),
        (
            "autoalign-vicuna",
            "A chat between a curious user and an artificial intelligence assistant."
            + " " * 13
            + "The assistant gives "
            "helpful, detailed, and polite answers to the user's questions. USER: Hi ASSISTANT: Hello</s>USER: Bye "
            "ASSISTANT:  See you \n</s>",
            ["Hello</s>", " See you \n</s>"],
        ),
        ("plain", "HiHello</s>Bye See you \n</s>", ["Hello</s>", " See you \n</s>"]),
        (
            "mistral-instruct",
            "<s> [INST] Hi [/INST] Hello</s> [INST] Bye [/INST]  See you \n</s>",
            [" Hello</s>", "  See you \n</s>"],
        ),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n"
            " See you \n</s>\n\n",
            ["Hello</s>", " See you \n</s>"],
        ),
    ],
)
def test_named_templates_render_and_train_the_assistant_with_its_end_marker(name, text, spans):
    assert named(name).render(Conversation(TWO_TURNS)).text == text
    assert trained(named(name), TWO_TURNS) == spans


SPACED = " \n x y\t \n"


@pytest.mark.parametrize("name", sorted(named_templates()))
def test_contents_are_never_stripped(name):
    text = named(name).text(chat(SPACED, SPACED, system=SPACED))
    assert text.count(SPACED) == 3


WITH_DEFAULT_SYSTEM = {"qwen2.5", "alpaca", "modellink-alpaca"}


@pytest.mark.parametrize("name", sorted(named_templates()))
def test_an_absent_system_message_adds_no_turn_unless_the_template_has_one_of_its_own(name):
    words = named(name).text(chat("Hi", "Hello"))
    own = name in WITH_DEFAULT_SYSTEM or (name.startswith("autoalign") and name[10:] not in ("mistral", "gemma"))
    assert ("system" in words or len(words.partition("Hi")[0]) > 60) == own


@pytest.mark.parametrize("name", sorted(named_templates()))
def test_a_system_message_is_rendered_once(name):
    text = named(name).text(chat("Hi", "Hello", system="Be brief."))
    assert text.count("Be brief.") == 1


@pytest.mark.parametrize("name", sorted(named_templates()))
def test_the_prompt_for_an_answer_is_a_prefix_of_the_answered_chat(name):
    """What evaluation asks is what training saw."""
    prompt = named(name).text(chat("Hi"), prompt=True)
    rendered = named(name).render(Conversation(chat("Hi", "Hello")))
    assert rendered.text.startswith(prompt)
    assert rendered.spans[0][0] == len(prompt)


def test_tools_are_rendered_and_calls_are_trained():
    assert named("qwen2.5").takes_tools()
    assert not named("chatml").takes_tools()
    assert trained(named("qwen2.5"), TOOL_CHAT, [TOOL]) == [
        "hello<|im_end|>",
        '<tool_call>\n{"name": "search", "arguments": {"query": "cats"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "search", "arguments": {"query": "dogs"}}\n</tool_call><|im_end|>',
        "three and four<|im_end|>",
    ]


# --- which turns are trained ------------------------------------------------------------------------------------

BARE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FIRST_ONLY = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.index0 < 2")
"""Marks the first answer alone."""
FOUR = chat("q", "a", "r", "b", system="s")


def parts(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize("text", [BARE, MARKED])
def test_the_last_turn_or_the_whole_text_is_trained_where_asked_for(text):
    source = TemplateSource("test", text)
    assert parts(ChatTemplate(source, TOKENS).render(Conversation(FOUR))) == ["a<|end|>", "b<|end|>"]
    assert parts(ChatTemplate(source, TOKENS, last_turn_only=True).render(Conversation(FOUR))) == ["b<|end|>"]
    whole = ChatTemplate(source, TOKENS, train_on_prompt=True).render(Conversation(FOUR))
    assert whole.spans == [(0, len(whole.text))]


@pytest.mark.parametrize("text", [BARE, MARKED])
def test_turns_before_the_first_trained_one_belong_to_the_prompt(text):
    conversation = Conversation(FOUR, None, 3)
    assert parts(template(text).render(conversation)) == ["b<|end|>"]
    assert parts(template(text).render(Conversation(FOUR, None, 1))) == ["a<|end|>", "b<|end|>"]


@pytest.mark.parametrize("options", [{}, {"last_turn_only": True}, {"train_on_prompt": True}])
@pytest.mark.parametrize("text", [BARE, MARKED])
def test_a_preference_trains_its_answers_alone_whatever_the_options(text, options):
    answer = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "t"}]
    answer.append({"role": "assistant", "content": "y"})
    preference = Preference(FOUR[:-1], [FOUR[-1]], answer)
    chosen, rejected = ChatTemplate(TemplateSource("test", text), TOKENS, **options).render_pair(preference)
    assert parts(chosen) == ["b<|end|>"]
    assert parts(rejected) == ["x<|end|>", "y<|end|>"]
    prompt = template(text).text(FOUR[:-1], prompt=True)
    assert chosen.text.startswith(prompt)
    assert rejected.text.startswith(prompt)


def test_an_answer_that_cannot_be_told_from_the_others_is_refused():
    last = ChatTemplate(TemplateSource("test", "{{ messages | length }}" + FIRST_ONLY), TOKENS, last_turn_only=True)
    with pytest.raises(ChatTemplateError, match="writes 0 generation blocks for 2 assistant turns"):
        last.render(Conversation(FOUR))


def test_the_date_is_that_of_the_given_moment():
    dated = TemplateSource("test", "{{ strftime_now('%d %b %Y') }}" + MARKED)
    then = ChatTemplate(dated, TOKENS, now=datetime(2024, 7, 26))
    assert then.writes_date
    assert [then.render(Conversation(FOUR)).text[:11] for _ in range(2)] == ["26 Jul 2024"] * 2


# --- spans of templates that do not mark them -------------------------------------------------------------------

THINK_STRIPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>{{ parts[0].split('<think>')[-1] if parts|length > 1 else '' }}</think>{% endif %}"
    "{{ parts[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS_AT_THE_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}{{ eos_token }}"
HEADER_WITHOUT_PROMPT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}{{ '\n' }}{% endfor %}"
SHOUTING = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | upper | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TRIMMED = SHOUTING.replace(" | upper", "")


@pytest.mark.parametrize(
    ("text", "messages", "spans"),
    [
        (
            THINK_STRIPPED,
            chat("a", "<think>x</think>one", "b", "<think>y</think>two"),
            ["one<|im_end|>", "<think>y</think>two<|im_end|>"],
        ),
        (EOS_AT_THE_END, chat("a", "b", "c", "d"), ["b", "d\n</s>"]),
        (HEADER_WITHOUT_PROMPT, chat("a", "b", "c", "a b"), ["b</s>", "a b</s>"]),
        (SHOUTING, chat("a", " yes \n", "c", "no"), ["YES<end>", "NO<end>"]),
        (TRIMMED, [{"role": "assistant", "content": " first "}, *chat("a", "b")], ["first<end>", "b<end>"]),
    ],
)
def test_spans_are_derived_from_what_an_unmarked_template_renders(text, messages, spans):
    assert trained(template(text), messages) == spans


def test_content_that_repeats_the_question_or_the_marker_is_still_told_apart():
    bare = template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    again = "a<|im_end|>\n<|im_start|>assistant\na"
    assert trained(bare, chat("a", "a", "a", again)) == ["a<|im_end|>", again + "<|im_end|>"]
    assert trained(bare, chat("a", "")) == ["<|im_end|>"]


def test_a_template_whose_turns_cannot_be_found_is_refused():
    last_first = "{% for m in messages | reverse %}{{ m.content | length }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"message 2 \(assistant\).*cannot be found; put {% generation %}"):
        trained(template(last_first), chat("a", "b"))


def test_generation_in_a_macro_is_refused_instead_of_training_the_wrong_text():
    macro = (
        "{% macro turn(m) %}<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match="in a macro or a captured block"):
        trained(template(macro), chat("a", "b"))
