"""Supervised fine-tuning, whole: a Hugging Face model and conversations in, a tuned, exported and scored one out."""

from __future__ import annotations

from typing import Any

from megatron_ext.config import DataConfig, EvalConfig, ModelConfig, Recipe, RuntimeConfig, TrainConfig
from tasks.artifacts import Report
from tasks.checks import check_validation
from tasks.convert_checkpoint import convert_checkpoint
from tasks.evaluate_model import evaluate_base, evaluate_tuned
from tasks.export_checkpoint import export_checkpoint
from tasks.pin_sources import pin_sources
from tasks.tokenize_dataset import tokenize_dataset, tokenize_validation
from tasks.train_model import train_model
from tasks.write_report import write_report

DEFAULT_RUNTIME = RuntimeConfig()


def sentence(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    evaluate: EvalConfig,
    runtime: RuntimeConfig = DEFAULT_RUNTIME,
) -> Report:
    """Convert, tokenize, train, export, evaluate; what was done before is reused.

    Raises:
        ConfigError: two validation sets.
    """
    check_validation(data, train)
    evaluate = evaluate.asked_as(data.chat_template)
    sources = pin_sources(model, data, evaluate)
    base = convert_checkpoint.submit(model, sources, runtime=runtime)
    vocabulary = {"extra_vocab_size": model.extra_vocab_size}
    tokens = tokenize_dataset.submit(data, sources, runtime=runtime, **vocabulary)
    own = data.validation_files
    validation = tokenize_validation.submit(data, sources, runtime=runtime, **vocabulary) if own else None
    scores = {"base": evaluate_base(evaluate, sources, runtime=runtime)} if evaluate.baseline else {}
    trained = train_model(train, base, tokens, validation=validation, runtime=runtime)
    exported = export_checkpoint(model, trained, sources, runtime=runtime)
    scores["tuned"] = evaluate_tuned(evaluate, exported, sources, runtime=runtime)
    recipe = Recipe(model=model, data=data, train=train, evaluate=evaluate, runtime=runtime)
    return write_report(recipe, sources, base, tokens, trained, exported, scores, validation, runtime=runtime)


def __getattr__(name: str) -> Any:
    """``full_sft``, the Prefect flow, is made when it is asked for: `mflow explain` reads the sentence without it."""
    if name != "full_sft":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flows.pipeline import as_flow

    globals()[name] = as_flow(sentence, "full-sft")
    return globals()[name]
