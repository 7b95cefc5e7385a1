"""Progress and metrics of a running job as JSON lines, one event a line.

Events: ``progress`` (done, total, unit), ``metrics`` (step and values), ``note`` (text), ``ranks`` (pids of a
training's processes), ``checkpoint`` (step that was saved), ``interrupted`` (step saved before stopping),
``error`` (type, message, exit_code), ``result`` (the job's summary). The flow turns them into Prefect artifacts,
the command line into a bar, the report into plots.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class Events:
    """Writer of one job's events; every line is flushed, so a reader can follow and a kill loses nothing."""

    def __init__(self, path: Path | None = None) -> None:
        self._file: TextIO | None = path.open("a", encoding="utf-8") if path else None

    def emit(self, event: str, **fields: Any) -> None:
        if self._file:
            self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")
            self._file.flush()

    def progress(self, done: int, total: int | None, unit: str) -> None:
        """``done`` of ``total`` ``unit`` (bytes, documents, tokens, steps); ``total`` None when unknown."""
        self.emit("progress", done=done, total=total, unit=unit)

    def note(self, text: str) -> None:
        """A sentence for the person who watches."""
        self.emit("note", text=text)


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
