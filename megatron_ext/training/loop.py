"""The training loop: build, load, resume; then step by step compute, look, update, write down, validate, save."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_ext.errors import JobInterrupted
from megatron_ext.events import Events
from megatron_ext.platforms.base import Platform
from megatron_ext.training.checkpoints import full_state, resume
from megatron_ext.training.finishing import describe, finish
from megatron_ext.training.metrics import Diary
from megatron_ext.training.parallel import announce, first_rank
from megatron_ext.training.saving import Saver
from megatron_ext.training.schedule import announce_schedule
from megatron_ext.training.setup import Setup
from megatron_ext.training.state import write_run
from megatron_ext.training.steps import Trainer
from megatron_ext.training.watch import HEART, Watch


def train(setup: Setup, platform: Platform, events: Events) -> dict[str, Any]:
    """All steps that are left, on this rank; the summary of the training.

    Raises:
        TrainingDivergedError: a loss, the gradient norm or a weight is not a number.
        JobInterrupted: stopped on request; a checkpoint was saved, if there was something to save.
    """
    runtime, iterations = setup.runtime, setup.plan.iterations
    with HEART.watching(runtime.hang_timeout):
        saver = Saver(setup.out, runtime, partial(describe, setup))
        trainer = Trainer(setup, platform, saver)
        watch = Watch(setup, trainer, saver, events)
        if first_rank():
            write_run(setup.out, setup.state)
            announce_schedule(events, setup.train, iterations, setup.out)
        saver.recover()
        announce(events, platform, setup.state.num_threads)
        if resume(setup, trainer.state):
            events.note(f"resumed after step {trainer.state.step}")
        diary = Diary(setup, platform, events)
        diary.open(trainer.state.step, trainer.state.validated)
        stop = not watch.validated(diary)
        while not stop and (step := trainer.state.step + 1) <= iterations:
            HEART.beat()
            diary.start_step()
            computed = trainer.compute()
            watch.finite(step, "loss", computed.loss)
            result = trainer.update(computed)
            watch.finite(step, "gradient norm", result.grad_norm)
            saver.confirm()
            diary.end_step(step, result)
            saver.look(computed.writing, events)
            stop = computed.stop or not watch.validated(diary)
            if stop or (step < iterations and step % runtime.save_interval == 0):
                HEART.beat()
                watch.finite_weights()
                saver.save(step, full_state(trainer.state), events)
        figures = diary.close()
        if stop:
            saver.finish(events)
            raise JobInterrupted(f"stopped after step {trainer.state.step}", trainer.state.step)
        watch.sound()
        return finish(setup, trainer.state, saver, figures)
