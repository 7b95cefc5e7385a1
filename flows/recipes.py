"""A YAML recipe and its overrides become the validated parameters of a flow."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.config import Recipe
from megatron_ext.config_files import read_yaml, validated, with_overrides


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in ``path`` with each ``section.key=value`` applied.

    Raises:
        ConfigError: the file is missing, or a key or value does not fit; names it.
    """
    return validated(Recipe, with_overrides(read_yaml(path), overrides), str(path))
