"""Rows of data files: what is read from each kind, and how a file that cannot be read is named."""

import gzip
import json
import tracemalloc

import pyarrow
import pytest
from data_files import TEXTS, packed, texts_of, write, write_texts
from pyarrow import ipc, parquet
from real_data import REAL_DATA, needs_real_data

from megatron_ext.data.sources import KINDS, column_batches, read_rows
from megatron_ext.errors import DatasetFormatError, SourceError

ROWS = [{"a": 1}, {"a": "日本 \u2028 [,]{}"}, {"a": [1, {"b": None}]}]


# --- every kind, compressed or not ------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_texts_as_rows_and_as_batches_from_any_start(tmp_path, kind, compression):
    path = write_texts(tmp_path, f"d{kind}", TEXTS)
    path = packed(path, compression) if compression else path
    expected = list(enumerate(TEXTS, 1))
    assert [(number, row["text"]) for number, row in read_rows(path, ("text",))] == expected
    for block_bytes in (1 << 24, 40):
        for start in (0, 1, 3, 5, 9):
            assert [(n, row["text"]) for n, row in read_rows(path, ("text",), start)] == expected[start:]
            assert texts_of(column_batches(path, "text", block_bytes, start)) == expected[start:]


def test_an_arrow_stream_is_read_like_an_arrow_file(tmp_path):
    table = pyarrow.table({"id": range(5), "text": pyarrow.array(TEXTS).dictionary_encode()})
    path = tmp_path / "d.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert [row for _, row in read_rows(path, ("text",))] == [{"text": text} for text in TEXTS]
    assert texts_of(column_batches(path, "text")) == list(enumerate(TEXTS, 1))


def test_a_batch_says_where_the_next_one_starts(tmp_path):
    for kind in KINDS:
        path = write_texts(tmp_path, f"d{kind}", TEXTS * 3)
        first = next(column_batches(path, "text", 40))
        assert 0 < len(first.values) < len(TEXTS) * 3
        rest = column_batches(path, "text", 40, start=first.last_row)
        assert texts_of([first, *rest]) == list(enumerate(TEXTS * 3, 1))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("escaped", [True, False])
def test_a_json_array_gives_its_elements_numbered_from_one(tmp_path, indent, escaped):
    path = write(tmp_path / "d.json", json.dumps(ROWS, indent=indent, ensure_ascii=escaped))
    assert list(read_rows(path)) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_a_json_array_is_the_same_wherever_its_pieces_are_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr("megatron_ext.data.sources.json_array.CHUNK_BYTES", size)
    values = [*ROWS, -1.5e-3, 12345, True, None, "😀 é", '\\"', [], {}, "x" * 100]
    for escaped in (True, False):
        text = "\ufeff" + json.dumps(values, ensure_ascii=escaped, indent=1)
        path = write(tmp_path / f"{escaped}.json", text)
        assert [row for _, row in read_rows(path)] == json.loads(text.lstrip("\ufeff"))


