"""Dataset formats: rows become conversations and preferences, and rows that do not fit are named."""

import pickle
from pathlib import Path

import pytest

from megatron_ext.data.formats import (
    Preference,
    Text,
    detect_format,
    parse_row,
    require_columns,
    wanted_columns,
)
from megatron_ext.errors import DatasetFormatError, RowFormatError

FILE = Path("data/train.jsonl")
DEEP = "[" * 100_000


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


def test_text_is_taken_as_it_is_even_when_empty():
    assert parse_row({"text": " a\n", "id": 3}, "text", FILE, 1) == Text(" a\n")
    assert parse_row({"text": ""}, "text", FILE, 1) == Text("")


def test_lists_may_be_the_json_text_of_lists_as_in_csv():
    messages = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    assert messages_of({"messages": messages}, "messages") == [("user", "a"), ("assistant", "b")]
    row = {"instruction": "q", "input": "", "output": "o", "history": '[["a", "b"]]', "system": ""}
    assert messages_of(row, "alpaca") == [("user", "a"), ("assistant", "b"), ("user", "q"), ("assistant", "o")]


def test_reasoning_gets_the_names_that_templates_read():
    answer = {"role": "assistant", "content": "4", "reasoning": "2 + 2"}
    (message,) = parse_row({"messages": [answer]}, "messages", FILE, 1).messages
    assert message == answer | {"thinking": "2 + 2", "reasoning_content": "2 + 2"}


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Hi ", " Hello"),
        ([{"role": "user", "content": "Hi "}], [{"role": "assistant", "content": " Hello"}]),
        ([{"from": "human", "value": "Hi "}], {"from": "gpt", "value": " Hello"}),
    ],
)
def test_prompt_and_completion_as_texts_or_turns_train_the_completion_alone(prompt, completion):
    row = {"prompt": prompt, "completion": completion}
    assert messages_of(row, "prompt_completion") == [("user", "Hi "), ("assistant", " Hello")]
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert parse_row({"prompt": history, "completion": "d"}, "prompt_completion", FILE, 1).trained_from == 3


# --- preferences ------------------------------------------------------------------------------------------------

U, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
H, G, W = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}
S = {"role": "system", "content": "s"}
TEXTS = {"chosen": "a", "rejected": "b"}
EARLIER = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"conversations": [H], "chosen": G, "rejected": W}, [U]),  # LLaMA-Factory, sharegpt
        ({"conversations": [H], "chosen": G, "rejected": W, "system": "s"}, [S, U]),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, [U]),  # LLaMA-Factory, alpaca
        (
            {"instruction": "q", "history": [["x", "y"]], **TEXTS, "system": "s"},
            [S, *EARLIER, U],
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [U]),  # TRL, plain, explicit
        ({"chosen": "qa", "rejected": "qb"}, [U]),  # TRL, plain, implicit
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, [U]),  # TRL, conversational, explicit
        ({"chosen": [S, *EARLIER, U, A], "rejected": [S, *EARLIER, U, B]}, [S, *EARLIER, U]),  # TRL, implicit
        ({"prompt": "q", "prompt_id": "0", "chosen": [H, G], "rejected": [H, W], "conversations": [H, G]}, [U]),
        ({"prompt": "q", "messages": [U, A], "chosen": [U, A], "rejected": [U, B]}, [U]),  # UltraFeedback
    ],
)
def test_preferences_of_every_shape_give_prompt_and_answers(row, prompt):
    assert parse_row(row, "preference", FILE, 1) == Preference(prompt, [A], [B])
    assert detect_format([(1, row)], FILE)[0] == "preference"
    chosen, rejected = parse_row(row, "preference", FILE, 1).conversations()
    assert chosen.messages == [*prompt, A]
    assert rejected.messages == [*prompt, B]
    assert chosen.trained_from == rejected.trained_from == len(prompt)


def test_a_space_before_the_first_difference_of_two_texts_belongs_to_the_answers():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    preference = parse_row(row, "preference", FILE, 1)
    assert preference.prompt == [{"role": "user", "content": "The sky is"}]
    assert [preference.chosen[0]["content"], preference.rejected[0]["content"]] == [" blue.", " green."]


