"""What a finished training leaves: its weights, their manifest, on request its full state, and its summary."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.training.checkpoints import TrainingState, final_weights, full_state
from megatron_ext.training.parallel import first_rank
from megatron_ext.training.saving import Saver
from megatron_ext.training.setup import Setup
from megatron_ext.training.state import write_run
from megatron_ext.training.watch import HEART
from megatron_ext.weights.manifest import write_manifest
from megatron_ext.weights.vocab import padded_vocab_size

DTYPES = {"fp8": "bf16"}
"""Type of the weights in training, where it is not named like the precision."""
FULL_STATE = "full_state"
"""Folder in the training's with weights, optimizer and schedule of the last step."""


def finish(setup: Setup, state: TrainingState, saver: Saver, figures: dict[str, Any]) -> dict[str, Any]:
    """Write the last checkpoint and say so in ``training_state.json``; the summary of the training."""
    iterations = setup.plan.iterations
    summary = {**setup.plan.summary(), **figures, "num_threads": setup.state.num_threads}
    HEART.beat()
    if setup.runtime.keep_final_state:
        whole = saver.beside(setup.out / FULL_STATE)
        whole.save_final(iterations, full_state(state), partial(describe, setup, setup.out / FULL_STATE, iterations))
        HEART.beat()
    weights = final_weights(state, setup.checkpoint)
    saver.save_final(iterations, weights, partial(describe, setup, setup.out, iterations, summary))
    if first_rank():
        write_run(setup.out, setup.state.model_copy(update={"summary": summary}))
    return summary


def describe(setup: Setup, folder: Path, step: int, summary: dict[str, Any] | None = None) -> None:
    """Write the manifest of a checkpoint folder of this training; there is a ``summary`` when it is finished."""
    runtime, known = setup.runtime, setup.manifest
    rows = padded_vocab_size(known.vocab_size, runtime.tensor_model_parallel_size, runtime.make_vocab_size_divisible_by)
    training = {"train": setup.train.model_dump(), **({"summary": summary} if summary else {})}
    dtype = known.dtype if summary else DTYPES.get(setup.train.precision, setup.train.precision)
    facts = {"iteration": step, "dtype": dtype, "padded_vocab_size": rows, "training": training}
    write_manifest(folder, known.model_copy(update=facts))
