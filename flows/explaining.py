"""What a run would do, and why: each stage cached or to be built, training steps, disk. Without Prefect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.catalog import flow_module, sections_of
from flows.recipes import load_recipe
from tasks.checks import check_recipe
from tasks.estimates import disk_needed, steps_to_run
from tasks.identity import differences
from tasks.stage import Planned, planning
from tasks.store import Manifest, Store

SOURCES = {
    "model": "model.path",
    "data": "data.files",
    "validation": "data.validation_files",
    "tasks": "evaluate.include_path",
}
"""Part of the pinned sources -> key of the recipe that names it."""


@dataclass(frozen=True)
class Explanation:
    """What would happen to one stage."""

    stage: str
    cached: bool
    reason: str
    artifact: Path


def planned_stages(sentence: Callable[..., Any], sections: dict[str, Any]) -> list[Planned]:
    """Every stage of the flow, looked up in the store and not run.

    Raises:
        UserError: a source is missing or does not fit.
    """
    with planning() as plan:
        sentence(**sections)
    return plan


def explain(plan: Sequence[Planned]) -> list[Explanation]:
    """One explanation for each stage."""
    store = Store.current()
    earlier = store.artifacts() if any(p.manifest is None for p in plan) else []
    builds = {p.spec.makes.kind + "/" + p.fingerprint: p.stage for p in plan if p.manifest is None}
    return [
        Explanation(
            p.stage,
            p.manifest is not None,
            "" if p.manifest else _reason(p, earlier, builds),
            store.folder(p.spec.makes.kind, p.fingerprint),
        )
        for p in plan
    ]


def _reason(planned: Planned, earlier: Sequence[Manifest], builds: dict[str, str]) -> str:
    kind, store = planned.spec.makes.kind, Store.current()
    if store.folder(kind, planned.fingerprint).exists():
        return "its artifact is damaged or its sources have changed since"
    document = planned.build.document(planned.spec.identity, planned.spec.version)
    before = [m for m in earlier if m.stage == planned.spec.identity]
    waiting = [builds[name] for name in _input_names(planned) if name in builds]
    if not before:
        return "no artifact yet"
    changes = min((differences(m.identity, document) for m in reversed(before)), key=len)
    own = {key: change for key, change in changes.items() if not key.startswith("inputs.")}
    if planned.stage == "pin-sources":
        said = [f"{_source(key)} changed" for key in own]
    else:
        said = [f"{_key(key)} changed{_values(old, new)}" for key, (old, new) in own.items()]
    waiting = list(dict.fromkeys(waiting))
    if len(waiting) > 2:
        waiting = [waiting[0], f"{len(waiting) - 1} more stages"]
    said += [f"{' and '.join(waiting)} will build"] if waiting else []
    said = said or [f"{_input_label(planned, key)} changed" for key in changes]
    return ", ".join(dict.fromkeys(said))


def _input_names(planned: Planned) -> list[str]:
    return [str(given.name) for given in planned.build.inputs.values() if given] + [
        f"evaluations/{value}"
        for given in planned.build.inputs.values()
        if given and isinstance(given.identity, dict)
        for value in given.identity.values()
    ]


def _key(key: str) -> str:
    return key.removeprefix("config.").removeprefix("recipe.")


def _source(key: str) -> str:
    part = key.removeprefix("config.").split(".")[0].split("/")[0]
    return SOURCES.get(part, part)


def _values(old: Any, new: Any) -> str:
    shown = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    return f" {shown[0]} → {shown[1]}" if all(len(text) < 40 for text in shown) else ""


def _input_label(planned: Planned, key: str) -> str:
    role = key.removeprefix("inputs.").split(".")[0]
    given = planned.build.inputs.get(role)
    return given.name if given else key


def explain_recipe(name: str, path: Path, overrides: list[str], as_json: bool) -> str:
    """The answer of `mflow explain`.

    Raises:
        UserError: the recipe or a source does not fit.
    """
    module, sections = flow_module(name), sections_of(load_recipe(path, overrides), name)
    architecture = check_recipe(**sections, download=False)
    plan = planned_stages(module.sentence, sections)
    stages = explain(plan)
    steps, needed = steps_to_run(plan), disk_needed(plan, architecture)
    if as_json:
        listed = [
            {"name": s.stage, "state": "cached" if s.cached else "will build", "reason": s.reason or None}
            | {"artifact": str(s.artifact)}
            for s in stages
        ]
        return json.dumps({"stages": listed, "steps": steps.as_json() if steps else None, "disk_bytes": needed})
    width = max(len(s.stage) for s in stages)
    lines = [f"{s.stage:<{width}}  " + ("cached" if s.cached else f"will build, because {s.reason}") for s in stages]
    lines.append(f"training: {steps.sentence()}" if steps else "training: nothing to do")
    free = shutil.disk_usage(next(p for p in [Store.current().root, *Store.current().root.parents] if p.exists())).free
    lines.append(f"disk: about {needed / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free in {Store.current().root}")
    return "\n".join(lines)
