"""A checkpoint folder's manifest and its pointer to the newest iteration. Torch-free.

A checkpoint folder holds ``latest_checkpointed_iteration.txt`` (``release`` after convert, else the iteration),
``release/`` or ``iter_NNNNNNN/`` with the torch_dist files, and ``manifest.json``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from megatron_ext.config import Section
from megatron_ext.errors import CheckpointError
from megatron_ext.families.base import Architecture
from megatron_ext.weights.changes import ModelChanges

MANIFEST = "manifest.json"
LATEST = "latest_checkpointed_iteration.txt"
DTYPES = ("bf16", "fp16", "fp32")
IMPORT = "make a torch_dist checkpoint of it with mflow convert --model HF_DIR --checkpoint {checkpoint} --out DIR"


class CheckpointManifest(Section):
    """What no later stage should have to guess."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["megatron-flows/checkpoint"] = "megatron-flows/checkpoint"
    version: Literal[1] = 1
    layout: Literal["torch_dist", "mp_rank"] = "torch_dist"
    parallel_sizes: dict[str, int] | None = Field(default=None, description="tp, pp and ep of the files of ranks")
    family: str = Field(description="model_type of Hugging Face")
    architecture: Architecture
    hf_config: dict[str, Any] = Field(description="config.json of the model that the checkpoint holds")
    changes: ModelChanges | None = Field(default=None, description="what made another model of the source")
    hf_layout: str | None = Field(
        default=None, description="how the source names its weights, if its family has several"
    )
    dtype: str = Field(description="bf16, fp16, fp32, fp64, or mixed: type of the weights in this checkpoint")
    source_dtype: str = Field(description="type of the weights in the Hugging Face source")
    weight_dtypes: dict[str, str] = Field(
        default_factory=dict,
        description="Hugging Face weights that were narrower than the fused or stacked tensor that holds them",
    )
    vocab_size: int = Field(description="rows of the embedding that the model has")
    padded_vocab_size: int = Field(description="rows on disk")
    tokenizer_digest: str
    chat_template: str | None = None
    iteration: Literal["release"] | int
    training: dict[str, Any] | None = None


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder, or of one iteration in it.

    Raises:
        CheckpointError: no such folder, no manifest, or a manifest of another kind.
    """
    if (iteration := _own_iteration(folder)) is not None:
        return read_manifest(folder.parent).model_copy(update={"iteration": iteration})
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist; write one with mflow convert")
    try:
        return CheckpointManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        remedy = "give a folder that mflow convert wrote or that mflow train has finished"
        if any(folder.glob("*/mp_rank_*")):
            remedy = f"it holds Megatron-LM's files of ranks: {IMPORT.format(checkpoint=folder)}"
        raise CheckpointError(f"{folder} has no {MANIFEST}; {remedy}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        raise CheckpointError(f"{path} is not a checkpoint manifest: {place}: {first['msg']}") from None


def require_torch_dist(manifest: CheckpointManifest, checkpoint: Path) -> None:
    """Refuse a layout that cannot be trained from.

    Raises:
        CheckpointError: says how to import it.
    """
    if manifest.layout != "torch_dist":
        raise CheckpointError(
            f"{checkpoint} is in the layout {manifest.layout}; {IMPORT.format(checkpoint=checkpoint)}"
        )


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest by one rename, so that a reader never sees half of it."""
    _replace(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def write_latest(folder: Path, iteration: Literal["release"] | int) -> None:
    """Point the checkpoint folder to ``release`` or an iteration."""
    _replace(folder / LATEST, f"{iteration}\n")


def read_latest(folder: Path) -> Literal["release"] | int:
    """What the checkpoint folder points to; of one iteration in it, that iteration.

    Raises:
        CheckpointError: the pointer is missing or unreadable.
    """
    if (iteration := _own_iteration(folder)) is not None:
        return iteration
    path = folder / LATEST
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {LATEST}; is it a checkpoint folder?") from None
    if text == "release":
        return "release"
    if not text.isdecimal():
        raise CheckpointError(f"{path} says {text!r}; it must say release or an iteration")
    return int(text)


def iteration_folder(folder: Path, iteration: Literal["release"] | int) -> Path:
    """Where the torch_dist files of ``iteration`` lie: ``release/`` or ``iter_0000100/``."""
    return folder / ("release" if iteration == "release" else f"iter_{iteration:07d}")


def latest_folder(folder: Path) -> Path:
    """The torch_dist folder that the checkpoint folder points to; one iteration in it stands for itself.

    Raises:
        CheckpointError: there is no pointer, or it points to nothing.
    """
    if _own_iteration(folder) is not None:
        return folder
    found = iteration_folder(folder, read_latest(folder))
    if not found.is_dir():
        raise CheckpointError(f"{folder / LATEST} points to {found.name}, which is not in {folder}")
    return found


def at_iteration(folder: Path, iteration: int | None) -> Path:
    """The checkpoint folder, or, where an iteration is asked for, the place of that one in it.

    Raises:
        CheckpointError: it holds no such iteration; names those that it holds.
    """
    if iteration is None:
        return folder
    found = iteration_folder(folder, iteration)
    if not found.is_dir():
        held = sorted(int(path.name[5:]) for path in folder.glob("iter_*") if path.name[5:].isdecimal())
        raise CheckpointError(
            f"{folder} holds no iteration {iteration}; it holds {', '.join(map(str, held)) or 'none'}"
        )
    return found


def _own_iteration(folder: Path) -> int | None:
    """The number of ``folder`` if it is itself one iteration of a checkpoint folder with a manifest."""
    name, number = folder.name[:5], folder.name[5:]
    whole = name == "iter_" and number.isdecimal() and not (folder / LATEST).exists()
    return int(number) if whole and folder.is_dir() and (folder.parent / MANIFEST).exists() else None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
