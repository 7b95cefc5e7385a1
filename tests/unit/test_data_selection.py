"""What training reads from each kind of dataset: decided once, cached, split, blended, windowed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext import cache
from megatron_ext.config import TrainConfig
from megatron_ext.data import selection
from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.idxmap import IdxmapWriter
from megatron_ext.data.packing import require_aligned
from megatron_ext.data.samples import PreferencePairs, Samples
from megatron_ext.data.selection import Choice, select
from megatron_ext.errors import ConfigError, DatasetFormatError, ParallelismError, SourceError
from megatron_ext.training.plan import make_plan, validation_plan


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw(count: int, seed: int, longest: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 500, rng.integers(2, longest)) for _ in range(count)]


def write(prefix: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IdxmapWriter(prefix, dtype) as writer:
        writer.add(np.concatenate(documents).astype(dtype), np.asarray([len(d) for d in documents]))
    return prefix


def dataset(folder: Path, documents: list[np.ndarray], kind: str = "chat", **facts: Any) -> Path:
    """Every second token of chat and preference data is trained; a rejected answer is the chosen one and a token."""
    sides = {"text": [("", 0)], "chat": [("", 0)], "preference": [("chosen_", 0), ("rejected_", 1)]}[kind]
    for side, more in sides:
        ours = [np.concatenate([d, [7] * more]) for d in documents]
        write(folder / f"{side}tokens", ours)
        if kind != "text":
            write(folder / f"{side}loss_mask", [np.arange(len(d)) % 2 for d in ours], np.uint8)
    manifest = {"format": "megatron-flows/dataset", "version": 1, "kind": kind, "max_token_id": 499, **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def config(**values: Any) -> TrainConfig:
    return TrainConfig(
        **({"seq_length": 64, "global_batch_size": 4, "lr": 1e-3, "train_iters": 10, "seed": 3} | values)
    )


def test_it_is_made_once_for_all_processes_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dataset(tmp_path / "data", draw(100, 1))
    first = select(open_dataset(folder), Choice.of(config()))
    monkeypatch.setattr(selection, "pack", None)
    again = select(open_dataset(folder), Choice.of(config()))
    for name in ("documents", "lengths", "sequences"):
        assert getattr(first, name).tolist() == getattr(again, name).tolist()
    assert [first.packing[b].tolist() for b in range(len(first.packing))] == [
        again.packing[b].tolist() for b in range(len(again.packing))
    ]
    assert isinstance(again.lengths, np.memmap)
    for other in ({"seed": 4}, {"seq_length": 128}, {"pack_alignment": 8}, {"validation_fraction": 0.1}):
        with pytest.raises(TypeError, match="not callable"):
            select(open_dataset(folder), Choice.of(config(**other)))


def test_a_dataset_that_changed_is_read_anew(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", draw(50, 1))
    before = select(open_dataset(folder), Choice.of(config()))
    dataset(folder, draw(60, 2))
    assert len(select(open_dataset(folder), Choice.of(config())).documents) == 60 > len(before.documents)


def test_processes_that_ask_at_once_get_one_answer(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", draw(3000, 1))
    script = (
        "import sys; from pathlib import Path; from megatron_ext.data.selection import *;"
        "print(select(open_dataset(Path(sys.argv[1])), Choice(seq_length=64, seed=3)).packing.documents.tolist())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    assert len(set(said)) == 1
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 1


def test_a_damaged_entry_of_the_cache_is_made_anew(tmp_path: Path, own_cache: Path) -> None:
    folder = dataset(tmp_path / "data", draw(50, 1))
    whole = select(open_dataset(folder), Choice.of(config())).documents.tolist()
    (entry,) = (own_cache / "plans").iterdir()
    (entry / "documents.npy").write_bytes(b"")
    assert select(open_dataset(folder), Choice.of(config())).documents.tolist() == whole
    (entry / "counts.npy").unlink()
    assert select(open_dataset(folder), Choice.of(config())).documents.tolist() == whole


def test_the_cache_keeps_what_was_used_last(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 3)
    for number in (1, 2, 3, 1, 4, 5):
        cache.kept("plans", str(number), lambda folder: (folder / "x").touch())
    assert sorted(path.name for path in (own_cache / "plans").iterdir()) == ["1", "4", "5"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MFLOW_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = dataset(tmp_path / "data", draw(50, 1))
    assert len(select(open_dataset(folder), Choice.of(config())).documents) == 50


def test_a_million_chat_samples_are_selected_and_packed_in_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.8, 0.6, 1_000_000).astype(np.int64), 2, 4096)
    total = int(lengths.sum())
    (tmp_path / "data").mkdir()
    for name, values, dtype in (
        ("tokens", np.zeros(total, dtype=np.uint16), np.uint16),
        ("loss_mask", np.ones(total, dtype=np.uint8), np.uint8),
    ):
        with IdxmapWriter(tmp_path / "data" / name, dtype) as writer:
            writer.add(values, lengths)
    (tmp_path / "data" / "manifest.json").write_text('{"format": "megatron-flows/dataset", "kind": "chat"}')
    start = time.process_time()
    found = select(open_dataset(tmp_path / "data"), Choice(seq_length=4096, seed=1))
    assert time.process_time() - start < 5
    assert found.packing.fill > 0.99
    start = time.process_time()
    select(open_dataset(tmp_path / "data"), Choice(seq_length=4096, seed=1))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_both_sides_of_a_split_are_planned_and_share_no_document(tmp_path: Path, kind: str) -> None:
    folder = dataset(tmp_path / "data", draw(400, 1), kind)
    train = config(validation_fraction=0.2)
    kept, held_out = make_plan(train, folder), validation_plan(train, folder)
    sides = [set(p.documents.tolist()) if kind == "chat" else set(p.stream.order.tolist()) for p in (kept, held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(400))
    assert 40 < len(sides[1]) < 120
    assert kept.summary()["held_out"] == len(sides[1])
    count = held_out.iterations * train.global_batch_size
    stream = np.concatenate([held_out.sequences(step) for step in range(held_out.iterations)])
    assert set(stream.tolist()) == set(range(len(held_out.packing)))
    assert count - len(held_out.packing) < train.global_batch_size


def test_a_validation_set_of_its_own_is_taken_whole_and_holds_nothing_out(tmp_path: Path) -> None:
    folder, own = dataset(tmp_path / "data", draw(40, 1)), dataset(tmp_path / "own", draw(30, 2))
    plan = validation_plan(config(), folder, own)
    assert sorted(plan.documents.tolist()) == list(range(30))
    assert validation_plan(config(validation_fraction=0.5), folder, own).documents.tolist() == list(range(30))
    assert validation_plan(config(), folder) is None
    with pytest.raises(ConfigError, match=r"lower train\.seq_length to 8"):
        validation_plan(config(), folder, own, 8)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_inputs_are_blended_by_their_weights(tmp_path: Path, kind: str) -> None:
    files = [
        {"name": "a", "rows": 30, "documents": 29, "weight": 0.75, "input": "a"},
        {"name": "b1", "rows": 150, "documents": 150, "weight": 0.25, "input": "b*"},
        {"name": "b2", "rows": 121, "documents": 121, "weight": 0.25, "input": "b*"},
    ]
    folder = dataset(tmp_path / "data", draw(300, 1), kind, files=files)
    plan = make_plan(config(), folder)
    first = plan.selection.sequences
    taken = np.concatenate([plan.sequences(step) for step in range(50)])
    assert abs((taken < first[1]).mean() - 0.75) < 0.01
    assert set(range(int(first[1]))) <= set(taken.tolist())
    if kind == "chat":
        for sequence in range(len(plan.packing)):
            inputs = {int(d) < 29 for d in plan.documents[plan.samples(sequence)]}
            assert inputs == {sequence < first[1]}
    else:
        pieces = [[d for d, _, _ in plan.stream.pieces(w)] for w in range(len(plan.packing))]
        assert all({d < 29 for d in p} == {w < first[1]} for w, p in enumerate(pieces))


def test_files_without_weights_are_one_pool_and_files_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    files = [{"name": n, "rows": 25, "documents": 25, "weight": None} for n in "ab"]
    assert len(open_dataset(dataset(tmp_path / "data", draw(50, 1), files=files)).pools) == 1
    files[0]["weight"] = 1.0
    assert len(open_dataset(dataset(tmp_path / "data", draw(50, 1), files=files)).pools) == 2
    with pytest.raises(SourceError, match="hold 50 documents, but there are 60"):
        _ = open_dataset(dataset(tmp_path / "data", draw(60, 1), files=files)).pools


@pytest.mark.parametrize("name", ["corpus_text_document", "corpus_text_document.bin", "corpus_text_document.idx"])
def test_a_megatron_pair_is_a_dataset_as_it_is(tmp_path: Path, name: str) -> None:
    write(tmp_path / "corpus_text_document", draw(80, 1), np.int32)
    data = open_dataset(tmp_path / name)
    assert (data.kind, data.is_pair, data.max_token_id()) == ("text", True, 499)
    assert [f.name for f in data.files] == ["corpus_text_document.bin", "corpus_text_document.idx"]
    plan = make_plan(config(), tmp_path / name)
    assert plan.packing.fill == 1
    assert plan.lengths[0] == 65


def test_documents_without_a_token_in_a_foreign_pair_are_passed_over(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", [np.arange(90), np.arange(90)])
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    lengths = np.frombuffer(raw, dtype="<i4", count=2, offset=34)
    assert lengths.tolist() == [90, 90]
    raw[34:42] = np.asarray([0, 90], dtype="<i4").tobytes()
    prefix.with_suffix(".idx").write_bytes(raw)
    data = open_dataset(prefix)
    found = select(data, Choice(seq_length=64, seed=1))
    assert len(found.documents) == 1
    assert Samples(data, found.stream).read(0, 65).tokens.tolist() == list(range(65))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", [np.arange(64)])
    with pytest.raises(DatasetFormatError, match="1 documents with 64 tokens together do not fill"):
        make_plan(config(), prefix)


def test_pairs_are_read_together(tmp_path: Path) -> None:
    documents = draw(20, 1)
    pairs = PreferencePairs(open_dataset(dataset(tmp_path / "data", documents, "preference")))
    assert len(pairs) == 20
    assert pairs.lengths.tolist() == [[len(d), len(d) + 1] for d in documents]
    chosen, rejected = pairs[4]
    assert chosen.tokens.tolist() == documents[4].tolist()
    assert rejected.tokens.tolist() == [*documents[4].tolist(), 7]
    assert rejected.trained.tolist() == [n % 2 == 1 for n in range(len(documents[4]) + 1)]
    assert [len(answer.tokens) for answer in pairs.read(4, 5)] == [min(5, len(documents[4]))] * 2
    assert pairs.trainable(2).all()
    assert not pairs.trainable(1).any()


def test_pairs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", draw(20, 1), "preference")
    write(folder / "rejected_tokens", draw(19, 1))
    with pytest.raises(SourceError, match="differ in their lengths"):
        PreferencePairs(open_dataset(folder))
    write(folder / "rejected_loss_mask", [np.ones(len(d)) for d in draw(19, 1)], np.uint8)
    with pytest.raises(SourceError, match="two sides differ"):
        PreferencePairs(open_dataset(folder))
    with pytest.raises(DatasetFormatError, match="--format preference"):
        PreferencePairs(open_dataset(dataset(tmp_path / "chat", draw(3, 1))))


@pytest.mark.parametrize(
    ("files", "error", "named"),
    [
        (None, SourceError, "does not exist; give a folder that mflow tokenize wrote, or the prefix"),
        ({}, SourceError, "has no manifest.json"),
        ({"manifest.json": "{"}, SourceError, "not valid JSON"),
        ({"manifest.json": "[]"}, SourceError, "not the manifest of a dataset"),
        ({"manifest.json": '{"format": "megatron-flows/dataset", "kind": "image"}'}, DatasetFormatError, "'image'"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, files: dict | None, error: type, named: str) -> None:
    if files is not None:
        (tmp_path / "data").mkdir()
        for name, text in files.items():
            (tmp_path / "data" / name).write_text(text)
    with pytest.raises(error, match=named):
        open_dataset(tmp_path / "data")


def test_an_idxmap_of_something_else_than_tokens_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", [np.arange(64)])
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    raw[17] = 7  # float32
    prefix.with_suffix(".idx").write_bytes(raw)
    with pytest.raises((DatasetFormatError, SourceError)):
        open_dataset(prefix)


@pytest.mark.parametrize(("alignment", "cp", "fits"), [(16, 1, True), (1, 1, True), (16, 8, True), (16, 3, False)])
def test_an_alignment_that_context_parallelism_cannot_cut_is_refused(alignment: int, cp: int, fits: bool) -> None:
    if fits:
        require_aligned(alignment, cp)
        return
    with pytest.raises(ParallelismError, match=r"set train\.pack_alignment to 18"):
        require_aligned(alignment, cp)
