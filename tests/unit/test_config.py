"""Recipes: what is refused, and how the refusal reads."""

import pytest

from megatron_ext.config import Recipe, TrainConfig
from megatron_ext.config_files import read_yaml, validated, with_overrides
from megatron_ext.errors import ConfigError

RECIPE = {
    "model": {"path": "model"},
    "data": {"files": ["train.jsonl"]},
    "train": {"global_batch_size": 8, "train_iters": 10, "lr": 1e-4},
    "evaluate": {"tasks": ["demo_routing"]},
}


def test_unknown_key_is_refused_and_the_nearest_one_is_named():
    with pytest.raises(ConfigError, match=r"unknown key 'train\.weigth_decay'; did you mean 'weight_decay'\?"):
        validated(Recipe, with_overrides(RECIPE, ["train.weigth_decay=0.1"]), "recipe.yaml")


def test_value_out_of_range_names_key_value_and_file():
    with pytest.raises(
        ConfigError, match=r"train\.lr: input should be greater than 0 \(value: -1\) \(in recipe\.yaml\)"
    ):
        validated(Recipe, with_overrides(RECIPE, ["train.lr=-1"]), "recipe.yaml")


@pytest.mark.parametrize("given", [{}, {"train_iters": 3, "train_epochs": 1}])
def test_exactly_one_length_must_be_given(given):
    with pytest.raises(ConfigError, match="exactly one of train_iters, train_epochs, train_tokens"):
        validated(TrainConfig, {"global_batch_size": 8, "lr": 1e-4, **given}, "test")


def test_an_overridden_length_replaces_the_recipes():
    recipe = validated(Recipe, with_overrides(RECIPE, ["train.train_epochs=2"]), "test")
    assert recipe.train.train_epochs == 2
    assert recipe.train.train_iters is None


def test_overrides_are_read_as_yaml_and_json():
    values = with_overrides(RECIPE, ['data.files=["a.json", "b.json"]', "train.lr=1e-5", "runtime.num_threads=2"])
    recipe = validated(Recipe, values, "test")
    assert recipe.data.files == ("a.json", "b.json")
    assert recipe.train.lr == 1e-5
    assert recipe.runtime.num_threads == 2


def test_overrides_leave_the_original_alone():
    with_overrides(RECIPE, ["train.lr=1"])
    assert RECIPE["train"]["lr"] == 1e-4


@pytest.mark.parametrize("override", ["train.lr", "=3", "model.path.x=1"])
def test_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match="--set"):
        with_overrides(RECIPE, [override])


def test_broken_yaml_names_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"r\.yaml is not valid YAML"):
        read_yaml(tmp_path / "r.yaml")
