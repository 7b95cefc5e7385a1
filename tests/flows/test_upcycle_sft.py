"""A dense model becomes a mixture of experts on a real server: converted, trained, exported, scored by lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect_site import Site, states

MODEL = {"extra_vocab_size": 5, "upcycle": {"num_experts": 4, "topk": 2}}


def run(server: Site, recipe: Path) -> tuple[int, dict[str, Any], str]:
    done = server.command("mflow", "run", "upcycle-sft", str(recipe), "--json")
    return done.returncode, json.loads(done.stdout), done.stderr


def test_experts_are_trained_exported_and_scored(server: Site, built: dict[str, Any]) -> None:
    path = server.recipe(model=MODEL)
    code, said, errors = run(server, path)
    assert code == 0, errors
    reused = {"pin-sources", "tokenize-dataset", "evaluate-base"}
    assert states(said) == {name: "cached" if name in reused else "built" for name in states(built)}
    folders = {stage["name"]: Path(stage["artifact"]) for stage in said["stages"]}

    manifest = json.loads((folders["convert-checkpoint"] / "manifest.json").read_text())
    assert 0 < manifest["changes"]["step_zero"]["max_difference"] <= 1e-5
    dense = manifest["changes"]["source_config"]
    exported = json.loads((folders["export-checkpoint"] / "config.json").read_text())
    assert (dense["model_type"], exported["model_type"], exported["num_experts"]) == ("qwen2", "qwen2_moe", 4)
    assert exported["vocab_size"] == dense["vocab_size"] + 5
    assert said["scores"]["tuned"]["demo_routing"].keys() == said["scores"]["base"]["demo_routing"].keys()
    page = Path(said["report"]).read_text(encoding="utf-8")
    assert "upcycle-sft: demo://routing" in page
    assert "logits before training" in page

    explained = server.command("mflow", "explain", "upcycle-sft", str(path))
    assert explained.stdout.count("cached") == len(said["stages"])


def test_a_recipe_without_upcycling_is_refused_in_one_line(server: Site) -> None:
    code, said, errors = run(server, server.recipe())
    assert code == 2
    assert said["stages"] == []
    assert "model.upcycle" in errors
    assert len(errors.splitlines()) == 1
