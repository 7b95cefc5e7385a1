"""The gate: a checkpoint and a Hugging Face folder must hold the same model before either of them is published.

Run: ``mflow verify --checkpoint DIR --model HF_DIR [--level digest|logits]``; convert and export run it on what they
wrote, read back from the files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import VerifyLevel
from megatron_ext.errors import (
    CheckpointChangedError,
    CheckpointError,
    ConfigError,
    SourceError,
    VerificationError,
    WeightMappingError,
    unknown,
)
from megatron_ext.events import Events
from megatron_ext.families.base import Architecture, Weight
from megatron_ext.hf_folder import read_config
from megatron_ext.weights import planning
from megatron_ext.weights.certificate import (
    CERTIFICATE,
    Certificate,
    read_certificate,
    sentence,
    versions,
    write_certificate,
)
from megatron_ext.weights.hf import SHORT, TensorInfo, short_name
from megatron_ext.weights.layouts import manifest_of, open_checkpoint
from megatron_ext.weights.manifest import CheckpointManifest
from megatron_ext.weights.sources import descends, require_tokenizer, source_of
from megatron_ext.weights.verify_digest import Compared, Direction, Sides, compare
from megatron_ext.weights.verify_logits import Pair, compare_logits, require_memory

LEVELS = ("none", "digest", "logits")


def gate(
    level: VerifyLevel,
    *,
    checkpoint: Path,
    model: Path,
    made: Path,
    events: Events,
    platform: str = "auto",
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Verify what was just made, ``checkpoint`` or ``model``, and put the certificate into it; its summary.

    Raises:
        VerificationError: it does not equal what it was made from, or cannot be read back.
    """
    if level == "none":
        return {"verified": None}
    direction: Direction = "to_checkpoint" if made == checkpoint else "to_model"
    try:
        options = {"direction": direction, "platform": platform, "trust_pickle": trust_pickle}
        certificate = verify(checkpoint, model, level=level, events=events, **options)
    except CheckpointChangedError:
        raise
    except VerificationError as error:
        raise VerificationError(
            f"{error}. Nothing was published; check disk and memory of this machine and try again: what fails twice at "
            "the same place is a fault in megatron_ext/families or megatron_ext/weights"
        ) from None
    except (CheckpointError, SourceError, WeightMappingError) as error:
        raise VerificationError(f"what was written cannot be read back: {error}") from None
    write_certificate(made, certificate)
    events.note(f"verified ({level}): {sentence(certificate)}")
    return {"verified": certificate.summary()}


def check_level(level: VerifyLevel, architecture: Architecture, platform: str = "auto") -> None:
    """Refuse, before anything is written, a level that is unknown or that this machine cannot compute.

    Raises:
        ConfigError: names what is needed, what there is, and the level that goes without.
    """
    if level not in LEVELS:
        raise ConfigError(unknown("verification level", level, LEVELS))
    if level == "logits":
        require_memory(architecture, platform)


def verify(
    checkpoint: Path,
    model: Path,
    *,
    level: VerifyLevel,
    events: Events,
    direction: Direction | None = None,
    platform: str = "auto",
    trust_pickle: bool = False,
) -> Certificate:
    """Compare the checkpoint folder with the Hugging Face folder that it was made from, or that was made from it.

    ``direction`` says which of the two it is, None finds out: a trained checkpoint, and one whose source had another
    type than ``model``, is what ``model`` was exported from. Level ``logits`` compares all bits first.

    Raises:
        VerificationError: they differ; names the tensor with its place and values, or the first layer.
        CheckpointChangedError: a converted checkpoint is no longer what its certificate says.
        CheckpointError, SourceError, WeightMappingError, VocabularyError: they cannot be compared.
    """
    started = time.monotonic()
    noting = events if direction is None else Events()  # who gives the direction has read the manifest before
    manifest = manifest_of(checkpoint, model, noting, trust_pickle=trust_pickle)
    check_level(level, manifest.architecture, platform)
    source = source_of(manifest, checkpoint, model, trust_pickle=trust_pickle)
    require_tokenizer(manifest, checkpoint, model)
    plan, tensors = source.plan, source.reader.tensors
    reopened = partial(open_checkpoint, checkpoint, manifest, trust_pickle=trust_pickle)
    reader = reopened()
    planning.check_stored(plan, reader, checkpoint)
    reader.close()
    digests = converted_digests(manifest, checkpoint)
    sides = Sides(checkpoint, model, reopened, source.reopened)
    if direction is None:
        changed = descends(manifest, read_config(model), checkpoint, model)
        direction = _direction(manifest, plan, tensors, changed=changed)
        rounds = direction == "to_checkpoint" and not changed and not _holds(plan, reader.dtypes, tensors)
    else:
        rounds = False
    try:
        if rounds:
            compared, direction = _original_or_export(plan, sides, tensors, digests, events)
        else:
            compared = compare(plan, sides, tensors, direction, events)
    except VerificationError as error:
        raise VerificationError(f"{error}{_trained(manifest, checkpoint, direction)}") from None
    _require_unchanged(manifest, plan, reader.dtypes, tensors, compared, digests, checkpoint)
    made_of = {reader.dtypes[weight.key] for weight in plan}
    types = made_of if direction == "to_checkpoint" else {tensors[name].dtype for name in compared.digests}
    figures = None
    if level == "logits":
        rounded = _rounded(direction, types, made_of, model)
        figures = compare_logits(Pair(checkpoint, model, manifest, direction, rounded, trust_pickle), events, platform)
    return Certificate(
        level=level,
        compared=_sentence(direction, manifest),
        dtype=short_name(types),
        tensors=len(compared.digests),
        megatron_tensors=compared.megatron_tensors,
        bytes=compared.bytes,
        digests=compared.digests,
        not_converted=source.not_converted,
        logits=figures,
        seconds=round(time.monotonic() - started, 3),
        versions=versions(),
    )