def test_a_json_array_is_read_in_memory_for_a_piece_of_it(tmp_path):
    path = tmp_path / "d.json"
    row = json.dumps({"text": "long " * 2000})
    path.write_text("[" + ",\n".join([row] * 3000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 29e6
    assert peak < 12e6


def test_jsonl_with_bom_crlf_and_blank_lines_gives_rows_with_their_lines(tmp_path):
    lines = [json.dumps({"a": str(row["a"])}, ensure_ascii=False) for row in ROWS]
    text = "\ufeff" + lines[0] + "\r\n\r\n  \n" + lines[1] + "\n" + lines[2]
    path = write(tmp_path / "d.jsonl", text)
    expected = [(1, str(ROWS[0]["a"])), (4, str(ROWS[1]["a"])), (5, str(ROWS[2]["a"]))]
    assert [(number, row["a"]) for number, row in read_rows(path)] == expected
    assert texts_of(column_batches(path, "a")) == expected
    assert texts_of(column_batches(path, "a", 8, start=1)) == expected[1:]


@pytest.mark.parametrize("name", ["d.json", "d.json.gz"])
def test_json_lines_under_the_name_json_are_read(tmp_path, name):
    raw = "\n".join(json.dumps(row) for row in ROWS).encode()
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    assert [row for _, row in read_rows(path)] == ROWS


def test_a_line_of_a_text_file_is_a_document_and_blank_lines_are_none(tmp_path):
    path = write(tmp_path / "d.txt", "\ufeff one \r\n\r\n \t\ntwo\x85\x0b end\n\nthree")
    expected = [(1, " one "), (4, "two\x85\x0b end"), (6, "three")]
    assert [(number, row["text"]) for number, row in read_rows(path)] == expected
    assert texts_of(column_batches(path, "text")) == expected
    assert texts_of(column_batches(path, "text", start=1)) == expected[1:]


def test_csv_fields_in_quotes_hold_commas_and_line_breaks(tmp_path):
    path = write(tmp_path / "d.csv", '\ufefftext,more\r\n"a, ""b""\nc",1\r\n\r\n,2\r\n')
    assert list(read_rows(path)) == [(1, {"text": 'a, "b"\nc', "more": "1"}), (2, {"text": "", "more": "2"})]
    assert texts_of(column_batches(path, "text")) == [(1, 'a, "b"\nc'), (2, "")]


def test_a_csv_with_quotes_inside_fields_is_read_however_many_there_are(tmp_path):
    path = write(tmp_path / "d.csv", 'n,text\n1,5" pipe\n2,"a, b"\n3,7" nail\n4,6" end\n')
    expected = [(1, '5" pipe'), (2, "a, b"), (3, '7" nail'), (4, '6" end')]
    for block_bytes in (1 << 20, 12):
        assert texts_of(column_batches(path, "text", block_bytes)) == expected


def test_parquet_gives_rows_of_the_wanted_columns(tmp_path):
    table = pyarrow.table({"messages": [[{"role": "user", "content": str(n)}] for n in range(3000)], "x": range(3000)})
    parquet.write_table(table, tmp_path / "d.parquet")
    rows = list(read_rows(tmp_path / "d.parquet", {"messages", "tools"}))
    assert rows[2999] == (3000, {"messages": [{"role": "user", "content": "2999"}]})
    assert next(read_rows(tmp_path / "d.parquet", {"conversations"}))[1].keys() == {"messages", "x"}


def test_texts_that_arrow_reads_otherwise_come_out_as_json_says(tmp_path):
    lines = ['{"text": "a", "text": "b"}', '{"text": "c", "n": NaN}', '{"n": [{"text": 1}], "te\\u0078t": "\\u0000"}']
    path = write(tmp_path / "d.jsonl", "\n".join(lines))
    assert texts_of(column_batches(path, "text")) == [(1, "b"), (2, "c"), (3, "\x00")]


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"d{kind}{packing}" for kind in KINDS for packing in ("", ".gz")])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(SourceError, match=rf"{name} does not exist"):
        list(read_rows(tmp_path / name))
    with pytest.raises(SourceError, match=rf"{name} does not exist"):
        list(column_batches(tmp_path / name, "text"))


