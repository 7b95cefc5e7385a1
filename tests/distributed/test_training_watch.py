"""What is said of unusual steps, what stays of old checkpoints, and what identifies a training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import write_checkpoint, write_dataset

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.events import Events
from megatron_ext.training.parallel import parallel_state
from megatron_ext.training.state import open_run, training_digest
from megatron_ext.training.watch import LEAST, Spikes
from megatron_ext.weights.manifest import LATEST, latest_folder, read_latest, write_latest


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the one rank."""
    train = TrainConfig(global_batch_size=1, train_iters=1, lr=1e-3, precision="fp32")
    with parallel_state(RuntimeConfig(platform="cpu"), train, 1):
        yield


def test_a_value_far_above_those_before_is_told_with_its_step_and_quiet_noise_is_not() -> None:
    spikes = Spikes("loss")
    assert spikes.look(1, 50.0) is None, "nothing to compare with"
    for step in range(2, LEAST + 5):
        assert spikes.look(step, 2.0 + 0.01 * (step % 3)) is None
    assert spikes.look(LEAST + 5, 2.04) is None
    told = spikes.look(LEAST + 6, 9.0)
    assert told is not None
    assert "loss 9" in told
    assert f"step {LEAST + 6}" in told
    assert spikes.look(LEAST + 7, 0.1) is None, "far below is no spike"
    assert spikes.look(LEAST + 8, float("inf")) is None, "what is not finite stops elsewhere, and is not remembered"
    assert spikes.look(LEAST + 9, 2.01) is None


@pytest.mark.parametrize("keep_last", [1, 2, 4, 6])
def test_keep_last_keeps_as_many_as_it_says(tmp_path: Path, alone: None, keep_last: int) -> None:
    from megatron_ext.training.saving import Saver

    saver = Saver(tmp_path, RuntimeConfig(keep_last=keep_last), lambda folder, step: None)
    for step in range(1, 11):
        (tmp_path / f"iter_{step:07d}").mkdir()
        write_latest(tmp_path, step)
        saver.recover()
        held = min(step, keep_last + 1)
        assert len(list(tmp_path.glob("iter_*"))) == held, "the new one is not proven yet"
        saver.confirm()
        kept = sorted(int(path.name[5:]) for path in tmp_path.iterdir() if path.is_dir())
        assert kept == list(range(max(1, step - keep_last + 1), step + 1))


def test_the_pointer_goes_back_from_a_checkpoint_whose_next_step_was_not_sound(tmp_path: Path, alone: None) -> None:
    from megatron_ext.training.saving import Saver

    described = []
    saver = Saver(tmp_path, RuntimeConfig(), lambda folder, step: described.append(step))
    for step in (3, 6):
        (tmp_path / f"iter_{step:07d}").mkdir()
    write_latest(tmp_path, 6)
    saver.recover()
    saver.distrust(9, Events())
    assert read_latest(tmp_path) == 6, "two sound steps came after it"
    saver.distrust(7, Events())
    assert (read_latest(tmp_path), described) == (3, [3])
    shutil.rmtree(tmp_path / "iter_0000003")
    write_latest(tmp_path, 6)
    saver.distrust(7, Events())
    assert not (tmp_path / LATEST).exists(), "there is no good one"


def test_a_training_is_told_from_another_by_every_byte_of_weights_and_data(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    dataset = write_dataset(tmp_path / "data", checkpoint, [20, 30])
    big = latest_folder(checkpoint) / "__9_9.distcp"
    big.write_bytes(bytes(3 << 20))
    first = training_digest({"lr": 1}, checkpoint, dataset)
    assert training_digest({"lr": 1}, checkpoint, dataset) == first
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    assert training_digest({"lr": 1}, copied, dataset) == first, "wherever it lies"
    with (latest_folder(copied) / big.name).open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"x")
    assert training_digest({"lr": 1}, copied, dataset) != first
    assert training_digest({"lr": 2}, checkpoint, dataset) != first


def test_the_layout_that_is_noted_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RuntimeConfig(nproc_per_node=2, context_parallel_size=2, pipeline_model_parallel_size=2)
    assert open_run(tmp_path, "d", runtime).layout["world_size"] == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    layout = open_run(tmp_path, "d", runtime).layout
    assert (layout["world_size"], layout["context_parallel_size"]) == (8, 2)
    assert layout["virtual_pipeline_model_parallel_size"] == 1