def converted_digests(manifest: CheckpointManifest, checkpoint: Path) -> dict[str, str]:
    """Hugging Face tensor -> digest of what a converted checkpoint was made from; empty if it was never verified.

    Raises:
        CheckpointError: its certificate is damaged.
    """
    kept = read_certificate(checkpoint) if manifest.iteration == "release" else None
    return kept.digests if kept else {}


def _direction(
    manifest: CheckpointManifest, plan: list[Weight], tensors: Mapping[str, TensorInfo], *, changed: bool
) -> Direction:
    """Where the conversion made another model, the model is either ``changed`` by it, or an export."""
    types = {tensors[part.name].dtype for weight in plan for part in weight.parts}
    converted = changed if manifest.changes else short_name(types) == manifest.source_dtype
    return "to_checkpoint" if converted and manifest.iteration == "release" else "to_model"


def _holds(plan: list[Weight], stored: Mapping[str, torch.dtype], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the checkpoint's types hold every value of the model's."""
    pairs = ((stored[weight.key], tensors[part.name].dtype) for weight in plan for part in weight.parts)
    return all(torch.promote_types(ours, theirs) == ours for ours, theirs in pairs)


def _original_or_export(
    plan: list[Weight], sides: Sides, tensors: dict[str, TensorInfo], digests: Mapping[str, str], events: Events
) -> tuple[Compared, Direction]:
    """Compare a model whose values the checkpoint rounds if it was made of it, and does not if it made the model.

    What differs from the checkpoint as it is, and equals it only rounded, must be the model of the certificate's
    ``digests``, if there are any: else it is an export that was changed below the checkpoint's precision.
    """
    try:
        return compare(plan, sides, tensors, "to_model", events), "to_model"
    except VerificationError as error:
        exact = error
    compared = compare(plan, sides, tensors, "to_checkpoint", events)
    if other := [name for name, digest in compared.digests.items() if digests.get(name, digest) != digest]:
        raise VerificationError(
            f"{exact}; nor is it the model that was converted: {other[0]} has another digest in {CERTIFICATE}"
        )
    return compared, "to_checkpoint"


def _require_unchanged(
    manifest: CheckpointManifest,
    plan: list[Weight],
    stored: Mapping[str, torch.dtype],
    tensors: Mapping[str, TensorInfo],
    compared: Compared,
    digests: Mapping[str, str],
    checkpoint: Path,
) -> None:
    """A model that equals a converted checkpoint equals what was converted, where both have its type.

    Raises:
        CheckpointChangedError: names the first tensor that does not.
    """
    for weight in plan:
        for name in dict.fromkeys(part.name for part in weight.parts):
            ours, theirs = stored[weight.key], tensors[name].dtype
            short = manifest.weight_dtypes.get(name, manifest.source_dtype)
            own = SHORT.get(short, ours if manifest.dtype == manifest.source_dtype else None)
            exact = own == theirs and torch.promote_types(theirs, ours) == ours
            if exact and digests.get(name, compared.digests[name]) != compared.digests[name]:
                raise CheckpointChangedError(
                    f"{name} in {checkpoint} is not what was converted, by the digest in its {CERTIFICATE}: the "
                    "checkpoint was changed since it was converted; convert again"
                )


def _trained(manifest: CheckpointManifest, checkpoint: Path, direction: Direction) -> str:
    """Why a trained checkpoint differs from the model that it began as."""
    if manifest.iteration == "release" or direction == "to_checkpoint":
        return ""
    return (
        f". {checkpoint} was trained to iteration {manifest.iteration}: its weights are no longer those of the model "
        "that it began as; give --model a folder that mflow export wrote from this checkpoint"
    )


def _rounded(direction: Direction, types: set[torch.dtype], stored: set[torch.dtype], model: Path) -> str | None:
    """The type that the weights of what was given are rounded to before logits are computed; None for their own.

    Raises:
        ConfigError: the export rounded some tensors and not others.
    """
    if (name := short_name(types)) in SHORT:
        return name
    if direction == "to_model" and types != stored:
        raise ConfigError(
            f"{model} holds weights of several types, rounded from others; its logits cannot be compared: verify with "
            "--level digest, or export with --dtype"
        )
    return None


def _sentence(direction: Direction, manifest: CheckpointManifest) -> str:
    if direction == "to_checkpoint":
        made = "; rows that the conversion added or drew, with the same rows made a second time by the same code"
        told = "the checkpoint, mapped back, with the Hugging Face model that it was converted from"
        return told + (made if manifest.changes else "")
    what = "the checkpoint" if manifest.iteration == "release" else f"iteration {manifest.iteration} of the training"
    return f"the Hugging Face model with {what} that it was exported from"
