"""Every recipe in deployments/recipes: it loads, fits the published model's shape, and plans the stages of its flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import full_dpo, full_pretrain, full_sft
from flows.catalog import sections_of
from flows.explaining import planned_stages
from flows.recipes import load_recipe
from megatron_ext.errors import ConfigError
from tasks.checks import DEMO, architecture_of, check_layout, check_schedule, iterations_without_data

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "deployments" / "recipes").glob("*.yaml"))
PUBLISHED = json.loads((ROOT / "tests" / "published_configs.json").read_text())
ALIKE = {"Qwen/Qwen2.5-7B": "Qwen/Qwen2-7B", "meta-llama/Llama-3.1-8B": "meta-llama/Llama-3.1-8B-Instruct"}
"""Models whose shape is that of a published one in tests."""
FLOW = {"pretrain": "full-pretrain", "sft": "full-sft", "dpo": "full-dpo", "upcycle": "upcycle-sft"}
SENTENCE = {"demo_pretrain": full_pretrain, "demo_sft": full_sft, "demo_dpo": full_dpo}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_shape_of_its_model(path: Path) -> None:
    sections = sections_of(load_recipe(path, []), FLOW[path.stem.rsplit("_", 1)[1]])
    name, train = sections["model"].path, sections["train"]
    config = DEMO if name.startswith("demo://") else PUBLISHED[ALIKE.get(name, name)]
    shape = architecture_of(config, sections["model"])
    check_layout(shape, train, sections["runtime"])
    assert train.seq_length <= shape.max_position_embeddings
    if (iterations := iterations_without_data(train)) is not None:
        check_schedule(train, iterations)


def test_the_seeds_models_have_their_recipes() -> None:
    models = {load_recipe(path, []).model.path.split("/")[-1] for path in RECIPES}
    assert models >= {
        "Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3.1-8B", "Mistral-7B-Instruct-v0.2", "Mixtral-8x7B-v0.1", "Llama-2-7b-hf",
    }  # fmt: skip


def test_a_flow_refuses_data_of_another_flow() -> None:
    recipe = load_recipe(RECIPES[0].with_name("demo_dpo.yaml"), [])
    with pytest.raises(ConfigError, match=r"data\.format preference .* full-dpo"):
        sections_of(recipe, "full-pretrain")
    assert (
        sections_of(load_recipe(RECIPES[0].with_name("demo_sft.yaml"), []), "full-dpo")["data"].format == "preference"
    )


def plan(name: str, monkeypatch: pytest.MonkeyPatch, place: Path, *overrides: str) -> dict[str, str]:
    monkeypatch.setenv("MFLOW_ARTIFACTS", str(place))
    sections: dict[str, Any] = sections_of(load_recipe(RECIPES[0].with_name(f"{name}.yaml"), list(overrides)))
    return {p.stage: p.fingerprint for p in planned_stages(SENTENCE[name].sentence, sections)}


def test_only_what_decides_the_reference_computes_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = plan("demo_dpo", monkeypatch, tmp_path)
    for change, again in (
        ("train.lr=5e-4", False), ("train.preference={beta: 0.2}", False), ("train.seed=7", False),
        ("train.seq_length=256", True), ("train.precision=bf16", True), ("data.last_turn_only=true", True),
    ):  # fmt: skip
        after = plan("demo_dpo", monkeypatch, tmp_path, change)
        assert (after["reference-logps"] != before["reference-logps"]) is again, change
        assert after["train-model"] != before["train-model"], change


def test_text_pairs_and_conversations_of_a_demo_share_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans = [plan(name, monkeypatch, tmp_path) for name in SENTENCE]
    assert len({p["convert-checkpoint"] for p in plans}) == 1
    assert len({p["tokenize-dataset"] for p in plans}) == 3
    assert "reference-logps" not in plans[0]
