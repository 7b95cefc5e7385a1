"""Which format rows have: auto says what it decided and why; real data is recognized and read alike in every format."""

import json
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest
from real_data import REAL_DATA, needs_real_data

from megatron_ext.config import DatasetFormat
from megatron_ext.data.formats import AUTO, FORMATS, detect_format, parse_row, require_format, wanted_columns
from megatron_ext.data.sources import read_rows
from megatron_ext.errors import DatasetFormatError

FILE = Path("data/train.jsonl")
ALPACA = {"instruction": "a", "output": "b", "text": "c"}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
MESSAGES = {"messages": [QUESTION, ANSWER]}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (ALPACA, "alpaca"),
        (SHAREGPT, "sharegpt"),
        (MESSAGES, "messages"),
        ({"conversations": MESSAGES["messages"]}, "messages"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b", "text": "ab"}, "prompt_completion"),
        ({"messages": [QUESTION], "chosen": ANSWER, "rejected": ANSWER | {"content": "c"}}, "preference"),
    ],
)
def test_auto_decides_and_says_why(row, format):
    name, why = detect_format(enumerate([row] * 5, 1), FILE)
    assert name == format
    assert why.startswith("train.jsonl: all of the first 5 rows have ")
    assert parse_row(row, name, FILE, 1)


def test_auto_follows_the_majority_so_that_the_odd_row_is_named_later():
    assert detect_format(enumerate([ALPACA, {"bad": 1}, ALPACA], 1), FILE)[0] == "alpaca"


def test_auto_refuses_what_it_cannot_decide():
    with pytest.raises(DatasetFormatError, match=r"row 1 has the fields content, id; name columns .*Known: text: "):
        detect_format([(1, {"id": 1, "content": "plain"})], FILE)
    with pytest.raises(DatasetFormatError, match="row 1 is a list"):
        detect_format([(1, ["a"])], FILE)
    with pytest.raises(DatasetFormatError, match="fits alpaca and messages alike; name one with --format"):
        detect_format([(1, ALPACA | MESSAGES)], FILE)


def test_the_configuration_offers_every_format():
    assert set(get_args(DatasetFormat)) == {AUTO, *FORMATS}


def test_an_unknown_format_is_named_with_the_nearest():
    with pytest.raises(DatasetFormatError, match="unknown dataset format 'sharegtp'; did you mean 'sharegpt'"):
        require_format("sharegtp")


# --- real data --------------------------------------------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize(
    ("name", "format", "rows"),
    [
        ("alpaca_en_demo.json", "alpaca", 999),
        ("alpaca_zh_demo.json", "alpaca", 1000),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("dpo_en_demo.json", "preference", 300),
        ("autoalign_dummy_sft.json", "sharegpt", 2),
        ("autoalign_dummy_dpo.json", "preference", 2),
        ("c4_demo.jsonl", "text", 300),
        ("wiki_demo.txt", "text", 30),
        ("tinyshakespeare.txt", "text", 32777),
    ],
)
def test_real_data_is_recognized_and_every_row_fits(name, format, rows):
    path = REAL_DATA / name
    decided, why = detect_format(islice(read_rows(path), 100), path)
    assert decided == format, why
    parsed = [parse_row(row, format, path, n) for n, row in read_rows(path, wanted_columns(format))]
    assert len(parsed) == rows


@needs_real_data
def test_autoaligns_pairs_have_the_question_as_prompt_and_answers_that_differ():
    path = REAL_DATA / "autoalign_dummy_dpo.json"
    for number, row in read_rows(path):
        preference = parse_row(row, "preference", path, number)
        assert preference.prompt == [{"role": "user", "content": row["prompt"]}]
        assert preference.chosen == [{"role": "assistant", "content": row["chosen"][-1]["value"]}]
        assert preference.rejected == [{"role": "assistant", "content": row["rejected"][-1]["value"]}]


@needs_real_data
@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet", "csv", "arrow"])
@pytest.mark.parametrize("format", ["messages", "prompt_completion", "preference", "sharegpt", "alpaca"])
def test_one_conversation_in_every_format_and_kind_of_file_is_the_same(tmp_path, kind, format):
    """Real rows, rewritten in the other shapes: what is rendered must not depend on how it was stored."""
    import pyarrow
    from pyarrow import csv, ipc, parquet

    pairs = [(row["instruction"], row["output"]) for _, row in read_rows(REAL_DATA / "alpaca_zh_demo.json")][:50]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    rows = {
        "alpaca": [{"instruction": q, "output": a} for q, a in pairs],
        "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs],
        "messages": [{"messages": messages} for messages in turns],
        "prompt_completion": [{"prompt": q, "completion": a} for q, a in pairs],
        "preference": [{"prompt": q, "chosen": a, "rejected": "?"} for q, a in pairs],
    }[format]
    path = tmp_path / f"d.{kind}"
    if kind == "csv":
        rows = [{k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in r.items()} for r in rows]
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "csv":
        csv.write_csv(table, path)
    elif kind == "arrow":
        with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    assert detect_format(islice(read_rows(path), 100), path)[0] == format
    parsed = [parse_row(row, format, path, n) for n, row in read_rows(path, wanted_columns(format))]
    if format == "preference":
        assert {p.rejected[0]["content"] for p in parsed} == {"?"}
        parsed = [p.conversations()[0] for p in parsed]
    assert [conversation.messages for conversation in parsed] == turns
