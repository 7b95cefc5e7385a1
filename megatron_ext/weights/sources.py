"""A Hugging Face folder as convert reads it: checked against its config.json, and changed on the way if that is asked.

What changes the model (extra vocabulary, upcycling) changes what the reader presents: names, shapes and rows of the
model that the checkpoint is going to hold. Everything after it sees a plain Hugging Face model of that config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.errors import CheckpointError, VocabularyError
from megatron_ext.families import find_family
from megatron_ext.families.base import Architecture, ModelFamily, Weight
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.hf_folder import read_config, tokenizer_digest
from megatron_ext.weights.changes import ModelChanges, changed_config
from megatron_ext.weights.hf import HFWeights, open_weights
from megatron_ext.weights.manifest import CheckpointManifest
from megatron_ext.weights.planning import architecture_of, check_coverage
from megatron_ext.weights.upcycle import UpcycledExperts
from megatron_ext.weights.vocab import ExtendedVocabulary


@dataclass(frozen=True)
class Source:
    """A Hugging Face model, as it is or as ``changes`` make it.

    Attributes:
        config: config.json of the model that is presented.
        layout: how it names its weights, if its family has several ways.
        plan: every weight of it.
        reader: its tensors and rows.
        reopened: gives another reader, for another thread.
        not_converted: tensors of the folder that config.json determines.
    """

    config: dict[str, Any]
    architecture: Architecture
    family: ModelFamily
    layout: str | None
    plan: list[Weight]
    reader: Any
    reopened: Callable[[], Any]
    not_converted: tuple[str, ...]


def read_source(model: Path, changes: ModelChanges | None = None, *, trust_pickle: bool = False) -> Source:
    """Open the folder and check every weight of it against its config.json.

    Raises:
        UnsupportedModelError: no family converts this config, or it cannot be changed as asked; names the key.
        SourceError: a file is missing, truncated or damaged; names it.
        UntrustedPickleError: a ``.bin`` file wants a class that could run a program; ``trust_pickle`` loads it.
        WeightMappingError: a weight without a rule, a rule without a weight, a shape that contradicts config.json.
    """
    config = read_config(model)
    family, architecture = architecture_of(config)
    target = changed_config(config, changes) if changes else config  # refuses before a file is opened
    opened = partial(open_weights, model, trust_pickle=trust_pickle)
    reader = opened()
    layout = family.layout_of(reader.tensors)
    plan = list(family.plan(architecture, layout))
    check_coverage(family, architecture, plan, reader, model)
    rest = tuple(sorted(set(reader.tensors) - {part.name for weight in plan for part in weight.parts}))
    if not changes:
        return Source(dict(config), architecture, family, layout, plan, reader, opened, rest)
    return _changed(opened, target, changes, plan, reader, layout, rest)


def source_of(manifest: CheckpointManifest, checkpoint: Path, model: Path, *, trust_pickle: bool = False) -> Source:
    """``model`` as the source of the checkpoint, or as what was exported from it.

    Raises:
        CheckpointError: the checkpoint is of another model than ``model``; names the field.
    """
    changed = descends(manifest, read_config(model), checkpoint, model)
    return read_source(model, manifest.changes if changed else None, trust_pickle=trust_pickle)


def descends(manifest: CheckpointManifest, config: Mapping[str, Any], checkpoint: Path, model: Path) -> bool:
    """Whether converting changed the model of ``config`` into that of the checkpoint; False if they are the same.

    Raises:
        CheckpointError: neither; names the first field that differs.
    """
    kind, architecture = config.get("model_type"), architecture_of(config)[1]
    ours = (manifest.family, manifest.architecture)
    changed = manifest.changes is not None and (kind, architecture) != ours
    if changed:
        before = manifest.changes.source_config
        ours = (before["model_type"], architecture_of(before)[1])
    what = "was made of a model of" if changed else "has"
    if ours[0] != kind:
        raise CheckpointError(
            f"{checkpoint} {what} family {ours[0]}, but {model} has model_type {kind}; "
            "give --model the folder that was converted"
        )
    theirs = architecture.model_dump()
    for field, value in ours[1].model_dump().items():
        if theirs[field] != value:
            raise CheckpointError(
                f"{checkpoint} {what} {field} {value}, but config.json of {model} says {theirs[field]}; "
                "give --model the folder that was converted"
            )
    return changed


def require_tokenizer(manifest: CheckpointManifest, checkpoint: Path, model: Path) -> None:
    """The tokenizer files of ``model`` are those that the checkpoint was converted with.

    Raises:
        VocabularyError: they are not.
    """
    if (found := tokenizer_digest(model)) != manifest.tokenizer_digest:
        raise VocabularyError(
            f"the tokenizer files of {model} are not those that {checkpoint} was converted with "
            f"(digest {found}, not {manifest.tokenizer_digest}); give --model the folder that was converted"
        )


def _changed(
    opened: Callable[[], HFWeights],
    config: dict[str, Any],
    changes: ModelChanges,
    dense: list[Weight],
    reader: HFWeights,
    layout: str | None,
    rest: tuple[str, ...],
) -> Source:
    family = find_family(config["model_type"])
    architecture = read_architecture(family, config)
    layout = None if changes.upcycle else layout
    plan = list(family.plan(architecture, layout))
    vocabulary = {part.name for weight in dense if weight.padded_vocabulary for part in weight.parts}

    def changed(plain: HFWeights) -> Any:
        result: Any = plain
        if changes.extra_vocab_size:
            result = ExtendedVocabulary(result, vocabulary, changes.extra_vocab_size, changes.extra_vocab_init)
        return UpcycledExperts(result, dense, plan, changes.upcycle) if changes.upcycle else result

    return Source(config, architecture, family, layout, plan, changed(reader), lambda: changed(opened()), rest)
