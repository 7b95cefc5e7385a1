"""Token ids and loss masks against transformers' own ``apply_chat_template``, and derived masks against marked ones."""

import json
from itertools import islice
from pathlib import Path

import pytest
from chat_data import CHATS, TOOL, TOOL_CHAT, chat, write_chat_tokenizer
from real_data import REAL_DATA, needs_real_data

from megatron_ext.data.chat_templates import TemplateSource, find_template, named_templates, special_tokens
from megatron_ext.data.encoding import encode, to_arrays
from megatron_ext.data.formats import FIELDS, Conversation, detect_format, parse_row
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.rendering import GENERATION, ChatTemplate
from megatron_ext.data.sources import read_rows
from megatron_ext.data.tokenization import tokenize
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ChatTemplateError
from megatron_ext.events import Events

OUTSIDE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
"""Leaves the end marker out of the generation block."""
FOLDERS: dict[str, Path] = {}


@pytest.fixture
def folder(request, tmp_path_factory):
    """A tokenizer of the kind that the test asks for, byte-level if it asks for none."""
    kind = getattr(request, "param", "bytes")
    if kind not in FOLDERS:
        FOLDERS[kind] = write_chat_tokenizer(tmp_path_factory.mktemp(kind), kind)
    return FOLDERS[kind]


def ours(folder: Path, source: TemplateSource, conversations: list[Conversation]):
    template, tokenizer = ChatTemplate(source, special_tokens(folder)), load_tokenizer(folder)
    documents = [template.render(c) for c in conversations]
    batch = to_arrays(encode(tokenizer, documents), documents)
    ends = batch.lengths.cumsum()
    starts = ends - batch.lengths
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    return [batch.ids[a:b].tolist() for a, b in spans], [batch.mask[a:b].tolist() for a, b in spans]


def theirs(folder: Path, text: str, conversations: list[Conversation]):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    results = [
        tokenizer.apply_chat_template(
            c.messages, tools=c.tools, chat_template=text, return_dict=True, return_assistant_tokens_mask=True
        )
        for c in conversations
    ]
    return [r["input_ids"] for r in results], [r["assistant_masks"] for r in results]


def accepted(source: TemplateSource, folder: Path) -> list[Conversation]:
    """The test conversations that the template takes (some demand strict turns)."""
    template = ChatTemplate(source, special_tokens(folder))
    every = [Conversation(messages) for messages in CHATS]
    if template.takes_tools():
        every += [Conversation(TOOL_CHAT, [TOOL]), Conversation(TOOL_CHAT)]
    taken = []
    for conversation in every:
        try:
            template.text(conversation.messages, conversation.tools)
        except ChatTemplateError:
            continue
        taken.append(conversation)
    assert len(taken) >= 4
    return taken


EVERY_KIND = ("chatml", "qwen2.5", "llama2", "mistral-instruct-v3")


@pytest.mark.parametrize(
    ("folder", "name"),
    [("bytes", name) for name in sorted(named_templates())]
    + [(kind, name) for kind in ("nfc", "metaspace") for name in EVERY_KIND],
    indirect=["folder"],
)
def test_ids_and_masks_equal_transformers(folder, name):
    source = find_template(name, folder)
    conversations = accepted(source, folder)
    our_ids, our_masks = ours(folder, source, conversations)
    their_ids, their_masks = theirs(folder, source.text, conversations)
    assert our_ids == their_ids
    assert our_masks == their_masks
    assert all(0 < sum(mask) < len(mask) for mask in our_masks)


@pytest.mark.parametrize("name", sorted(named_templates()))
def test_spans_derived_without_generation_blocks_equal_the_marked_ones(folder, name):
    marked = find_template(name, folder)
    text = GENERATION.sub("", marked.text).replace("{%- endgeneration -%}", "").replace("{%- endgeneration %}", "")
    templates = [ChatTemplate(s, special_tokens(folder)) for s in (marked, TemplateSource("bare", text))]
    assert [template.marks_generation for template in templates] == [True, False]
    # a system message that moves with the last question leaves no prompt to find an answer's first space by
    begin = str.lstrip if name in ("mistral-instruct-v2", "mistral-instruct-v3") else str
    for conversation in accepted(marked, folder):
        (text, spans), (bare_text, bare_spans) = (template.render(conversation) for template in templates)
        assert text == bare_text
        assert [(begin(text[a:b]), b) for a, b in spans] == [(begin(text[a:b]), b) for a, b in bare_spans]


