"""What a person at a terminal sees of a running job: a bar on standard error, notes as plain lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_ext.events import Events, metrics_sentence, rate_text, validation_sentence


class TerminalEvents(Events):
    """Events of a command: notes and metrics as lines, on a terminal a bar too, on standard error; a file if asked."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path)
        self._bar: Any = None
        self._task: Any = None

    def emit(self, event: str, **fields: Any) -> None:
        super().emit(event, **fields)
        if event == "note":
            sys.stderr.write(fields["text"] + "\n")
        elif event == "metrics":
            sys.stderr.write(metrics_sentence(fields) + "\n")
        elif event == "validation":
            sys.stderr.write(validation_sentence(fields) + "\n")
        elif event == "progress" and sys.stderr.isatty():
            self._advance(fields["done"], fields["total"], fields["unit"] + rate_text(fields))

    def _advance(self, done: float, total: float | None, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(text, total=total)
        self._bar.update(self._task, completed=done, total=total, description=text)

    def close(self) -> None:
        super().close()
        if self._bar is not None:
            self._bar.stop()
