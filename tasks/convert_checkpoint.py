"""Stage convert-checkpoint: Hugging Face weights become a torch_dist checkpoint."""

from __future__ import annotations

from typing import Any

from megatron_ext.config import ModelConfig, RuntimeConfig
from tasks.artifacts import McoreCheckpoint, Sources
from tasks.build import Build
from tasks.stage import stage


@stage("convert-checkpoint", version=2, makes=McoreCheckpoint)
def convert_checkpoint(model: ModelConfig, sources: Sources, *, runtime: RuntimeConfig) -> Build:
    """Convert the pinned model; without ``model.dtype`` each tensor keeps its own type.

    ``model.extra_vocab_size`` rows are added, and ``model.upcycle`` makes a mixture of experts of a dense model.

    Raises:
        UnsupportedModelError: there is no such mixture of experts in Hugging Face; names the key.
        VerificationError: the checkpoint is not the model; names tensor or layer.
        WeightMappingError: a weight without a rule or a rule without a weight; names it.
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    config, checks = {"dtype": model.dtype, **_changes(model)}, {"verify": model.verify}
    return Build(
        job="convert",
        identity={"model": config},
        checks={"model": checks},
        config=config | checks,
        inputs={"model": sources.model},
        runtime=runtime,
    )


def _changes(model: ModelConfig) -> dict[str, Any]:
    """What makes another model of the source; nothing where nothing does."""
    changes: dict[str, Any] = {}
    if model.extra_vocab_size:
        changes |= {"extra_vocab_size": model.extra_vocab_size, "extra_vocab_init": model.extra_vocab_init}
    if model.upcycle:
        changes["upcycle"] = model.upcycle.model_dump()
    return changes
