"""Hugging Face safetensors to a torch_dist checkpoint, streamed: no model is built, one layer's weights in memory.

Run: ``mflow convert --model HF_DIR --out DIR [--dtype bf16|fp16|fp32]``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ext.data.chat_templates import own_template
from megatron_ext.errors import ConfigError, unknown
from megatron_ext.events import Events
from megatron_ext.families.base import Architecture, Weight
from megatron_ext.folders import full_disk_named, require_space
from megatron_ext.hf_folder import read_config, tokenizer_digest
from megatron_ext.weights.hf import SHORT, SafetensorsReader, short_name
from megatron_ext.weights.manifest import (
    CheckpointManifest,
    iteration_folder,
    write_latest,
    write_manifest,
)
from megatron_ext.weights.planning import architecture_of, check_coverage, checkpoint_dtypes
from megatron_ext.weights.streams import PIECE_BYTES, CheckpointWriter, gathered, row_blocks, stored_bytes
from megatron_ext.weights.torch_dist import BLOB_OVERHEAD, TorchDistWriter


def run(job: Any, events: Events) -> dict[str, Any]:
    """The ``convert`` job: inputs ``model``; config ``dtype``."""
    return convert(Path(job.inputs["model"]), job.out, dtype=job.config.get("dtype"), events=events)


def convert(model: Path, out: Path, *, dtype: str | None, events: Events) -> dict[str, Any]:
    """Write the checkpoint folder of the Hugging Face model in ``model`` into the folder ``out``, cleared first.

    ``dtype`` is bf16, fp16, fp32, or None: then each tensor keeps its own. Everything that can be checked is checked
    before the first byte is written; on an error ``out`` is left empty.

    Raises:
        UnsupportedModelError: no family converts this config; names the key and what there is.
        SourceError: a file is missing, truncated or damaged; names it.
        WeightMappingError: a weight without a rule, a rule without a weight, a shape that contradicts config.json.
        DiskSpaceError: ``out`` lies on a disk without enough room.
    """
    if dtype is not None and dtype not in SHORT:
        raise ConfigError(unknown("dtype", dtype, SHORT))
    config = read_config(model)
    family, architecture = architecture_of(config)
    source = SafetensorsReader(model)
    hf_layout = family.layout_of(source.tensors)
    plan = list(family.plan(architecture, hf_layout))
    check_coverage(family, architecture, plan, source, model)
    dtypes = checkpoint_dtypes(plan, source, dtype)
    total = stored_bytes(plan, dtypes)
    manifest = _manifest(model, config, architecture, plan, source, dtypes, keep_own=dtype is None, hf_layout=hf_layout)
    with emptied_on_failure(out):
        require_space(out, total + BLOB_OVERHEAD * (6 * len(plan) + total // PIECE_BYTES), "the converted checkpoint")
        writer = TorchDistWriter(iteration_folder(out, "release"), architecture)
        _write_weights(writer, plan, source, dtypes, events, total)
        write_manifest(out, manifest)
        write_latest(out, "release")
    parameters = sum(prod(shape) for shape in {w.key: w.shape for w in plan}.values())
    return {"family": manifest.family, "parameters": parameters, "bytes": total, "dtype": manifest.dtype}


@contextmanager
def emptied_on_failure(folder: Path) -> Iterator[None]:
    """Start with an empty ``folder`` (a killed attempt may have left something) and leave none of it on an error."""
    _empty(folder)
    try:
        with full_disk_named(folder):
            yield
    except BaseException:
        _empty(folder)
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_weights(
    writer: CheckpointWriter,
    plan: list[Weight],
    source: SafetensorsReader,
    dtypes: Mapping[str, torch.dtype],
    events: Events,
    total: int,
) -> None:
    done = 0
    for weight in plan:
        dtype = dtypes[weight.key]
        for start, count in row_blocks(weight, dtype):
            rows = gathered(weight, source, start, count, dtype)
            writer.write(weight, start, rows)
            done += rows.nbytes
        events.progress(done, total, "bytes")
    writer.close()


def _manifest(
    model: Path,
    config: dict[str, Any],
    architecture: Architecture,
    plan: list[Weight],
    source: SafetensorsReader,
    dtypes: Mapping[str, torch.dtype],
    *,
    keep_own: bool,
    hf_layout: str | None,
) -> CheckpointManifest:
    own = {part.name: source.tensors[part.name].dtype for weight in plan for part in weight.parts}
    narrower = {
        part.name: short_name({own[part.name]})
        for weight in plan
        for part in weight.parts
        if own[part.name] != dtypes[weight.key]
    }
    source_dtype = short_name(set(own.values()))
    return CheckpointManifest(
        family=config["model_type"],
        architecture=architecture,
        hf_config=config,
        hf_layout=hf_layout,
        dtype=source_dtype if keep_own else short_name(set(dtypes.values())),
        source_dtype=source_dtype,
        weight_dtypes=narrower if keep_own else {},
        vocab_size=architecture.vocab_size,
        padded_vocab_size=architecture.vocab_size,
        tokenizer_digest=tokenizer_digest(model),
        chat_template=own_template(model),
        iteration="release",
    )
