"""What ties a training folder to one training: its digest, its threads, and whether it is finished. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from pydantic import Field

from megatron_ext.config import RuntimeConfig, Section
from megatron_ext.data.datasets import open_dataset
from megatron_ext.errors import OutputExistsError
from megatron_ext.weights.manifest import LATEST, MANIFEST, latest_folder, read_latest, read_manifest

STATE = "training_state.json"
SAMPLE = 1 << 20


class RunState(Section):
    """``training_state.json``."""

    digest: str = Field(description="of the configuration, the base checkpoint and the dataset")
    num_threads: int = Field(description="CPU threads a process; results are bit-equal at one count only")
    layout: dict[str, int] = Field(description="parallel sizes of the attempt that started last")
    summary: dict[str, Any] | None = Field(default=None, description="the result, once training is finished")


def training_digest(settings: Mapping[str, Any], checkpoint: Path, *datasets: Path) -> str:
    """xxh3-128 of everything that decides the result. Large files count by size and their first MiB.

    What else lies in the folders, certificates or an artifact's own record, decides nothing.
    """
    hasher = xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode())
    weights = sorted(path for path in latest_folder(checkpoint).iterdir() if path.is_file())
    files = [checkpoint / LATEST, checkpoint / MANIFEST, *weights]
    of_datasets = [file for dataset in datasets for file in open_dataset(dataset).files]
    files += [file for file in of_datasets if file.suffix in (".bin", ".idx") or file.name == MANIFEST]
    for path in files:
        hasher.update(f"{path.name}:{path.stat().st_size};".encode())
        with path.open("rb") as file:
            hasher.update(file.read(SAMPLE))
    return hasher.hexdigest()


def open_run(out: Path, digest: str, runtime: RuntimeConfig) -> RunState:
    """The state of the training in ``out``: the one that is there, or a new one.

    The thread count of the first attempt stays, whatever the configuration or the machine says now.

    Raises:
        OutputExistsError: ``out`` holds another training, or a checkpoint that is none of ours.
    """
    path = out / STATE
    layout = {
        "world_size": runtime.nproc_per_node,
        "tensor_model_parallel_size": runtime.tensor_model_parallel_size,
        "pipeline_model_parallel_size": runtime.pipeline_model_parallel_size,
        "expert_model_parallel_size": runtime.expert_model_parallel_size,
    }
    if path.exists():
        found = RunState.model_validate_json(path.read_bytes())
        if found.digest != digest:
            raise OutputExistsError(
                f"out {out} holds a training of another configuration, checkpoint or dataset; "
                "choose another folder or remove this one"
            )
        return found.model_copy(update={"layout": layout, "summary": found.summary or _published_summary(out)})
    if (out / LATEST).exists() or (out / MANIFEST).exists():
        raise OutputExistsError(f"out {out} holds a checkpoint that this training did not write; choose another folder")
    return RunState(digest=digest, num_threads=threads_of_process(runtime), layout=layout)


def threads_of_process(runtime: RuntimeConfig) -> int:
    """CPU threads that a process takes when nothing was decided before: those asked for, or its share of the cores."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.nproc_per_node))
    return runtime.num_threads or max(1, len(os.sched_getaffinity(0)) // processes)


def _published_summary(out: Path) -> dict[str, Any] | None:
    """The result of a training that was killed after its final weights were published, before it was marked done."""
    if not ((out / LATEST).exists() and (out / MANIFEST).exists()):
        return None
    manifest = read_manifest(out)
    return manifest.training["summary"] if manifest.training and read_latest(out) == manifest.iteration else None


def write_run(out: Path, state: RunState) -> None:
    """Keep ``state`` in ``out``, by one rename."""
    draft = out / f".{STATE}"
    draft.write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(draft, out / STATE)


def last_checkpoint(out: Path) -> str:
    """The newest whole checkpoint in ``out``, in words."""
    return str(latest_folder(out)) if (out / LATEST).exists() else "none was saved yet"