BROKEN = [
    ("d.json", "", "holds no rows"),
    ("d.json", "[]", "holds no rows"),
    ("d.jsonl", "\n \n", "holds no rows"),
    ("d.txt", "\n \n", "holds no rows"),
    ("d.csv", "a,b\n", "holds no rows"),
    ("d.csv.gz", b"", "holds no rows"),
    ("d.json", '[{"a": "x"}, {"a": ]', "row 2: not valid JSON \\(Expecting value at character 19 of the file"),
    ("d.json", '[{"a": "x"}, {"a"', "row 2: the file ends inside this row; is it cut short"),
    ("d.json", '[{"a": "x"}, {"a": "x', "row 2: the file ends inside this row; is it cut short"),
    ("d.json", '[{"a": "x"}, ', "not closed after row 1; is the file cut short"),
    ("d.json", '[{"a": "x"}', "not closed after row 1"),
    ("d.json", '[{"a": "x"},]', "comma without a row follows row 1"),
    ("d.json", '[{"a": "x"} {"a": "y"}]', "'{' follows row 1 where a comma or ] belongs"),
    ("d.json", '[{"a": "x"}] x', "text follows the end of the array, at character 13"),
    ("d.json", '"text"', "holds an array of rows"),
    ("d.json", '{\n"a": 1\n}', "a .json file holds an array of rows"),
    ("d.json", b'[{"a": "b"}, {"a": "\xe6\x97\xa5\xff"}]', "row 2: is not UTF-8 \\(invalid start byte at byte 23 of"),
    ("d.json", "[" + "[" * 100_000, "row 1: nested too deeply"),
    ("d.jsonl", '{"a": "x"}\n\n{"a": \n', "row 3: the line is not valid JSON"),
    ("d.jsonl", '{"a": "x"}\n{"a": "x"}{"a": "y"}\n', "row 2: the line is not valid JSON"),
    ("d.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', "row 2: is not UTF-8 \\(invalid start byte at byte 7 of the line"),
    ("d.jsonl", "[" * 100_000, "row 1: the line is nested too deeply"),
    ("d.txt", b"x\n\nab\xe6\n", "row 3: is not UTF-8 \\(unexpected end of data at byte 2 of the line"),
    ("d.csv", "a,b\n1,2\n3\n", "row 2: has 1 values, but the header names 2 columns"),
    ("d.csv", 'a,b\n1,2\n3,"4\n5,6\n', "row 2: not valid csv .*is a quote left open"),
    ("d.csv", b"a,b\n1,2\nx\xff,4\n", "row 2: is not UTF-8"),
    ("d.csv", 'a,b\n1,2\n3,"4""\n', "row 2: not valid csv .*is a quote left open"),
    ("d.csv", "a,a\n1,2\n", "the header names a more than once"),
    ("d.parquet", "PAR1 not really", "not a readable parquet file"),
    ("d.arrow", "ARROW1 not really", "not a readable arrow file"),
    ("d.arrow", "neither", "not a readable arrow file"),
    ("d.jsonl.gz", "neither", "not a readable jsonl file in gzip"),
    ("d.parquet.zst", "neither", "not a readable parquet file in zstd"),
]


@pytest.mark.parametrize(("name", "content", "problem"), BROKEN)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, content, problem):
    path = write(tmp_path / name, content)
    for rows in (read_rows(path), column_batches(path, "a")):
        with pytest.raises(DatasetFormatError, match=problem) as caught:
            list(rows)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_compressed_file_is_named_with_how_far_it_went(tmp_path, kind, compression):
    whole = packed(write_texts(tmp_path, f"d{kind}", [f"{n} {TEXTS[1]}" for n in range(50)]), compression)
    path = write(tmp_path / f"cut{kind}{compression}", whole.read_bytes()[:-9])
    for rows in (read_rows(path), column_batches(path, "text")):
        with pytest.raises(DatasetFormatError, match=r"cut.* is not a readable .*; is it cut short or damaged\?"):
            list(rows)


def test_a_file_damaged_late_says_after_which_row(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % n for n in range(200_000))
    path = write(tmp_path / "d.jsonl.gz", gzip.compress(lines, 1)[:-100])
    with pytest.raises(DatasetFormatError, match=r"not a readable jsonl file in gzip after row \d{5,6}: "):
        list(read_rows(path))
    with pytest.raises(DatasetFormatError, match=r"not a readable jsonl file in gzip after row \d{5,6}: "):
        list(column_batches(path, "text", 1 << 16))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.jsonl", '{"text": "x"}\n{"txt": "y"}\n', "row 2: field 'text' is missing; the row has 'txt'"),
        ("d.jsonl", '{"text": "x"}\n{"text": null}\n', "row 2: field 'text' is null, not text"),
        ("d.jsonl", '{"text": "x"}\n\n{"text": 3}\n', "row 3: field 'text' is a number, not text"),
        ("d.jsonl", '{"text": "x"}\n"y"\n', "row 2: is text, not an object with fields"),
        ("d.jsonl", '{"text": "x"}\n{"text": "\\ud800"}\n', "row 2: field 'text' holds half of a surrogate pair"),
        ("d.json", '[{"text": "x"}, {"text": ["y"]}]', "row 2: field 'text' is a list, not text"),
        ("d.csv", "id,txt\n1,x\n", "row 1: field 'text' is missing; the row has 'id', 'txt'"),
    ],
)
def test_a_row_without_text_is_named_with_its_field(tmp_path, name, content, problem):
    path = write(tmp_path / name, content)
    with pytest.raises(DatasetFormatError) as caught:
        list(column_batches(path, "text"))
    assert str(caught.value).startswith(f"{path}, {problem}")


