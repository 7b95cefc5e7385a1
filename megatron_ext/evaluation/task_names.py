"""Which tasks there are, local and bundled with lm-eval, found without importing lm-eval or its 15 s index."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import EvaluationError

FILE_BUILDERS = frozenset({"json", "csv", "parquet", "text", "arrow", "pandas", "xml"})
"""``dataset_path`` values that read files instead of the Hugging Face hub."""
DECLARATION = re.compile(rb"^\s*-?\s*(?:task|group|tag):[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class LocalTasks:
    """Names declared below one folder, and whether all its data lies in files."""

    names: frozenset[str]
    needs_hub: bool


class _Loader(yaml.SafeLoader):
    """YAML whose unknown tags (lm-eval's ``!function module.name``) are read as nothing."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def read_local_tasks(folder: Path) -> LocalTasks:
    """Tasks, groups and tags of every YAML below ``folder``.

    Raises:
        EvaluationError: no such folder, no YAML in it, or a file that is not YAML (lm-eval would skip it silently).
    """
    if not folder.is_dir():
        raise EvaluationError(f"evaluate.include_path {folder} is not a folder; give a folder with lm-eval task YAMLs")
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise EvaluationError(f"evaluate.include_path {folder} holds no *.yaml; put the task's YAML there")
    names: set[str] = set()
    needs_hub = False
    for file in files:
        config = _read(file)
        names |= {config[key] for key in ("task", "group") if isinstance(config.get(key), str)}
        tags = config.get("tag") or ()
        names |= {tags} if isinstance(tags, str) else set(tags)
        source = config.get("dataset_path")
        needs_hub |= source is not None and source not in FILE_BUILDERS and not (folder / str(source)).exists()
        needs_hub |= "custom_dataset" in config or "class" in config
    return LocalTasks(frozenset(names), needs_hub)


def require_known(names: Iterable[str], local: LocalTasks) -> None:
    """Refuse a task that is neither local nor named anywhere in lm-eval's bundled YAMLs (a text scan of about 2 s).

    Raises:
        EvaluationError: names the nearest task.
    """
    wanted = {name.encode() for name in names if name not in local.names}
    if not wanted:
        return
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise EvaluationError("lm-eval is not installed; pip install 'lm-eval[hf]'")
    declared: set[bytes] = set()
    named: set[bytes] = set()
    for file in Path(package.submodule_search_locations[0], "tasks").rglob("*.yaml"):
        text = file.read_bytes()
        declared.update(DECLARATION.findall(text))
        named.update(name for name in wanted if name in text)
    for name in sorted(wanted - named):
        raise EvaluationError(unknown_task(name.decode(), {d.decode(errors="replace") for d in declared}, local))


def unknown_task(name: str, bundled: Iterable[str], local: LocalTasks) -> str:
    """The sentence for a task that does not exist; local names are listed, the thousands of bundled ones counted."""
    bundled = sorted(set(bundled) - local.names)
    close = [
        *difflib.get_close_matches(name, sorted(local.names), n=1, cutoff=0.6),
        *difflib.get_close_matches(name, bundled, n=1, cutoff=0.6),
    ]
    hint = f"did you mean {close[0]!r}? " if close else ""
    own = f"{', '.join(sorted(local.names))} (evaluate.include_path) and " if local.names else ""
    return (
        f"unknown evaluation task {name!r}; {hint}Available: {own}lm-eval's {len(bundled)} bundled names "
        "(lm-eval ls tasks); for a task of your own, give the folder of its YAML as evaluate.include_path"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    return config if isinstance(config, dict) else {}
