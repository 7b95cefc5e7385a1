"""Each stage as a flow of its own; what it needs from earlier stages is reused, or built on the way."""

from __future__ import annotations

from typing import Any

from flows import full_dpo, full_sft
from flows.pipeline import as_flow
from megatron_ext.config import DataConfig, EvalConfig, ModelConfig, RuntimeConfig, TrainConfig
from tasks import convert_checkpoint as convert
from tasks import evaluate_model as evaluation
from tasks import export_checkpoint as export
from tasks import pin_sources as pin
from tasks import reference_logps as references
from tasks import tokenize_dataset as tokenization
from tasks import train_model as training
from tasks.artifacts import EvalReport, HFModel, IdxmapDataset, McoreCheckpoint, References, Report, Sources, Training
from tasks.checks import check_validation

HERE = RuntimeConfig()


def _pin(model: ModelConfig, data: DataConfig | None = None, evaluate: EvalConfig | None = None) -> Sources:
    """Check and digest sources."""
    return pin.pin_sources(model, data, evaluate)


def _convert(model: ModelConfig, runtime: RuntimeConfig = HERE) -> McoreCheckpoint:
    """Turn a Hugging Face model into a torch_dist checkpoint."""
    return convert.convert_checkpoint(model, pin.pin_sources(model), runtime=runtime)


def _tokenize(model: ModelConfig, data: DataConfig, runtime: RuntimeConfig = HERE) -> IdxmapDataset:
    """Turn text, conversations or preferences into token ids and loss masks."""
    return tokenization.tokenize_dataset(
        data, pin.pin_sources(model, data), runtime=runtime, extra_vocab_size=model.extra_vocab_size
    )


def _reference(model: ModelConfig, data: DataConfig, train: TrainConfig, runtime: RuntimeConfig = HERE) -> References:
    """Log-probabilities that a model gives to both answers of each pair."""
    data = data.holding("preference")
    check_validation(data, train)
    base, tokens, _ = _inputs(model, data, runtime)
    return references.reference_logps(train, base, tokens, runtime=runtime)


def _train(model: ModelConfig, data: DataConfig, train: TrainConfig, runtime: RuntimeConfig = HERE) -> Training:
    """Train a model on text or conversations, or, where ``data.format`` is preference, on pairs of answers."""
    check_validation(data, train)
    base, tokens, validation = _inputs(model, data, runtime)
    reference = None
    if data.format == "preference":
        reference = references.reference_logps(train, base, tokens, runtime=runtime)
    return training.train_model(train, base, tokens, reference, validation, runtime=runtime)


def _inputs(model: ModelConfig, data: DataConfig, runtime: RuntimeConfig) -> tuple[Any, Any, Any]:
    """Checkpoint, dataset and, where it has files of its own, validation set: all on their way."""
    sources = pin.pin_sources(model, data)
    base = convert.convert_checkpoint.submit(model, sources, runtime=runtime)
    given = {"runtime": runtime, "extra_vocab_size": model.extra_vocab_size}
    tokens = tokenization.tokenize_dataset.submit(data, sources, **given)
    own = data.validation_files
    return base, tokens, tokenization.tokenize_validation.submit(data, sources, **given) if own else None


def _export(model: ModelConfig, data: DataConfig, train: TrainConfig, runtime: RuntimeConfig = HERE) -> HFModel:
    """Train a model, and export it to a Hugging Face folder."""
    trained = _train(model, data, train, runtime)
    return export.export_checkpoint(model, trained, pin.pin_sources(model, data), runtime=runtime)


def _evaluate(model: ModelConfig, evaluate: EvalConfig, runtime: RuntimeConfig = HERE) -> EvalReport:
    """Score a Hugging Face model as it is."""
    return evaluation.evaluate_base(evaluate, pin.pin_sources(model, None, evaluate), runtime=runtime)


def _report(
    model: ModelConfig, data: DataConfig, train: TrainConfig, evaluate: EvalConfig, runtime: RuntimeConfig = HERE
) -> Report:
    """Write the report about a training."""
    sentence = full_dpo.sentence if data.format == "preference" else full_sft.sentence
    return sentence(model, data, train, evaluate, runtime)


pin_sources = as_flow(_pin, "pin-sources")
convert_checkpoint = as_flow(_convert, "convert-checkpoint")
tokenize_dataset = as_flow(_tokenize, "tokenize-dataset")
reference_logps = as_flow(_reference, "reference-logps")
train_model = as_flow(_train, "train-model")
export_checkpoint = as_flow(_export, "export-checkpoint")
evaluate_model = as_flow(_evaluate, "evaluate-model")
write_report = as_flow(_report, "write-report")
