"""Stage train-model: supervised fine-tuning with megatron-core, resumable."""

from __future__ import annotations

from megatron_ext.config import RuntimeConfig, TrainConfig
from tasks.artifacts import IdxmapDataset, McoreCheckpoint, Training
from tasks.build import Build
from tasks.stage import stage


@stage("train-model", version=1, makes=Training)
def train_model(train: TrainConfig, base: McoreCheckpoint, tokens: IdxmapDataset, *, runtime: RuntimeConfig) -> Build:
    """Train ``base`` on ``tokens``; an attempt that was stopped or killed goes on from its last checkpoint.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        WorkerFailedError: a rank died; ends with the last lines of the log.
    """
    return Build(
        job="train",
        identity={"train": train},
        config=train.model_dump(),
        inputs={"checkpoint": base.whole, "dataset": tokens.whole},
        runtime=runtime,
    )