def test_an_answer_may_call_tools():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    row = {"conversations": [H], "chosen": [call, {"from": "observation", "value": "1"}, G], "rejected": [W]}
    preference = parse_row(row | {"tools": '[{"name": "f"}]'}, "preference", FILE, 1)
    assert [message["role"] for message in preference.chosen] == ["assistant", "tool", "assistant"]
    assert preference.uses_tools


# --- rows that do not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "row", "problem"),
    [
        ("text", {"txt": "a"}, "field 'text' is missing"),
        ("text", {"text": None}, "field 'text' is null, not text"),
        ("prompt_completion", {"prompt": "a"}, "field 'completion' is missing"),
        ("prompt_completion", {"prompt": "a", "completion": [U]}, "field 'completion' has no assistant turn"),
        ("preference", {"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "field 'rejected' is the same as chosen"),
        ("preference", {"chosen": [U, A], "rejected": [S, U, B]}, "field 'rejected' starts with another turn"),
        ("preference", {"chosen": [U, A], "rejected": [U]}, "field 'rejected' does not go on with an assistant turn"),
        ("preference", {"chosen": [U, S, A], "rejected": [U, B]}, "field 'chosen' does not go on with an assistant"),
        ("preference", {"prompt": [U, A], "chosen": [A], "rejected": [B]}, "ends with an assistant turn already"),
        ("preference", {"prompt": "a", "chosen": [{"value": 1}], "rejected": "b"}, r"field 'chosen\[0\]\.role' holds"),
        ("sharegpt", {"conversations": [H], "chosen": G, "rejected": W}, "nothing to train on; it has chosen and rej"),
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
        ("sharegpt", {"conversations": [{"from": ["x"], "value": "x"}]}, "holds an unknown speaker"),
        ("sharegpt", {"conversations": DEEP}, "field 'conversations' is not valid JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": DEEP}]}, "not the JSON of a function call"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}], "tools": DEEP}, "'tools' is not valid JSON"),
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
    assert (caught.value.source, caught.value.row) == ("data/train.jsonl", 7)
    assert caught.value.field is None or f"field {caught.value.field!r}" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


# --- odd names --------------------------------------------------------------------------------------------------


def test_columns_give_fields_other_names():
    row = {"question": "q", "answer": "a", "input": "unwanted", "text": "t"}
    columns = {"instruction": "question", "output": "answer", "input": "nowhere"}
    conversation = parse_row(row, "alpaca", FILE, 1, columns)
    assert [m["content"] for m in conversation.messages] == ["q", "a"]
    name, why = detect_format([(1, row)], FILE, columns)
    assert name == "alpaca"
    assert "instruction from question, output from answer" in why
    assert wanted_columns("alpaca", columns) == {"question", "answer", "nowhere", "system", "history"}


def test_a_column_that_stands_for_another_field_is_only_that():
    conversation = parse_row({"input": "q", "output": "a"}, "alpaca", FILE, 1, {"instruction": "input"})
    assert [m["content"] for m in conversation.messages] == ["q", "a"]
    swapped = parse_row({"input": "q", "instruction": "x", "output": "a"}, "alpaca", FILE, 1,
                        {"instruction": "input", "input": "instruction"})  # fmt: skip
    assert swapped.messages[0]["content"] == "q\nx"


def test_an_error_names_the_column_of_the_file():
    with pytest.raises(RowFormatError, match="row 1: field 'answer' is missing") as caught:
        parse_row({"question": "q"}, "alpaca", FILE, 1, {"instruction": "question", "output": "answer"})
    assert caught.value.field == "answer"
    with pytest.raises(RowFormatError, match=r"field 'turns\[0\]\.from' holds an unknown speaker"):
        parse_row({"turns": [{"from": "x"}]}, "sharegpt", FILE, 1, {"conversations": "turns"})


@pytest.mark.parametrize(
    ("columns", "format", "problem"),
    [
        ({"instructoin": "q"}, "alpaca", "unknown field 'instructoin'; did you mean 'instruction'"),
        ({"messages": "q"}, "alpaca", "fields of format alpaca"),
        ({"nonsense": "q"}, "auto", "fields of any format"),
        ({"instruction": "q", "output": "q"}, "alpaca", "'q' stands for several fields"),
    ],
)
def test_a_mapping_of_what_no_format_reads_is_refused(columns, format, problem):
    with pytest.raises(DatasetFormatError, match=problem):
        require_columns(columns, format)
