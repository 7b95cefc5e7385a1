"""Dataset formats: rows become conversations, rows that do not fit are named, auto says what it decided and why."""

from pathlib import Path

import pytest

from megatron_ext.data.formats import detect_format, parse_row, require_format
from megatron_ext.errors import DatasetFormatError

FILE = Path("data/train.jsonl")


def messages_of(row, format):
    return [(m["role"], m["content"]) for m in parse_row(row, format, FILE, 7).messages]


def test_alpaca_with_input_system_and_history():
    row = {
        "instruction": "Translate", "input": "chat", "output": "cat", "system": "You translate.",
        "history": [["Hi", "Hello"]], "extra": 1,
    }  # fmt: skip
    assert messages_of(row, "alpaca") == [
        ("system", "You translate."), ("user", "Hi"), ("assistant", "Hello"),
        ("user", "Translate\nchat"), ("assistant", "cat"),
    ]  # fmt: skip


def test_alpaca_contents_are_never_stripped_and_empty_fields_add_nothing():
    row = {"instruction": " Say \n", "input": "", "output": "\n a \n", "system": None, "history": None}
    assert messages_of(row, "alpaca") == [("user", " Say \n"), ("assistant", "\n a \n")]


def test_sharegpt_speakers():
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    assert messages_of(row, "sharegpt") == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
    ]  # fmt: skip


def test_sharegpt_tools_become_openai_tool_calls():
    row = {
        "conversations": [
            {"from": "human", "value": "find"},
            {"from": "function_call", "value": '{"name": "search", "arguments": {"q": [1]}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "three"},
        ],
        "tools": '[{"name": "search", "description": "d", "parameters": {}}]',
    }
    conversation = parse_row(row, "sharegpt", FILE, 1)
    assert conversation.uses_tools
    assert conversation.tools == [
        {"type": "function", "function": {"name": "search", "description": "d", "parameters": {}}}
    ]
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "search", "arguments": {"q": [1]}}}
    ]


def test_messages_with_text_parts_nulls_and_tool_calls():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "name": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "done", "tool_calls": None},
        ]
    }
    messages = parse_row(row, "messages", FILE, 1).messages
    assert messages[0] == {"role": "user", "content": "a b"}
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert messages[3] == {"role": "assistant", "content": "done"}


@pytest.mark.parametrize(
    ("format", "row", "problem"),
    [
        ("alpaca", {"instruction": "a"}, "field 'output' is missing"),
        ("alpaca", {"instruction": "a", "output": 3}, "field 'output' is a number, not text"),
        ("alpaca", {"instruction": "a", "output": "b", "input": ["c"]}, "field 'input' is a list, not text"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, r"field 'history\[0\]' is not a pair"),
        ("alpaca", ["a"], "is a list, not an object"),
        ("sharegpt", {"messages": []}, "field 'conversations' is missing"),
        ("sharegpt", {"conversations": []}, "field 'conversations' is empty"),
        ("sharegpt", {"conversations": "x"}, "field 'conversations' is text, not a list"),
        ("sharegpt", {"conversations": [{"from": "humn", "value": "x"}]}, "did you mean 'human'"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, r"field 'conversations\[0\]\.value' is missing"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "has no assistant turn"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "not the JSON of a function call"),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": "x"}], "tools": "{"},
            "field 'tools' is not valid JSON",
        ),
        ("messages", {"messages": [{"role": "bot", "content": "x"}]}, r"'messages\[0\]\.role' holds an unknown role"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, r"content' is null, not text"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not a text part"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "has no assistant turn"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_file_row_and_field(format, row, problem):
    with pytest.raises(DatasetFormatError, match=problem) as caught:
        parse_row(row, format, FILE, 7)
    assert str(caught.value).startswith("data/train.jsonl, row 7: ")


ALPACA = {"instruction": "a", "output": "b", "text": "c"}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (ALPACA, "alpaca"),
        (SHAREGPT, "sharegpt"),
        (MESSAGES, "messages"),
        ({"conversations": MESSAGES["messages"]}, "messages"),
    ],
)
def test_auto_decides_and_says_why(row, format):
    name, why = detect_format(enumerate([row] * 5, 1), FILE)
    assert name == format
    assert why.startswith("train.jsonl: all of the first 5 rows have ")
    assert len(messages_of(row, name)) == 2


def test_auto_follows_the_majority_so_that_the_odd_row_is_named_later():
    assert detect_format(enumerate([ALPACA, {"bad": 1}, ALPACA], 1), FILE)[0] == "alpaca"


def test_auto_refuses_what_it_cannot_decide():
    with pytest.raises(DatasetFormatError, match=r"no known format: row 1 has the fields text\. Known: alpaca: "):
        detect_format([(1, {"text": "plain"})], FILE)
    with pytest.raises(DatasetFormatError, match=r"preference pairs \(chosen, rejected\)"):
        detect_format([(1, {"prompt": "p", "chosen": "a", "rejected": "b"})], FILE)
    with pytest.raises(DatasetFormatError, match="fits alpaca and messages alike; name one with --format"):
        detect_format([(1, ALPACA | MESSAGES)], FILE)


def test_an_unknown_format_is_named_with_the_nearest():
    with pytest.raises(DatasetFormatError, match="unknown dataset format 'sharegtp'; did you mean 'sharegpt'"):
        require_format("sharegtp")
