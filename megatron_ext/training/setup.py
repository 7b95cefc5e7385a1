"""What a training was asked for, read and checked before the first expensive second. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.config_files import validated
from megatron_ext.data.datasets import Dataset, open_dataset
from megatron_ext.errors import ConfigError
from megatron_ext.folders import require_space
from megatron_ext.platforms.base import require_transformer_engine
from megatron_ext.training.layout import check_kind, check_layout, disk_needed
from megatron_ext.training.plan import Plan, check_vocabulary, make_plan, validation_plan
from megatron_ext.training.state import RunState, open_run, training_digest
from megatron_ext.weights.manifest import CheckpointManifest, read_manifest, require_torch_dist

if TYPE_CHECKING:
    from megatron_ext.worker import Job


@dataclass(frozen=True)
class Base:
    """Where a training starts, and on what: the same for training and for the pass of the reference model."""

    train: TrainConfig
    runtime: RuntimeConfig
    checkpoint: Path
    manifest: CheckpointManifest
    dataset: Dataset
    out: Path


@dataclass(frozen=True)
class Setup(Base):
    """Everything that a training needs to know.

    Attributes:
        reference: folder with the reference model's log-probabilities; it is made there if it does not exist. None
            where the dataset holds no pairs.
        continued: the checkpoint folder whose optimizer, schedule and step are gone on from; None starts at step 0.
        validation: the dataset that validation reads, and its plan; None without validation.
    """

    plan: Plan
    reference: Path | None
    validation: tuple[Path, Plan] | None
    state: RunState
    continued: Path | None


def read_base(job: Job) -> Base:
    """Read and check model, data and layout.

    Raises:
        UserError: whatever does not fit, named with its value, place and remedy.
    """
    train = validated(TrainConfig, job.config, "train")
    checkpoint = Path(job.inputs["checkpoint"])
    manifest = read_manifest(checkpoint)
    require_torch_dist(manifest, checkpoint)
    dataset = open_dataset(Path(job.inputs["dataset"]))
    started = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    if train.precision == "fp8":
        require_transformer_engine(job.runtime.platform)
    check_layout(manifest.architecture, train, job.runtime, started)
    check_kind(dataset.kind, train, job.runtime)
    check_vocabulary(manifest, dataset)
    return Base(train, job.runtime, checkpoint, manifest, dataset, job.out)


def prepare(job: Job) -> Setup:
    """Read and check what the job names; the same in the launcher and in every rank.

    Raises:
        UserError: whatever does not fit, named with its value, place and remedy.
    """
    base = read_base(job)
    train, positions = base.train, base.manifest.architecture.max_position_embeddings
    plan = make_plan(train, base.dataset.place, positions)
    validation = _validation(job, base, positions)
    datasets = [base.dataset.place, *([validation[0]] if validation else [])]
    continued = Path(job.inputs["state"]) if job.inputs.get("state") else None
    settings = train.model_dump() | ({"finetune": False} if continued else {})
    state = open_run(job.out, training_digest(settings, base.checkpoint, *datasets), job.runtime)
    if state.summary is None:
        needed = disk_needed(base.manifest.architecture, job.runtime, plan.iterations)
        require_space(job.out, needed - _held(job.out), "training")
    reference = None
    if base.dataset.kind == "preference":
        reference = Path(job.inputs.get("reference") or job.out / "reference")
    elif job.inputs.get("reference"):
        raise ConfigError(f"a reference was given, but dataset {base.dataset.place} holds no pairs; leave it out")
    return Setup(
        **{name: getattr(base, name) for name in Base.__dataclass_fields__},
        plan=plan,
        reference=reference,
        validation=validation,
        state=state,
        continued=continued,
    )


def _held(out: Path) -> int:
    """Bytes of the checkpoints that an attempt before has left."""
    return sum(path.stat().st_size for path in out.glob("iter_*/*") if path.is_file())


def _validation(job: Job, base: Base, positions: int) -> tuple[Path, Plan] | None:
    train = base.train
    if own := job.inputs.get("validation"):
        if train.validation_fraction:
            raise ConfigError(
                f"train.validation_fraction {train.validation_fraction} and a validation dataset exclude each other; "
                "give one of them"
            )
        dataset = open_dataset(Path(own))
        if dataset.kind != base.dataset.kind:
            raise ConfigError(
                f"validation dataset {own} is of kind {dataset.kind}, the training's is {base.dataset.kind}; "
                "tokenize it in the same format"
            )
        if dataset.kind == "preference":
            raise ConfigError(
                f"validation dataset {own} holds pairs, of which the reference knows nothing; hold out some of the "
                "training's with train.validation_fraction"
            )
        check_vocabulary(base.manifest, dataset)
    place = Path(own) if own else base.dataset.place
    plan = validation_plan(train, base.dataset.place, place if own else None, positions)
    return (place, plan) if plan else None
