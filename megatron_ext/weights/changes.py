"""What a conversion changes of a model besides its layout and the type of its weights. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from megatron_ext.config import ModelConfig, Section, UpcycleConfig, VocabInit
from megatron_ext.families import find_family
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.weights.certificate import LogitsFigures
from megatron_ext.weights.upcycle import upcycled_config


class ModelChanges(Section):
    """Kept in the checkpoint's manifest, so that export and verification know what the source was."""

    source_config: dict[str, Any] = Field(description="config.json of the model that was changed")
    extra_vocab_size: int = 0
    extra_vocab_init: VocabInit = "mean"
    upcycle: UpcycleConfig | None = None
    step_zero: LogitsFigures | None = Field(
        default=None, description="how near the upcycled model's logits are to those of its source before any training"
    )


def changes_of(
    config: Mapping[str, Any],
    extra_vocab_size: int = 0,
    extra_vocab_init: VocabInit = "mean",
    upcycle: UpcycleConfig | None = None,
) -> ModelChanges | None:
    """The changes to the model of ``config``; None if there are none."""
    if not extra_vocab_size and upcycle is None:
        return None
    return ModelChanges(
        source_config=dict(config),
        extra_vocab_size=extra_vocab_size,
        extra_vocab_init=extra_vocab_init,
        upcycle=upcycle,
    )


def asked_changes(config: Mapping[str, Any], model: ModelConfig) -> ModelChanges | None:
    """The changes that a recipe's ``model`` section asks for."""
    return changes_of(config, model.extra_vocab_size, model.extra_vocab_init, model.upcycle)


def changed_config(config: Mapping[str, Any], changes: ModelChanges | None) -> dict[str, Any]:
    """config.json of the model that the checkpoint holds.

    Raises:
        UnsupportedModelError: there is no such model in Hugging Face; names the key.
    """
    result = dict(config)
    if changes is None:
        return result
    if changes.extra_vocab_size:
        result["vocab_size"] = config["vocab_size"] + changes.extra_vocab_size
    if changes.upcycle:
        dense = read_architecture(find_family(str(result.get("model_type"))), result)
        result = upcycled_config(result, dense, changes.upcycle)
    return result
