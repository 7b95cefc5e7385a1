"""Failing, retrying, cancelling and killing a run on a real worker: the training always goes on from what it saved."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect_site import TINY, Site, wait_for

from flows.server import answers

LONG = TINY | {
    "train": TINY["train"] | {"train_iters": 100_000, "lr": 3e-4},
    "runtime": TINY["runtime"] | {"nproc_per_node": 2},
}
LATEST = "latest_checkpointed_iteration.txt"


class Run:
    """A run of deployment full-sft, and its training's folders."""

    def __init__(self, site: Site, lr: float) -> None:
        self.site = site
        parameters = LONG | {"train": LONG["train"] | {"lr": lr}}
        started = site.command("prefect", "deployment", "run", "full-sft", "--params", json.dumps(parameters))
        assert started.returncode == 0, started.stderr
        self.id = re.search(r"UUID: (\S+)", started.stdout).group(1)
        self._before = set(site.store.glob("trainings/.partial-*"))

    @property
    def state(self) -> str:
        with self.site.client() as client:
            return client.read_flow_run(self.id).state_name

    def _partial(self) -> Path | None:
        return next(iter(set(self.site.store.glob("trainings/.partial-*")) - self._before), None)

    def saved_step(self) -> int:
        partial = self._partial()
        try:
            return int((partial / LATEST).read_text()) if partial else 0
        except (FileNotFoundError, ValueError):
            return 0

    def events(self) -> list[dict[str, Any]]:
        partial = self._partial()
        path = self.site.store / ".work" / f"trainings-{partial.name.removeprefix('.partial-')}" / "events.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines()]
        except FileNotFoundError:
            return []

    def ranks(self) -> list[int]:
        """Process ids of the training's ranks."""
        return next(event["pids"] for event in reversed(self.events()) if event["event"] == "ranks")

    def step_after(self, step: int) -> int:
        """Wait until a training step beyond ``step`` was saved; the answer is its number."""
        return wait_for(lambda: (s := self.saved_step()) > step and s, f"a checkpoint after step {step}", 200)

    def retry(self) -> None:
        """Retry, and wait until training went on and saved.

        Prefect's worker looks for runs to cancel every 10 s; one that is retried within these is cancelled again.
        """
        saved = self.saved_step()
        for _ in range(3):
            assert self.site.command("prefect", "flow-run", "retry", self.id).returncode == 0
            wait_for(
                lambda: self.saved_step() > saved or self.state in ("Cancelled", "Crashed"), "training goes on", 200
            )
            if self.saved_step() > saved:
                return
        raise AssertionError("cancelled again and again")

    def processes(self) -> list[psutil.Process]:
        """The flow's process and everything that works for this site's store."""
        mine = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if "megatron_ext.worker" in line and str(self.site.store) in line:
                mine.append(process)
        return mine

    def flow_process(self) -> psutil.Process:
        """The process that runs the flow: the owner of the training."""
        trainer = wait_for(self.processes, "a trainer")[0]
        return psutil.Process(int(trainer.environ()["MFLOW_OWNER_PIDS"].split(",")[0]))


@pytest.fixture(scope="module")
def run(server: Site, built: dict[str, Any], worker: subprocess.Popen[bytes]) -> Run:
    """A long training, started by the deployment's bare name."""
    run = Run(server, 3e-4)
    run.step_after(0)
    return run


def test_the_bare_name_starts_the_deployment_and_reuses_what_is_there(run: Run) -> None:
    assert run.state == "Running"
    kinds = ("checkpoints", "datasets", "evaluations")
    assert not [path for kind in kinds for path in run.site.store.glob(f"{kind}/.partial-*")]


def test_progress_and_loss_curve_are_shown_while_it_trains(run: Run) -> None:
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(run.id)]))

    def shown() -> dict[str, Any]:
        with run.site.client() as client:
            return {artifact.key: artifact.data for artifact in client.read_artifacts(flow_run_filter=of_run)}

    found = wait_for(lambda: (s := shown()).keys() >= {"train-model-progress", "loss-curve"} and s, "both are shown")
    assert run.state == "Running"
    assert 0 < float(found["train-model-progress"]) < 100
    assert str(found["loss-curve"]).startswith("data:image/svg+xml")


