"""What rows may say besides their turns: a system column, older names of tools, turns not to train; empty samples."""

import json
from pathlib import Path

import pytest
from chat_data import chat, write_chat_tokenizer
from tiny import write_jsonl

from megatron_ext.data.chat_templates import TemplateSource, named_templates
from megatron_ext.data.formats import Conversation, parse_row, says_something, wanted_columns
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.rendering import ChatTemplate
from megatron_ext.data.tokenization import tokenize
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import DatasetFormatError, RowFormatError
from megatron_ext.events import Events

FILE = Path("data/train.jsonl")
U, A = ({"role": role, "content": content} for role, content in (("user", "q"), ("assistant", "a")))
S = {"role": "system", "content": "turn"}
CALL = {"name": "f", "arguments": '{"x": 1}'}


def parsed(row, format="messages"):
    return parse_row(row, format, FILE, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


def written(tmp_path, model, rows, **options):
    """The summary, every document's text, and what of it is trained."""
    path, out = write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out"
    out.mkdir(exist_ok=True)
    summary = tokenize([path], model, out, events=Events(), workers=1, **{"chat_template": "chatml"} | options)
    tokens, masks, encoder = Idxmap(out / "tokens"), Idxmap(out / "loss_mask"), load_tokenizer(model)
    both = [(tokens[n], tokens[n][masks[n] == 1]) for n in range(len(tokens))]
    return summary, *(
        [encoder.decode(ids.tolist(), skip_special_tokens=False) for ids in side] for side in zip(*both, strict=True)
    )


# --- the system column ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [U, A]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
    ],
)
def test_a_system_column_becomes_the_first_turn(row, format):
    said = parsed({"system": "column", **row}, format)
    assert [m["role"] for m in said.messages] == ["system", "user", "assistant"]
    assert said.messages[0]["content"] == "column"
    assert said.answers(last_only=False) == [2]
    assert "system" in wanted_columns(format)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [S, U, A]}, "messages"),
        ({"messages": [S | {"role": "developer"}, U, A]}, "messages"),
        ({"conversations": [{"from": who, "value": "turn"} for who in ("system", "human", "gpt")]}, "sharegpt"),
        ({"prompt": [S, U], "completion": "a"}, "prompt_completion"),
        ({"prompt": [S, U], "chosen": "a", "rejected": "b"}, "preference"),
    ],
)
def test_a_system_column_beside_a_system_turn_does_not_give_two(row, format):
    said = parsed({"system": "column", **row}, format)
    messages = said.messages if isinstance(said, Conversation) else said.prompt
    assert [m["content"] for m in messages if m["role"] in ("system", "developer")] == ["turn"]


# --- function_call, functions -----------------------------------------------------------------------------------


def test_a_function_call_and_functions_are_tool_calls_and_tools():
    row = {
        "functions": [{"name": "f", "parameters": {}}],
        "messages": [
            U,
            {"role": "assistant", "content": None, "function_call": CALL, "tool_calls": None},
            {"role": "function", "name": "f", "content": "3"},
            A | {"function_call": None},
        ],
    }
    said = parsed(row)
    assert said.messages[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL | {"arguments": {"x": 1}}}],
        },
        {"role": "tool", "name": "f", "content": "3"},
        A,
    ]
    assert said.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert "functions" in wanted_columns("messages")


def test_a_function_call_that_is_none_or_stands_beside_tool_calls_is_a_bad_row():
    with pytest.raises(RowFormatError, match=r"'messages\[1\]\.function_call\[0\]' is not a tool call"):
        parsed({"messages": [U, {"role": "assistant", "content": "", "function_call": "auto"}]})
    both = {"role": "assistant", "content": "", "function_call": CALL, "tool_calls": [{"function": CALL}]}
    with pytest.raises(RowFormatError, match="stands beside tool_calls"):
        parsed({"messages": [U, both]})


