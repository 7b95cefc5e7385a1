"""A stage's events -> what Prefect's UI shows: log lines, progress, loss curve, score table, report link."""

from __future__ import annotations

import base64
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ext.events import metrics_sentence, rate_text, validation_sentence
from tasks.curve import curve
from tasks.store import Manifest, Store

PROGRESS_SECONDS, CURVE_SECONDS = 2.0, 15.0
SCHEDULE_ROWS = 20
NO_COLUMN = ("event", "time")
LOG_LINES = 40
"""Log lines sent to the server in one message at most; the rest stays in the file."""


class PrefectWatcher:
    """Watches one stage. Nothing that goes wrong here may harm the job.

    After the death of a Prefect worker the next log call raises SystemExit in this thread, so that everything that
    talks to Prefect is wrapped in ``suppress(BaseException)``; signals reach the main thread only.
    """

    def __init__(self, stage: str) -> None:
        from prefect import get_run_logger

        self._stage = stage
        self._logger = get_run_logger()
        self._progress: Any = None
        self._progress_due, self._curve_due = time.monotonic() + PROGRESS_SECONDS, time.monotonic() + CURVE_SECONDS
        self._unit, self._done, self._total, self._rate = "", 0.0, None, ""
        self._metrics: list[dict[str, Any]] = []
        self._validation: list[dict[str, Any]] = []

    def event(self, event: dict[str, Any]) -> None:
        """Take one event of the job."""
        with suppress(BaseException):
            match event["event"]:
                case "note":
                    self._logger.info(event["text"])
                case "progress":
                    self._unit, self._done, self._total = event["unit"], event["done"], event["total"]
                    self._rate = rate_text(event)
                    self._show_progress()
                case "metrics":
                    self._metrics.append(event)
                    self._logger.info(metrics_sentence(event))
                    self._show_curve()
                case "schedule":
                    self._show_schedule(event["points"])
                case "validation":
                    self._validation.append({name: value for name, value in event.items() if name not in NO_COLUMN})
                    self._logger.info(validation_sentence(event))
                    self._show_validation()
                case "interrupted":
                    self._logger.warning("stopped and saved at step %s", event.get("step"))

    def log(self, lines: list[str]) -> None:
        """Pass the job's log on."""
        with suppress(BaseException):
            left_out = f"… {len(lines) - LOG_LINES} more lines in the log file\n" if len(lines) > LOG_LINES else ""
            self._logger.info(left_out + "\n".join(lines[-LOG_LINES:]))

    def finished(self, manifest: Manifest) -> None:
        """The artifact is there: show its place, and what it holds for people."""
        with suppress(BaseException):
            folder = Store.current().folder(manifest.kind, manifest.fingerprint)
            self._logger.info("%s: %s", self._stage, folder)
            if manifest.kind == "trainings":
                self._metrics = _records(folder / "metrics.jsonl")  # those before a retry, too
                self._show_curve(last=True)
                self._validation = _records(folder / "validation.jsonl")
                self._show_validation()
            if self._progress:
                self._show_progress(last=True)
            if manifest.kind == "evaluations":
                self._show_scores(folder)
            if manifest.kind == "reports":
                self._show_report(folder)

    def _show_progress(self, last: bool = False) -> None:
        if not self._total or (time.monotonic() < self._progress_due and not last):
            return
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        self._progress_due = time.monotonic() + PROGRESS_SECONDS
        percent = 100.0 if last else min(100.0, 100.0 * self._done / self._total)
        latest = self._metrics[-1] if self._metrics else {}
        speed = f", {latest['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in latest else self._rate
        text = f"{self._stage}: {self._done:.0f} of {self._total:.0f} {self._unit}{speed}"
        if self._progress is None:
            self._progress = create_progress_artifact(percent, key=f"{self._stage}-progress", description=text)
        else:
            update_progress_artifact(self._progress, progress=percent, description=text)

    def _show_curve(self, last: bool = False) -> None:
        if time.monotonic() < self._curve_due and not last:
            return
        from prefect.artifacts import create_image_artifact

        self._curve_due = time.monotonic() + CURVE_SECONDS
        points = [(m["step"], m["loss"]) for m in self._metrics if "loss" in m]
        if points:
            image = base64.b64encode(curve(points, "loss", "step").encode()).decode()
            create_image_artifact(
                f"data:image/svg+xml;base64,{image}", key="loss-curve", description=f"Loss until step {points[-1][0]}"
            )

    def _show_schedule(self, points: list[list[float]]) -> None:
        from prefect.artifacts import create_table_artifact

        every = max(1, len(points) // SCHEDULE_ROWS)
        rows = [{"step": int(step), "lr": f"{lr:.4g}"} for step, lr in [*points[:-1:every], points[-1]]]
        create_table_artifact(rows, key="planned-schedule", description="Learning rate as planned before training")

    def _show_validation(self) -> None:
        if not self._validation:
            return
        from prefect.artifacts import create_table_artifact

        create_table_artifact(self._validation, key="validation", description="Means over the validation set")

    def _show_scores(self, folder: Path) -> None:
        from prefect.artifacts import create_table_artifact

        tasks = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]
        rows = [
            {"task": task, "metric": metric, "value": value}
            for task, metrics in tasks.items()
            for metric, value in metrics.items()
            if not metric.endswith("_stderr")
        ]
        create_table_artifact(rows, key=f"{self._stage}-scores", description=f"Scores of {self._stage}")

    def _show_report(self, folder: Path) -> None:
        from prefect.artifacts import create_link_artifact

        path = next(iter(sorted(folder.glob("*.html"))))
        create_link_artifact(path.as_uri(), link_text=path.name, key="report", description=f"Report: {path}")


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
