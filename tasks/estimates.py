"""How long and how large a planned run would be: steps to train, bytes to write. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_ext.config import TrainConfig
from megatron_ext.families.base import Architecture
from megatron_ext.training.layout import disk_needed as training_disk
from megatron_ext.training.layout import parameters
from megatron_ext.training.plan import iterations_without_data, planned_iterations
from tasks.stage import Planned
from tasks.store import Store

LATEST = "latest_checkpointed_iteration.txt"
BYTES_OF = {"bf16": 2, "fp16": 2, "fp32": 4, None: 4}


@dataclass(frozen=True)
class StepsToRun:
    """Optimizer steps: from where, to where; the end is unknown until the data is tokenized."""

    first: int
    last: int | None

    def as_json(self) -> dict[str, int | None]:
        return asdict(self)

    def sentence(self) -> str:
        """For a person."""
        if self.last is None:
            return "steps are known when the data is tokenized"
        resumed = f" (goes on from step {self.first} of {self.last})" if self.first else ""
        return f"{self.last - self.first} steps to run{resumed}"


def resume_step(planned: Planned) -> int | None:
    """The step from which an interrupted training would go on; None when it would start at the beginning."""
    partial = Store.current().partial(planned.spec.makes.kind, planned.fingerprint)
    try:
        return int((partial / LATEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def steps_to_run(plan: Sequence[Planned]) -> StepsToRun | None:
    """The steps of the plan's training; None when there is none to run."""
    training = next((p for p in plan if p.stage == "train-model" and p.manifest is None), None)
    if training is None:
        return None
    train = training.build.identity["train"]
    assert isinstance(train, TrainConfig)
    dataset = next((p for p in plan if p.stage == "tokenize-dataset" and p.manifest), None)
    last = iterations_without_data(train) or (planned_iterations(train, dataset.pointer.folder) if dataset else None)
    return StepsToRun(resume_step(training) or 0, last)


def disk_needed(plan: Sequence[Planned], architecture: Architecture) -> int:
    """Bytes that the stages to be built will write, roughly, for a model of this shape."""
    to_build = {p.stage: p for p in plan if p.manifest is None}
    if not to_build:
        return 0
    weights = parameters(architecture)
    converting = next((p for p in plan if p.stage == "convert-checkpoint"), None)
    size = weights * BYTES_OF[converting.build.config["dtype"] if converting else None]
    training, steps = to_build.get("train-model"), steps_to_run(plan)
    kept = training_disk(architecture, training.build.runtime if training else None, steps.last if steps else None)
    sizes = {"convert-checkpoint": size, "train-model": kept, "export-checkpoint": size}
    return sum(needed for stage, needed in sizes.items() if stage in to_build) + 50_000_000
