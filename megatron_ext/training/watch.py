"""What watches a training: a heartbeat that ends a hung rank, and warnings about steps that look wrong."""

from __future__ import annotations

import faulthandler
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_ext.errors import JobInterrupted, TrainingDivergedError
from megatron_ext.events import Events
from megatron_ext.training.parallel import first_rank
from megatron_ext.training.state import last_checkpoint, write_json

if TYPE_CHECKING:
    from megatron_ext.training.metrics import Diary
    from megatron_ext.training.saving import Saver
    from megatron_ext.training.setup import Setup
    from megatron_ext.training.steps import Trainer

DIVERGED = "diverged.json"
"""In the training's folder: the step that stopped it, and all of its samples."""

WINDOW = 50
"""Steps that a new one is compared with."""
LEAST = 10
"""Steps that must be known before anything is called unusual."""
DEVIATIONS = 6.0
"""Robust standard deviations above the median from which on a value is unusual."""
NOISE = 0.05
"""Part of the median that always counts as noise, however quiet the steps before were."""


class Heartbeat:
    """Ends this process when ``beat`` was not called for a while: every thread's stack goes to standard error.

    The timer is faulthandler's own thread, which needs no interpreter lock, so it works inside a stuck collective.
    torchrun then ends the other ranks, and a rerun goes on from the last checkpoint.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None

    def beat(self) -> None:
        """Start the time anew; nothing where nobody watches."""
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Expect a beat every ``seconds`` while the block runs."""
        self._seconds = seconds
        self.beat()
        try:
            yield
        finally:
            self._seconds = None
            faulthandler.cancel_dump_traceback_later()


HEART = Heartbeat()
"""The one of this process: of a step of training, a pass of validation or of the reference model, a save."""


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


class Watch:
    """Stops a training before what is broken spreads. Every rank calls every method, in the same order."""

    def __init__(self, setup: Setup, trainer: Trainer, saver: Saver, events: Events) -> None:
        self._setup, self._trainer, self._saver, self._events = setup, trainer, saver, events

    def finite(self, step: int, name: str, value: float | None) -> None:
        """Look at a value of ``step`` (from 1); None where there is nothing to look at.

        Raises:
            TrainingDivergedError: it is NaN or infinite; names the step's samples and the last good checkpoint.
        """
        if value is not None and not math.isfinite(value):
            self._saver.distrust(step, self._events)
            self._stop(step, f"the {name} of step {step} is {value}")

    def finite_weights(self) -> None:
        """Look at all weights, before they are saved.

        Raises:
            TrainingDivergedError: as ``finite``.
        """
        step = self._trainer.state.step
        if broken := self._trainer.broken_weights():
            self._saver.distrust(step + 1, self._events)
            self._stop(
                step, f"{broken} of the weights' tensors are not finite, or their squares are not, after step {step}"
            )

    def validated(self, diary: Diary) -> bool:
        """Validate where it is due and was not done yet; False if a stop was asked for meanwhile.

        Raises:
            TrainingDivergedError: as ``finite``.
        """
        state, runtime = self._trainer.state, self._setup.runtime
        due = state.step % runtime.eval_interval == 0 or state.step == self._setup.plan.iterations
        if not due or state.step == state.validated:
            return True
        try:
            means = self._trainer.validate()
        except JobInterrupted:
            return False
        if means:
            self.finite(state.step, "validation loss", means["loss"])
        diary.validated(state.step, means)
        state.validated = state.step
        return True

    def sound(self) -> None:
        """Look at what the last update left: no step after it would tell.

        Raises:
            TrainingDivergedError: as ``finite``.
        """
        self.finite_weights()
        step = self._trainer.state.step
        loss = self._trainer.loss_of(self._trainer.loss, self._trainer.data, step - 1)
        if not math.isfinite(loss):
            self._saver.distrust(step + 1, self._events)
            self._stop(step, f"the update of step {step} broke the model: the loss of its samples is {loss} now")

    def _stop(self, step: int, what: str) -> None:
        samples, checkpoint = self._setup.plan.sample_ids(step - 1), last_checkpoint(self._setup.out)
        place = self._setup.out / DIVERGED
        if first_rank():
            facts = {"step": step, "what": what, "last_checkpoint": checkpoint, "sample_ids": samples}
            write_json(place, facts)
        raise TrainingDivergedError(
            f"{what}; its samples were {shown(samples)} (all of them: {place}); last good checkpoint: {checkpoint}; "
            "lower train.lr or look at these samples with mflow inspect"
        )


def shown(samples: list[int]) -> str:
    """The first few of ``samples``, for a sentence."""
    return ", ".join(map(str, samples[:16])) + (f" and {len(samples) - 16} more" if len(samples) > 16 else "")
