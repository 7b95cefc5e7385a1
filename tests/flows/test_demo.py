"""The demo as it stands, and the same recipe on real conversations."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from prefect_site import ROOT, Site, states

DEMO = ROOT / "deployments" / "recipes" / "demo_sft.yaml"
REAL = os.environ.get("MFLOW_REAL_DATA")


@pytest.fixture(scope="module")
def site(server: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The session's server, and an empty store."""
    store = tmp_path_factory.mktemp("demo") / "store"
    return dataclasses.replace(server, store=store, environment=server.environment | {"MFLOW_ARTIFACTS": str(store)})


def test_the_demo_learns_what_its_base_model_does_not_know(site: Site) -> None:
    code, said, errors = site.run(DEMO)
    assert code == 0, errors
    base, tuned = (said["scores"][name]["demo_routing"]["acc"] for name in ("base", "tuned"))
    assert base < 0.4
    assert tuned > 0.9
    assert Path(said["report"]).is_file()

    code, again, errors = site.run(DEMO)
    assert code == 0, errors
    assert set(states(again).values()) == {"cached"}
    assert again["scores"] == said["scores"]


@pytest.mark.skipif(not REAL, reason="MFLOW_REAL_DATA does not name the folder of real data")
@pytest.mark.parametrize(
    ("name", "row_format"),
    [
        ("alpaca_en_demo.json", "alpaca"),
        pytest.param("autoalign_dummy_sft.json", "sharegpt", marks=pytest.mark.slow),
    ],
)
def test_real_conversations_go_through_the_whole_chain(site: Site, name: str, row_format: str) -> None:
    files = json.dumps([str(Path(REAL or "") / name)])
    short = ("--set", "train.train_iters=3", "--set", "evaluate.limit=8")
    code, said, errors = site.run(DEMO, "--set", f"data.files={files}", *short)
    assert code == 0, errors
    assert len(said["stages"]) == 8
    dataset = next(Path(s["artifact"]) for s in said["stages"] if s["name"] == "tokenize-dataset")
    assert json.loads((dataset / "manifest.json").read_text())["row_format"] == row_format
    assert 0 <= said["scores"]["tuned"]["demo_routing"]["acc"] <= 1
