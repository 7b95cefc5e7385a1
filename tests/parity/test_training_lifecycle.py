"""What a training leaves at every moment can be gone on from, exported, or is refused as broken; one process, here."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from training import column, records, write_checkpoint, write_dataset, write_job, write_preferences

from megatron_ext.errors import CheckpointError, ConfigError, JobInterrupted, ParallelismError, TrainingDivergedError
from megatron_ext.events import Events
from megatron_ext.folders import digest_file
from megatron_ext.guard import STOP
from megatron_ext.training.job import run
from megatron_ext.training.watch import HEART, Spikes
from megatron_ext.weights.manifest import LATEST, at_iteration, latest_folder, read_latest, read_manifest
from megatron_ext.worker import Job

STEADY = {"lr_decay_style": "constant", "lr_warmup_iters": 0, "hidden_dropout": 0.1}
WILD = {"lr": 1e30, "clip_grad": 0.0, "lr_warmup_iters": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lifecycle")
    checkpoint = write_checkpoint(folder)
    lengths = np.random.default_rng(1).integers(5, 60, 60).tolist()
    files = [{"name": "a.jsonl", "rows": 40, "weight": 3.0}, {"name": "b.jsonl", "rows": 20, "weight": 1.0}]
    write_dataset(folder / "data", checkpoint, lengths, files=files)
    write_preferences(folder / "pairs", checkpoint, 24)
    return folder


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A training listens to signals; afterwards this process does not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    STOP.asked = False
    for number, handler in before.items():
        signal.signal(number, handler)


def train(
    base: Path, name: str, train: dict | None = None, runtime: dict | None = None, data: str = "data", **inputs: Path
) -> Path:
    """Train in this process; the folder."""
    checkpoint = inputs.pop("checkpoint", base / "checkpoint")
    job = write_job(base / name, checkpoint, base / data, train, runtime, **inputs)
    run(Job.model_validate_json(job.read_text()), Events())
    return base / name


def digests(out: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in latest_folder(out).iterdir() if path.name != ".metadata"}


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by name."""
    folder = latest_folder(out)
    facts = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in facts.items()
        if isinstance(of, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(found, checkpoint_id=folder, no_dist=True)
    return found


def at_beat(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> list[int]:
    """Have ``action`` done at each beat of the heart, with its number; the list of numbers."""
    beats: list[int] = []
    beat = HEART.beat

    def counted() -> None:
        beats.append(len(beats) + 1)
        action(len(beats))
        beat()

    monkeypatch.setattr(HEART, "beat", counted)
    return beats


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_finished_training_is_extended_from_its_full_state_as_if_it_had_been_longer(
    base: Path, precision: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ext.training import checkpoints

    if large:  # as for a model of so many parameters, whose optimizer is written in another form
        monkeypatch.setattr(checkpoints, "LARGE", 0)
    steady, base = STEADY | {"precision": precision, "loss_scale_window": 3}, base / f"{precision}-{large}"
    base.mkdir()
    for name in ("checkpoint", "data"):
        (base / name).symlink_to(base.parent / name)
    whole = train(base, "eight", steady | {"train_iters": 8})
    half = train(base, "four", steady | {"train_iters": 4}, {"keep_final_state": True})
    full = half / "full_state"
    more = train(base, "more", steady | {"train_iters": 8}, checkpoint=full, state=full)
    assert column(half, "loss") + column(more, "loss") == column(whole, "loss")
    assert column(more, "step") == [5, 6, 7, 8]
    assert column(more, "consumed_tokens") == column(whole, "consumed_tokens")[4:]
    assert column(more, "samples") == column(whole, "samples")[4:]
    ends, others = weights_of(more), weights_of(whole)  # a full state keeps weights in the type that was trained
    assert ends.keys() == others.keys()
    assert all(torch.equal(ends[name].float(), others[name].float()) for name in ends)
    if precision == "fp32":
        assert digests(more) == digests(whole)
    with pytest.raises(ConfigError, match="trained for 4 steps already"):
        train(base, "as-long", steady | {"train_iters": 4}, checkpoint=full, state=full)
    with pytest.raises(CheckpointError, match="weights alone"):
        train(base, "weights", steady | {"train_iters": 8}, checkpoint=half, state=half)
    if large:
        with pytest.raises(
            ParallelismError, match=r"overlap_grad_reduce False and cannot be resumed with True; set it"
        ):
            train(base, "bk", steady | {"train_iters": 8}, {"overlap_grad_reduce": True}, checkpoint=full, state=full)
    if precision != "fp32":
        assert column(whole, "loss") != column(train(base, "fp32", STEADY | {"train_iters": 8}), "loss")
    kept = FileSystemReader(latest_folder(full)).read_metadata().state_dict_metadata
    weights = {name: facts.properties.dtype for name, facts in kept.items() if "optimizer" in name and "param" in name}
    assert weights
    assert set(map(str, weights.values())) == {"torch.float32"}, "what the optimizer adds to"


def test_finetuning_a_finished_training_starts_at_step_1_with_a_fresh_optimizer(base: Path) -> None:
    half = train(base, "again", STEADY | {"train_iters": 3}, {"keep_final_state": True})
    ours = train(base, "tuned", {"train_iters": 2}, checkpoint=half)
    other = train(base, "tuned-full", {"train_iters": 2}, checkpoint=half / "full_state")
    assert column(ours, "step") == [1, 2]
    assert column(ours, "lr") == column(other, "lr") == column(train(base, "fresh", {"train_iters": 2}), "lr")
    assert column(ours, "loss") == column(other, "loss"), "whatever else the checkpoint holds"
    assert column(ours, "loss")[0] != column(base / "fresh", "loss")[0], "but its weights"


def test_a_kept_checkpoint_is_exported_and_trained_on_by_its_iteration(base: Path) -> None:
    from megatron_ext.weights.export import export

    short = train(base, "two", STEADY | {"train_iters": 2})
    kept = train(base, "kept", STEADY | {"train_iters": 5}, {"save_interval": 2, "keep_every": 2})
    assert read_manifest(at_iteration(kept, 2)).iteration == 2
    folders = []
    for name, place in (("hf-short", short), ("hf-kept", at_iteration(kept, 2))):
        (base / name).mkdir()
        export(place, base / "hf", base / name, dtype=None, events=Events(), verify="digest")
        folders.append(load_file(base / name / "model.safetensors"))
    assert all((folders[1][name] == tensor).all() for name, tensor in folders[0].items())
    tuned = [train(base, f"on-{p.name}", {"train_iters": 2}, checkpoint=p) for p in (short, at_iteration(kept, 2))]
    assert column(tuned[0], "loss") == column(tuned[1], "loss")
    with pytest.raises(CheckpointError, match="no iteration 3; it holds 2, 4, 5"):
        at_iteration(kept, 3)


def test_the_last_good_checkpoint_is_not_the_one_that_holds_the_bad_update(base: Path) -> None:
    wild = WILD | {"train_iters": 6, "lr_warmup_iters": 3}  # the first step's learning rate is 0
    with pytest.raises(TrainingDivergedError, match=r"not finite.* after step 2.*last good checkpoint: .*iter_0000001"):
        train(base, "wild", wild, {"save_interval": 1})
    out = base / "wild"
    assert (read_latest(out), read_manifest(out).iteration) == (1, 1)
    told = json.loads((out / "diverged.json").read_text())
    assert told["step"] == 2
    assert len(told["sample_ids"]) == len(set(told["sample_ids"])) >= 4


def test_a_training_whose_last_update_broke_the_model_is_not_finished(base: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"not finite.* after step 1"):
        train(base, "last", WILD | {"train_iters": 1})
    assert not (base / "last" / LATEST).exists()


@pytest.mark.parametrize(
    ("method", "found", "told"),
    [
        ("validate", {"loss": math.nan}, "the validation loss of step 2 is nan"),
        ("loss_of", math.inf, "step 4 broke the model: the loss of its samples is inf now"),
    ],
)
def test_a_loss_that_is_not_finite_stops_after_a_step_too(
    base: Path, monkeypatch: pytest.MonkeyPatch, method: str, found: object, told: str
) -> None:
    from megatron_ext.training.steps import Trainer

    monkeypatch.setattr(Trainer, method, lambda *_: found)
    with pytest.raises(TrainingDivergedError, match=told):
        train(base, method, {"validation_fraction": 0.3}, {"eval_interval": 2})
    assert (base / method / "metrics.jsonl").exists()


def test_a_stop_during_validation_saves_and_goes_on_as_if_nothing_had_been(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train_iters": 4, "validation_fraction": 0.4}, {"eval_interval": 2, "save_interval": 100}
    whole = train(base, "seen", *settings)
    with monkeypatch.context() as patch:
        beats = at_beat(patch, lambda number: setattr(STOP, "asked", number == 5))  # start, 2 steps, 2nd of a pass
        with pytest.raises(JobInterrupted) as stopped:
            train(base, "looked", *settings)
    assert (stopped.value.step, read_latest(base / "looked")) == (2, 2)
    assert len(beats) == 6, "the pass beats for each of its calls, and ends at the stop; a save follows"
    out = train(base, "looked", *settings)
    assert column(out, "loss") == column(whole, "loss")
    assert (out / "validation.jsonl").read_text() == (whole / "validation.jsonl").read_text()
    assert digests(out) == digests(whole)


def test_a_stop_during_the_reference_pass_ends_soon_and_leaves_no_half_of_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_beat(patch, lambda number: setattr(STOP, "asked", number == 3))
        with pytest.raises(JobInterrupted):
            train(base, "asked", {"train_iters": 2}, data="pairs")
    assert not (base / "asked" / "reference" / "manifest.json").exists()
    STOP.asked = False
    assert column(train(base, "asked", {"train_iters": 2}, data="pairs"), "step") == [1, 2]


def test_the_answers_of_a_pair_count_each_for_itself(base: Path) -> None:
    from megatron_ext.data.datasets import open_dataset
    from megatron_ext.training.flops import training_flops

    (record,) = records(train(base, "counted-pairs", {"train_iters": 1, "lr_warmup_iters": 0}, data="pairs"))
    sides = open_dataset(base / "pairs").tokens
    lengths = np.concatenate([side.lengths[record["sample_ids"]] - 1 for side in sides])
    assert record["tokens"] == lengths.sum()
    model = read_manifest(base / "checkpoint").architecture
    found, expected = record["flops"] * record["tokens"] / record["tokens_per_second"], training_flops(model, lengths)
    assert found == pytest.approx(expected, rel=2e-3)
    together = sum(np.split(lengths, 2))  # as if the answers saw each other
    assert found != pytest.approx(training_flops(model, together), rel=1e-2)


def test_samples_are_counted_by_the_input_that_they_come_from(base: Path) -> None:
    out, counts = train(base, "counted", {"train_iters": 5}), {"a.jsonl": 0, "b.jsonl": 0}
    for record in records(out):
        for sample in record["sample_ids"]:
            counts["a.jsonl" if sample < 40 else "b.jsonl"] += 1
        assert record["samples"] == counts
    assert counts["a.jsonl"] > counts["b.jsonl"] > 0
    summary = json.loads((out / "training_state.json").read_text())["summary"]
    assert summary["samples_drawn"] == counts


def test_an_unusual_loss_and_gradient_are_told_with_the_step_s_samples(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spikes, "look", lambda self, step, value: f"{self._name} is odd" if step == 2 else None)
    notes: list[str] = []
    monkeypatch.setattr(Events, "note", lambda self, text: notes.append(text))
    samples = column(train(base, "odd", {"train_iters": 3}), "sample_ids")[1]
    told = [note for note in notes if "is odd" in note]
    assert [note.split(";")[0] for note in told] == ["loss is odd", "grad_norm is odd"]
    assert all(str(samples[0]) in note for note in told)


def test_the_share_of_the_peak_is_recorded_where_it_is_known_and_tensorboard_holds_the_curve(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron_ext.platforms.cpu import CPU

    assert "mfu" not in records(train(base, "unknown", {"train_iters": 2}))[0]
    monkeypatch.setattr(CPU, "peak_flops", lambda self, precision: 1e7)
    out = train(base, "peak", {"train_iters": 3})
    for record in records(out):
        assert record["flops"] > 0
        assert record["tokens_per_second"] == record["tokens_per_second_per_device"], "one process"
        assert record["memory"] > 1e8
        assert 0 <= record["padding"] < 1
        assert record["tokens_per_second"] * record["step_time"] == pytest.approx(record["tokens"], rel=0.05)
        assert record["mfu"] == pytest.approx(record["flops"] / 1e7, rel=2e-3)
    board: Any = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(column(out, "loss"))
