"""Preference training, whole: a Hugging Face model and pairs of answers in, one that prefers the better out."""

from __future__ import annotations

from typing import Any

from flows import full_sft
from flows.catalog import FORMATS
from megatron_ext.config import DataConfig, EvalConfig, ModelConfig, Recipe, RuntimeConfig, TrainConfig
from tasks.artifacts import Report
from tasks.checks import check_validation
from tasks.convert_checkpoint import convert_checkpoint
from tasks.evaluate_model import evaluate_base, evaluate_tuned
from tasks.export_checkpoint import export_checkpoint
from tasks.pin_sources import pin_sources
from tasks.reference_logps import reference_logps
from tasks.tokenize_dataset import tokenize_dataset
from tasks.train_model import train_model
from tasks.write_report import write_report


def sentence(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    evaluate: EvalConfig,
    runtime: RuntimeConfig = full_sft.DEFAULT_RUNTIME,
) -> Report:
    """Convert, tokenize pairs, ask the model as it is about them, train, export, evaluate; what was done is reused.

    Raises:
        ConfigError: ``data.format`` is another one than preference, or ``data.validation_files`` are given.
    """
    data, evaluate = data.holding(FORMATS["full-dpo"]), evaluate.asked_as(data.chat_template)
    check_validation(data, train)
    sources = pin_sources(model, data, evaluate)
    base = convert_checkpoint.submit(model, sources, runtime=runtime)
    tokens = tokenize_dataset.submit(data, sources, runtime=runtime, extra_vocab_size=model.extra_vocab_size)
    scores = {"base": evaluate_base(evaluate, sources, runtime=runtime)} if evaluate.baseline else {}
    reference = reference_logps(train, base, tokens, runtime=runtime)
    trained = train_model(train, base, tokens, reference, runtime=runtime)
    exported = export_checkpoint(model, trained, sources, runtime=runtime)
    scores["tuned"] = evaluate_tuned(evaluate, exported, sources, runtime=runtime)
    recipe = Recipe(model=model, data=data, train=train, evaluate=evaluate, runtime=runtime)
    return write_report(recipe, sources, base, tokens, trained, exported, scores, runtime=runtime)


def __getattr__(name: str) -> Any:
    """``full_dpo``, the Prefect flow, is made when it is asked for, as ``full_sft`` is."""
    if name != "full_dpo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flows.pipeline import as_flow

    globals()[name] = as_flow(sentence, "full-dpo")
    return globals()[name]