def test_cancelling_saves_and_leaves_no_process(run: Run) -> None:
    before = run.saved_step()
    assert run.site.command("prefect", "flow-run", "cancel", run.id).returncode == 0
    wait_for(lambda: run.state == "Cancelled", "the run is Cancelled")
    wait_for(lambda: not run.processes(), "no trainer is left", 30)
    interrupted = [event for event in run.events() if event["event"] == "interrupted"]
    assert interrupted[-1]["step"] == run.saved_step() >= before


def test_a_retry_goes_on_from_there_and_a_killed_trainer_fails_the_run(run: Run) -> None:
    saved = run.saved_step()
    run.retry()
    steps = [event["step"] for event in run.events() if event["event"] == "metrics"]
    assert min(steps) > saved
    os.kill(run.ranks()[1], signal.SIGKILL)
    wait_for(lambda: run.state == "Failed", "the run is Failed")
    with run.site.client() as client:
        assert "killed by signal 9" in client.read_flow_run(run.id).state.message
    assert not run.processes()


def test_nothing_survives_the_sigkill_of_the_flow_for_more_than_ten_seconds(run: Run) -> None:
    run.retry()
    flow = run.flow_process()
    family = [process for process in run.processes() if process.pid != flow.pid]
    assert {process.pid for process in family} > set(run.ranks())
    flow.kill()
    started = time.monotonic()
    wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in family), "descendants are gone", 30)
    assert time.monotonic() - started < 10
    wait_for(lambda: run.state == "Crashed", "the worker marks the run Crashed")


def test_a_typo_in_a_nested_key_is_refused_by_the_server(server: Site) -> None:
    parameters = TINY | {"train": TINY["train"] | {"lrr": 1}}
    refused = server.command("prefect", "deployment", "run", "full-sft", "--params", json.dumps(parameters))
    assert refused.returncode == 1
    assert "lrr" in refused.stdout + refused.stderr


def test_ctrl_c_and_sigterm_of_mflow_run_save_and_say_how_to_go_on(server: Site, built: dict[str, Any]) -> None:
    recipe = server.recipe(train={"train_iters": 100_000, "lr": 2e-4})
    before = set(server.store.glob("trainings/.partial-*"))
    process = server.start("mflow", "run", "full-sft", str(recipe), log="stopped.txt")

    def saved() -> int:
        for partial in set(server.store.glob("trainings/.partial-*")) - before:
            if (partial / LATEST).exists():
                return int((partial / LATEST).read_text())
        return 0

    wait_for(saved, "a checkpoint", 200)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    last = (server.folder / "stopped.txt").read_text().strip().splitlines()[-1]
    assert re.fullmatch(rf"retry with: \S*mflow run full-sft {recipe}   # training goes on from step {saved()}", last)


def test_mflow_up_uses_a_server_that_answers_and_ends_only_what_it_started(server: Site) -> None:
    process = server.start("mflow", "up", log="up.txt")
    said = server.folder / "up.txt"
    wait_for(lambda: said.exists() and "Ctrl-C" in said.read_text(), "mflow up is up", 120)
    assert f"export PREFECT_API_URL={server.api}" in said.read_text()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)
    assert answers(server.api)


@pytest.mark.slow
def test_training_outlives_its_worker(server: Site, built: dict[str, Any]) -> None:
    worker = server.start("prefect", "worker", "start", "--pool", "local", "--type", "process", log="worker2.txt")
    run = Run(server, 1e-4)
    saved = run.step_after(0)
    owner = run.flow_process()
    worker.kill()
    worker.wait()
    later = run.step_after(saved + 20)
    assert later > saved
    assert owner.is_running()
    owner.terminate()
    wait_for(lambda: not run.processes(), "the trainer saved and ended", 60)
    assert run.saved_step() >= later
