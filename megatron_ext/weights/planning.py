"""What is known of a conversion before a byte is written: architecture, plan, types; refuses what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import CheckpointError, SourceError, WeightMappingError
from megatron_ext.families import find_family
from megatron_ext.families.base import Architecture, ModelFamily, Weight
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.weights.hf import SHORT, HFWeights, same_tensor
from megatron_ext.weights.streams import CheckpointReader

TRAINING_STATE = ("optimizer.", "chained_")
"""Beginnings of the optimizer's keys in a resumable checkpoint of megatron-core."""


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


def hf_shapes(plan: list[Weight]) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the plan, in the plan's order."""
    return {part.name: part.tensor_shape for weight in plan for part in weight.parts}


def check_coverage(
    family: ModelFamily, architecture: Architecture, plan: list[Weight], source: HFWeights, model: Path
) -> None:
    """Every weight has a rule, every rule its weights, and every shape is the one that config.json implies.

    Raises:
        WeightMappingError: names the first weight that does not.
    """
    expected = hf_shapes(plan)
    layers = range(architecture.num_layers)
    derived = {name.format(i=i) for name in family.derived_weights for i in layers}
    idle = {part.name: part.tensor_shape for part in family.idle(architecture)}
    surplus = {name for name in source.tensors if name not in expected | idle and name not in derived}
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
    for name, shape in (expected | idle).items():
        if name in source.tensors and source.tensors[name].shape != shape:
            raise WeightMappingError(
                f"{name} of {model} has shape {list(source.tensors[name].shape)}, but config.json implies {list(shape)}"
            )


def check_stored(plan: list[Weight], source: CheckpointReader, checkpoint: Path) -> None:
    """Every tensor of the checkpoint has a rule, every rule its tensor in the expected shape.

    Raises:
        WeightMappingError: names the first that has not.
        CheckpointError: a shape contradicts the manifest; only an embedding may have more rows, as padding.
    """
    expected = {weight.key: weight for weight in plan}
    stored = {key: shape for key, shape in source.shapes.items() if not key.startswith(TRAINING_STATE)}
    if missing := [key for key in expected if key not in stored]:
        raise WeightMappingError(f"{checkpoint} has no tensor {missing[0]} ({len(missing)} missing), that a rule needs")
    if surplus := sorted(set(stored) - set(expected)):
        raise WeightMappingError(
            f"no rule exports {surplus[0]} of {checkpoint} ({len(surplus)} such tensors); "
            "add a rule in megatron_ext/families/"
        )
    for key, weight in expected.items():
        rows = slice(1, None) if weight.padded_vocabulary and stored[key][0] >= weight.shape[0] else slice(None)
        if stored[key][rows] != weight.shape[rows]:
            raise CheckpointError(
                f"{key} of {checkpoint} has shape {list(stored[key])}, but its manifest implies {list(weight.shape)}"
            )


def _tied_copies(family: ModelFamily, source: HFWeights, surplus: set[str]) -> set[str]:
    """Output weights that a tied model's file holds once more: harmless if they equal the embedding."""
    tied = [rule for rule in family.weights if rule.skip_if == "share_embeddings_and_output_weights"]
    embedding = next(rule.hf[0] for rule in family.weights if rule.mcore == "embedding.word_embeddings.weight")
    copies = {rule.hf[0] for rule in tied} & surplus
    for name in copies:
        if embedding in source.tensors and not same_tensor(source, name, embedding):
            raise WeightMappingError(
                f"{name} differs from {embedding}, but config.json says tie_word_embeddings true; set it to false"
            )
    return copies


def checkpoint_dtypes(plan: list[Weight], source: HFWeights, dtype: str | None) -> dict[str, torch.dtype]:
    """Type of each megatron-core tensor: ``dtype``, else the narrowest that holds all its parts and layers exactly."""
    parts: dict[str, set[torch.dtype]] = {}
    for weight in plan:
        parts.setdefault(weight.key, set()).update(source.tensors[part.name].dtype for part in weight.parts)
    if dtype is not None:
        return dict.fromkeys(parts, SHORT[dtype])
    return {key: reduce(torch.promote_types, found) for key, found in parts.items()}
