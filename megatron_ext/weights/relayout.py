"""A Megatron checkpoint in another layout: trained torch_dist to files of ranks, Megatron-LM's files to torch_dist.

Run: ``mflow convert --model HF_DIR --checkpoint DIR --out DIR [--layout torch_dist|mp_rank --tp N --pp N --ep N]``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import VerifyLevel
from megatron_ext.errors import ConfigError, VerificationError, unknown
from megatron_ext.events import Events
from megatron_ext.families.base import Weight, placed
from megatron_ext.folders import emptied_on_failure
from megatron_ext.hf_folder import read_config
from megatron_ext.weights.casting import cast
from megatron_ext.weights.certificate import Certificate, versions, write_certificate
from megatron_ext.weights.export import checked_plan
from megatron_ext.weights.hf import SHORT, short_name
from megatron_ext.weights.layouts import checkpoint_writer, laid_out, manifest_of, open_checkpoint
from megatron_ext.weights.manifest import CheckpointManifest, write_latest, write_manifest
from megatron_ext.weights.megatron_writer import RankLayout, check_sizes
from megatron_ext.weights.pipeline import Piece, Progress, pieces, work_through
from megatron_ext.weights.planning import check_stored, hf_shapes
from megatron_ext.weights.streams import CheckpointReader, CheckpointWriter, stored_bytes
from megatron_ext.weights.verify_digest import same_bits


def relayout(
    checkpoint: Path,
    model: Path,
    out: Path,
    *,
    dtype: str | None,
    events: Events,
    layout: RankLayout | None = None,
    verify: VerifyLevel = "none",
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Write the weights of ``checkpoint`` as ``release`` of the checkpoint folder ``out``, cleared first.

    ``model`` is the Hugging Face folder that the checkpoint descends from: its config.json and tokenizer stand in for
    the manifest that Megatron-LM's checkpoints lack; its weights are not read. ``layout`` None is torch_dist, which is
    what training reads. ``dtype`` is bf16, fp16, fp32, or None: then each tensor keeps its own. ``verify`` digest reads
    every row back and compares it with ``checkpoint``.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or of another model than ``model``; names the field.
        UntrustedPickleError: a file of a rank wants a class that could run a program; ``trust_pickle`` loads it.
        ParallelismError: ``layout`` does not divide the model; names the size.
        DiskSpaceError: ``out`` lies on a disk without enough room.
        VerificationError: what was written is not what was read; names the weight.
    """
    if dtype is not None and dtype not in SHORT:
        raise ConfigError(unknown("dtype", dtype, SHORT))
    if verify == "logits":
        raise ConfigError(
            "--verify logits compares with a Hugging Face model, and the weights of --model are not read here; use "
            "digest, and mflow verify --level logits with a folder that mflow export wrote from this checkpoint"
        )
    source_manifest = manifest_of(checkpoint, model, events, trust_pickle=trust_pickle)
    plan = checked_plan(source_manifest, checkpoint, model, read_config(model))
    source = open_checkpoint(checkpoint, source_manifest, trust_pickle=trust_pickle)
    check_stored(plan, source, checkpoint)
    if layout is not None:
        check_sizes(plan, source_manifest.architecture, layout)
    dtypes = {weight.key: SHORT[dtype] if dtype else source.dtypes[weight.key] for weight in plan}
    manifest = laid_out(source_manifest, layout)
    if dtype:
        manifest = manifest.model_copy(update={"dtype": dtype, "weight_dtypes": {}})
    with emptied_on_failure(out):
        writer = checkpoint_writer(out, plan, dtypes, manifest.architecture, layout, events)
        _copy(writer, plan, source, dtypes, events)
        write_manifest(out, manifest)
        write_latest(out, "release")
        verified = None
        if verify == "digest":
            certificate = _verified(checkpoint, out, manifest, plan, source, dtypes, events)
            write_certificate(out, certificate)
            verified = certificate.summary()
    source.close()
    return {
        "family": manifest.family,
        "parameters": sum(prod(shape) for shape in {weight.key: weight.shape for weight in plan}.values()),
        "bytes": stored_bytes(plan, dtypes),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "verified": verified,
    }


def _copy(
    writer: CheckpointWriter,
    plan: list[Weight],
    source: CheckpointReader,
    dtypes: Mapping[str, torch.dtype],
    events: Events,
) -> None:
    def move(piece: Piece) -> int:
        size = 0
        for weight, (_, _, target, count) in piece:
            rows = cast(source.rows(weight, target, count), dtypes[weight.key], weight.key, target)
            writer.write(weight, target, rows)
            size += rows.nbytes
        return size

    work_through(pieces(plan, dtypes), move, writer.sync, Progress(events, stored_bytes(plan, dict(dtypes))))
    writer.close()


def _verified(
    checkpoint: Path,
    out: Path,
    manifest: CheckpointManifest,
    plan: list[Weight],
    source: CheckpointReader,
    dtypes: Mapping[str, torch.dtype],
    events: Events,
) -> Certificate:
    started = time.monotonic()
    made = open_checkpoint(out, manifest)
    check_stored(plan, made, out)

    def compare(piece: Piece) -> int:
        size = 0
        for weight, (_, _, target, count) in piece:
            given, written = source.rows(weight, target, count), made.rows(weight, target, count)
            if not same_bits(given.to(dtypes[weight.key]), written):
                raise VerificationError(
                    f"{placed(weight.key, weight.index)} differs from {checkpoint} in rows {target} to "
                    f"{target + count - 1}. Nothing was published; check disk and memory of this machine and try again"
                )
            size += written.nbytes
        return size

    total = stored_bytes(plan, dict(dtypes))
    work_through(pieces(plan, dtypes), compare, lambda: None, Progress(events, total, "bytes compared"))
    made.close()
    return Certificate(
        level="digest",
        compared="the checkpoint, read back, with the one whose weights were laid out anew",
        dtype=short_name(set(dtypes.values())),
        tensors=len(hf_shapes(plan)),
        megatron_tensors=len(dtypes),
        bytes=total,
        digests={},
        seconds=round(time.monotonic() - started, 3),
        versions=versions(),
    )
