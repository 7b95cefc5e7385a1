"""Model families: a file here named after a ``model_type`` of Hugging Face is a family; nothing else registers it."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_ext.errors import UnsupportedModelError, unknown
from megatron_ext.families.base import ModelFamily

NOT_FAMILIES = {"base", "hf_config", "shared"}


def available() -> list[str]:
    """The ``model_type``s that have a family."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_FAMILIES)


def find_family(model_type: str) -> ModelFamily:
    """The family of a ``model_type``.

    Raises:
        UnsupportedModelError: no family of this name; lists those there are.
    """
    if model_type not in available():
        remedy = "key model_type of config.json; add a family in megatron_ext/families/"
        raise UnsupportedModelError(unknown("model_type", model_type, available(), remedy))
    return importlib.import_module(f"{__name__}.{model_type}").FAMILY
