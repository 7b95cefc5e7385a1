"""What a person at a terminal sees of a running job: a bar on standard error, notes as plain lines."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from megatron_ext.events import Events


class TerminalEvents(Events):
    """Events of a command: a progress bar on a terminal, nothing but notes off it (both on standard error)."""

    def __init__(self) -> None:
        super().__init__(None)
        self._bar: Any = None
        self._task: Any = None

    def emit(self, event: str, **fields: Any) -> None:
        if event == "note":
            sys.stderr.write(fields["text"] + "\n")
        elif event == "progress" and sys.stderr.isatty():
            self._advance(fields["done"], fields["total"], fields["unit"])

    def _advance(self, done: float, total: float | None, unit: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(unit, total=total)
        self._bar.update(self._task, completed=done, total=total, description=unit)

    def __enter__(self) -> TerminalEvents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
