"""The training loop: build, load, resume; then step by step compute, look, update, write down, validate, save."""

from __future__ import annotations

from typing import Any

from megatron_ext.errors import JobInterrupted
from megatron_ext.events import Events
from megatron_ext.platforms.base import Platform
from megatron_ext.training.checkpoints import full_state, resume
from megatron_ext.training.finishing import finish
from megatron_ext.training.metrics import Diary
from megatron_ext.training.parallel import announce, first_rank
from megatron_ext.training.saving import Saver
from megatron_ext.training.schedule import announce_schedule
from megatron_ext.training.setup import Setup
from megatron_ext.training.state import write_run
from megatron_ext.training.steps import Trainer
from megatron_ext.training.watch import Heartbeat, require_finite


def train(setup: Setup, platform: Platform, events: Events) -> dict[str, Any]:
    """All steps that are left, on this rank; the summary of the training.

    Raises:
        TrainingDivergedError: the loss or the gradient norm is not a number.
        JobInterrupted: stopped on request; a checkpoint was saved.
    """
    runtime, iterations = setup.runtime, setup.plan.iterations
    with Heartbeat(runtime.hang_timeout) as heart:
        saver = Saver(setup.out, runtime)
        trainer = Trainer(setup, platform, saver)
        if first_rank():
            write_run(setup.out, setup.state)
            announce_schedule(events, setup.train, iterations, setup.out)
        saver.clear_partials()
        announce(events, platform, setup.state.num_threads)
        if resume(setup.out, trainer.state):
            events.note(f"resumed after step {trainer.state.step}")
        diary = Diary(setup, platform, events)
        diary.open(trainer.state.step)
        while (step := trainer.state.step + 1) <= iterations:
            heart.beat()
            diary.start_step()
            computed = trainer.compute()
            require_finite(setup, step, "loss", computed.loss)
            result = trainer.update(computed)
            require_finite(setup, step, "gradient norm", result.grad_norm)
            diary.end_step(step, result)
            if step % runtime.eval_interval == 0 or step == iterations:
                diary.validated(step, trainer.validate())
            saver.look(computed.writing, events)
            if step < iterations and (computed.stop or step % runtime.save_interval == 0):
                saver.save(step, full_state(trainer.state), events)
            if step < iterations and computed.stop:
                saver.finish(events)
                diary.close()
                events.emit("interrupted", step=step)
                raise JobInterrupted(f"stopped after step {step}")
        heart.beat()
        return finish(setup, trainer.state, saver, diary.close())
