"""megatron-core loads a checkpoint at any parallel size, answers alike, and saves what exports to the same weights."""

import json

import pytest
import torch
from mcore_worker import run_worker
from safetensors.torch import load_file
from tiny import write_model
from torch.distributed.checkpoint import FileSystemReader

from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import read_manifest, write_latest, write_manifest

LAYOUTS = {"one": {}, "tp 2": {"tp": 2}, "pp 2": {"pp": 2}, "ep 2": {"ep": 2}, "tp 2, ep 2": {"tp": 2, "ep": 2}}
MODELS = {
    "llama, odd vocabulary": {"vocab_size": 509},
    "qwen2 tied, window from layer 2 on": {
        "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2
    },
    "mistral, window": {"sliding_window": 17},
    "mixtral, odd vocabulary": {"vocab_size": 509},
    "qwen2_moe": {},
    "qwen3_moe, stacked experts": {"stacked_experts": True},
}  # fmt: skip
EXPERTS = [case for case in MODELS if case.startswith(("mixtral", "qwen2_moe", "qwen3_moe"))]
TWO = [(case, name) for case in MODELS for name in ("one", "tp 2", "pp 2", "ep 2") if case in EXPERTS or name != "ep 2"]
FOUR = [(case, "tp 2, ep 2") for case in EXPERTS]


def save_again(tmp, cases, processes: int) -> None:
    """Convert the models, answer, and save again as iteration 7 of each layout with megatron-core."""
    torch.save(torch.randint(0, 500, (2, 64), generator=torch.Generator().manual_seed(1)), tmp / "tokens.pt")
    steps = []
    for case, layout in cases:
        converted, folder = tmp / case / "converted", tmp / case / layout
        if not converted.exists():
            converted.mkdir(parents=True)
            model = write_model(tmp / case / "hf", case.split()[0].strip(","), **MODELS[case])
            convert(model, converted, dtype=None, events=Events())
        (folder / "iter_0000007").mkdir(parents=True)
        write_manifest(folder, read_manifest(converted).model_copy(update={"iteration": 7}))
        write_latest(folder, 7)
        files = {"tokens": tmp / "tokens.pt", "logits": folder / "logits.pt", "save": folder / "iter_0000007"}
        step = {"checkpoint": str(converted), **LAYOUTS[layout]}
        steps.append(step | {name: str(path) for name, path in files.items()})
    run_worker(steps, tmp, processes)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every model under every layout that two processes can have."""
    tmp = tmp_path_factory.mktemp("layouts")
    save_again(tmp, TWO, processes=2)
    return tmp


def assert_same_logits(folder, case: str, layout: str) -> None:
    rows = MODELS[case].get("vocab_size", 512)
    one, split = (torch.load(folder / case / name / "logits.pt")[..., :rows] for name in ("one", layout))
    assert one.abs().max() > 1
    torch.testing.assert_close(split, one, rtol=0, atol=1e-5)


def assert_exports_to_its_source(folder, case: str, layout: str, out) -> None:
    model, checkpoint = folder / case / "hf", folder / case / layout
    export(checkpoint, model, out, dtype=None, events=Events(), max_shard_size=100_000)
    exported = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    source = load_file(model / "model.safetensors")
    assert exported.keys() == source.keys()
    assert [name for name in source if not torch.equal(source[name], exported[name])] == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == source.keys()


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "layout"), TWO)
def test_export_of_any_layout_gives_back_the_source_bit_for_bit(checkpoints, case, layout, tmp_path):
    assert_exports_to_its_source(checkpoints, case, layout, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "layout"), [pair for pair in TWO if pair[1] != "one"])
def test_logits_are_those_of_one_process(checkpoints, case, layout):
    assert_same_logits(checkpoints, case, layout)


@pytest.mark.slow
@pytest.mark.distributed
def test_experts_split_by_tensor_and_expert_parallelism_together(tmp_path):
    save_again(tmp_path, [(case, "one") for case in EXPERTS] + FOUR, processes=4)
    for number, (case, layout) in enumerate(FOUR):
        assert_same_logits(tmp_path, case, layout)
        out = tmp_path / f"export {number}"
        out.mkdir()
        assert_exports_to_its_source(tmp_path, case, layout, out)


def entries(folder):
    """Key -> what a torch_dist folder says of it."""
    return FileSystemReader(str(folder)).read_metadata().state_dict_metadata


@pytest.mark.distributed
@pytest.mark.parametrize("case", MODELS)
def test_a_converted_checkpoint_has_the_keys_that_megatron_core_saves(checkpoints, case):
    """Besides, it has the objects that Transformer Engine's layers expect."""
    ours, theirs = (entries(checkpoints / case / name) for name in ("converted/release", "one/iter_0000007"))
    assert theirs.keys() <= ours.keys()
    assert [key for key in ours.keys() - theirs.keys() if "._extra_state/shard_" not in key] == []
    vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}  # padded by whoever loads it
    for key in theirs.keys() - vocabulary:
        assert getattr(ours[key], "size", None) == getattr(theirs[key], "size", None), key


@pytest.mark.distributed
def test_checkpoints_of_this_test_are_really_split_and_padded(checkpoints):
    llama, mixtral = (
        entries(checkpoints / f"{name}, odd vocabulary" / "tp 2" / "iter_0000007") for name in ("llama", "mixtral")
    )
    assert tuple(llama["embedding.word_embeddings.weight"].size) == (512, 64)
    assert len(llama["decoder.layers.mlp.linear_fc1.weight"].chunks) == 4 * 4  # layers x (gate, up) x tp
    assert len(mixtral["decoder.layers.mlp.experts.experts.linear_fc1.weight"].chunks) == 4 * 4 * 4  # x experts


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
