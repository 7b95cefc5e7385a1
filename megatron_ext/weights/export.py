"""A Megatron checkpoint to a plain Hugging Face folder, streamed: small pieces of it are in memory.

Run: ``mflow export --checkpoint DIR --model HF_DIR --out DIR``. The checkpoint may come from convert, from training at
any parallel sizes, or, as files of ranks, from Megatron-LM.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import VerifyLevel
from megatron_ext.errors import ConfigError, unknown
from megatron_ext.events import Events
from megatron_ext.families import find_family
from megatron_ext.families.base import Weight
from megatron_ext.folders import emptied_on_failure, require_space
from megatron_ext.hf_folder import read_config
from megatron_ext.weights.certificate import CERTIFICATE
from megatron_ext.weights.hf import CONFIG_NAMES, SHORT, TensorInfo, short_name
from megatron_ext.weights.hf_writer import SafetensorsWriter
from megatron_ext.weights.layouts import manifest_of, open_checkpoint
from megatron_ext.weights.manifest import CheckpointManifest
from megatron_ext.weights.pipeline import write_model
from megatron_ext.weights.planning import check_stored, hf_shapes
from megatron_ext.weights.sources import descends, require_tokenizer
from megatron_ext.weights.streams import CheckpointReader
from megatron_ext.weights.verify import check_level, converted_digests, gate

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
"""Files that hold the source's weights in some format; the export holds its own."""
NOT_COPIED = ("README.md", CERTIFICATE)
"""What is said of the source and not of the export."""


def run(job: Any, events: Events) -> dict[str, Any]:
    """The ``export`` job: inputs ``checkpoint`` and ``model``; config ``dtype`` and ``verify``."""
    checkpoint, model, config = Path(job.inputs["checkpoint"]), Path(job.inputs["model"]), job.config
    options = {"verify": config.get("verify", "digest"), "platform": job.runtime.platform}
    return export(checkpoint, model, job.out, dtype=config.get("dtype"), events=events, **options)


def export(
    checkpoint: Path,
    model: Path,
    out: Path,
    *,
    dtype: str | None,
    events: Events,
    max_shard_size: int = 5_000_000_000,
    verify: VerifyLevel = "none",
    platform: str = "auto",
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Write ``checkpoint`` as a Hugging Face folder into the folder ``out``, cleared first.

    ``model`` is the Hugging Face folder that the checkpoint descends from: its config.json, generation config and
    tokenizer files are copied byte for byte; if the type of the weights changed, exactly that key of config.json does.
    Where the conversion made another model of it (extra vocabulary, upcycling), config.json is that model's.
    ``dtype`` is bf16, fp16, fp32, or None: then each tensor keeps the checkpoint's. ``max_shard_size`` is in bytes.
    ``verify`` is what the exported folder must pass, and ``platform`` computes the logits that this may ask for.
    ``trust_pickle`` loads files of ranks whatever they want.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or of another model than ``model``; names the field.
        VocabularyError: the checkpoint was made with another tokenizer.
        WeightMappingError: a weight without a rule, or a rule without a weight.
        UntrustedPickleError: a file of a rank wants a class that could run a program.
        DiskSpaceError: ``out`` lies on a disk without enough room.
        VerificationError: what was written is not the same model; names tensor or layer.
    """
    if dtype is not None and dtype not in SHORT:
        raise ConfigError(unknown("dtype", dtype, SHORT))
    manifest = manifest_of(checkpoint, model, events, trust_pickle=trust_pickle)
    check_level(verify, manifest.architecture, platform)
    if verify != "none":
        converted_digests(manifest, checkpoint)  # the gate needs them: refuse damaged ones before anything is written
    config = read_config(model)
    plan = checked_plan(manifest, checkpoint, model, config)
    source = open_checkpoint(checkpoint, manifest, trust_pickle=trust_pickle)
    check_stored(plan, source, checkpoint)
    tensors = planned_tensors(plan, source, manifest, dtype)
    idle = find_family(manifest.family).idle(manifest.architecture)
    tensors |= {part.name: TensorInfo(next(iter(tensors.values())).dtype, part.tensor_shape) for part in idle}
    total = sum(info.nbytes for info in tensors.values())
    with emptied_on_failure(out):
        require_space(out, total + (64 << 20), "the exported model")
        writer = SafetensorsWriter(out, tensors, max_shard_size)
        for part in (part for part in idle if prod(part.shape)):
            writer.write(part, 0, torch.zeros(part.shape, dtype=tensors[part.name].dtype))
        write_model(writer, plan, source, tensors, events)
        source.close()
        copied = copy_companions(model, out)
        if descends(manifest, config, checkpoint, model):
            write_json(out / "config.json", manifest.hf_config)
        exported_dtypes = {info.dtype for info in tensors.values()}
        _write_config(out / "config.json", exported_dtypes, manifest.source_dtype)
        options = {"platform": platform, "trust_pickle": trust_pickle}
        verified = gate(verify, checkpoint=checkpoint, model=out, made=out, events=events, **options)
    return {
        "family": manifest.family,
        "iteration": manifest.iteration,
        "bytes": total,
        "dtype": short_name(exported_dtypes),
        "copied": copied,
        **verified,
    }


def checked_plan(
    manifest: CheckpointManifest, checkpoint: Path, model: Path, config: Mapping[str, Any], hf_layout: str | None = None
) -> list[Weight]:
    """Every weight of the checkpoint, of which ``model`` must be the source; ``hf_layout`` None is the manifest's.

    Raises:
        CheckpointError: the checkpoint is of another model than ``model``; names the field.
        VocabularyError: the checkpoint was made with another tokenizer.
    """
    descends(manifest, config, checkpoint, model)
    require_tokenizer(manifest, checkpoint, model)
    return list(find_family(manifest.family).plan(manifest.architecture, hf_layout or manifest.hf_layout))


def planned_tensors(
    plan: list[Weight], source: CheckpointReader, manifest: CheckpointManifest, dtype: str | None
) -> dict[str, TensorInfo]:
    """Type and shape of every Hugging Face weight, in the order in which they are written."""
    own = {name: SHORT[short] for name, short in manifest.weight_dtypes.items()}
    stored = {part.name: source.dtypes[weight.key] for weight in plan for part in weight.parts}
    return {
        name: TensorInfo(SHORT[dtype] if dtype else own.get(name, stored[name]), shape)
        for name, shape in hf_shapes(plan).items()
    }


def copy_companions(model: Path, out: Path) -> list[str]:
    """Copy the model's files but its weights, model card, certificate and hidden files; returns their names."""
    names = []
    for path in sorted(_companions(model)):
        target = out / path.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        names.append(str(path.relative_to(model)))
    return names


def _companions(model: Path) -> Iterable[Path]:
    for path in [*model.iterdir(), *model.glob("additional_chat_templates/*.jinja")]:
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and not path.name.startswith(".") and path.name not in NOT_COPIED:
            yield path


def _write_config(path: Path, dtypes: set[torch.dtype], source_dtype: str) -> None:
    """Change the type of the weights in config.json, in the spelling that it has, if and only if the type changed."""
    if short_name(dtypes) == source_dtype or len(dtypes) != 1:
        return
    text = path.read_text(encoding="utf-8")
    config = json.loads(text)
    name = CONFIG_NAMES[next(iter(dtypes))]
    changed = {key: name for key in ("dtype", "torch_dtype") if config.get(key) not in (None, name)}
    if changed:
        write_json(path, config | changed)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """``values`` as Hugging Face writes a config.json."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
