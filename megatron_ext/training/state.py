"""What ties a training folder to one training: its digest, its threads, and whether it is finished. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import Field

from megatron_ext.cache import kept_arrays
from megatron_ext.config import RuntimeConfig, Section
from megatron_ext.data.datasets import open_dataset
from megatron_ext.errors import OutputExistsError
from megatron_ext.folders import digest_file
from megatron_ext.weights.manifest import LATEST, MANIFEST, latest_folder, read_latest, read_manifest

STATE = "training_state.json"


class RunState(Section):
    """``training_state.json``."""

    digest: str = Field(description="of the configuration, the base checkpoint and the dataset")
    num_threads: int = Field(description="CPU threads a process; results are bit-equal at one count only")
    layout: dict[str, int] = Field(description="parallel sizes of the attempt that started last")
    summary: dict[str, Any] | None = Field(default=None, description="the result, once training is finished")


def training_digest(settings: Mapping[str, Any], checkpoint: Path, *datasets: Path) -> str:
    """xxh3-128 of everything that decides the result: settings, model, every byte of the weights and of the datasets.

    What else lies in the folders, certificates or an artifact's own record, decides nothing.
    """
    hasher = xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode())
    hasher.update(read_manifest(checkpoint).model_dump_json(exclude={"training"}).encode())
    hasher.update(_digest_of([path for path in latest_folder(checkpoint).iterdir() if path.is_file()]))
    for dataset in datasets:
        files = open_dataset(dataset).files
        hasher.update(_digest_of([path for path in files if path.suffix in (".bin", ".idx") or path.name == MANIFEST]))
    return hasher.hexdigest()


def _digest_of(files: list[Path]) -> bytes:
    """xxh3-128 of names and contents; read once, then kept by size, time and inode."""
    files, hasher = sorted(files), xxhash.xxh3_128()
    stats = [(path.name, path.stat()) for path in files]
    key = json.dumps([(name, s.st_size, s.st_mtime_ns, s.st_dev, s.st_ino) for name, s in stats])

    def read() -> dict[str, np.ndarray]:
        for path in files:
            hasher.update(f"{path.name}:{digest_file(path)};".encode())
        return {"digest": np.frombuffer(hasher.digest(), dtype=np.uint8)}

    return kept_arrays("digests", xxhash.xxh3_128_hexdigest(key.encode()), read)["digest"].tobytes()


def open_run(out: Path, digest: str, runtime: RuntimeConfig) -> RunState:
    """The state of the training in ``out``: the one that is there, or a new one.

    The thread count of the first attempt stays, whatever the configuration or the machine says now.

    Raises:
        OutputExistsError: ``out`` holds another training, or a checkpoint that is none of ours.
    """
    path = out / STATE
    layout = {
        "world_size": int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else runtime.nproc_per_node,
        "tensor_model_parallel_size": runtime.tensor_model_parallel_size,
        "pipeline_model_parallel_size": runtime.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": runtime.virtual_pipeline_model_parallel_size or 1,
        "context_parallel_size": runtime.context_parallel_size,
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
    finished = (manifest.training or {}).get("summary")
    return finished if read_latest(out) == manifest.iteration else None


def write_run(out: Path, state: RunState) -> None:
    """Keep ``state`` in ``out``, by one rename."""
    write_json(out / STATE, state.model_dump())


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``facts`` by one rename."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def last_checkpoint(out: Path) -> str:
    """The newest whole checkpoint in ``out``, in words."""
    return str(latest_folder(out)) if (out / LATEST).exists() else "none"
