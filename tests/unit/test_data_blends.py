"""Weights of blended inputs: what the command, a flow's job and the library make of them is the same."""

import json

import pytest
from chat_data import write_chat_tokenizer
from tiny import write_jsonl
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.tokenization import run, tokenize
from megatron_ext.events import Events
from megatron_ext.worker import Job


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


def texts(path, count):
    path.parent.mkdir(exist_ok=True)
    write_jsonl(path, [{"text": f"{path.parent.name} {n}"} for n in range(count)])
    return str(path)


def by_command(inputs, model, out):
    given = [part for text in inputs for part in ("--input", text)]
    result = CliRunner().invoke(app, ["tokenize", *given, "--tokenizer", str(model), "--out", str(out)])
    assert result.exit_code == 0, result.output


def by_library(inputs, model, out):
    tokenize(inputs, model, out, events=Events())


def by_flow(inputs, model, out):
    """As tasks/tokenize_dataset.py hands a job its files: links, and for each its weight and its entry."""
    from megatron_ext.data.sources import expand

    sources = [(source, f"{n + 1}: said") for n, text in enumerate(inputs) for source in expand([text])]
    out.mkdir()
    config = {"format": "text", "sources": [[source.weight, said] for source, said in sources]}
    files = {"files": [source.path for source, _ in sources], "tokenizer": str(model)}
    run(Job(job="tokenize", config=config, inputs=files, out=out), Events())


def pools(dataset):
    return [(pool.first, pool.last, pool.weight) for pool in open_dataset(dataset).pools]


@pytest.mark.parametrize("way", [by_command, by_flow, by_library])
def test_a_weighted_glob_counts_once_whatever_number_of_files_it_has(tmp_path, model, way):
    for number in (1, 2, 3):
        texts(tmp_path / "web" / f"{number}.jsonl", number)
    other = texts(tmp_path / "b" / "data.jsonl", 4)
    way([f"0.7:{tmp_path}/web/*.jsonl", f"0.3:{other}"], model, tmp_path / "out")
    assert pools(tmp_path / "out") == [(0, 6, 0.7), (6, 10, 0.3)]


@pytest.mark.parametrize("way", [by_command, by_flow, by_library])
def test_files_of_one_name_in_several_folders_keep_their_own_weights(tmp_path, model, way):
    first, second = texts(tmp_path / "a" / "data.jsonl", 3), texts(tmp_path / "b" / "data.jsonl", 4)
    way([f"0.7:{first}", f"0.3:{second}"], model, tmp_path / "out")
    assert pools(tmp_path / "out") == [(0, 3, 0.7), (3, 7, 0.3)]
    named = json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    assert [file["entry"] for file in named] == [0, 1]


@pytest.mark.parametrize("way", [by_command, by_flow, by_library])
def test_a_weight_of_one_is_a_weight(tmp_path, model, way):
    first, second = texts(tmp_path / "a.jsonl", 1), texts(tmp_path / "b.jsonl", 4)
    way([f"1:{first}", f"1:{second}"], model, tmp_path / "out")
    assert pools(tmp_path / "out") == [(0, 1, 1.0), (1, 5, 1.0)]
    way([str(first), str(second)], model, tmp_path / "one")
    assert pools(tmp_path / "one") == [(0, 5, 1.0)]
    way([str(first), f"3:{second}"], model, tmp_path / "both")
    assert pools(tmp_path / "both") == [(0, 1, 1.0), (1, 5, 3.0)]


def test_columns_are_for_the_files_that_have_some(tmp_path, model):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}])
    (tmp_path / "b.txt").write_text("two\nthree\n")
    tokenize(
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")],
        model,
        tmp_path / "out",
        events=Events(),
        columns={"text": "body"},
    )
    assert open_dataset(tmp_path / "out").facts["documents"] == 3


def test_the_same_reason_is_told_once_for_all_files(tmp_path, model):
    files = [texts(tmp_path / "web" / f"{number}.jsonl", 2) for number in range(5)]
    by_library(files, model, tmp_path / "out")
    why = open_dataset(tmp_path / "out").facts["why"]
    assert why.startswith("0.jsonl, 1.jsonl, 2.jsonl and 2 more: all of the first 2 rows have text")
    assert why.count("rows have text") == 1
