"""What a tokenization tells while it runs: rows done, how many there will be, and how long the rest takes."""

import json
import random

import pytest
from chat_data import chat, write_chat_tokenizer
from data_files import packed, write_texts
from tiny import write_jsonl

from megatron_ext.data import building, chat_work, plan, source_facts, text_work
from megatron_ext.data.source_facts import SourceFacts, file_states
from megatron_ext.data.sources import Source, json_array, rows
from megatron_ext.data.tokenization import tokenize
from megatron_ext.events import Events

draw = random.Random(5)
TEXTS = [draw.randbytes(200).hex() for _ in range(1500)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def often(monkeypatch):
    """Small blocks, and a word about each."""
    monkeypatch.setattr(building, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(text_work, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(chat_work, "BLOCK_ROWS", 50)
    monkeypatch.setattr(json_array, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(plan, "SMALL_BYTES", 1 << 40)


def told(files, model, folder, **options):
    with Events(folder / "events.jsonl") as events:
        tokenize(files, model, folder / "out", events=events, workers=1, **options)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == "progress"]


PACKED = ("a.jsonl.gz", "a.txt.zst", "a.json.gz", "a.csv.zst", "a.parquet.gz", "a.arrow.zst")


@pytest.mark.parametrize("name", [*PACKED, "a.json", "a.csv", "a.arrow"])
def test_the_time_left_is_told_for_every_kind_of_file(tmp_path, model, often, name):
    kind, _, compression = name.removeprefix("a.").partition(".")
    path = write_texts(tmp_path, f"a.{kind}", TEXTS)
    path = packed(path, f".{compression}") if compression else path
    progress = told([path], model, tmp_path)
    middle = [event for event in progress if len(TEXTS) * 0.5 < event["done"] < len(TEXTS) * 0.9]
    assert middle
    assert all(event["seconds_left"] is not None for event in middle)
    assert all(len(TEXTS) * 0.5 < event["total"] < len(TEXTS) * 2 for event in middle)
    assert progress[-1]["total"] == len(TEXTS)


def test_the_time_left_is_told_for_conversations_in_several_files(tmp_path, model, often):
    whole = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("question", text)} for text in TEXTS[:750]])
    second = write_jsonl(tmp_path / "b.jsonl", [{"messages": chat("question", text)} for text in TEXTS[750:]])
    progress = told([packed(whole, ".gz"), packed(second, ".zst")], model, tmp_path, chat_template="chatml")
    middle = [event for event in progress if 800 < event["done"] < 1400]
    assert middle
    assert all(event["seconds_left"] is not None for event in middle)
    assert all(event["done"] <= event["total"] < 2300 for event in middle)
    assert progress[-1]["total"] == 1500


@pytest.mark.parametrize("name", ["a.arrow", "a.csv", "a.parquet", "a.jsonl"])
def test_the_rows_of_a_file_are_counted(tmp_path, monkeypatch, name):
    monkeypatch.setattr(source_facts, "CHUNK", 97)
    texts = ["plain", "two\nlines", 'says "hi",\n', "last"] * 20
    sources = [Source(str(write_texts(tmp_path, name, texts)))]
    facts = SourceFacts(sources, file_states(sources))
    facts.digest(0)
    facts._thread.join()
    assert facts.rows == len(texts)
