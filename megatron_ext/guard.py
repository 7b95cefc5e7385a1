"""No orphans: a subprocess ends when the process that owns it is gone.

torchrun starts its ranks in sessions of their own, so neither a process group nor a terminal reaches them; each
process therefore watches its owner itself. The owner is the pid in ``MFLOW_OWNER_PID`` (the flow process).
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

OWNER = "MFLOW_OWNER_PID"
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
    """Thread that waits for the owner's death, then asks this process to stop and soon after ends it.

    ``grace_seconds`` is granted instead when the stop had been asked for before the owner died: a cancelled run's
    checkpoint may be finished although its flow was killed meanwhile.
    """

    def __init__(self, owner: int, grace_seconds: float) -> None:
        self._owner, self._grace = owner, grace_seconds

    def start(self) -> None:
        threading.Thread(target=self._watch, name="owner-guard", daemon=True).start()

    def _watch(self) -> None:
        try:
            pidfd = os.pidfd_open(self._owner)
        except ProcessLookupError:
            pass
        else:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        seconds = self._grace if STOP.asked else SECONDS_TO_SAVE
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        os._exit(128 + signal.SIGKILL)


def watch_owner(grace_seconds: float) -> OwnerGuard | None:
    """Start the guard if an owner is named in the environment."""
    owner = os.environ.get(OWNER)
    if owner is None:
        return None
    guard = OwnerGuard(int(owner), grace_seconds)
    guard.start()
    return guard
