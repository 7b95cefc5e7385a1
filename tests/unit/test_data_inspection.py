"""A look into a dataset of each kind, and how it packs: at the terminal, as HTML, as JSON."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_data import write_chat_tokenizer
from rich.console import Console
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.data.idxmap import IdxmapWriter
from megatron_ext.data.inspection import inspect_dataset, render_html, render_terminal
from megatron_ext.data.manifest import DatasetManifest, LeftOut, LengthStatistics, Side, SourceFile
from megatron_ext.data.tokenization import tokenize
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import DatasetFormatError, SourceError
from megatron_ext.events import Events

TEXTS = ["What is the capital?", "Paris 日本 <b>x</b>", "user \x1b[31m red", "1 2 3 " * 40]
CHECK = {"documents", "tokens", "trained_tokens", "dropped", "truncated", "lengths"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


def idxmap(prefix: Path, documents: list[list[int]], dtype: type) -> np.ndarray:
    lengths = np.asarray([len(d) for d in documents])
    with IdxmapWriter(prefix, dtype) as writer:
        writer.add(np.concatenate(documents).astype(dtype), lengths)
    return lengths


def dataset(folder: Path, model: Path, kind: str, **facts: Any) -> Path:
    """TEXTS in a dataset; of chat and preference data the last two tokens of each document are trained."""
    folder.mkdir()
    tokenizer = load_tokenizer(model)
    ids = [e.ids for e in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    lengths = []
    sides = ["chosen_", "rejected_"] if kind == "preference" else [""]
    for number, side in enumerate(sides):
        ours = [d[: len(d) - number] for d in ids]
        lengths.append(idxmap(folder / f"{side}tokens", ours, np.uint16))
        if kind != "text":
            idxmap(folder / f"{side}loss_mask", [[0] * (len(d) - 2) + [1, 1] for d in ours], np.uint8)
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    every = np.concatenate(lengths)
    trained = int(every.sum()) if kind == "text" else 2 * len(every)
    if kind == "preference":
        facts["sides"] = {
            name.rstrip("_"): Side(
                tokens=int(one.sum()), trained_tokens=8, untrained_documents=0, lengths=LengthStatistics.of(one)
            )
            for name, one in zip(sides, lengths, strict=True)
        }
    DatasetManifest(
        kind=kind, documents=4, tokens=int(every.sum()), trained_tokens=trained, vocab_size=420, max_token_id=419,
        tokenizer_digest="ab" * 16, row_format=kind, why="asked for", dtype="uint16",
        lengths=LengthStatistics.of(every),
        files=(SourceFile(name="a", rows=4, digest="0", format=kind, documents=4),), **facts,
    ).write(folder)  # fmt: skip
    return folder


def pair(prefix: Path, model: Path) -> Path:
    idxmap(prefix, [e.ids for e in load_tokenizer(model).encode_batch(TEXTS, add_special_tokens=False)], np.int32)
    return prefix


def printed(place: Path, samples: int = 4, tokenizer: Path | None = None, **console: Any) -> str:
    file = io.StringIO()
    inspection = inspect_dataset(place, samples, tokenizer)
    render_terminal(inspection, Console(file=file, width=200, **({"color_system": None} | console)))
    return file.getvalue()


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("kind", ["text", "chat", "preference"])
def test_each_kind_is_shown_with_its_totals_and_its_trained_tokens(tmp_path: Path, model: Path, kind: str) -> None:
    place = dataset(tmp_path / "data", model, kind, left_out=LeftOut(dropped=3, truncated=2, truncated_tokens=70))
    values = json.loads(run("inspect", place, "--json", "--samples", 2))
    assert set(values) >= CHECK
    assert (values["documents"], values["dropped"], values["truncated"]) == (4, 3, 2)
    assert sum(bar["documents"] for bar in values["lengths"]["histogram"]) == (8 if kind == "preference" else 4)
    assert [s["side"] for s in values["samples"]] == {"preference": ["chosen", "rejected"] * 2}.get(kind, ["", ""])
    for sample in values["samples"]:
        trained = [token["trained"] for token in sample["tokens"]]
        assert sum(trained) == sample["trained"] == (sample["length"] if kind == "text" else 2)
        assert trained[-2:] == [True, True]
    said = run("inspect", place)
    assert f"{kind}: 4 documents" in said
    assert "3 documents were longer than max_length and dropped" in said
    assert "2 documents were cut to max_length, 70 tokens lost" in said
    if kind == "preference":
        assert "document 1, rejected: " in said
        assert "rejected: " in said


def test_colour_marks_what_is_trained_and_nothing_of_the_data_reaches_the_terminal(tmp_path: Path, model: Path) -> None:
    place = dataset(tmp_path / "data", model, "chat")
    plain = printed(place)
    assert TEXTS[0] in plain.replace("[[", "").replace("]]", "")
    assert plain.count("[[") == plain.count("]]") == 8  # half of them in the headings
    assert "user ␛[31m" in plain
    assert "\x1b" not in plain
    coloured = printed(place, color_system="standard", force_terminal=True)
    assert coloured.count("\x1b[1;32m") == 4
    assert "\x1b[31m" not in coloured


def test_controls_without_a_picture_are_shown_as_their_numbers(tmp_path: Path, model: Path) -> None:
    text, place = "a\x9b31mred\u202eabc\u2066x\x85y\u2069", tmp_path / "data"
    rows = tmp_path / "bad\x9b.jsonl"
    rows.write_text(json.dumps({"text": text}) + "\n")
    place.mkdir()
    tokenize([rows], model, place, events=Events(), format="text")
    inspection = inspect_dataset(place, 1)
    for shown in (
        printed(place),
        printed(place, color_system="standard", force_terminal=True),
        render_html(inspection),
    ):
        assert not any(sign in shown for sign in "\x9b\x85\u202e\u2066\u2069")
        shown = html.unescape(shown)
        assert "a<U+009B>31mred<U+202E>abc<U+2066>x<U+0085>y<U+2069>" in shown
        assert "bad<U+009B>.jsonl: format text" in shown


@pytest.mark.parametrize("name", ["folder", "file/look.html"])
def test_an_html_file_that_cannot_be_written_is_named(tmp_path: Path, model: Path, name: str) -> None:
    place = dataset(tmp_path / "data", model, "chat")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=r"cannot write .*(folder|look\.html): "):
        run("inspect", place, "--html", tmp_path / name)


def test_the_html_file_stands_alone_and_is_escaped(tmp_path: Path, model: Path) -> None:
    place = dataset(tmp_path / "data", model, "chat")
    file = tmp_path / "new" / "look.html"
    assert run("inspect", place, "--html", file).strip() == str(file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.count("<pre>") == 3
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert json.loads(run("inspect", place, "--html", file, "--json"))["documents"] == 4


def test_a_megatron_pair_is_shown_as_numbers_or_through_a_named_tokenizer(tmp_path: Path, model: Path) -> None:
    prefix = pair(tmp_path / "corpus_text_document", model)
    values = json.loads(run("inspect", prefix, "--json"))
    assert set(values) >= CHECK
    assert (values["kind"], values["documents"], values["trained_share"]) == ("text", 4, 1)
    count = sum(len(e.ids) for e in load_tokenizer(model).encode_batch(TEXTS, add_special_tokens=False))
    assert values["tokens"] == values["trained_tokens"] == count
    ids = load_tokenizer(model).encode(TEXTS[0], add_special_tokens=False).ids
    assert " ".join(map(str, ids)) in printed(prefix)
    assert "Paris 日本 <b>x</b>" in printed(tmp_path / "corpus_text_document.idx", tokenizer=model)
    assert "no manifest says which tokenizer made it" in printed(prefix)
    assert "Megatron-LM pair" in render_html(inspect_dataset(prefix, 1))


def test_a_pair_without_tokens_is_refused(tmp_path: Path) -> None:
    with IdxmapWriter(tmp_path / "empty", np.uint16):
        pass
    with pytest.raises(DatasetFormatError, match="holds no tokens"):
        inspect_dataset(tmp_path / "empty", 1)


def test_a_folder_whose_manifest_says_otherwise_is_refused(tmp_path: Path, model: Path) -> None:
    place = dataset(tmp_path / "data", model, "preference")
    idxmap(place / "rejected_tokens", [[1, 2]], np.uint16)
    idxmap(place / "rejected_loss_mask", [[1, 1]], np.uint8)
    with pytest.raises(SourceError, match="two sides differ"):
        inspect_dataset(place, 1)
    other = dataset(tmp_path / "other", model, "text")
    idxmap(other / "tokens", [[1, 2]], np.uint16)
    with pytest.raises(SourceError, match="is damaged"):
        inspect_dataset(other, 1)


def test_pack_says_bins_fill_and_seconds_for_chat_and_for_a_pair(tmp_path: Path, model: Path) -> None:
    place = dataset(tmp_path / "data", model, "chat")
    values = json.loads(run("pack", place, "--seq-length", 256, "--json"))
    assert (values["samples"], values["truncated"]) == (4, 0)
    lengths = [len(e.ids) for e in load_tokenizer(model).encode_batch(TEXTS, add_special_tokens=False)]
    places = [-(-(n - 1) // 16) * 16 for n in lengths]
    assert values["bins"] == -(-sum(places) // 256)
    assert values["fill"] == pytest.approx(sum(places) / (256 * values["bins"]), abs=1e-6)
    assert values["useful"] == pytest.approx(sum(n - 1 for n in lengths) / (256 * values["bins"]), abs=1e-6)
    assert 0 <= values["seconds"] < 60
    assert "bins" in run("pack", place, "--seq-length", 256)
    text = json.loads(run("pack", pair(tmp_path / "corpus", model), "--seq-length", 32, "--json"))
    assert (text["bins"], text["fill"]) == ((sum(lengths) - 1) // 32, 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seq-length", "100"], "not a multiple of pack_alignment 16; take 96"),
        (["--seq-length", "8"], "take 16"),
    ],
)
def test_a_sequence_length_that_the_alignment_does_not_divide_is_refused(
    tmp_path: Path, model: Path, arguments: list[str], named: str
) -> None:
    from megatron_ext.errors import ConfigError

    place = dataset(tmp_path / "data", model, "chat")
    with pytest.raises(ConfigError, match=named):
        run("pack", place, *arguments)


def test_both_answers_of_a_pair_lie_in_one_bin(tmp_path: Path, model: Path) -> None:
    place = dataset(tmp_path / "data", model, "preference")
    summary = run("pack", place, "--seq-length", 64, "--json")
    assert json.loads(summary)["bins"] > 0
