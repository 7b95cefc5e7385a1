"""A training that is killed or stopped goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training import TRAIN as DEFAULTS
from training import column, events, run, start, write_checkpoint, write_dataset, write_job

from megatron_ext.folders import digest_file
from megatron_ext.weights.manifest import LATEST, latest_folder, read_latest, read_manifest

TRAIN = {"train_iters": 9, "hidden_dropout": 0.1}
RUNTIME = {"save_interval": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 60 samples, and the uninterrupted training."""
    folder = tmp_path_factory.mktemp("resume")
    checkpoint = write_checkpoint(folder / "base")
    write_dataset(folder / "data", checkpoint, np.random.default_rng(1).integers(5, 60, 60).tolist())
    run(job(folder, "whole"))
    return folder


@pytest.fixture(scope="module")
def of_two(base: Path) -> Path:
    """The uninterrupted training of two data-parallel ranks."""
    run(job(base, "whole-of-two", nproc_per_node=2))
    return base / "whole-of-two"


def job(base: Path, name: str, **runtime: object) -> Path:
    return write_job(base / name, base / "base" / "checkpoint", base / "data", TRAIN, RUNTIME | runtime)


def kill_when(worker: subprocess.Popen, seen: Callable[[], object], number: int, pids: list[int] | None = None) -> int:
    """Send signal ``number`` as soon as ``seen()``; the worker's exit code."""
    deadline = time.monotonic() + 120
    while not seen():
        assert worker.poll() is None, "the worker ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for pid in pids if pids is not None else [worker.pid]:
        os.kill(pid, number)
    return worker.wait(timeout=60)


def step_done(job: Path, step: int) -> Callable[[], bool]:
    return lambda: any(e["event"] == "metrics" and e["step"] >= step for e in events(job))


def digests(out: Path) -> dict[str, str]:
    """Of everything in the newest checkpoint but ``.metadata``, which holds a random id."""
    return {path.name: digest_file(path) for path in latest_folder(out).iterdir() if path.name != ".metadata"}


def assert_equal(one: Path, other: Path) -> None:
    for name in ("step", "loss", "grad_norm", "lr", "sample_ids"):
        assert column(other, name) == column(one, name), name
    assert digests(other) == digests(one)
    assert [p.name for p in other.glob("iter_*")] == ["iter_0000009"], "older checkpoints are removed"


def test_training_killed_at_random_moments_ends_bit_for_bit_as_uninterrupted(base: Path) -> None:
    killed, draw = job(base, "killed"), random.Random(time.time_ns())
    assert kill_when(start(killed), step_done(killed, 5), signal.SIGKILL) == -signal.SIGKILL
    assert read_latest(base / "killed") in (3, 6)
    for _ in range(2):
        worker = start(killed)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=draw.uniform(0, 6))  # anywhere: in its imports, its load, a step, a save, the export
        worker.kill()
        worker.wait()
    resumed = run(job(base, "killed", num_threads=2))
    threads = [e["num_threads"] for e in resumed if e["event"] == "ranks"]
    assert len(threads) >= 2
    assert set(threads) == {1}, "the first thread count stays"
    assert any(e["event"] == "note" and "resumed after step" in e["text"] for e in resumed)
    assert_equal(base / "whole", base / "killed")


def test_training_killed_while_it_saves_keeps_the_checkpoint_before(base: Path) -> None:
    killed, out = job(base, "saving"), base / "saving"
    kill_when(start(killed), lambda: list(out.glob(".iter_0000006.partial/*")), signal.SIGKILL)
    assert (latest_folder(out) / "metadata.json").exists(), "the pointer names a whole checkpoint"
    run(killed)
    assert not list(out.glob(".iter_*"))
    assert_equal(base / "whole", out)


def test_checkpoints_written_beside_the_training_are_as_good_and_those_asked_for_stay(base: Path) -> None:
    kept, out = job(base, "kept", async_save=True, save_interval=2, keep_last=2, keep_every=4), base / "kept"
    kill_when(start(kept), lambda: read_latest(out) == 6 if (out / LATEST).exists() else False, signal.SIGKILL)
    assert {p.name for p in out.glob("iter_*")} >= {"iter_0000004", "iter_0000006"}
    run(job(base, "kept", async_save=True, save_interval=2, keep_last=2, keep_every=4, keep_final_state=True))
    assert column(out, "loss") == column(base / "whole", "loss")
    assert digests(out) == digests(base / "whole")
    assert sorted(p.name for p in out.glob("iter_*")) == ["iter_0000004", "iter_0000008", "iter_0000009"]
    assert read_latest(out / "full_state") == 9
    assert sum(p.stat().st_size for p in latest_folder(out / "full_state").iterdir()) > 2 * sum(
        p.stat().st_size for p in latest_folder(out).iterdir()
    )


