"""Upcycling and fine-tuning: a dense Hugging Face model becomes a mixture of experts, tuned, exported and scored."""

from __future__ import annotations

from typing import Any

from flows import full_sft
from megatron_ext.config import DataConfig, EvalConfig, ModelConfig, RuntimeConfig, TrainConfig
from megatron_ext.errors import ConfigError
from tasks.artifacts import Report


def sentence(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    evaluate: EvalConfig,
    runtime: RuntimeConfig = full_sft.DEFAULT_RUNTIME,
) -> Report:
    """Convert into experts, tokenize, train, export, evaluate: full-sft, of a model that is not dense any more.

    Raises:
        ConfigError: ``model.upcycle`` is not given.
    """
    if model.upcycle is None:
        raise ConfigError(
            "flow upcycle-sft needs model.upcycle, for instance {num_experts: 8, topk: 2}; "
            "full-sft trains a model as it is"
        )
    return full_sft.sentence(model, data, train, evaluate, runtime)


def __getattr__(name: str) -> Any:
    """``upcycle_sft``, the Prefect flow, is made when it is asked for, as ``full_sft`` is."""
    if name != "upcycle_sft":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flows.pipeline import as_flow

    globals()[name] = as_flow(sentence, "upcycle-sft")
    return globals()[name]
