"""Starting a job somewhere, following it, stopping it: what every launcher has in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_ext import errors
from megatron_ext.errors import JobInterrupted, MegatronFlowsError, WorkerFailedError
from megatron_ext.events import Follower
from megatron_ext.worker import Job

LOG, EVENTS, JOB = "log.txt", "events.jsonl", "job.json"
LOG_LINES = 20
POLL_SECONDS = 0.2


class Handle(Protocol):
    """A job that was started."""

    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        ...

    def stop(self, ranks: list[int]) -> None:
        """Ask it to save and end; ``ranks`` are the process ids that it announced, if any."""
        ...

    def kill(self, ranks: list[int]) -> None:
        """End it now."""
        ...


class Launcher(Protocol):
    """Starts jobs in one kind of place."""

    def submit(self, job: Job, work: Path, lock: int) -> Handle:
        """Start ``job``, log and events in ``work``; it keeps the descriptor ``lock`` open while it writes."""
        ...


class Watcher(Protocol):
    """Someone who wants to see how a job goes on."""

    def event(self, event: dict[str, Any]) -> None: ...

    def log(self, lines: list[str]) -> None: ...


class Stopping:
    """Whether this process was asked to stop, and the jobs that still have to hear of it."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._running = 0
        self._idle = threading.Condition()

    @contextmanager
    def job(self) -> Iterator[None]:
        """Count a job while it runs."""
        with self._idle:
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def wait(self) -> None:
        """Until no job runs any more."""
        with self._idle:
            self._idle.wait_for(lambda: not self._running)


STOPPING = Stopping()


@dataclass
class Course:
    """What a job has told so far."""

    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    interrupted: dict[str, Any] | None = None
    ranks: list[int] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "result":
                self.result = {k: v for k, v in event.items() if k not in ("event", "time")}
            case "error":
                self.error = event
            case "interrupted":
                self.interrupted = event
            case "ranks":
                self.ranks = list(event["pids"])


class Tail:
    """Whole lines that were added to a growing text file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


def run(launcher: Launcher, job: Job, work: Path, lock: int, watcher: Watcher, name: str) -> dict[str, Any]:
    """Run ``job`` to its end and return its summary.

    Raises:
        UserError: the job refused its input; the same class and message as in the job.
        JobInterrupted: it was asked to stop; says what was saved.
        WorkerFailedError: it died; ends with the last lines of its log.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / EVENTS).unlink(missing_ok=True)
    written_before = (work / LOG).stat().st_size if (work / LOG).exists() else 0
    tail, events, course = Tail(work / LOG), Follower(work / EVENTS), Course()
    with STOPPING.job():
        handle = launcher.submit(job, work, lock)
        try:
            code = _follow(handle, course, events, tail, watcher, job.runtime.grace_seconds)
        finally:
            if handle.exit_code() != 0:
                handle.kill(course.ranks)  # an agent that was killed leaves its ranks behind
    return _outcome(course, code, work / LOG, written_before, name)


def _follow(handle: Handle, course: Course, events: Follower, tail: Tail, watcher: Watcher, grace: float) -> int:
    deadline = None
    while True:
        code = handle.exit_code()
        for event in events.new():
            course.take(event)
            watcher.event(event)
        if lines := tail.new():
            watcher.log(lines)
        if code is not None:
            return code
        if deadline is None:
            if STOPPING.asked.wait(POLL_SECONDS):
                handle.stop(course.ranks)
                deadline = time.monotonic() + grace
        elif time.monotonic() > deadline:
            handle.kill(course.ranks)
            deadline = float("inf")
        else:
            time.sleep(POLL_SECONDS)


def _outcome(course: Course, code: int, log: Path, written_before: int, name: str) -> dict[str, Any]:
    if course.error is not None:
        cause = getattr(errors, str(course.error["type"]), MegatronFlowsError)
        raise cause(course.error["message"])
    if course.interrupted is not None:
        step = course.interrupted.get("step")
        raise JobInterrupted(f"{name} was stopped and saved at step {step}; run it again to go on from there")
    if course.result is not None and code == 0:
        return course.result
    if STOPPING.asked.is_set():
        raise JobInterrupted(f"{name} was stopped before it finished; run it again to go on")
    by_signal = -code if code < 0 else code - 128
    ended = f"was killed by signal {by_signal}" if by_signal > 0 else f"ended with exit code {code}"
    raise WorkerFailedError(f"{name} {ended}; the last lines of {log}:\n{last_lines(log, written_before)}")


def last_lines(log: Path, start: int = 0, count: int = LOG_LINES) -> str:
    """The end of a log file, of what stands behind byte ``start``: earlier attempts write into the same file."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 400 * count))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(lines[-count:]) or "(it wrote nothing)"
