"""The flows that `mflow run` and `mflow explain` know, and the order in which their stages are shown."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megatron_ext.config import Section
from megatron_ext.errors import ConfigError, unknown

FLOWS = {"full-sft": "flows.full_sft", "upcycle-sft": "flows.upcycle_sft"}
"""Flow -> its module, which has the plain ``sentence`` and, under the flow's name, the Prefect flow."""
STAGES = (
    "pin-sources",
    "convert-checkpoint",
    "tokenize-dataset",
    "train-model",
    "export-checkpoint",
    "evaluate-base",
    "evaluate-tuned",
    "write-report",
)


def flow_module(name: str) -> Any:
    """The module of a flow.

    Raises:
        ConfigError: no flow of this name.
    """
    if name not in FLOWS:
        raise ConfigError(unknown("flow", name, FLOWS))
    return import_module(FLOWS[name])


def sections_of(recipe: Section) -> dict[str, Any]:
    """The recipe's sections by name: the flow's parameters."""
    return {name: getattr(recipe, name) for name in type(recipe).model_fields}
