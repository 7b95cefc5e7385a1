"""Weights that no ordinary model has: not numbers, in fp64, out of range, where config.json says there are none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model

from megatron_ext.errors import PrecisionError, WeightMappingError
from megatron_ext.events import Events
from megatron_ext.weights.casting import cast
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.megatron_writer import asked_layout

WEIGHTS = "model.safetensors"


def converted(model: Path, out: Path, **options) -> dict:
    out.mkdir()
    return convert(model, out, **({"dtype": None, "verify": "digest"} | options), events=Events())


def exported(checkpoint: Path, model: Path, out: Path, **options) -> dict:
    out.mkdir()
    return export(checkpoint, model, out, **({"dtype": None, "verify": "digest"} | options), events=Events())


def test_a_shared_expert_that_config_json_denies_is_not_dropped(tmp_path):
    model = write_model(tmp_path / "hf", "qwen2_moe", num_hidden_layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"shared_expert_intermediate_size": 0}))
    with pytest.raises(WeightMappingError, match=r"shared_expert\.\w+\.weight .* has shape .* config\.json implies"):
        converted(model, tmp_path / "checkpoint")


@pytest.mark.parametrize("layout", [None, asked_layout("mp_rank", pp=2)], ids=["torch_dist", "mp_rank"])
def test_a_tied_copy_with_values_that_are_no_numbers_is_a_copy(layout, tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=2, tie_word_embeddings=True)
    tensors = load_file(model / WEIGHTS)
    tensors["model.embed_tokens.weight"][3, 5] = torch.nan
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    converted(model, tmp_path / "checkpoint", layout=layout)


def test_a_model_in_fp64_says_so(tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=1)
    tensors = {name: tensor.double() for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    assert converted(model, tmp_path / "checkpoint")["dtype"] == "fp64"
    summary = exported(tmp_path / "checkpoint", model, tmp_path / "out")
    assert (summary["dtype"], summary["verified"]["dtype"]) == ("fp64", "fp64")


@pytest.mark.parametrize(
    ("value", "own", "dtype", "remedy"),
    [
        (3.4e38, torch.float32, torch.bfloat16, "bf16 cannot.*use --dtype fp32$"),
        (1e5, torch.float32, torch.float16, "fp16 cannot.*use --dtype bf16 or fp32$"),
        (1e5, torch.bfloat16, torch.float16, "fp16 cannot.*use --dtype bf16 or fp32$"),
        (1e300, torch.float64, torch.float32, "fp32 cannot.*leave out --dtype$"),
    ],
)
def test_a_value_beyond_the_type_is_refused_and_never_infinity(value, own, dtype, remedy):
    rows = torch.tensor([[1.0, value]], dtype=own)
    with pytest.raises(PrecisionError, match=f"odd holds .* at row 7, column 1, which {remedy}"):
        cast(rows, dtype, "odd", 7)
    infinite = torch.tensor([torch.inf, torch.nan], dtype=own)
    assert torch.equal(cast(infinite, dtype, "odd", 0)[:1], infinite[:1].to(dtype))


def test_a_tensor_that_vanishes_in_fp16_is_noted(tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=1)
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(1e-9)
    tensors["model.layers.0.mlp.up_proj.weight"][:8] = 1e-9
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    events = Notes()
    convert(model, tmp_path / "out", dtype="fp16", events=events)
    (said,) = events.said
    assert "model.layers.0.mlp.down_proj.weight became zero (1 such tensors)" in said


class Notes(Events):
    """Keeps what is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
