"""What every stage has in common: identity, look-up, lock, launch, publish, and how Prefect sees it. Once, here.

A stage is a function that returns a ``Build``. Called inside a Prefect flow it becomes a task that returns a typed
pointer; called inside ``planning()`` it only says whether it would be cached. Prefect is imported when a flow runs.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from megatron_ext.errors import JobInterrupted, SourceError, UserError, WorkerFailedError
from megatron_ext.folders import require_space
from megatron_ext.worker import Job
from tasks.artifacts import Artifact
from tasks.build import Build, Made
from tasks.launch import base
from tasks.launch.local import LocalLauncher
from tasks.store import Manifest, Store

A = TypeVar("A", bound=Artifact)
LEAST_SPACE = 1 << 20
RESULTS = ".prefect-results"
"""Folder of Prefect's records, inside the store, so that a record never points to another store."""


@dataclass(frozen=True)
class Spec(Generic[A]):
    """A stage's name, its version (raise it when its code makes something else), and the pointer it returns."""

    identity: str
    version: int
    makes: type[A]


class Silent:
    """A watcher that looks away."""

    def event(self, event: dict[str, Any]) -> None: ...

    def log(self, lines: list[str]) -> None: ...


def produce(spec: Spec[A], build: Build, watcher: base.Watcher | None = None) -> tuple[Manifest, bool]:
    """The artifact's manifest, and whether it had to be built. Two callers at once build it once."""
    store, kind = Store.current(), spec.makes.kind
    document = build.document(spec.identity, spec.version)
    name = build.fingerprint(spec.identity, spec.version)
    if found := store.look_up(kind, name):
        return found, False
    with store.writing(), store.locked(kind, name, _give_up_when_stopping) as lock:
        if found := store.look_up(kind, name):
            return found, False
        started, partial = time.monotonic(), store.open_partial(kind, name)
        try:
            made = build.make(partial) if build.make else _run_job(spec, build, name, lock, watcher or Silent())
        except UserError:
            with suppress(OSError):  # a resumable training is not empty and stays
                partial.rmdir()
            raise
        manifest = store.publish(
            partial,
            made.links,
            stage=spec.identity,
            version=spec.version,
            kind=kind,
            fingerprint=name,
            identity=document,
            pointer={**build.pointer(spec.identity, spec.version), **made.pointer},
            inputs=build.named(),
            runtime=build.runtime.model_dump(),
            seconds=round(time.monotonic() - started, 3),
            summary=made.summary,
        )
    return manifest, True


def _run_job(spec: Spec[A], build: Build, name: str, lock: int, watcher: base.Watcher) -> Made:
    store, kind = Store.current(), spec.makes.kind
    assert build.job is not None
    work = store.work(kind, name)
    job = Job(
        job=build.job,
        config=dict(build.config),
        inputs=build.located(),
        out=store.partial(kind, name),
        events=work / base.EVENTS,
        runtime=build.runtime,
    )
    _require_unchanged(build)
    try:
        summary = base.run(LocalLauncher(), job, work, lock, watcher, spec.identity)
    except UserError as error:
        raise type(error)(store.with_origins(str(error))) from None
    except WorkerFailedError:
        require_space(store.root, LEAST_SPACE, f"stage {spec.identity}")  # a full disk cuts the log off, too
        raise
    try:
        _require_unchanged(build)
    except SourceError:
        shutil.rmtree(job.out)
        raise
    return Made(summary, {}, {})


def _require_unchanged(build: Build) -> None:
    if changes := build.changes():
        raise SourceError(f"{changes[0]} since this run began; run it again to take it as it is now")


def _give_up_when_stopping() -> None:
    if base.STOPPING.asked.is_set():
        raise JobInterrupted("stopped while another run was building the same artifact; run it again to go on")


@dataclass
class Planned:
    """What planning found out about one stage."""

    stage: str
    spec: Spec[Any]
    build: Build
    fingerprint: str
    manifest: Manifest | None
    pointer: Artifact

    def result(self) -> Artifact:
        """The pointer, whether or not its artifact is there."""
        return self.pointer


