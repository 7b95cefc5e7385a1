"""Hugging Face safetensors to a torch_dist checkpoint, streamed: no model is built, one layer's weights in memory.

Run: ``mflow convert --model HF_DIR --out DIR [--dtype bf16|fp16|fp32]``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ext.data.chat_templates import own_template
from megatron_ext.errors import ConfigError, SourceError, WeightMappingError, unknown
from megatron_ext.events import Events
from megatron_ext.families import find_family
from megatron_ext.families.base import Architecture, ModelFamily, Weight
from megatron_ext.families.hf_config import read_architecture, unread_keys
from megatron_ext.folders import full_disk_named, require_space
from megatron_ext.hf_folder import read_config, tokenizer_digest
from megatron_ext.weights.hf import SHORT, SafetensorsReader, short_name
from megatron_ext.weights.manifest import (
    CheckpointManifest,
    iteration_folder,
    write_latest,
    write_manifest,
)
from megatron_ext.weights.torch_dist import BLOB_OVERHEAD, MAX_CHUNK_BYTES, TorchDistWriter

EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
TE_EXTRA_STATES = ("self_attention.core_attention",)
"""Modules of a layer that keep an (empty) object beside their weights: all, and those of Transformer Engine only."""


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
    for key in unread_keys(family, config):
        events.note(f"config.json: key {key} is not read; if it changes what the model computes, do not go on")
    source = SafetensorsReader(model)
    plan = list(family.plan(architecture))
    check_coverage(family, architecture, plan, source, model)
    dtypes = checkpoint_dtypes(plan, source, dtype)
    total = sum(prod(shape) * dtypes[key].itemsize for key, shape in {w.key: w.shape for w in plan}.items())
    manifest = _manifest(model, config, architecture, plan, source, dtypes, keep_own=dtype is None)
    with emptied_on_failure(out):
        require_space(
            out, total + BLOB_OVERHEAD * (6 * len(plan) + total // MAX_CHUNK_BYTES), "the converted checkpoint"
        )
        _write_weights(iteration_folder(out, "release"), architecture, plan, source, dtypes, events, total)
        write_manifest(out, manifest)
        write_latest(out, "release")
    parameters = sum(prod(shape) for shape in {w.key: w.shape for w in plan}.values())
    return {"family": manifest.family, "parameters": parameters, "bytes": total, "dtype": manifest.dtype}


def architecture_of(config: Mapping[str, Any]) -> tuple[ModelFamily, Architecture]:
    """Family and architecture of a Hugging Face config.

    Raises:
        UnsupportedModelError: no family converts this config.
        SourceError: a key is missing.
    """
    if "model_type" not in config:
        raise SourceError("config.json has no key model_type; is it the config of a Hugging Face model?")
    family = find_family(config["model_type"])
    return family, read_architecture(family, config)


def check_coverage(
    family: ModelFamily, architecture: Architecture, plan: list[Weight], source: SafetensorsReader, model: Path
) -> None:
    """Every weight has a rule, every rule its weights, and every shape is the one that config.json implies.

    Raises:
        WeightMappingError: names the first weight that does not.
    """
    expected = {name: shape for weight in plan for name, shape in weight.hf.items()}
    layers = range(architecture.num_layers)
    derived = {name.format(i=i) for name in family.derived_weights for i in layers}
    surplus = {name for name in source.tensors if name not in expected and name not in derived}
    if architecture.share_embeddings_and_output_weights:
        surplus -= _tied_copies(family, source, surplus)
    if missing := [name for name in expected if name not in source.tensors]:
        raise WeightMappingError(
            f"{model} has no weight {missing[0]} ({len(missing)} missing), which a {family.hf_architecture} of "
            "config.json needs; download the model again, or correct config.json"
        )
    if surplus:
        raise WeightMappingError(
            f"no rule converts {min(surplus)} of {model} ({len(surplus)} such weights); the family "
            f"{family.hf_architecture} does not know it: add a rule in megatron_ext/families/, or correct config.json"
        )
    for name, shape in expected.items():
        if source.tensors[name].shape != shape:
            raise WeightMappingError(
                f"{name} of {model} has shape {list(source.tensors[name].shape)}, but config.json implies {list(shape)}"
            )


def _tied_copies(family: ModelFamily, source: SafetensorsReader, surplus: set[str]) -> set[str]:
    """Output weights that a tied model's file holds once more: harmless if they equal the embedding."""
    tied = [rule for rule in family.weights if rule.skip_if == "share_embeddings_and_output_weights"]
    embedding = next(rule.hf[0] for rule in family.weights if rule.mcore == "embedding.word_embeddings.weight")
    copies = {rule.hf[0] for rule in tied} & surplus
    for name in copies:
        if embedding in source.tensors and not torch.equal(source.get(name), source.get(embedding)):
            raise WeightMappingError(
                f"{name} differs from {embedding}, but config.json says tie_word_embeddings true; set it to false"
            )
    return copies


def checkpoint_dtypes(plan: list[Weight], source: SafetensorsReader, dtype: str | None) -> dict[str, torch.dtype]:
    """Type of each torch_dist tensor: ``dtype``, else the narrowest that holds all its parts and layers exactly."""
    parts: dict[str, set[torch.dtype]] = {}
    for weight in plan:
        parts.setdefault(weight.key, set()).update(source.tensors[name].dtype for name in weight.hf)
    if dtype is not None:
        return dict.fromkeys(parts, SHORT[dtype])
    return {key: reduce(torch.promote_types, found) for key, found in parts.items()}


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
    folder: Path,
    architecture: Architecture,
    plan: list[Weight],
    source: SafetensorsReader,
    dtypes: Mapping[str, torch.dtype],
    events: Events,
    total: int,
) -> None:
    dims, writer, done = architecture.dims(), TorchDistWriter(folder), 0
    for weight in plan:
        parts = [source.get(name).to(dtypes[weight.key]) for name in weight.hf]
        tensor = weight.rule.to_mcore(parts, dims)
        stacked = tensor if weight.layer is None else tensor[None]
        offset = () if weight.layer is None else (weight.layer,)
        writer.tensor(weight.key, weight.shape, (*offset, *[0] * tensor.ndim), stacked)
        done += tensor.nbytes
        events.progress(done, total, "bytes")
    layers = architecture.num_layers
    for layer in range(layers):
        for module in (*EXTRA_STATES, *TE_EXTRA_STATES):
            writer.extra_state(f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}")
    writer.extra_state("decoder.final_layernorm._extra_state/shard_0_1")
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
) -> CheckpointManifest:
    own = {name: source.tensors[name].dtype for weight in plan for name in weight.hf}
    narrower = {
        name: short_name({own[name]}) for weight in plan for name in weight.hf if own[name] != dtypes[weight.key]
    }
    source_dtype = short_name(set(own.values()))
    return CheckpointManifest(
        family=config["model_type"],
        architecture=architecture,
        hf_config=config,
        dtype=source_dtype if keep_own else short_name(set(dtypes.values())),
        source_dtype=source_dtype,
        weight_dtypes=narrower if keep_own else {},
        vocab_size=architecture.vocab_size,
        padded_vocab_size=architecture.vocab_size,
        tokenizer_digest=tokenizer_digest(model),
        chat_template=own_template(model),
        iteration="release",
    )
