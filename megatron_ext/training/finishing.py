"""What a finished training leaves: its weights, their manifest, on request its full state, and its summary."""

from __future__ import annotations

from typing import Any

from megatron_ext.training.checkpoints import TrainingState, final_weights, full_state
from megatron_ext.training.parallel import first_rank
from megatron_ext.training.saving import Saver
from megatron_ext.training.setup import Setup
from megatron_ext.training.state import write_run
from megatron_ext.weights.manifest import write_manifest
from megatron_ext.weights.vocab import padded_vocab_size


def finish(setup: Setup, state: TrainingState, saver: Saver, figures: dict[str, Any]) -> dict[str, Any]:
    """Write the last checkpoint and say so in ``training_state.json``; the summary of the training."""
    iterations, runtime = setup.plan.iterations, setup.runtime
    summary = {**setup.plan.summary(), **figures, "num_threads": setup.state.num_threads}
    manifest = setup.manifest.model_copy(
        update={
            "iteration": iterations,
            "padded_vocab_size": padded_vocab_size(
                setup.manifest.vocab_size, runtime.tensor_model_parallel_size, runtime.make_vocab_size_divisible_by
            ),
            "training": {"train": setup.train.model_dump(), "summary": summary},
        }
    )
    if runtime.keep_final_state:
        whole = setup.out / "full_state"
        saver.beside(whole).save_final(iterations, full_state(state), lambda: write_manifest(whole, manifest))
    weights = final_weights(state, setup.checkpoint)
    saver.save_final(iterations, weights, lambda: write_manifest(setup.out, manifest))
    if first_rank():
        write_run(setup.out, setup.state.model_copy(update={"summary": summary}))
    return summary
