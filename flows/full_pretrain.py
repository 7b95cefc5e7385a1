"""Continued pretraining, whole: a Hugging Face model and text in, an exported and scored model that read it out."""

from __future__ import annotations

from typing import Any

from flows import full_sft
from flows.catalog import FORMATS
from megatron_ext.config import DataConfig, EvalConfig, ModelConfig, RuntimeConfig, TrainConfig
from tasks.artifacts import Report


def sentence(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    evaluate: EvalConfig,
    runtime: RuntimeConfig = full_sft.DEFAULT_RUNTIME,
) -> Report:
    """Convert, tokenize text, train on all of it, export, evaluate: full-sft, of text instead of conversations.

    Raises:
        ConfigError: ``data.format`` is another one than text.
    """
    return full_sft.sentence(model, data.holding(FORMATS["full-pretrain"]), train, evaluate, runtime)


def __getattr__(name: str) -> Any:
    """``full_pretrain``, the Prefect flow, is made when it is asked for, as ``full_sft`` is."""
    if name != "full_pretrain":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flows.pipeline import as_flow

    globals()[name] = as_flow(sentence, "full-pretrain")
    return globals()[name]