@pytest.mark.distributed
def test_a_job_that_hangs_ends_with_its_stacks_in_the_log_and_goes_on_when_run_again(base: Path, of_two: Path) -> None:
    hung, out = job(base, "hung", nproc_per_node=2, hang_timeout=12, grace_seconds=1), base / "hung"
    worker = start(hung)
    deadline = time.monotonic() + 120
    while not (out / LATEST).exists():
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (ranks,) = [e["pids"] for e in events(hung) if e["event"] == "ranks"]
    os.kill(ranks[1], signal.SIGSTOP)
    assert worker.wait(timeout=90) != 0
    log = Path(f"{hung}.log").read_text()
    assert "Timeout (0:00:12)!" in log
    assert "megatron_ext/training/loop.py" in log, "the stack says where it hung"
    run(hung)
    assert_equal(of_two, out)


@pytest.mark.distributed
def test_sigterm_to_the_launcher_of_two_ranks_saves_and_ends_with_0_and_goes_on_bit_for_bit(
    base: Path, of_two: Path
) -> None:
    asked, out = job(base, "launched", nproc_per_node=2), base / "launched"
    assert kill_when(start(asked), step_done(asked, 1), signal.SIGTERM) == 0
    (stopped,) = [e["step"] for e in events(asked) if e["event"] == "interrupted"]
    assert (read_latest(out), read_manifest(out).iteration) == (stopped, stopped)
    assert stopped < 9
    run(asked)
    assert_equal(of_two, out)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_tensor_parallel_ranks_that_were_killed_end_bit_for_bit_as_uninterrupted(base: Path) -> None:
    layout = {"nproc_per_node": 2, "tensor_model_parallel_size": 2, "grace_seconds": 1}
    run(job(base, "whole-tp", **layout))
    killed = job(base, "killed-tp", **layout)
    worker = start(killed)
    deadline = time.monotonic() + 120
    while not (ranks := [e["pids"] for e in events(killed) if e["event"] == "ranks"]):
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert kill_when(worker, step_done(killed, 4), signal.SIGKILL, ranks[0][1:]) != 0
    run(killed)
    assert_equal(base / "whole-tp", base / "killed-tp")


@pytest.mark.distributed
def test_sigterm_to_one_rank_saves_on_all_and_another_layout_goes_on(base: Path) -> None:
    asked, out = job(base, "asked", nproc_per_node=2), base / "asked"
    worker = start(asked)
    deadline = time.monotonic() + 120
    while not (ranks := [e for e in events(asked) if e["event"] == "ranks"]):
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert kill_when(worker, step_done(asked, 1), signal.SIGTERM, ranks[0]["pids"][1:]) == 0
    (stopped,) = [e["step"] for e in events(asked) if e["event"] == "interrupted"]
    assert read_latest(out) == stopped < 9
    assert not any(e["event"] == "result" for e in events(asked))
    shutil.copytree(out, base / "asked-copy")
    run(job(base, "asked-copy"))
    assert column(base / "asked-copy", "step") == list(range(1, 10))
    assert read_latest(base / "asked-copy") == 9


def test_a_finished_training_answers_with_its_result_and_trains_no_more(base: Path) -> None:
    before = digests(base / "whole")
    again = run(job(base, "whole"))
    first, second = [e for e in again if e["event"] == "result"]
    assert {k: v for k, v in first.items() if k != "time"} == {k: v for k, v in second.items() if k != "time"}
    assert digests(base / "whole") == before


def test_training_killed_before_its_result_was_noted_is_finished_all_the_same(base: Path) -> None:
    out = Path(shutil.copytree(base / "whole", base / "noted"))
    state = json.loads((out / "training_state.json").read_text())
    (out / "training_state.json").write_text(json.dumps(state | {"summary": None}))
    (result,) = [e for e in run(job(base, "noted")) if e["event"] == "result"]
    assert result["loss"] == state["summary"]["loss"]
    assert digests(out) == digests(base / "whole")


def test_another_configuration_is_refused_in_the_same_folder(base: Path) -> None:
    changed = write_job(base / "whole", base / "base" / "checkpoint", base / "data", TRAIN | {"lr": 2e-3}, RUNTIME)
    (error,) = [e for e in run(changed, expect=2) if e["event"] == "error"]
    assert error["type"] == "OutputExistsError"
    assert str(base / "whole") in error["message"]


def test_the_command_trains_under_any_torchrun(base: Path, tmp_path: Path) -> None:
    runtime = {"platform": "cpu", "micro_batch_size": 1, "num_threads": 1, "log_interval": 1, "nproc_per_node": 2}
    config = {
        "model": {"checkpoint": str(base / "base" / "checkpoint")}, "data": {"dataset": str(base / "data")},
        "train": DEFAULTS | {"train_iters": 3}, "runtime": runtime, "out": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "megatron_ext.cli", "train", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    given = base / "base" / "checkpoint", base / "data"
    run(write_job(base / "by-worker", *given, {"train_iters": 3}, {"micro_batch_size": 1, "nproc_per_node": 2}))
    assert column(tmp_path / "out", "loss") == column(base / "by-worker", "loss")
