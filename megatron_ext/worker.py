"""The one entry point of every subprocess: ``python -m megatron_ext.worker JOB.json``.

The job file says what to do, with which inputs, into which folder. A job with several processes becomes its own
torchrun. Exit code 0: done, or stopped on request after an ``interrupted`` event; 2: the input was at fault, one
``error`` event says how; anything else is a crash, and the log says where.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_ext.config import RuntimeConfig, Section
from megatron_ext.errors import JobInterrupted, MegatronFlowsError, unknown
from megatron_ext.events import Events
from megatron_ext.folders import full_disk_named
from megatron_ext.guard import own_children, watch_owners
from megatron_ext.terminal import TerminalEvents

TERMINAL = "MFLOW_TERMINAL"
"""Set where a person watches the job itself: its events are shown on standard error, too."""

JOBS = {
    "demo": "megatron_ext.demo:run",
    "convert": "megatron_ext.weights.convert:run",
    "tokenize": "megatron_ext.data.tokenization:run",
    "train": "megatron_ext.training.job:run",
    "reference": "megatron_ext.training.job:run_reference",
    "export": "megatron_ext.weights.export:run",
    "evaluate": "megatron_ext.evaluation.lm_eval_runner:run",
    "report": "megatron_ext.report:run",
    "logits-transformers": "megatron_ext.weights.logits_transformers:run",
    "logits-megatron": "megatron_ext.weights.logits_megatron:run",
}
"""Job name -> ``module:function``; the function takes ``(job, events)`` and returns a JSON-able summary."""


PARALLEL = ("train", "reference")
"""Jobs that ``runtime.nproc_per_node`` processes do together."""


class Job(Section):
    """What one subprocess has to do."""

    job: str = Field(description="Name in JOBS.")
    config: dict[str, Any] = Field(default_factory=dict, description="The stage's section of the recipe.")
    inputs: dict[str, Any] = Field(default_factory=dict, description="Role -> absolute path (or list of paths).")
    out: Path = Field(description="Folder to write into; may hold what a killed attempt left.")
    events: Path | None = Field(default=None, description="JSON-lines file for progress, metrics and the result.")
    runtime: RuntimeConfig = RuntimeConfig()


def run_job(job: Job, events: Events) -> dict[str, Any]:
    """Run ``job`` in this process and return its summary."""
    if job.job not in JOBS:
        raise MegatronFlowsError(unknown("job", job.job, JOBS))
    module, function = JOBS[job.job].split(":")
    return getattr(importlib.import_module(module), function)(job, events)


def check_training(job: Job) -> None:
    """Refuse a training that cannot run before its ranks are started."""
    from megatron_ext.training.setup import prepare, read_base

    (prepare if job.job == "train" else read_base)(job)


def start_torchrun(job_file: Path, job: Job) -> int:
    """Become the torchrun agent of the job's ranks on this node; the exit code is that of the first rank to fail.

    A rank that was killed by a signal counts as 128 + its number, as in a shell.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    agent = ["--standalone", f"--nproc-per-node={job.runtime.nproc_per_node}", "--max-restarts=0"]
    agent += [f"--shutdown-timeout={job.runtime.grace_seconds}"]
    own_children()
    before = job.events.stat().st_size if job.events and job.events.exists() else 0
    try:
        torchrun([*agent, "-m", "megatron_ext.worker", str(job_file)])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # passed on to the ranks, which have ended since
        return 0 if _told(job.events, before) & {"interrupted", "result"} else 128 + int(error.sigval)
    return 0


def _told(events: Path | None, start: int) -> set[str]:
    """Names of the events that were written behind byte ``start``."""
    if events is None or not events.exists():
        return set()
    with events.open("rb") as file:
        file.seek(start)
        return {json.loads(line)["event"] for line in file if line.endswith(b"\n")}


def main() -> int:
    """Run the job file named on the command line; only rank 0 writes events."""
    job_file = Path(sys.argv[1])
    job = Job.model_validate_json(job_file.read_text(encoding="utf-8"))
    agent = job.job in PARALLEL and job.runtime.nproc_per_node > 1 and "RANK" not in os.environ
    watch_owners(job.runtime.grace_seconds, agent=agent)
    first = os.environ.get("RANK", "0") == "0"
    watched = TerminalEvents if first and TERMINAL in os.environ else Events
    with watched(job.events if first else None) as events:
        try:
            if agent:
                check_training(job)
                return start_torchrun(job_file, job)
            with full_disk_named(job.out):
                summary = run_job(job, events)
            events.emit("result", **summary)
        except JobInterrupted:
            return 0
        except MegatronFlowsError as error:
            events.emit("error", type=type(error).__name__, message=str(error), exit_code=error.exit_code)
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
