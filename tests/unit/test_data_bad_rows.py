"""One bad row, or one empty file, among many: named by default, counted where rows are skipped."""

import io
import json

import pyarrow
import pytest
from chat_data import write_chat_tokenizer
from pyarrow import ipc, parquet
from tiny import write_jsonl

from megatron_ext.data.inspection import inspect_dataset
from megatron_ext.data.manifest import DatasetManifest
from megatron_ext.data.sources import column_batches, read_rows
from megatron_ext.data.sources.quotes import Quotes
from megatron_ext.data.tokenization import tokenize
from megatron_ext.errors import DatasetFormatError
from megatron_ext.events import Events


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


def call(arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    return {"messages": [*turns, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "done"}]}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tool_calls_are_the_same_from_a_columnar_file_as_from_json_lines(tmp_path, model, kind):
    kinds = [{"city": {"type": "string"}}, {"x": {"type": "integer", "enum": [1]}}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": p}}} for p in kinds]
    rows = [{**call(arguments), "tools": tools} for arguments in ({"city": "Rome"}, {"x": 1})]
    table = pyarrow.Table.from_pylist(rows)
    columnar = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(table, columnar)
    else:
        with pyarrow.OSFile(str(columnar), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    found = []
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), columnar):
        out = tmp_path / f"out{path.suffix}"
        tokenize([path], model, out, events=Events(), chat_template="qwen2.5")
        found.append(["".join(text for text, _ in sample.runs()) for sample in inspect_dataset(out, 2).samples])
    assert '"arguments": {"city": "Rome"}' in found[0][0]
    assert found[0] == found[1]


def test_one_row_that_is_not_utf8_is_named_and_can_be_skipped(tmp_path, model):
    _, offsets, data = pyarrow.array([b"ok", b"\xff\xfe", b"fine"]).buffers()
    texts = pyarrow.StringArray.from_buffers(3, offsets, data)
    parquet.write_table(pyarrow.table({"instruction": ["a", "b", "c"], "output": texts}), tmp_path / "a.parquet")
    given = ([tmp_path / "a.parquet"], model, tmp_path / "out")
    with pytest.raises(DatasetFormatError, match=r"a\.parquet, row 2: is not UTF-8"):
        tokenize(*given, events=Events(), chat_template="chatml")
    summary = tokenize(*given, events=Events(), chat_template="chatml", on_bad_row="skip")
    assert (summary["documents"], summary["skipped_rows"]) == (2, 1)


def test_a_bad_quote_costs_its_own_record(tmp_path, model):
    (tmp_path / "a.csv").write_text('text,id\na,1\n"b"c,2\nd,3\n"e\n')
    given = ([tmp_path / "a.csv"], model, tmp_path / "out")
    with pytest.raises(DatasetFormatError, match=r"a\.csv, row 2: not valid csv"):
        list(read_rows(tmp_path / "a.csv"))
    bad = []
    rows = list(read_rows(tmp_path / "a.csv", on_bad=lambda number, error: bad.append(number)))
    assert [(number, row["text"]) for number, row in rows] == [(1, "a"), (3, "d")]
    assert bad == [2, 4]
    assert [number for number, _ in read_rows(tmp_path / "a.csv", start=2, on_bad=lambda *_: None)] == [3]
    assert tokenize(*given, events=Events(), on_bad_row="skip")["skipped_rows"] == 2


@pytest.mark.parametrize(
    "lines",
    [
        'x,text\na,"b\nc,"d\n',  # as many quotes as a valid file: the break in the middle joins two records
        'text,x\n"b"c,1\n"d",2\n"e"f,3\n',
        "text,x\n" + "good,1\n" * 40 + 'b"c"d,1\n',
        'text\n"a""b"\n"a"" b\n',
    ],
)
@pytest.mark.parametrize("block", [16 << 20, 24])
def test_a_quote_astray_in_a_csv_is_read_as_by_row(tmp_path, lines, block):
    path = tmp_path / "a.csv"
    path.write_text(lines)
    rows, bad, bad_too = [], [], []
    for number, row in read_rows(path, on_bad=lambda number, error: bad.append((number, str(error)))):
        rows.append((number, row["text"]))
    batches = column_batches(path, "text", block, on_bad=lambda number, error: bad_too.append((number, str(error))))
    found = [(batch.row(i), str(value)) for batch in batches for i, value in enumerate(batch.values)]
    assert (found, bad_too) == (rows, bad)


@pytest.mark.parametrize("cut", range(1, 60))
def test_quotes_in_their_places_are_known_wherever_the_pieces_end(cut):
    text = b'text,x\n"a",1\r\n"b ""c"" d",2\n"""","e\nf"\n"",3\nplain,"g, h"\n'
    quotes = Quotes(io.BytesIO(text))
    while quotes.read(cut):
        pass
    assert (quotes.open, quotes.astray) == (False, False)


def test_two_rows_in_a_line_are_refused_though_a_blank_line_makes_up_for_it(tmp_path, model):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}{"text": "b"}\n \n')
    with pytest.raises(DatasetFormatError, match=r"a\.jsonl, row 1: the line is not valid JSON"):
        tokenize([tmp_path / "a.jsonl"], model, tmp_path / "out", events=Events(), format="text")


def test_a_number_of_too_many_digits_names_its_row(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": ' + "7" * 5000 + "}]")
    with pytest.raises(DatasetFormatError, match=r"a\.json, row 2: not valid JSON \(Exceeds the limit"):
        list(read_rows(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["part.jsonl", "part.json", "part.csv", "part.txt", "part.jsonl.gz", "part.parquet"])
@pytest.mark.parametrize("format", ["auto", "text"])
def test_an_empty_part_is_named_and_passed_over_where_rows_are_skipped(tmp_path, model, name, format):
    first, empty = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]), tmp_path / name
    empty.touch()
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), empty)
    given = ([first, empty], model, tmp_path / "out")
    with pytest.raises(DatasetFormatError, match=r"part\.\S+ holds no rows; remove it from the list or fill it"):
        tokenize(*given, events=Events(), format=format)
    with Events(tmp_path / "events.jsonl") as events:
        tokenize(*given, events=events, format=format, on_bad_row="skip")
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert f"{empty} holds no rows and is passed over" in [e["text"] for e in told if e["event"] == "note"]
    assert [file.name for file in DatasetManifest.read(tmp_path / "out").files] == ["a.jsonl"]
