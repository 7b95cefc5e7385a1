"""Stages tokenize-dataset and tokenize-validation: text, chats or preferences become token ids and loss masks."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.config import DataConfig, RuntimeConfig, TokenizeOptions
from tasks.artifacts import IdxmapDataset, Sources
from tasks.build import Build, Input
from tasks.stage import stage
from tasks.templates import template_argument, template_identity

IDENTITY, VERSION = "tokenize-dataset", 4
Blend = tuple[tuple[float | None, str], ...]


@stage("tokenize-dataset", version=VERSION, makes=IdxmapDataset, identity=IDENTITY)
def tokenize_dataset(data: DataConfig, sources: Sources, *, runtime: RuntimeConfig, extra_vocab_size: int = 0) -> Build:
    """Tokenize ``data.files`` with the model's tokenizer, loss masks included. The weights do not matter here.

    ``extra_vocab_size`` is how many tokens the tokenizer may have beyond the model's vocabulary.

    Raises:
        VocabularyError: it has more.
        DatasetFormatError: a row does not fit ``data.format``; names file, row and field.
        ChatTemplateError: no template of that name.
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    return _tokenized(data, sources, sources.data, sources.data_blend, runtime, extra_vocab_size)


@stage("tokenize-validation", version=VERSION, makes=IdxmapDataset, identity=IDENTITY)
def tokenize_validation(
    data: DataConfig, sources: Sources, *, runtime: RuntimeConfig, extra_vocab_size: int = 0
) -> Build:
    """Tokenize ``data.validation_files`` in the same way. Raises what ``tokenize_dataset`` raises."""
    return _tokenized(data, sources, sources.validation, sources.validation_blend, runtime, extra_vocab_size)


def _tokenized(
    data: DataConfig, sources: Sources, files: Input | None, blend: Blend, runtime: RuntimeConfig, extra_vocab_size: int
) -> Build:
    options = {name: getattr(data, name) for name in TokenizeOptions.model_fields}
    template = template_identity(data.chat_template, Path(sources.model.locate()))
    return Build(
        job="tokenize",
        identity={"data": {**options, "chat_template": template}, "blend": _weights(blend)},
        config={
            **options,
            "chat_template": template_argument(data.chat_template),
            "extra_vocab_size": extra_vocab_size,
            "sources": [list(given) for given in blend],
        },
        inputs={"files": files, "tokenizer": sources.tokenizer},
        runtime=runtime,
    )


def _weights(blend: Blend) -> list[list[float | int | None]]:
    """Weight of each file and number of the entry that named it, where any file has a weight; names do not matter."""
    if all(weight is None for weight, _ in blend):
        return []
    entries = list(dict.fromkeys(given for _, given in blend))
    return [[weight, entries.index(given)] for weight, given in blend]
