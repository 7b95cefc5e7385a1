"""What can be said about a recipe before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config import DataConfig, EvalConfig, ModelConfig, RuntimeConfig, TrainConfig
from megatron_ext.data.chat_templates import chat_template_identity
from megatron_ext.demo.model import SIZES, VOCAB_SIZE
from megatron_ext.errors import ConfigError, VocabularyError
from megatron_ext.evaluation.task_names import LocalTasks, read_local_tasks, require_known
from megatron_ext.families import find_family
from megatron_ext.families.base import Architecture
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.hf_folder import read_config
from megatron_ext.training.layout import check_layout
from megatron_ext.training.plan import check_schedule, iterations_without_data
from megatron_ext.weights.changes import asked_changes, changed_config
from tasks.sources import (
    DemoName,
    Files,
    data_source,
    model_source,
    source_digests,
    tasks_source,
    validation_source,
)

DEMO = {"model_type": "qwen2", **SIZES, "vocab_size": VOCAB_SIZE}
"""config.json of the demo before it is made; its vocabulary may turn out a little smaller."""


def check_recipe(
    model: ModelConfig,
    data: DataConfig | None = None,
    train: TrainConfig | None = None,
    evaluate: EvalConfig | None = None,
    runtime: RuntimeConfig | None = None,
    *,
    download: bool = True,
) -> Architecture:
    """Refuse a recipe whose sources, template or sizes do not fit, before the first stage; returns the model's shape.

    Raises:
        UserError: names the key, the value and the remedy.
    """
    digests = source_digests()
    source = model_source(model, digests, download=download)
    folder = source.places["config.json"].parent if isinstance(source, Files) else None
    architecture = architecture_of(read_config(folder) if folder else DEMO, model)
    if folder and model.extra_vocab_size:
        _check_vocabulary(model, folder, evaluate)
    if data:
        validation_source(data, digests, data_source(data, digests))
        if data.format != "text" and (data.chat_template or folder):
            chat_template_identity(data.chat_template, folder or Path())
    if evaluate:
        _check_tasks(evaluate, tasks_source(evaluate, digests))
        if evaluate.chat_template:
            chat_template_identity(evaluate.chat_template, folder or Path())
    if data and train:
        check_validation(data, train)
    if train:
        check_layout(architecture, train, runtime or RuntimeConfig())
        if (iterations := iterations_without_data(train)) is not None:
            check_schedule(train, iterations)
    return architecture


def check_validation(data: DataConfig, train: TrainConfig) -> None:
    """Refuse a validation set beside another one, or one of pairs.

    Raises:
        ConfigError: names both keys, or the one to take.
    """
    if not data.validation_files:
        return
    if train.validation_fraction:
        raise ConfigError(
            f"data.validation_files and train.validation_fraction {train.validation_fraction} exclude each other; "
            "give one of them"
        )
    if data.format == "preference":
        raise ConfigError(
            "data.validation_files: of pairs in files of their own the reference knows nothing; "
            "hold out some of data.files with train.validation_fraction"
        )


def architecture_of(config: Mapping[str, Any], model: ModelConfig) -> Architecture:
    """The shape of the model that is trained: that of ``config``, changed as ``model`` asks."""
    changed = changed_config(config, asked_changes(config, model))
    return read_architecture(find_family(str(changed.get("model_type"))), changed)


def _check_vocabulary(model: ModelConfig, folder: Path, evaluate: EvalConfig | None) -> None:
    """A tokenizer with more tokens than the model will have, or, to be scored as it is, has already."""
    from megatron_ext.data.definition import Definition
    from megatron_ext.data.tokenizers import load_tokenizer, read_vocabulary, require_vocabulary, tokenizer_file

    definition = Definition.read(tokenizer_file(folder))
    vocabulary = read_vocabulary(folder, definition, lambda: load_tokenizer(folder))
    largest = require_vocabulary(vocabulary, folder, model.extra_vocab_size)
    rows = read_config(folder)["vocab_size"]
    if evaluate and evaluate.baseline and largest >= rows:
        raise VocabularyError(
            f"evaluate.baseline: the base model has {rows} rows and cannot read the tokens up to {largest} of its "
            "tokenizer; set evaluate.baseline to false"
        )


def _check_tasks(evaluate: EvalConfig, source: DemoName | Files | None) -> None:
    """A task that nobody knows is found now, not after the training; bundled ones take a scan of 2 s."""
    if isinstance(source, Files):
        require_known(evaluate.tasks, read_local_tasks(Path(evaluate.include_path or "").expanduser()))
    elif source is None:
        require_known(evaluate.tasks, LocalTasks(frozenset(), needs_hub=True))
