"""Continued pretraining on a real server: text, every token trained, validation files, export, scores, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect_site import Site, states
from tiny import write_jsonl

from megatron_ext.demo import routing

DATA = {"files": ["demo://routing/text"], "append_eod": True}
TRAIN = {"train_iters": 4}
HELD_OUT = 30
EVALUATE = {"limit": 2, "apply_chat_template": False}


@pytest.fixture(scope="module")
def recipe(server: Site) -> Path:
    path = server.folder / "held_out.jsonl"
    write_jsonl(path, [routing.document(row) for row in routing.rows(1)[1][:HELD_OUT]])
    data = DATA | {"validation_files": [str(path)]}
    return server.recipe(data=data, train=TRAIN, evaluate=EVALUATE, runtime={"eval_interval": 2})


@pytest.fixture(scope="module")
def read(server: Site, recipe: Path, built: dict[str, Any]) -> dict[str, Any]:
    """What the first run said; the first of all, ``built``, came before it, so that it makes the checkpoint."""
    code, said, errors = server.run(recipe, flow="full-pretrain")
    assert code == 0, errors
    return said


def test_text_is_trained_validated_exported_and_scored(read: dict[str, Any]) -> None:
    made = {stage["name"]: Path(stage["artifact"]) for stage in read["stages"]}
    assert "reference-logps" not in made
    dataset = json.loads((made["tokenize-dataset"] / "manifest.json").read_text())
    assert (dataset["kind"], dataset["chat_template"]) == ("text", None)
    validation = json.loads((made["tokenize-validation"] / "manifest.json").read_text())
    assert validation["documents"] == HELD_OUT
    assert [file["name"] for file in validation["files"]] == ["held_out.jsonl"]
    trained = json.loads((made["train-model"] / "artifact.json").read_text())
    assert trained["inputs"]["validation"] == f"datasets/{made['tokenize-validation'].name}"
    records = [json.loads(line) for line in (made["train-model"] / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert records[1]["loss"] < records[0]["loss"]
    assert (made["export-checkpoint"] / "config.json").is_file()
    assert set(read["scores"]) == {"base", "tuned"}


def test_the_report_is_about_text_and_shows_validation_beside_training(read: dict[str, Any]) -> None:
    page = Path(read["report"]).read_text(encoding="utf-8")
    for words in (
        "full-pretrain: demo://routing",
        "none: it is text",
        "validation set dashed",
        "validation loss, step 4",
        f"{HELD_OUT} documents",
        "validation: held_out.jsonl",
    ):
        assert words in page, words


def test_the_ui_has_the_planned_schedule_and_the_validation_losses(server: Site, read: dict[str, Any]) -> None:
    with server.client() as client:
        found = {artifact.key: artifact for artifact in client.read_latest_artifacts()}
    planned = json.loads(str(found["planned-schedule"].data))
    assert planned[0]["step"] == 1
    assert float(planned[0]["lr"]) == 1e-3
    assert "loss" in json.loads(str(found["validation"].data))[-1]


def test_a_second_run_is_cached(server: Site, read: dict[str, Any], recipe: Path) -> None:
    code, again, errors = server.run(recipe, flow="full-pretrain")
    assert code == 0, errors
    assert set(states(again).values()) == {"cached"}
