"""The ``train`` job, from a checkpoint and a dataset to a trained checkpoint, and the ``reference`` job before it.

``python -m megatron_ext.worker JOB.json`` runs either alone or as a rank under torchrun. The same folder and the same
configuration go on from the last checkpoint; the steps after it are the ones an uninterrupted run would have done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_ext.errors import DatasetFormatError, JobInterrupted
from megatron_ext.events import Events
from megatron_ext.guard import STOP
from megatron_ext.training.setup import prepare, read_base
from megatron_ext.training.state import threads_of_process
from megatron_ext.training.watch import HEART

if TYPE_CHECKING:
    from megatron_ext.worker import Job


def run(job: Job, events: Events) -> dict[str, Any]:
    """Train, or go on, or answer with the result that is already there.

    Raises:
        UserError: as ``prepare``.
        TrainingDivergedError: the loss or the gradient norm is not a number.
        JobInterrupted: stopped on request; a checkpoint was saved.
    """
    STOP.listen()
    setup = prepare(job)
    if setup.state.summary is not None:
        events.note(f"{setup.out} is already trained")
        return setup.state.summary
    from megatron_ext.training.parallel import parallel_state

    with parallel_state(setup.runtime, setup.train, setup.state.num_threads) as platform:
        from megatron_ext.training.loop import train  # megatron-core, on a platform that is ready for it

        try:
            return train(setup, platform, events)
        except JobInterrupted as stopped:
            events.emit("interrupted", step=stopped.step)
            raise


def run_reference(job: Job, events: Events) -> dict[str, Any]:
    """What the model before training makes of every pair: inputs ``checkpoint`` and ``dataset``, the training's config.

    Raises:
        UserError: as ``read_base``; or the dataset holds no pairs.
    """
    base = read_base(job)
    if base.dataset.kind != "preference":
        raise DatasetFormatError(
            f"dataset {base.dataset.place} is of kind {base.dataset.kind}; only pairs need a reference: "
            "mflow tokenize --format preference"
        )
    from megatron_ext.training.parallel import parallel_state

    threads = threads_of_process(base.runtime)
    with parallel_state(base.runtime, base.train, threads) as platform:
        from megatron_ext.training.parallel import announce
        from megatron_ext.training.passes import Passes
        from megatron_ext.training.reference import compute

        announce(events, platform, threads)
        with HEART.watching(base.runtime.hang_timeout):
            return compute(base, Passes(base, platform), job.out, events)
