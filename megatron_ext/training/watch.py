"""What watches a training: a heartbeat that ends a hung rank, and warnings about steps that look wrong."""

from __future__ import annotations

import faulthandler
import math
import statistics
import sys
from collections import deque
from typing import TYPE_CHECKING, Self

from megatron_ext.errors import TrainingDivergedError
from megatron_ext.training.state import last_checkpoint

if TYPE_CHECKING:
    from megatron_ext.training.setup import Setup

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

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
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


def require_finite(setup: Setup, step: int, name: str, value: float) -> None:
    """Stop before a broken step spreads; ``step`` counts from 1.

    Raises:
        TrainingDivergedError: ``value`` is NaN or infinite; names the step's samples and the last checkpoint.
    """
    if not math.isfinite(value):
        raise TrainingDivergedError(
            f"the {name} of step {step} is {value}; its samples were {shown(setup.plan.sample_ids(step - 1))}; "
            f"last checkpoint: {last_checkpoint(setup.out)}; lower train.lr or look at these samples with mflow inspect"
        )


def shown(samples: list[int]) -> str:
    """The first few of ``samples``, for a sentence."""
    return ", ".join(map(str, samples[:16])) + (f" and {len(samples) - 16} more" if len(samples) > 16 else "")
