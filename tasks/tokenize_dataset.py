"""Stage tokenize-dataset: conversations become token ids and loss masks."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.config import DataConfig, RuntimeConfig
from tasks.artifacts import IdxmapDataset, Sources
from tasks.build import Build
from tasks.stage import stage
from tasks.templates import template_argument, template_identity


@stage("tokenize-dataset", version=1, makes=IdxmapDataset)
def tokenize_dataset(data: DataConfig, sources: Sources, *, runtime: RuntimeConfig) -> Build:
    """Tokenize ``data.files`` with the model's tokenizer, loss masks included. The weights do not matter here.

    Raises:
        DatasetFormatError: a row does not fit ``data.format``; names file, row and field.
        ChatTemplateError: no template of that name.
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    template = template_identity(data.chat_template, Path(sources.model.locate()))
    return Build(
        job="tokenize",
        identity={"data": {"format": data.format, "chat_template": template}},
        config={"format": data.format, "chat_template": template_argument(data.chat_template)},
        inputs={"files": sources.data, "tokenizer": sources.tokenizer},
        runtime=runtime,
    )
