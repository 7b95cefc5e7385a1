"""Helpers of the flow tests: a place with a store and a Prefect server, and a chain small enough to run often."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
START_SECONDS = 240.0
TINY = {
    "model": {"path": "demo://routing"},
    "data": {"files": ["demo://routing"]},
    "train": {"seq_length": 128, "global_batch_size": 2, "train_iters": 4, "lr": 1e-3, "precision": "fp32"},
    "evaluate": {"tasks": ["demo_routing"], "include_path": "demo://routing", "limit": 4},
    "runtime": {"platform": "cpu", "num_threads": 1, "save_interval": 5, "log_interval": 2},
}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """The condition's first true value; fails with ``what`` when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.1)
    return value


@dataclass
class Site:
    """Where flow tests live: a store, a Prefect home, a server."""

    folder: Path
    store: Path
    environment: dict[str, str]
    api: str = ""

    def command(self, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run ``mflow …`` or ``prefect …`` in the repository's root and wait."""
        program, *rest = arguments
        options = {"env": self.environment, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 400} | kwargs
        return subprocess.run([str(BIN / program), *rest], check=False, **options)

    def start(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; its output goes to ``log`` in the site's folder."""
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                [str(BIN / arguments[0]), *arguments[1:]],
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def recipe(self, **sections: dict[str, Any]) -> Path:
        """A recipe file: the tiny one, with some keys of some sections changed."""
        values = {name: TINY[name] | sections.get(name, {}) for name in TINY}
        path = self.folder / f"recipe-{abs(hash(json.dumps(values, sort_keys=True)))}.yaml"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    def run(self, recipe: Path, *arguments: str, flow: str = "full-sft") -> tuple[int, dict[str, Any], str]:
        """``mflow run FLOW RECIPE --json``: exit code, the object, standard error."""
        done = self.command("mflow", "run", flow, str(recipe), "--json", *arguments)
        return done.returncode, json.loads(done.stdout), done.stderr

    def client(self) -> Any:
        """A Prefect client of this server."""
        from prefect.client.orchestration import SyncPrefectClient

        return SyncPrefectClient(self.api)


def states(said: dict[str, Any]) -> dict[str, str]:
    """Stage -> state of what ``mflow run --json`` said."""
    return {stage["name"]: stage["state"] for stage in said["stages"]}


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
