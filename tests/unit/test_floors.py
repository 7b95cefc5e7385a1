"""Imports run downwards only: flows -> tasks -> the engine's light modules; the engine knows neither Prefect nor us."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "megatron", "lm_eval", "tokenizers", "pyarrow", "matplotlib", "datasets"}
FORBIDDEN = {
    "megatron_ext": {"prefect", "tasks", "flows"},
    "tasks": {"flows"} | HEAVY,
    "flows": HEAVY,
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file, wherever it stands, and whether it is imported at module level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, id(node) in top


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_no_floor_imports_what_lies_above_or_is_too_heavy_for_it(floor: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / floor).rglob("*.py"))
        for module, _ in imports(path)
        if module.split(".")[0] in FORBIDDEN[floor]
    ]
    assert wrong == []


LIGHT = ["flows.cli", "flows.running", "flows.explaining", "flows.full_sft", "tasks.stage", "megatron_ext.worker"]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_loads_neither_prefect_nor_anything_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(answer.stdout.split()) & (HEAVY | {"prefect"}) == set()


def test_a_flow_process_loads_prefect_and_nothing_heavy() -> None:
    program = "import sys, flows.stages, flows.full_sft; flows.full_sft.full_sft; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in answer.stdout.splitlines()[-1].split()}
    assert loaded & HEAVY == set()
    assert "prefect" in loaded
