"""What watches a training: a heartbeat that ends a hung rank, and warnings about steps that look wrong."""

from __future__ import annotations

import faulthandler
import math
import statistics
import sys
from collections import deque

WINDOW = 50
"""Steps that a new one is compared with."""
LEAST = 10
"""Steps that must be known before anything is called unusual."""
DEVIATIONS = 6.0
"""Robust standard deviations above the median from which on a value is unusual."""
NOISE = 0.05
"""Part of the median that always counts as noise, however quiet the steps before were."""


class Heartbeat:
    """Ends this process when ``beat`` was not called for ``seconds``: every thread's stack goes to standard error.

    The timer is faulthandler's own thread, which needs no interpreter lock, so it works inside a stuck collective.
    torchrun then ends the other ranks, and a rerun goes on from the last checkpoint.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def beat(self) -> None:
        """Start the time anew."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        """No more beats will come."""
        faulthandler.cancel_dump_traceback_later()


class Spikes:
    """Says when a value is far above those of the steps before: median and median deviation over ``WINDOW`` steps."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, value: float) -> str | None:
        """A sentence if ``value`` of ``step`` is unusual; remembers it either way."""
        if not math.isfinite(value):
            return None
        sentence = None
        if len(self._seen) >= LEAST:
            middle = statistics.median(self._seen)
            spread = 1.4826 * statistics.median(abs(seen - middle) for seen in self._seen)
            if value - middle > max(DEVIATIONS * spread, NOISE * abs(middle)):
                sentence = f"{self._name} {value:.4g} of step {step} is far above the {middle:.4g} of the steps before"
        self._seen.append(value)
        return sentence
