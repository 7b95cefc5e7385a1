"""Progress and metrics of a running job as JSON lines, one event a line.

Events: ``progress`` (done, total, unit, rate), ``metrics`` (step and values), ``schedule`` (points: step and planned
learning rate), ``validation`` (step, loss and the objective's means), ``note`` (text), ``ranks`` (pids of a training's
processes), ``checkpoint`` (step that was saved), ``interrupted`` (step saved before stopping),
``error`` (type, message, exit_code), ``result`` (the job's summary). The flow turns them into Prefect artifacts,
the command line into a bar, the report into plots.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO


class Events:
    """Writer of one job's events; every line is flushed, so a reader can follow and a kill loses nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._file: TextIO | None = path.open("a", encoding="utf-8") if path else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the file."""
        if self._file:
            self._file.close()

    def emit(self, event: str, **fields: Any) -> None:
        if self._file:
            self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")
            self._file.flush()

    def progress(self, done: int, total: int | None, unit: str, rate: float | None = None) -> None:
        """``done`` of ``total`` ``unit`` (bytes, documents, tokens, steps); ``total`` None when unknown; ``rate`` in
        units a second, where the job measures it.
        """
        self.emit("progress", done=done, total=total, unit=unit, **({} if rate is None else {"rate": round(rate)}))

    def note(self, text: str) -> None:
        """A sentence for the person who watches."""
        self.emit("note", text=text)


SHOWN = ("loss", "accuracy", "margin", "lr", "grad_norm")


def metrics_sentence(event: Mapping[str, Any]) -> str:
    """A ``metrics`` event for a person: ``step 10: loss 2.31, lr 0.001, grad_norm 1.2, 4950 tokens/s``."""
    values = [f"{name} {event[name]:.4g}" for name in SHOWN if name in event]
    speed = [f"{event['tokens_per_second']:.0f} tokens/s"] if "tokens_per_second" in event else []
    return f"step {event['step']}: {', '.join(values + speed)}"


def rate_text(event: Mapping[str, Any]) -> str:
    """The speed that a ``progress`` event tells, for a person: ``, 950 MB/s``; empty if it tells none."""
    rate, unit = event.get("rate"), event["unit"]
    if rate is None:
        return ""
    return f", {rate / 1e6:.0f} MB/s" if unit.startswith("bytes") else f", {rate:.0f} {unit}/s"


def validation_sentence(event: Mapping[str, Any]) -> str:
    """A ``validation`` event for a person: ``step 10, validation: loss 2.31``."""
    values = [f"{name} {event[name]:.4g}" for name in SHOWN if name in event]
    return f"step {event['step']}, validation: {', '.join(values)}"


class Follower:
    """Reader of an events file that grows: each ``new()`` yields the whole lines since the last call."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)
