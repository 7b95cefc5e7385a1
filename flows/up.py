"""`mflow up`: a Prefect server if none answers, the deployments, a worker on pool local; ends what it started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.server import QUIET, RECORD, answers, prefect_home, running_server
from megatron_ext.errors import WorkerFailedError

START_SECONDS, STOP_SECONDS = 180.0, 40.0
HOST = "127.0.0.1"


def up(port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        WorkerFailedError: the server or the worker did not start, or ended by itself.
    """
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    with _server(port, over, say) as api:
        if over.is_set():
            return
        os.environ["PREFECT_API_URL"] = api
        from flows.deploying import deploy_all

        for line in deploy_all():
            say(line)
        with _started("worker", ["worker", "start", "--pool", "local", "--type", "process"]) as worker:
            say(f"\nUI:  {api.removesuffix('/api')}\n")
            say(f"  export PREFECT_API_URL={api}")
            say("  prefect deployment run full-sft\n\nCtrl-C ends the server and the worker.")
            while not over.wait(1.0):
                if worker.poll() is not None:
                    raise WorkerFailedError(f"the worker ended by itself with exit code {worker.returncode}; see above")


def check(say: Callable[[str], None]) -> None:
    """Start a server, see that it is healthy, and stop it; its database is made on the way.

    Raises:
        WorkerFailedError: it did not start; the log above says why.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    os.environ.pop("PREFECT_API_URL", None)
    with _server(_free_port(), threading.Event(), say, record=False):
        say("Prefect's server starts and answers")


@contextmanager
def _server(port: int, over: threading.Event, say: Callable[[str], None], *, record: bool = True) -> Iterator[str]:
    if record and (running := running_server()):
        say(f"a Prefect server answers at {running}")
        yield running
        return
    port = port if _is_free(port) else _free_port()
    api = f"http://{HOST}:{port}/api"
    say(f"starting a Prefect server at {api} …")
    with _started(
        "server", ["server", "start", "--host", HOST, "--port", str(port)], {"PREFECT_API_URL": api}
    ) as server:
        _wait_until(lambda: answers(api) or over.is_set(), server)
        mark = prefect_home() / RECORD
        if record:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(json.dumps({"api": api, "pid": os.getpid()}), encoding="utf-8")
        try:
            yield api
        finally:
            if record:
                mark.unlink(missing_ok=True)


@contextmanager
def _started(
    name: str, arguments: list[str], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A ``prefect`` command in a session of its own, so that Ctrl-C reaches only us and we end it in order."""
    log = prefect_home() / f"mflow-up-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    prefect = Path(sys.executable).with_name("prefect")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(prefect), *arguments],
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    pause = threading.Event()
    for _ in range(int(START_SECONDS / 0.5)):
        if ready():
            return
        if process.poll() is not None:
            break
        pause.wait(0.5)
    raise WorkerFailedError(f"the Prefect server did not start; see {prefect_home() / 'mflow-up-server.log'}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex((HOST, port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