def test_a_column_that_a_columnar_file_lacks_or_has_as_something_else_is_named(tmp_path):
    table = pyarrow.table({"id": [1, 2], "words": [["a"], ["b"]], "gap": ["a", None]})
    parquet.write_table(table, tmp_path / "d.parquet")
    with pyarrow.OSFile(str(tmp_path / "d.arrow"), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("d.parquet", "d.arrow"):
        for column, problem in [
            ("text", f"{name}: field 'text' is missing; the file has the columns id, words, gap"),
            ("id", f"{name}: field 'id' is int64, not text"),
            ("gap", f"{name}, row 2: field 'gap' is null, not text"),
        ]:
            with pytest.raises(DatasetFormatError, match=problem):
                list(column_batches(tmp_path / name, column))


def test_bad_rows_are_left_out_and_told_where_asked_for(tmp_path):
    write(tmp_path / "d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"txt": 1}\n{"text"\n\n{"text": "b"}\n')
    write(tmp_path / "d.csv", b"id,text\n1,a\n2,\xff\n3\n4,5,6\n,b\n")
    write(tmp_path / "d.txt", b"a\n\xff\nb\n")
    table = pyarrow.table({"text": pyarrow.array(["a", None, "b"])})
    parquet.write_table(table, tmp_path / "d.parquet")
    for kind, expected, bad_rows in [
        ("jsonl", [(1, "a"), (6, "b")], [2, 3, 4]),
        ("csv", [(1, "a"), (5, "b")], [2, 3, 4]),
        ("txt", [(1, "a"), (3, "b")], [2]),
        ("parquet", [(1, "a"), (3, "b")], [2]),
    ]:
        told: dict[int, DatasetFormatError] = {}
        assert texts_of(column_batches(tmp_path / f"d.{kind}", "text", on_bad=told.__setitem__)) == expected
        assert list(told) == bad_rows
        assert all(f"row {number}: " in str(error) for number, error in told.items())


def test_invalid_utf8_in_a_columnar_file_is_named_with_its_row(tmp_path):
    values = pyarrow.array([b"a", b"\xe6\x97", b"c"])
    values = pyarrow.StringArray.from_buffers(3, *values.buffers()[1:])
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "d.parquet")
    with pytest.raises(DatasetFormatError, match="row 2: field 'text' is not UTF-8"):
        list(column_batches(tmp_path / "d.parquet", "text"))
    with pytest.raises(DatasetFormatError, match=r"d\.parquet, row 2: is not UTF-8"):
        list(read_rows(tmp_path / "d.parquet", ("text",)))


# --- real data --------------------------------------------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize(
    ("name", "rows"),
    [("c4_demo.jsonl", 300), ("wiki_demo.txt", 30), ("tinyshakespeare.txt", 32777)],
)
def test_real_text_is_the_same_as_rows_and_as_batches(name, rows):
    read = [(number, row["text"]) for number, row in read_rows(REAL_DATA / name)]
    assert len(read) == rows
    assert texts_of(column_batches(REAL_DATA / name, "text", 1 << 16)) == read
