"""Stage convert-checkpoint: Hugging Face weights become a torch_dist checkpoint."""

from __future__ import annotations

from megatron_ext.config import ModelConfig, RuntimeConfig
from tasks.artifacts import McoreCheckpoint, Sources
from tasks.build import Build
from tasks.stage import stage


@stage("convert-checkpoint", version=2, makes=McoreCheckpoint)
def convert_checkpoint(model: ModelConfig, sources: Sources, *, runtime: RuntimeConfig) -> Build:
    """Convert the pinned model; without ``model.dtype`` each tensor keeps its own type.

    Raises:
        VerificationError: the checkpoint is not the model; names tensor or layer.
        WeightMappingError: a weight without a rule or a rule without a weight; names it.
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    config, checks = {"dtype": model.dtype}, {"verify": model.verify}
    return Build(
        job="convert",
        identity={"model": config},
        checks={"model": checks},
        config=config | checks,
        inputs={"model": sources.model},
        runtime=runtime,
    )
