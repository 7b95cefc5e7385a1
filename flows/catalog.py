"""The flows that `mflow run` and `mflow explain` know, and the order in which their stages are shown."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megatron_ext.config import DatasetFormat, Recipe
from megatron_ext.errors import ConfigError, unknown

FLOWS = {
    "full-pretrain": "flows.full_pretrain",
    "full-sft": "flows.full_sft",
    "full-dpo": "flows.full_dpo",
    "upcycle-sft": "flows.upcycle_sft",
}
"""Flow -> its module, which has the plain ``sentence`` and, under the flow's name, the Prefect flow."""
FORMATS: dict[str, DatasetFormat] = {"full-pretrain": "text", "full-dpo": "preference"}
"""Flow -> the only format of data that it trains on."""
STAGES = (
    "pin-sources",
    "convert-checkpoint",
    "tokenize-dataset",
    "tokenize-validation",
    "reference-logps",
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


def sections_of(recipe: Recipe, flow: str = "full-sft") -> dict[str, Any]:
    """The recipe's sections by name: the flow's parameters. Where a flow takes one format of data only, it is named.

    Raises:
        ConfigError: the recipe names another format than the flow's.
    """
    sections = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return sections | ({"data": recipe.data.holding(FORMATS[flow])} if flow in FORMATS else {})
