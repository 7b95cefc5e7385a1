"""A checkpoint folder in whichever layout it is: torch_dist, or Megatron-LM's files of ranks, ours or a stranger's.

Megatron-LM, and the converters around it, leave no manifest beside their files; the config.json of the Hugging Face
model that the checkpoint is of stands in for it, and every shape in the files is held against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.data.chat_templates import own_template
from megatron_ext.errors import CheckpointError
from megatron_ext.events import Events
from megatron_ext.families import find_family
from megatron_ext.families.base import Architecture, Weight
from megatron_ext.folders import require_space
from megatron_ext.hf_folder import read_config, tokenizer_digest
from megatron_ext.weights.hf import CONFIG_NAMES, short_name
from megatron_ext.weights.manifest import (
    MANIFEST,
    CheckpointManifest,
    iteration_folder,
    latest_folder,
    read_latest,
    read_manifest,
)
from megatron_ext.weights.megatron_names import is_ranks_folder
from megatron_ext.weights.megatron_ranks import EMBEDDING, MegatronRanksReader, place_in_model
from megatron_ext.weights.megatron_settings import check_vocabulary, compare_settings, other_rope
from megatron_ext.weights.megatron_writer import MegatronRanksWriter, RankLayout, vocab_rows
from megatron_ext.weights.planning import architecture_of, check_stored
from megatron_ext.weights.streams import CheckpointReader, CheckpointWriter, stored_bytes
from megatron_ext.weights.torch_dist import BLOB_OVERHEAD, CHUNK_BYTES, TorchDistReader, TorchDistWriter


def plan_of(manifest: CheckpointManifest) -> list[Weight]:
    """Every weight of the checkpoint."""
    return list(find_family(manifest.family).plan(manifest.architecture, manifest.hf_layout))


def open_checkpoint(checkpoint: Path, manifest: CheckpointManifest, *, trust_pickle: bool = False) -> CheckpointReader:
    """A reader of the newest iteration in the checkpoint folder.

    Raises:
        CheckpointError: files are missing, damaged, or do not fit each other.
        UntrustedPickleError: a rank's file wants a class that could run a program, and ``trust_pickle`` is not set.
    """
    folder = latest_folder(checkpoint)
    if is_ranks_folder(folder):
        return MegatronRanksReader(folder, plan_of(manifest), trust_pickle=trust_pickle)
    return TorchDistReader(folder)


def manifest_of(checkpoint: Path, model: Path, events: Events, *, trust_pickle: bool = False) -> CheckpointManifest:
    """The checkpoint's manifest, or, for files of ranks that came without one, what config.json of ``model`` implies.

    Raises:
        CheckpointError: there is no manifest and no file of a rank, or a shape, a setting or the vocabulary
            contradicts config.json; names it.
        WeightMappingError: a weight of the files is not in that model, or one of the model's not in the files.
        UntrustedPickleError: as ``open_checkpoint``.
    """
    if not checkpoint.is_dir() or (checkpoint / MANIFEST).exists() or not is_ranks_folder(latest_folder(checkpoint)):
        return read_manifest(checkpoint)
    config = read_config(model)
    family, architecture = architecture_of(config)
    plan = list(family.plan(architecture))
    reader = MegatronRanksReader(latest_folder(checkpoint), plan, trust_pickle=trust_pickle)
    check_stored(plan, reader, checkpoint)
    compare_settings(reader.args, architecture, checkpoint, events)
    rows = reader.shapes[EMBEDDING][0]
    check_vocabulary(reader.args, architecture, reader.sizes.tp, rows, checkpoint, events)
    said = config.get("dtype") or config.get("torch_dtype") or "float32"
    return CheckpointManifest(
        layout="mp_rank",
        parallel_sizes=reader.sizes._asdict(),
        family=config["model_type"],
        architecture=architecture,
        hf_config=config,
        dtype=short_name(set(reader.dtypes.values())),
        source_dtype=short_name({dtype for dtype, name in CONFIG_NAMES.items() if name == said}),
        vocab_size=architecture.vocab_size,
        padded_vocab_size=rows,
        tokenizer_digest=tokenizer_digest(model),
        chat_template=own_template(model),
        iteration=read_latest(checkpoint),
    )


def checkpoint_writer(
    out: Path,
    plan: Sequence[Weight],
    dtypes: Mapping[str, torch.dtype],
    architecture: Architecture,
    layout: RankLayout | None,
    events: Events,
) -> CheckpointWriter:
    """A writer of ``release`` in the checkpoint folder: files of ranks if there is a ``layout``, else torch_dist.

    Notes what files of ranks cannot say of the model.

    Raises:
        DiskSpaceError: the disk has too little room; nothing was written.
        ParallelismError: a size does not divide what it splits; nothing was written.
    """
    folder = iteration_folder(out, "release")
    if layout is not None:
        if unsaid := other_rope(architecture):
            events.note(unsaid)
        return MegatronRanksWriter(folder, plan, dtypes, architecture, layout)
    total = stored_bytes(plan, dict(dtypes))
    require_space(out, total + BLOB_OVERHEAD * (6 * len(plan) + total // CHUNK_BYTES), "the converted checkpoint")
    return TorchDistWriter(folder, plan, dtypes, architecture)


def laid_out(manifest: CheckpointManifest, layout: RankLayout | None) -> CheckpointManifest:
    """The manifest of the same weights in ``layout``."""
    rows, sizes = manifest.vocab_size, None
    if layout is not None:
        rows, sizes = vocab_rows(manifest.architecture, layout), layout.sizes._asdict()
    name = "torch_dist" if layout is None else "mp_rank"
    return manifest.model_copy(update={"layout": name, "parallel_sizes": sizes, "padded_vocab_size": rows})


def fill_model(model: Any, checkpoint: Path, manifest: CheckpointManifest, *, trust_pickle: bool = False) -> None:
    """Copy the weights of a checkpoint of ranks into megatron-core's model, built as one rank, in the model's type.

    Raises:
        CheckpointError: the files do not fit the manifest.
    """
    plan = {(weight.key, weight.index): weight for weight in plan_of(manifest)}
    reader = open_checkpoint(checkpoint, manifest, trust_pickle=trust_pickle)
    check_stored(list(plan.values()), reader, checkpoint)
    known = {key for key, _ in plan}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = plan.get(place_in_model(name, known))
            if weight is None:
                raise CheckpointError(f"{checkpoint} has no {name}, which the model needs")
            rows = weight.own_shape[0]
            parameter.zero_()  # padding
            parameter[:rows].copy_(reader.rows(weight, 0, rows))
    reader.close()
