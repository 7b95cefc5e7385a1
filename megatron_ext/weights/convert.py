"""Hugging Face safetensors to a Megatron checkpoint, streamed: no model is built, small pieces of it are in memory.

Run: ``mflow convert --model HF_DIR --out DIR [--dtype bf16|fp16|fp32] [--layout torch_dist|mp_rank]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import UpcycleConfig, VerifyLevel, VocabInit
from megatron_ext.config_files import validated
from megatron_ext.data.chat_templates import own_template
from megatron_ext.errors import ConfigError, unknown
from megatron_ext.events import Events
from megatron_ext.folders import emptied_on_failure
from megatron_ext.hf_folder import read_config, tokenizer_digest
from megatron_ext.weights.changes import ModelChanges, changes_of
from megatron_ext.weights.hf import SHORT, short_name
from megatron_ext.weights.layouts import checkpoint_writer, laid_out
from megatron_ext.weights.manifest import CheckpointManifest, write_latest, write_manifest
from megatron_ext.weights.megatron_writer import RankLayout, check_sizes
from megatron_ext.weights.pipeline import write_checkpoint
from megatron_ext.weights.planning import checkpoint_dtypes
from megatron_ext.weights.sources import Source, read_source
from megatron_ext.weights.step_zero import check_noise, receipt
from megatron_ext.weights.streams import stored_bytes
from megatron_ext.weights.verify import check_level, gate


def run(job: Any, events: Events) -> dict[str, Any]:
    """The ``convert`` job: inputs ``model``; config: fields of ``ModelConfig``."""
    options = {key: value for key, value in job.config.items() if value is not None}
    if "upcycle" in options:
        options["upcycle"] = validated(UpcycleConfig, options["upcycle"], "model.upcycle")
    options = {"dtype": None, "verify": "digest", "platform": job.runtime.platform} | options
    return convert(Path(job.inputs["model"]), job.out, events=events, **options)


def convert(
    model: Path,
    out: Path,
    *,
    dtype: str | None,
    events: Events,
    extra_vocab_size: int = 0,
    extra_vocab_init: VocabInit = "mean",
    upcycle: UpcycleConfig | None = None,
    verify: VerifyLevel = "none",
    platform: str = "auto",
    layout: RankLayout | None = None,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint folder of the Hugging Face model in ``model`` into the folder ``out``, cleared first.

    ``dtype`` is bf16, fp16, fp32, or None: then each tensor keeps its own. Everything that can be checked is checked
    before the first byte is written; on an error ``out`` is left empty.

    ``extra_vocab_size`` rows are added to embedding and output layer, ``upcycle`` makes a mixture of experts of a dense
    model; ``config.UpcycleConfig`` and ``config.ModelConfig`` say how. ``verify`` is what the checkpoint must pass, and
    ``platform`` computes the logits that this may ask for. ``layout`` asks for Megatron-LM's files of ranks.
    ``trust_pickle`` loads ``.bin`` files whatever they want.

    Raises:
        UnsupportedModelError: no family converts this config; names the key and what there is.
        SourceError: a file is missing, truncated or damaged; names it.
        UntrustedPickleError: a ``.bin`` file wants a class that could run a program.
        WeightMappingError: a weight without a rule, a rule without a weight, a shape that contradicts config.json.
        ParallelismError: ``layout`` does not divide the model; names the size.
        DiskSpaceError: ``out`` lies on a disk without enough room.
        VerificationError: what was written is not the same model; names tensor or layer.
    """
    if dtype is not None and dtype not in SHORT:
        raise ConfigError(unknown("dtype", dtype, SHORT))
    check_noise(upcycle, verify)
    changes = changes_of(read_config(model), extra_vocab_size, extra_vocab_init, upcycle)
    source = read_source(model, changes, trust_pickle=trust_pickle)
    check_level(verify, source.architecture, platform)
    plan, reader = source.plan, source.reader
    dtypes = checkpoint_dtypes(plan, reader, dtype)
    total = stored_bytes(plan, dtypes)
    if layout is not None:
        check_sizes(plan, source.architecture, layout)
    manifest = laid_out(_manifest(model, source, changes, dtypes, keep_own=dtype is None), layout)
    with emptied_on_failure(out):
        writer = checkpoint_writer(out, plan, dtypes, source.architecture, layout, events)
        write_checkpoint(writer, plan, reader, dtypes, events)
        write_manifest(out, manifest)
        write_latest(out, "release")
        options = {"platform": platform, "trust_pickle": trust_pickle}
        verified = gate(verify, checkpoint=out, model=model, made=out, events=events, **options)
        upcycled = {}
        if upcycle:
            upcycled = upcycle.model_dump() | receipt(out, model, verified["verified"], dtypes, events, platform)
    parameters = sum(prod(shape) for shape in {w.key: w.shape for w in plan}.values())
    return {
        "family": manifest.family,
        "parameters": parameters,
        "bytes": total,
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        **({"upcycle": upcycled} if upcycle else {}),
        **verified,
    }


def _manifest(
    model: Path, source: Source, changes: ModelChanges | None, dtypes: Mapping[str, torch.dtype], *, keep_own: bool
) -> CheckpointManifest:
    own = {part.name: source.reader.tensors[part.name].dtype for weight in source.plan for part in weight.parts}
    narrower = {
        part.name: short_name({own[part.name]})
        for weight in source.plan
        for part in weight.parts
        if own[part.name] != dtypes[weight.key]
    }
    source_dtype = short_name(set(own.values()))
    return CheckpointManifest(
        family=source.config["model_type"],
        architecture=source.architecture,
        hf_config=source.config,
        changes=changes,
        hf_layout=source.layout,
        dtype=source_dtype if keep_own else short_name(set(dtypes.values())),
        source_dtype=source_dtype,
        weight_dtypes=narrower if keep_own else {},
        vocab_size=source.architecture.vocab_size,
        padded_vocab_size=source.architecture.vocab_size,
        tokenizer_digest=tokenizer_digest(model),
        chat_template=own_template(model),
        iteration="release",
    )
