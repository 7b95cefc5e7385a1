"""Stage tokenize-dataset: conversations become token ids and loss masks."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.config import DataConfig, RuntimeConfig
from megatron_ext.data.chat_templates import chat_template_identity
from megatron_ext.errors import ChatTemplateError
from tasks.artifacts import IdxmapDataset, Sources
from tasks.build import Build
from tasks.stage import stage


@stage("tokenize-dataset", version=1, makes=IdxmapDataset)
def tokenize_dataset(data: DataConfig, sources: Sources, *, runtime: RuntimeConfig) -> Build:
    """Tokenize ``data.files`` with the model's tokenizer, loss masks included. The weights do not matter here.

    Raises:
        DatasetFormatError: a row does not fit ``data.format``; names file, row and field.
        ChatTemplateError: no template of that name.
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    name = data.chat_template
    return Build(
        job="tokenize",
        identity={"data": {"format": data.format, "chat_template": _template(name, Path(sources.model.locate()))}},
        config={"format": data.format, "chat_template": str(Path(name).absolute()) if _is_file(name) else name},
        inputs={"files": sources.data, "tokenizer": sources.tokenizer},
        runtime=runtime,
    )


def _template(name: str | None, folder: Path) -> str | None:
    """The template's content; the model's own is part of its tokenizer."""
    if name is None:
        return None
    try:
        return chat_template_identity(name, folder)
    except ChatTemplateError:
        if folder.exists():
            raise
        return name  # only planned: the model, whose own template this may be, is not pinned yet


def _is_file(name: str | None) -> bool:
    return name is not None and Path(name).is_file()
