"""Preference training on a real server: pairs, a cached reference, training, export, scores, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect_site import Site, states
from tiny import write_jsonl

from megatron_ext.demo import routing

PAIRS = 60
TRAIN = {"train_iters": 3, "validation_fraction": 0.2}


@pytest.fixture(scope="module")
def recipe(server: Site) -> Path:
    """The tiny recipe on a few pairs of the demo's: its reference is a matter of seconds."""
    pairs, _ = routing.rows(1)
    path = server.folder / "pairs.jsonl"
    write_jsonl(path, [routing.preference(row, number) for number, row in enumerate(pairs[:PAIRS])])
    return server.recipe(data={"files": [str(path)]}, train=TRAIN, evaluate={"limit": 2})


@pytest.fixture(scope="module")
def preferred(server: Site, recipe: Path, built: dict[str, Any]) -> dict[str, Any]:
    """What the first run said; the first of all, ``built``, came before it, so that it makes the checkpoint."""
    code, said, errors = server.run(recipe, flow="full-dpo")
    assert code == 0, errors
    return said


def folders(said: dict[str, Any]) -> dict[str, Path]:
    return {stage["name"]: Path(stage["artifact"]) for stage in said["stages"]}


def test_the_training_takes_the_reference_of_its_stage(preferred: dict[str, Any]) -> None:
    made = folders(preferred)
    reference = json.loads((made["reference-logps"] / "manifest.json").read_text())
    assert reference["pairs"] == PAIRS
    assert not (made["train-model"] / "reference").exists(), "the training computed a reference of its own"
    first = json.loads((made["train-model"] / "metrics.jsonl").read_text().splitlines()[0])
    assert first["margin"] == pytest.approx(0, abs=1e-5), "before its first step a model is its own reference"
    validated = json.loads((made["train-model"] / "validation.jsonl").read_text().splitlines()[-1])
    assert 0 <= validated["accuracy"] <= 1
    assert set(preferred["scores"]) == {"base", "tuned"}


def test_the_report_shows_preferences_and_the_plan(preferred: dict[str, Any]) -> None:
    page = Path(preferred["report"]).read_text(encoding="utf-8")
    for words in ("full-dpo: demo://routing", "Margin", "Preferred the better answer", "as planned before training"):
        assert words in page, words


def test_a_second_run_is_cached_and_another_learning_rate_keeps_the_reference(
    server: Site, preferred: dict[str, Any], recipe: Path
) -> None:
    code, again, errors = server.run(recipe, flow="full-dpo")
    assert code == 0, errors
    assert set(states(again).values()) == {"cached"}
    for change, state in (("train.lr=0.0005", "cached"), ("train.seq_length=96", "will build")):
        explained = server.command("mflow", "explain", "full-dpo", str(recipe), "--set", change)
        lines = dict(line.split("  ", 1) for line in explained.stdout.splitlines() if "  " in line)
        assert lines["reference-logps"].strip().startswith(state), change
        assert lines["train-model"].strip().startswith("will build")
        assert lines["tokenize-dataset"].strip() == "cached"


@pytest.mark.slow
def test_a_rebuilt_checkpoint_fits_the_reference_that_was_computed_with_the_damaged_one(
    server: Site, preferred: dict[str, Any], recipe: Path
) -> None:
    weights = next(folders(preferred)["convert-checkpoint"].rglob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1])
    code, said, errors = server.run(recipe, "--set", "train.lr=0.0005", flow="full-dpo")
    assert code == 0, errors
    assert states(said)["convert-checkpoint"] == "built"
    assert states(said)["reference-logps"] == "cached"


def test_other_data_is_refused_in_one_line(server: Site) -> None:
    done = server.command("mflow", "run", "full-dpo", str(server.recipe(data={"format": "text"})))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "data.format text" in done.stderr
    assert "full-pretrain" in done.stderr
