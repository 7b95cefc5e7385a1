"""Stage export-checkpoint: the trained checkpoint becomes a Hugging Face folder again."""

from __future__ import annotations

from megatron_ext.config import ModelConfig, RuntimeConfig
from tasks.artifacts import HFModel, Sources, Training
from tasks.build import Build
from tasks.stage import stage


@stage("export-checkpoint", version=2, makes=HFModel)
def export_checkpoint(model: ModelConfig, trained: Training, sources: Sources, *, runtime: RuntimeConfig) -> Build:
    """Export with the source's config and tokenizer files; ``model.dtype`` is the type of the weights.

    Raises:
        VerificationError: the exported folder is not the trained model; names tensor or layer.
        CheckpointError: the checkpoint is damaged or of another model.
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    config, checks = {"dtype": model.dtype}, {"verify": model.verify}
    return Build(
        job="export",
        identity={"model": config},
        checks={"model": checks},
        config=config | checks,
        inputs={"checkpoint": trained.whole, "model": sources.model},
        runtime=runtime,
    )
