"""A chat template that a recipe names: hashed by content, handed to jobs in a form that holds in any folder."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.data.chat_templates import chat_template_identity
from megatron_ext.errors import ChatTemplateError


def template_identity(name: str | None, model: Path) -> str | None:
    """The template's content; None stands for the model's own, which is part of its tokenizer.

    Raises:
        ChatTemplateError: no template of that name.
    """
    if name is None:
        return None
    try:
        return chat_template_identity(name, model)
    except ChatTemplateError:
        if model.exists():
            raise
        return name  # only planned: the model, whose own template this may be, is not pinned yet


def template_argument(name: str | None) -> str | None:
    """``name`` for a job, which runs in another folder: a file becomes absolute."""
    return str(Path(name).absolute()) if name is not None and Path(name).is_file() else name
