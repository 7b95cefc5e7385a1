"""Hugging Face -> torch_dist -> Hugging Face gives back every tensor and every other file, bit for bit."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model

from megatron_ext.errors import WeightMappingError
from megatron_ext.events import Events
from megatron_ext.families import available, find_family
from megatron_ext.families.shared import STACKED
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export

SHAPES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama, one key head": {"num_key_value_heads": 1},
    "llama, as many key heads as query heads": {"num_key_value_heads": 8},
    "llama, head_dim of its own": {"head_dim": 24},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, odd vocabulary": {"vocab_size": 509},
    "mistral": {"num_key_value_heads": 1, "head_dim": 24},
    "mixtral": {"vocab_size": 509},
    "mixtral, stacked experts": {"stacked_experts": True},
    "mixtral, three experts, six heads": {
        "num_local_experts": 3, "hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3
    },
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2_moe": {},
    "qwen2_moe, stacked experts": {"stacked_experts": True, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1},
    "qwen3_moe": {"vocab_size": 509},
    "qwen3_moe, stacked experts": {"stacked_experts": True, "tie_word_embeddings": True},
}  # fmt: skip
RULES = [(name, rule) for name in available() for rule in find_family(name).weights]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same_tensors(left: Path, right: Path) -> None:
    a, b = tensors_of(left), tensors_of(right)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def round_trip(model: Path, tmp: Path, *, dtype: str | None = None, max_shard_size: int = 5_000_000_000) -> Path:
    for name in ("checkpoint", "export"):
        (tmp / name).mkdir()
    convert(model, tmp / "checkpoint", dtype=dtype, events=Events())
    export(tmp / "checkpoint", model, tmp / "export", dtype=None, events=Events(), max_shard_size=max_shard_size)
    return tmp / "export"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SHAPES)
def test_round_trip_is_bit_equal(case, dtype, tmp_path):
    model = write_model(tmp_path / "hf", case.split()[0].strip(","), dtype=dtype, **SHAPES[case])
    assert_same_tensors(model, round_trip(model, tmp_path))


@pytest.mark.parametrize(("name", "rule"), RULES, ids=[f"{name} {rule.mcore} {rule.hf[0]}" for name, rule in RULES])
def test_no_rule_can_be_left_out(name, rule, tmp_path, monkeypatch):
    biases = {"attention_bias": True, "mlp_bias": True} if rule.only_if == "add_bias_linear" else {}
    model = write_model(
        tmp_path / "hf", name, num_hidden_layers=1, stacked_experts=rule.layout == STACKED, **biases
    )  # fmt: skip
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    checkpoint.mkdir()
    out.mkdir()
    convert(model, checkpoint, dtype=None, events=Events())
    module = importlib.import_module(find_family.__module__ + "." + name)
    rest = tuple(other for other in module.FAMILY.weights if other is not rule)
    monkeypatch.setattr(module, "FAMILY", replace(module.FAMILY, weights=rest))
    with pytest.raises(WeightMappingError, match="no rule converts"):
        convert(model, out, dtype=None, events=Events())
    with pytest.raises(WeightMappingError, match="no rule exports"):
        export(checkpoint, model, out, dtype=None, events=Events())


@pytest.mark.parametrize(
    ("stacked", "experts", "named"),
    [
        (False, 5, "has no weight model.layers.0.block_sparse_moe.experts.4.w1.weight"),
        (False, 3, "no rule converts model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        (True, 5, r"experts.gate_up_proj of .* has shape \[4, 96, 64\], but config.json implies \[5, 96, 64\]"),
    ],
)
def test_experts_that_contradict_the_config_are_named(stacked, experts, named, tmp_path):
    model = write_model(tmp_path / "hf", "mixtral", num_hidden_layers=1, stacked_experts=stacked)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_local_experts": experts}))
    router = "model.layers.0.mlp.gate.weight" if stacked else "model.layers.0.block_sparse_moe.gate.weight"
    weights = load_file(model / "model.safetensors")
    weights[router] = torch.zeros(experts, 64)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightMappingError, match=named):
        convert(model, tmp_path / "out", dtype=None, events=Events())


def test_every_other_file_is_copied_byte_for_byte(tmp_path):
    model = write_model(tmp_path / "hf")
    (model / "generation_config.json").write_text('{ "eos_token_id":  2 }')
    exported = round_trip(model, tmp_path)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