@dataclass
class StageRun:
    """One stage of a running flow."""

    name: str
    future: Any
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time until now, or until it ended."""
        return round((self.ended or time.monotonic()) - self.started, 2)

    @property
    def state(self) -> str:
        """built, cached, failed, or running."""
        state = self.future.state
        if not state.is_final():
            return "running"
        if not state.is_completed():
            return "failed"
        return "cached" if state.name == "Cached" else "built"

    def result(self) -> Any:
        """Wait for the pointer; what the stage raised is raised here."""
        return self.future.result()


_plan: ContextVar[list[Planned] | None] = ContextVar("plan", default=None)
_runs: ContextVar[list[StageRun] | None] = ContextVar("runs", default=None)


@contextmanager
def planning() -> Iterator[list[Planned]]:
    """Inside, stages only look into the store; the list grows by one entry for each stage that is called."""
    plan: list[Planned] = []
    token = _plan.set(plan)
    try:
        yield plan
    finally:
        _plan.reset(token)


@contextmanager
def recording() -> Iterator[list[StageRun]]:
    """The stages of the flow that runs inside, in the order in which they were started."""
    runs = _runs.get()
    if runs is not None:
        yield runs
        return
    token = _runs.set(runs := [])
    try:
        yield runs
    finally:
        _runs.reset(token)


def recorded_stages() -> dict[str, Any]:
    """Of the running flow's finished stages: name, state, seconds it took to build, artifact; and versions."""
    stages, versions = [], {}
    for run in _runs.get() or []:
        if run.state not in ("built", "cached"):
            continue
        pointer = run.result()
        if manifest := Store.current().manifest(pointer.kind, pointer.fingerprint):
            versions |= manifest.versions
            stages.append(
                {
                    "name": run.name,
                    "state": run.state,
                    "seconds": manifest.seconds,
                    "artifact": f"{pointer.kind}/{pointer.fingerprint}",
                }
            )
    return {"stages": stages, "versions": versions}


class Stage(Generic[A]):
    """A stage as flows see it: call it for its pointer, ``submit`` it to go on meanwhile."""

    def __init__(self, name: str, spec: Spec[A], build: Callable[..., Build]) -> None:
        functools.update_wrapper(self, build)
        self.name, self.spec, self.build = name, spec, build
        self._tasks: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> A:
        return self.submit(*args, **kwargs).result()

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """Start the stage; the answer has ``result()``. Arguments that were submitted are waited for first."""
        args = tuple(_resolved(arg) for arg in args)
        kwargs = {name: _resolved(arg) for name, arg in kwargs.items()}
        if (plan := _plan.get()) is not None:
            plan.append(planned := self._look(self.build(*args, **kwargs)))
            return planned
        run = StageRun(self.name, self.task().submit(*args, **kwargs))
        run.future.add_done_callback(lambda _: setattr(run, "ended", time.monotonic()))
        if (runs := _runs.get()) is not None:
            runs.append(run)
        return run

    def _look(self, build: Build) -> Planned:
        name = build.fingerprint(self.spec.identity, self.spec.version)
        manifest = Store.current().look_up(self.spec.makes.kind, name)
        if manifest:
            pointer = self.spec.makes.of(manifest)
        else:
            pointer = self.spec.makes.model_construct(
                fingerprint=name, **build.pointer(self.spec.identity, self.spec.version)
            )
        return Planned(self.name, self.spec, build, name, manifest, pointer)

    def task(self) -> Any:
        """The Prefect task, keeping its records in the current store."""
        from prefect import task

        root = Store.current().root
        if str(root) not in self._tasks:
            self._tasks[str(root)] = task(
                name=self.name,
                task_run_name=self.name,
                cache_key_fn=self._cache_key,
                persist_result=True,
                result_serializer="json",
                result_storage=root / RESULTS,
                retry_condition_fn=_worth_a_retry,
            )(self._body())
        return self._tasks[str(root)]

    def _cache_key(self, context: Any, arguments: dict[str, Any]) -> str | None:
        try:
            name = self.build(**arguments).fingerprint(self.spec.identity, self.spec.version)
        except UserError:
            return None  # the body raises it again, where Prefect shows it
        return f"{self.spec.makes.kind}-{name}"

    def _body(self) -> Callable[..., Any]:
        @functools.wraps(self.build)
        def body(*args: Any, **kwargs: Any) -> Any:
            from prefect.states import Completed

            from tasks.progress import PrefectWatcher

            watcher = PrefectWatcher(self.name)
            manifest, built = produce(self.spec, self.build(*args, **kwargs), watcher)
            watcher.finished(manifest)
            pointer = self.spec.makes.of(manifest)
            return pointer if built else Completed(name="Cached", data=pointer, message="found in the store")

        return body


def stage(
    name: str, *, version: int, makes: type[A], identity: str | None = None
) -> Callable[[Callable[..., Build]], Stage[A]]:
    """Make a stage of a function that returns a ``Build``; calling the stage returns a pointer of type ``makes``.

    Two stages with the same ``identity`` share their artifacts.
    """
    return lambda build: Stage(name, Spec(identity or name, version, makes), build)


def _resolved(argument: Any) -> Any:
    return argument.result() if isinstance(argument, StageRun | Planned) else argument


def _worth_a_retry(task: Any, task_run: Any, state: Any) -> bool:
    """A crash of a worker may pass; a fault in the input or a stop that was asked for does not."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, UserError | JobInterrupted)