def test_openai_tool_calls_reach_the_text_with_their_mask(tmp_path, model):
    call = {"id": "call00001", "type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
    rows = [
        {
            "tools": [{"type": "function", "function": {"name": "sum", "description": "Adds", "parameters": {}}}],
            "messages": [
                {"role": "user", "content": "1 + 2?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call00001", "content": "3"},
                {"role": "assistant", "content": "It is 3."},
            ],
        },
        {"messages": [{"role": "developer", "content": "Be brief."}, U, A]},
    ]
    _, texts, trained = written(tmp_path, model, rows[:1], chat_template="qwen2.5")
    called = '<tool_call>\n{"name": "sum", "arguments": {"of": [1, 2]}}\n</tool_call><|im_end|>'
    assert trained == [f"{called}It is 3.<|im_end|>"]
    assert "<tool_response>\n3\n</tool_response>" in texts[0]
    assert '"description": "Adds"' in texts[0]
    old = {
        "functions": [rows[0]["tools"][0]["function"]],
        "messages": [
            rows[0]["messages"][0],
            {"role": "assistant", "content": None, "function_call": call["function"]},
            {"role": "function", "name": "sum", "content": "3"},
            rows[0]["messages"][3],
        ],
    }
    assert written(tmp_path, model, [old], chat_template="qwen2.5")[1:] == (texts, trained)


# --- turns that are not trained ---------------------------------------------------------------------------------

FOUR = chat("q", "BAD", "q", "GOOD")


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
def test_a_turn_that_says_so_is_not_trained(flag, tmp_path, model):
    rows = [{"messages": [FOUR[0], FOUR[1] | flag, FOUR[2], FOUR[3] | {"weight": 1}]}, {"messages": FOUR}]
    (tmp_path / "bare.jinja").write_text(
        named_templates()["chatml"]
        .read_text()
        .replace("{%- generation", "{%- if true")
        .replace("endgeneration", "endif")
    )
    for template in ("chatml", str(tmp_path / "bare.jinja")):
        _, texts, trained = written(tmp_path, model, rows, chat_template=template)
        assert trained == ["GOOD<|im_end|>", "BAD<|im_end|>GOOD<|im_end|>"]
        assert texts[0] == texts[1]
    _, texts, trained = written(tmp_path, model, rows, train_on_prompt=True)
    assert trained == [texts[0].replace("BAD<|im_end|>", ""), texts[0]]


def test_a_turn_of_sharegpt_that_is_not_trained_and_a_flag_that_is_none():
    turns = [{"from": who, "value": "x", "weight": 0} for who in ("human", "gpt", "human")]
    said = parsed({"system": "s", "conversations": [*turns, {"from": "gpt", "value": "y", "train": True}]}, "sharegpt")
    assert (said.untrained, said.answers(last_only=False)) == ({2}, [4])
    said = parsed({"prompt": "q", "completion": [A | {"weight": 0}, U, A]}, "prompt_completion")
    assert said.answers(last_only=False) == [3]
    with pytest.raises(RowFormatError, match=r"'messages\[1\]\.weight' is 0\.5; it can be 1 \(trained\) or 0"):
        parsed({"messages": [U, A | {"weight": 0.5}]})


def test_a_template_with_one_block_for_two_turns_cannot_leave_one_of_them_out():
    once = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    template = ChatTemplate(TemplateSource("once", once), {})
    with pytest.raises(Exception, match="give each turn one block"):
        template.render(Conversation(FOUR, untrained=frozenset([3])))


# --- empty ones -------------------------------------------------------------------------------------------------


def test_alpaca_joins_the_parts_that_say_something():
    said = parsed({"instruction": "", "input": "text", "output": "o"}, "alpaca")
    assert said.messages[0]["content"] == "text"


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"instruction": "", "input": "", "output": ""}, {}),
        ({"instruction": "i", "output": ""}, {}),
        ({"instruction": "", "output": ""}, {"train_on_prompt": True}),
        ({"messages": [U, A | {"content": ""}]}, {}),
        ({"messages": [U, A, U, A | {"content": ""}]}, {"last_turn_only": True}),
        ({"messages": [U, A | {"weight": 0}]}, {}),
    ],
)
def test_samples_without_anything_to_train_are_counted_and_left_out(row, options, tmp_path, model):
    full = {"instruction": "i", "output": "o"} if "output" in row else {"messages": [U, A]}
    summary, texts, _ = written(tmp_path, model, [row, full, row], **options)
    assert (summary["empty_rows"], summary["skipped_rows"], len(texts)) == (2, 0, 1)


def test_an_answer_that_calls_a_tool_or_reasons_is_not_empty(tmp_path, model):
    row = {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}]}
    assert written(tmp_path, model, [row], chat_template="qwen2.5")[0]["empty_rows"] == 0
    assert says_something({"role": "assistant", "content": "", "reasoning_content": "hm"})
    assert not says_something({"role": "assistant", "content": "", "name": "x", "tool_calls": []})


def test_pairs_without_a_better_answer_are_left_out_and_nothing_left_is_an_error(tmp_path, model):
    pairs = [{"prompt": "q", "chosen": "", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": ""}]
    path, out = write_jsonl(tmp_path / "a.jsonl", pairs), tmp_path / "out"
    out.mkdir()
    summary = tokenize([path], model, out, events=Events(), workers=1, chat_template="chatml")
    assert (summary["documents"], summary["empty_rows"]) == (1, 1)
    path = write_jsonl(tmp_path / "b.jsonl", pairs[:1])
    with pytest.raises(DatasetFormatError, match="1 empty"):
        tokenize([path], model, out, events=Events(), workers=1, chat_template="chatml")
    assert json.loads(json.dumps(summary))["kind"] == "preference"
