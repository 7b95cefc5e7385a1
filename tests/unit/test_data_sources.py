"""Rows of data files: what is read, and how a file that cannot be read is named."""

import json

import pytest

from megatron_ext.data.sources import read_rows
from megatron_ext.errors import DatasetFormatError, SourceError

ROWS = [{"a": 1}, {"a": "日本 \u2028 [,]{}"}, {"a": [1, {"b": None}]}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("escaped", [True, False])
def test_a_json_array_gives_its_elements_numbered_from_one(tmp_path, indent, escaped):
    path = write(tmp_path / "d.json", json.dumps(ROWS, indent=indent, ensure_ascii=escaped))
    assert list(read_rows(path)) == list(enumerate(ROWS, 1))


def test_jsonl_with_bom_crlf_and_blank_lines_gives_rows_with_their_lines(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = "\ufeff" + lines[0] + "\r\n\r\n  \n" + lines[1] + "\n" + lines[2]
    assert list(read_rows(write(tmp_path / "d.jsonl", text))) == [(1, ROWS[0]), (4, ROWS[1]), (5, ROWS[2])]


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = write(tmp_path / "d.json", "\n".join(json.dumps(row) for row in ROWS))
    assert [row for _, row in read_rows(path)] == ROWS


def test_parquet_gives_rows_of_the_wanted_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"messages": [[{"role": "user", "content": str(n)}] for n in range(3000)], "x": range(3000)})
    parquet.write_table(table, tmp_path / "d.parquet")
    rows = list(read_rows(tmp_path / "d.parquet", {"messages", "tools"}))
    assert rows[2999] == (3000, {"messages": [{"role": "user", "content": "2999"}]})
    assert next(read_rows(tmp_path / "d.parquet", {"conversations"}))[1].keys() == {"messages", "x"}


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(SourceError, match=rf"{name} does not exist"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.json", "", "holds no rows"),
        ("d.json", "[]", "holds no rows"),
        ("d.jsonl", "\n \n", "holds no rows"),
        ("d.json", '[{"a": 1}, {"a": ]', "row 2: not valid JSON"),
        ("d.json", '[{"a": 1}', "not closed after row 1"),
        ("d.json", '[{"a": 1},]', "comma without a row follows row 1"),
        ("d.json", '[{"a": 1}] x', "text follows the end"),
        ("d.json", '"text"', "holds an array of rows"),
        ("d.json", '{\n"a": 1\n}', "a .json file holds an array of rows"),
        ("d.jsonl", '{"a": 1}\n\n{"a": \n', "row 3: the line is not valid JSON"),
        ("d.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("d.jsonl", "[" * 100_000, "nested too deeply"),
        ("d.parquet", "PAR1 not really", "not a readable parquet file"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, content, problem):
    with pytest.raises(DatasetFormatError, match=problem) as caught:
        list(read_rows(write(tmp_path / name, content)))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_file_are_refused_with_what_is_supported(tmp_path):
    with pytest.raises(SourceError, match=r"supported: \.json, \.jsonl, \.parquet"):
        list(read_rows(write(tmp_path / "d.csv", "a,b")))
    with pytest.raises(SourceError, match="is a folder"):
        list(read_rows(tmp_path))
