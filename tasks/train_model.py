"""Stage train-model: pretraining, fine-tuning or preference training with megatron-core, resumable."""

from __future__ import annotations

from megatron_ext.config import RuntimeConfig, TrainConfig
from tasks.artifacts import IdxmapDataset, McoreCheckpoint, References, Training
from tasks.build import Build
from tasks.stage import stage


@stage("train-model", version=1, makes=Training)
def train_model(
    train: TrainConfig,
    base: McoreCheckpoint,
    tokens: IdxmapDataset,
    reference: References | None = None,
    validation: IdxmapDataset | None = None,
    *,
    runtime: RuntimeConfig,
) -> Build:
    """Train ``base`` on ``tokens``; an attempt that was stopped or killed goes on from its last checkpoint.

    What ``tokens`` hold says what is learned: text, answers in conversations, or, beside a ``reference``, preferences.
    ``validation`` is read for a loss at intervals; otherwise ``train.validation_fraction`` may hold ``tokens`` out.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        WorkerFailedError: a rank died; ends with the last lines of the log.
    """
    return Build(
        job="train",
        identity={"train": train},
        config=train.model_dump(),
        inputs={
            "checkpoint": base.whole,
            "dataset": tokens.whole,
            "reference": reference.whole if reference else None,
            "validation": validation.whole if validation else None,
        },
        runtime=runtime,
    )
