"""No orphans: a subprocess ends when the process that owns it is gone.

torchrun starts its ranks in sessions of their own, so neither a process group nor a terminal reaches them; each
process therefore watches its owners itself. ``MFLOW_OWNER_PIDS`` names them: the flow process, and torchrun's agent.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

import psutil

OWNERS = "MFLOW_OWNER_PIDS"
SECONDS_TO_SAVE = 6.0


class StopRequest:
    """SIGTERM or Ctrl-C, remembered until the job finds a good moment to stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Catch the signals from now on; a job that does not listen is ended by them."""
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


STOP = StopRequest()
"""The one of this process."""


class OwnerGuard:
    """Thread that waits until one of the owners dies, then asks this process to stop and soon after ends it.

    ``grace_seconds`` is granted instead when the stop had been asked for before: a cancelled run's checkpoint may be
    finished although its flow was killed meanwhile. An ``agent`` (torchrun's) is not asked; it ends after its ranks,
    which have guards of their own, so that the artifact's lock, which it holds, outlives their writing.
    """

    def __init__(self, owners: list[int], grace_seconds: float, *, agent: bool = False) -> None:
        self._owners, self._grace, self._agent = owners, grace_seconds, agent

    def start(self) -> None:
        threading.Thread(target=self._watch, name="owner-guard", daemon=True).start()

    def _watch(self) -> None:
        self._wait_for_a_death()
        if self._agent:
            self._outlive_ranks()
        else:
            seconds = self._grace if STOP.asked else SECONDS_TO_SAVE
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(seconds)
        os._exit(128 + signal.SIGKILL)

    def _wait_for_a_death(self) -> None:
        poll = select.poll()
        for owner in self._owners:
            try:
                poll.register(os.pidfd_open(owner), select.POLLIN)
            except ProcessLookupError:
                return
        poll.poll()

    def _outlive_ranks(self) -> None:
        deadline = time.monotonic() + self._grace + SECONDS_TO_SAVE
        time.sleep(SECONDS_TO_SAVE)
        while psutil.Process().children() and time.monotonic() < deadline:
            time.sleep(0.2)


def watch_owners(grace_seconds: float, *, agent: bool) -> None:
    """Start the guard if the environment names owners."""
    if owners := [int(pid) for pid in os.environ.get(OWNERS, "").split(",") if pid]:
        OwnerGuard(owners, grace_seconds, agent=agent).start()


def own_children() -> None:
    """Make this process an owner of those that it starts from now on, beside its own owners."""
    os.environ[OWNERS] = ",".join(filter(None, [os.environ.get(OWNERS), str(os.getpid())]))
