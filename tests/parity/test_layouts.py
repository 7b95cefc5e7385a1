"""A checkpoint that megatron-core saved at any tensor- and pipeline-parallel size exports to the same weights."""

import json

import pytest
import torch
from mcore_worker import run_worker
from safetensors.torch import load_file
from tiny import write_model

from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import read_manifest, write_latest, write_manifest
from megatron_ext.weights.torch_dist import TorchDistReader

LAYOUTS = {"tp 1": (1, 1), "tp 2": (2, 1), "pp 2": (1, 2)}
MODELS = {
    "llama, odd vocabulary": {"vocab_size": 509},
    "qwen2 tied": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Each model, converted, and saved again by megatron-core as iteration 7 of each layout."""
    tmp = tmp_path_factory.mktemp("layouts")
    steps = []
    for number, (case, overrides) in enumerate(MODELS.items()):
        model = write_model(tmp / case / "hf", case.split()[0].strip(","), seed=number, **overrides)
        converted = tmp / case / "converted"
        converted.mkdir()
        convert(model, converted, dtype=None, events=Events())
        for layout, (tp, pp) in LAYOUTS.items():
            folder = tmp / case / layout
            (folder / "iter_0000007").mkdir(parents=True)
            write_manifest(folder, read_manifest(converted).model_copy(update={"iteration": 7}))
            write_latest(folder, 7)
            steps.append({"checkpoint": str(converted), "tp": tp, "pp": pp, "save": str(folder / "iter_0000007")})
    run_worker(steps, tmp, processes=2)
    return tmp


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MODELS)
def test_export_of_any_layout_gives_back_the_source_bit_for_bit(checkpoints, case, layout, tmp_path):
    model, checkpoint = checkpoints / case / "hf", checkpoints / case / layout
    export(checkpoint, model, tmp_path, dtype=None, events=Events(), max_shard_size=100_000)
    exported = {name: t for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    source = load_file(model / "model.safetensors")
    assert exported.keys() == source.keys()
    assert [name for name in source if not torch.equal(source[name], exported[name])] == []
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == source.keys()


@pytest.mark.distributed
def test_tensor_parallel_checkpoints_of_this_test_are_really_split_and_padded(checkpoints):
    reader = TorchDistReader(checkpoints / "llama, odd vocabulary" / "tp 2" / "iter_0000007")
    assert reader.shapes["embedding.word_embeddings.weight"] == (512, 64)
    assert len(reader._chunks["decoder.layers.mlp.linear_fc1.weight"]) == 4 * 4  # layers x (gate, up) x tp


def test_weights_load_without_the_objects_that_transformer_engine_keeps_beside_them(tmp_path, monkeypatch):
    """As the other way round: with Transformer Engine from a checkpoint that was trained without it."""
    monkeypatch.setattr("megatron_ext.weights.torch_dist.extra_states", lambda architecture: ())
    model, out = write_model(tmp_path / "hf", num_hidden_layers=2), tmp_path / "checkpoint"
    out.mkdir()
    convert(model, out, dtype=None, events=Events())
    torch.save(torch.arange(12)[None], tmp_path / "tokens.pt")
    step = {"checkpoint": str(out), "tp": 1, "pp": 1, "tokens": str(tmp_path / "tokens.pt")}
    run_worker([step | {"logits": str(tmp_path / "logits.pt")}], tmp_path)
    assert torch.load(tmp_path / "logits.pt").isfinite().all()
