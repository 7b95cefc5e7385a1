"""Supervised fine-tuning: from a converted checkpoint and a chat dataset to a trained checkpoint.

``python -m megatron_ext.worker JOB.json`` runs it alone or as a rank under torchrun. The same folder and the same
configuration go on from the last checkpoint; the steps after it are the ones an uninterrupted run would have done.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.config import RuntimeConfig, TrainConfig, validated
from megatron_ext.errors import JobInterrupted, TrainingDivergedError
from megatron_ext.events import Events
from megatron_ext.folders import require_space
from megatron_ext.guard import STOP
from megatron_ext.training import plan as planning
from megatron_ext.training.state import RunState, open_run, training_digest, write_run
from megatron_ext.weights.manifest import CheckpointManifest, read_manifest, require_torch_dist, write_manifest
from megatron_ext.weights.vocab import padded_vocab_size

if TYPE_CHECKING:
    from megatron_ext.worker import Job


@dataclass(frozen=True)
class Setup:
    """Everything that was read and checked before the first expensive second."""

    train: TrainConfig
    runtime: RuntimeConfig
    checkpoint: Path
    dataset: Path
    out: Path
    manifest: CheckpointManifest
    plan: planning.Plan
    state: RunState


def prepare(job: Job) -> Setup:
    """Read and check what the job names; torch-free, and the same in the launcher and in every rank.

    Raises:
        UserError: whatever does not fit, named with its value, place and remedy.
    """
    train = validated(TrainConfig, job.config, "train")
    checkpoint, dataset = Path(job.inputs["checkpoint"]), Path(job.inputs["dataset"])
    manifest = read_manifest(checkpoint)
    require_torch_dist(manifest, checkpoint)
    started = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    planning.check_layout(manifest.architecture, train, job.runtime, started)
    planning.check_vocabulary(manifest, planning.read_dataset_manifest(dataset), dataset)
    plan = planning.make_plan(train, dataset, manifest.architecture.max_position_embeddings)
    state = open_run(job.out, training_digest(train, checkpoint, dataset), job.runtime)
    if state.summary is None:
        require_space(job.out, planning.disk_needed(manifest.architecture), "training")
    return Setup(train, job.runtime, checkpoint, dataset, job.out, manifest, plan, state)


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
    from megatron_ext.training.parallel import parallel_state, set_num_threads

    set_num_threads(setup.state.num_threads)
    with parallel_state(setup.runtime, setup.train.seed) as platform:
        return _train(setup, platform, events)


def _train(setup: Setup, platform: Any, events: Events) -> dict[str, Any]:
    """The sentence: build, load, resume, then step by step compute, look, update, write down, save."""
    import torch.distributed as dist

    from megatron_ext.training import checkpoints
    from megatron_ext.training.metrics import Diary
    from megatron_ext.training.parallel import announce
    from megatron_ext.training.saving import Saver
    from megatron_ext.training.steps import Trainer
    from megatron_ext.training.watch import Heartbeat

    heart = Heartbeat(setup.runtime.hang_timeout)
    heart.beat()
    saver = Saver(setup.out, setup.runtime)
    trainer = Trainer(setup, platform, saver)
    if dist.get_rank() == 0:
        write_run(setup.out, setup.state)
    saver.clear_partials()
    announce(events, platform, setup.state.num_threads)
    if checkpoints.resume(setup.out, trainer.state):
        events.note(f"resumed after step {trainer.state.step}")
    architecture, interval = setup.manifest.architecture, setup.runtime.log_interval
    diary = Diary(setup.out, setup.train, setup.plan, events, interval, architecture, platform)
    diary.open(trainer.state.step)
    while trainer.state.step < setup.plan.iterations:
        heart.beat()
        diary.start_step()
        computed = trainer.compute()
        stop = computed.stop
        _look(setup, trainer.state.step, "loss", computed.loss)
        result = trainer.update(computed)
        _look(setup, trainer.state.step - 1, "gradient norm", result.grad_norm)
        diary.end_step(trainer.state.step, result)
        last = trainer.state.step == setup.plan.iterations
        if (saved := saver.look(computed.writing)) is not None:
            events.emit("checkpoint", step=saved)
        if not last and (stop or trainer.state.step % setup.runtime.save_interval == 0):
            saver.save(trainer.state.step, checkpoints.full_state(trainer.state))
            if not saver.writing:
                events.emit("checkpoint", step=trainer.state.step)
        if not last and stop:
            saver.finish()
            diary.close()
            events.emit("interrupted", step=trainer.state.step)
            raise JobInterrupted(f"stopped after step {trainer.state.step}")
    figures = diary.close()
    heart.beat()
    summary = _finish(setup, trainer, saver, figures)
    heart.stop()
    return summary


def _look(setup: Setup, step: int, name: str, value: float) -> None:
    """Stop before a broken step spreads; ``step`` counts from 0."""
    if math.isfinite(value):
        return
    from megatron_ext.training.checkpoints import last_checkpoint
    from megatron_ext.training.metrics import shown

    raise TrainingDivergedError(
        f"the {name} of step {step + 1} is {value}; its samples were {shown(setup.plan.sample_ids(step))}; "
        f"last checkpoint: {last_checkpoint(setup.out)}; lower train.lr or look at these samples with mflow inspect"
    )


def _finish(setup: Setup, trainer: Any, saver: Any, figures: dict[str, Any]) -> dict[str, Any]:
    from megatron_ext.training import checkpoints

    summary = {**setup.plan.summary(), **figures, "num_threads": setup.state.num_threads}
    manifest = setup.manifest.model_copy(
        update={
            "iteration": setup.plan.iterations,
            "padded_vocab_size": padded_vocab_size(
                setup.manifest.vocab_size,
                setup.runtime.tensor_model_parallel_size,
                setup.runtime.make_vocab_size_divisible_by,
            ),
            "training": {"train": setup.train.model_dump(), "summary": summary},
        }
    )
    if setup.runtime.keep_final_state:
        whole = setup.out / "full_state"
        saver.beside(whole).save_final(
            setup.plan.iterations,
            checkpoints.full_state(trainer.state),
            describe=lambda: write_manifest(whole, manifest),
        )
    weights = checkpoints.final_weights(trainer.state, setup.checkpoint)
    saver.save_final(setup.plan.iterations, weights, describe=lambda: write_manifest(setup.out, manifest))
    if trainer.first:
        write_run(setup.out, setup.state.model_copy(update={"summary": summary}))
    return summary
