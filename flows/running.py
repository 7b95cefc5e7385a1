"""`mflow run`: check, run the flow in this process, say what came of it."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.catalog import STAGES, flow_module, sections_of
from flows.explaining import planned_stages
from flows.recipes import load_recipe
from flows.server import prepare_environment
from megatron_ext.errors import MegatronFlowsError, UserError
from tasks.checks import check_recipe
from tasks.estimates import resume_step
from tasks.stage import Planned, StageRun, recording


def run_recipe(name: str, path: Path, overrides: list[str], as_json: bool) -> int:
    """Run flow ``name`` with the recipe; returns the exit code, having printed the outcome."""
    runs: list[StageRun] = []
    plan: list[Planned] = []
    try:
        module = flow_module(name)
        sections = sections_of(load_recipe(path, overrides), name)
        check_recipe(**sections)
        plan = planned_stages(module.sentence, sections)
        prepare_environment()
        signal.signal(signal.SIGTERM, _stopped)
        with recording() as runs:
            getattr(module, name.replace("-", "_"))(**sections)
    except BaseException as error:  # noqa: BLE001 (a stop signal must be reported like a failure)
        code = error.exit_code if isinstance(error, MegatronFlowsError) else 1
        _say(runs, as_json, error=error)
        sets = [part for override in overrides for part in ("--set", override)]
        command = shlex.join([program(), "run", name, str(path), *sets])
        _finish_failed(error, command, plan, bool(runs))
        return code
    _say(runs, as_json)
    return 0


def program() -> str:
    """How this program was called, so that a printed command can be pasted: its path, or its name if that is found."""
    called = sys.argv[0]
    if Path(called).name != "mflow":
        return "mflow"
    found = shutil.which("mflow")
    return "mflow" if found and Path(found).samefile(called) else called


def _stopped(number: int, frame: object) -> None:
    """Prefect lets the flow end first and then sends the signal again, to this handler."""
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


def _finish_failed(error: BaseException, command: str, plan: Sequence[Planned], ran: bool) -> None:
    sys.stderr.write(f"error: {_words(error)}\n")
    if isinstance(error, UserError) and not ran:
        return
    steps = [resume_step(p) for p in plan if p.stage == "train-model" and p.manifest is None]
    step = next((s for s in steps if s is not None), None)
    goes_on = f"   # training goes on from step {step}" if step is not None else ""
    sys.stderr.write(f"retry with: {command}{goes_on}\n")


def _words(error: BaseException) -> str:
    return str(error) or ("stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else type(error).__name__)


def outcome(runs: Sequence[StageRun], error: BaseException | None = None) -> dict[str, Any]:
    """The run as plain values: the object that ``--json`` prints."""
    stages, scores, report = [], {}, None
    for run in sorted(runs, key=lambda r: STAGES.index(r.name)):
        state = "failed" if error and run.state == "running" else run.state
        pointer = run.result() if state in ("built", "cached") else None
        artifact = str(pointer.folder) if pointer else None
        stages.append({"name": run.name, "state": state, "seconds": run.seconds, "artifact": artifact})
        if pointer and run.name.startswith("evaluate-"):
            scores[run.name.removeprefix("evaluate-")] = pointer.scores
        if pointer and run.name == "write-report":
            report = str(pointer.path)
    said: dict[str, Any] = {"state": "failed" if error else "completed", "stages": stages, "scores": scores}
    said["report"] = report
    if error:
        said["error"] = _words(error)
    return said


def _say(runs: Sequence[StageRun], as_json: bool, error: BaseException | None = None) -> None:
    said = outcome(runs, error)
    if as_json:
        sys.stdout.write(json.dumps(said) + "\n")
    elif runs:
        sys.stdout.write(table(said))
    sys.stdout.flush()


def table(said: dict[str, Any]) -> str:
    """The outcome for a person."""
    lines = ["", f"{'stage':<20} {'state':<8} {'seconds':>8}  artifact"]
    lines += [f"{s['name']:<20} {s['state']:<8} {s['seconds']:>8.1f}  {s['artifact'] or '-'}" for s in said["stages"]]
    if said["scores"]:
        lines += ["", *_score_lines(said["scores"])]
    if said["report"]:
        lines += [
            "",
            f"report: {said['report']}",
            f"watch:  {program()} up   # Prefect's UI: this run, its logs and curves",
        ]
    return "\n".join(lines) + "\n"


def _score_lines(scores: dict[str, Any]) -> list[str]:
    names = [name for name in ("base", "tuned") if name in scores]
    lines = [f"{'score':<36}" + "".join(f"{name:>10}" for name in names)]
    for task, metrics in scores[names[-1]].items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and "stderr" not in metric:
                values = [scores[name].get(task, {}).get(metric, float("nan")) for name in names]
                lines.append(f"{task + ' ' + metric:<36}" + "".join(f"{v:>10.3f}" for v in values))
    return lines
