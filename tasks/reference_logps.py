"""Stage reference-logps: what the model before preference training makes of every pair, computed once."""

from __future__ import annotations

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.training.plan import REFERENCE_DECIDES
from tasks.artifacts import IdxmapDataset, McoreCheckpoint, References
from tasks.build import Build
from tasks.stage import stage


@stage("reference-logps", version=1, makes=References)
def reference_logps(
    train: TrainConfig, base: McoreCheckpoint, tokens: IdxmapDataset, *, runtime: RuntimeConfig
) -> Build:
    """Log-probabilities that ``base`` gives to both answers of each pair of ``tokens``; a new learning rate keeps them.

    Raises:
        DatasetFormatError: the dataset holds no pairs.
        WorkerFailedError: a rank died; ends with the last lines of the log.
    """
    return Build(
        job="reference",
        identity={"train": {name: getattr(train, name) for name in REFERENCE_DECIDES}},
        config=train.model_dump(),
        inputs={"checkpoint": base.whole, "dataset": tokens.whole},
        runtime=runtime,
    )