def test_an_end_marker_outside_the_generation_block_is_not_trained_as_in_transformers(folder):
    source = TemplateSource("outside", OUTSIDE)
    conversations = [Conversation(chat("Hi", "Hello you", "And?", "Fine, e\u0301 thanks", system="Be brief."))]
    assert ours(folder, source, conversations) == theirs(folder, source.text, conversations)
    assert ours(folder, source, conversations)[1][0][-2:] == [1, 0]


def test_every_byte_of_a_last_character_is_trained_where_transformers_leaves_some_out(tmp_path):
    """``char_to_token`` gives the first token of a character; a character of several tokens is trained whole here."""
    folder = write_chat_tokenizer(tmp_path)
    source = TemplateSource("outside", OUTSIDE)
    conversations = [Conversation(chat("Hi", "Done 🎉"))]
    (our_mask,), (their_mask,) = ours(folder, source, conversations)[1], theirs(folder, OUTSIDE, conversations)[1]
    assert sum(our_mask) == sum(their_mask) + 3
    assert all(mine >= other for mine, other in zip(our_mask, their_mask, strict=True))


@needs_real_data
@pytest.mark.parametrize(
    ("name", "format", "template"),
    [
        ("alpaca_en_demo.json", "alpaca", "chatml"),
        ("alpaca_zh_demo.json", "alpaca", "llama3"),
        ("autoalign_dummy_sft.json", "sharegpt", "qwen2.5"),
        ("glaive_toolcall_en_demo.json", "sharegpt", "qwen2.5"),
    ],
)
def test_a_dataset_made_from_real_data_equals_transformers(tmp_path, name, format, template):
    folder, path = write_chat_tokenizer(tmp_path / "model", "nfc"), REAL_DATA / name
    assert detect_format(islice(read_rows(path), 100), path)[0] == format
    tokenize([path], folder, tmp_path / "out", format="auto", chat_template=template, events=Events())
    rows = list(islice(read_rows(path, FIELDS), 60))
    conversations = [parse_row(row, format, path, number) for number, row in rows]
    ids, masks = theirs(folder, find_template(template, folder).text, conversations)
    tokens, loss_mask = Idxmap(tmp_path / "out/tokens"), Idxmap(tmp_path / "out/loss_mask")
    assert len(tokens) == len(json.loads(path.read_text()))
    assert [tokens[i].tolist() for i in range(len(ids))] == ids
    assert [loss_mask[i].tolist() for i in range(len(ids))] == masks


@needs_real_data
@pytest.mark.parametrize("name", ["dpo_en_demo.json", "autoalign_dummy_dpo.json"])
def test_preferences_made_from_real_data_equal_transformers_and_train_the_answer_alone(tmp_path, name):
    folder, path = write_chat_tokenizer(tmp_path / "model"), REAL_DATA / name
    tokenize([path], folder, tmp_path / "out", chat_template="chatml", events=Events())
    text = find_template("chatml", folder).text
    rows = list(islice(read_rows(path), 30))
    pairs = [parse_row(row, "preference", path, number).conversations() for number, row in rows]
    for side, conversations in zip(("chosen", "rejected"), zip(*pairs, strict=True), strict=True):
        ids, masks = theirs(folder, text, list(conversations))
        prompts = [Conversation(c.messages[: c.trained_from]) for c in conversations]
        answers_start = [len(prompt) for prompt in theirs(folder, text, prompts)[0]]
        tokens, loss_mask = (Idxmap(tmp_path / f"out/{side}_{kind}") for kind in ("tokens", "loss_mask"))
        assert len(tokens) == len(json.loads(path.read_text()))
        assert [tokens[i].tolist() for i in range(len(ids))] == ids
        expected = [[0] * at + mask[at:] for at, mask in zip(answers_start, masks, strict=True)]
        assert [loss_mask[i].tolist() for i in range(len(ids))] == expected


@needs_real_data
@pytest.mark.parametrize("name", ["c4_demo.jsonl", "wiki_demo.txt"])
def test_text_made_from_real_data_equals_the_tokenizer(tmp_path, name):
    folder, path = write_chat_tokenizer(tmp_path / "model"), REAL_DATA / name
    tokenize([path], folder, tmp_path / "out", events=Events())
    tokens, rows = Idxmap(tmp_path / "out/tokens"), [row["text"] for _, row in read_rows(path)]
    assert len(tokens) == len(rows)
    tokenizer = load_tokenizer(folder)
    for index, text in enumerate(rows[:20]):
        assert tokens[index].tolist() == tokenizer.encode(text, add_special_tokens=False).ids
