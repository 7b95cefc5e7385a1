"""What convert refuses, what it keeps, and that a refusal leaves nothing behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model

import megatron_ext.families.llama as llama
from megatron_ext.errors import DiskSpaceError, SourceError, UnsupportedModelError, WeightMappingError
from megatron_ext.events import Events, Follower
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import latest_folder, read_manifest
from megatron_ext.weights.torch_dist import TorchDistReader

WEIGHTS = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("pristine") / "hf", num_hidden_layers=2)


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "hf"))


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def change_config(model: Path, drop: tuple[str, ...] = (), **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in drop}
    (model / "config.json").write_text(json.dumps(kept | changes))


def change_weights(model: Path, **changes) -> None:
    """Replace weights by name (dots as double underscores); None drops one."""
    tensors = load_file(model / WEIGHTS)
    for name, tensor in changes.items():
        tensors[name.replace("__", ".")] = tensor
    save_file({n: t for n, t in tensors.items() if t is not None}, model / WEIGHTS, metadata={"format": "pt"})


def shard(model: Path, tensors_a_file: int) -> None:
    """Split the single safetensors file into shards with an index."""
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    parts = [names[i : i + tensors_a_file] for i in range(0, len(names), tensors_a_file)]
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / WEIGHTS).unlink()


def refused(model: Path, out: Path, error: type[Exception], *fragments: str) -> None:
    with pytest.raises(error) as caught:
        convert(model, out, dtype=None, events=Events())
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert list(out.iterdir()) == []


def exported_tensors(model: Path, checkpoint: Path, folder: Path, **options) -> dict[str, torch.Tensor]:
    folder.mkdir()
    export(checkpoint, model, folder, dtype=options.pop("dtype", None), events=Events(), **options)
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_checkpoint_folder_has_pointer_release_and_manifest(model, out):
    convert(model, out, dtype=None, events=Events())
    assert {path.name for path in out.iterdir()} == {"latest_checkpointed_iteration.txt", "release", "manifest.json"}
    assert (out / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    manifest = read_manifest(out)
    assert (manifest.family, manifest.dtype, manifest.vocab_size, manifest.iteration) == (
        "llama",
        "fp32",
        512,
        "release",
    )
    assert "<|im_start|>" in manifest.chat_template


def test_progress_ends_at_the_bytes_of_the_weights(model, out, tmp_path):
    convert(model, out, dtype=None, events=Events(tmp_path / "events"))
    last = [event for event in Follower(tmp_path / "events").new() if event["event"] == "progress"][-1]
    size = sum(tensor.nbytes for tensor in load_file(model / WEIGHTS).values())
    assert (last["done"], last["total"], last["unit"]) == (size, size, "bytes")
    assert last["rate"] > 0


def test_shards_give_the_same_checkpoint_as_one_file(model, out, tmp_path):
    whole = load_file(model / WEIGHTS)
    shard(model, tensors_a_file=4)
    convert(model, out, dtype=None, events=Events())
    back = exported_tensors(model, out, tmp_path / "back")
    assert back.keys() == whole.keys()
    assert all(torch.equal(back[name], whole[name]) for name in whole)


def test_mixed_types_come_back_each_as_it_was(model, out, tmp_path):
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    own = {name: t.to(kinds[i % 3]) for i, (name, t) in enumerate(sorted(load_file(model / WEIGHTS).items()))}
    save_file(own, model / WEIGHTS, metadata={"format": "pt"})
    before = (model / "config.json").read_bytes()
    convert(model, out, dtype=None, events=Events())
    back = exported_tensors(model, out, tmp_path / "back")
    assert {name: t.dtype for name, t in back.items()} == {name: t.dtype for name, t in own.items()}
    assert all(torch.equal(back[name], own[name]) for name in own)
    assert read_manifest(out).dtype == "mixed"
    assert (tmp_path / "back" / "config.json").read_bytes() == before


def test_dtype_converts_every_tensor_and_export_changes_only_that_key(model, out, tmp_path):
    convert(model, out, dtype="bf16", events=Events())
    back = exported_tensors(model, out, tmp_path / "back")
    for name, tensor in load_file(model / WEIGHTS).items():
        assert torch.equal(back[name], tensor.bfloat16()), name
    config = json.loads((model / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | {"dtype": "bfloat16"}


def test_old_spelling_of_the_type_is_changed_in_the_old_spelling(model, out, tmp_path):
    change_config(model, drop=("dtype",), torch_dtype="float32")
    convert(model, out, dtype=None, events=Events())
    exported_tensors(model, out, tmp_path / "back", dtype="fp16")
    config = json.loads((model / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | {"torch_dtype": "float16"}


@pytest.mark.parametrize("rule", llama.FAMILY.weights, ids=lambda rule: rule.mcore)
def test_a_deleted_rule_fails_in_both_directions(rule, model, out, tmp_path, monkeypatch):
    if rule.only_if:
        change_config(model, attention_bias=True, mlp_bias=True)
        write_model(model, num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    convert(model, out, dtype=None, events=Events())
    rest = tuple(other for other in llama.FAMILY.weights if other is not rule)
    monkeypatch.setattr(llama, "FAMILY", replace(llama.FAMILY, weights=rest))
    (tmp_path / "again").mkdir()
    refused(model, tmp_path / "again", WeightMappingError, "no rule converts")
    (tmp_path / "back").mkdir()
    with pytest.raises(WeightMappingError, match="no rule exports"):
        export(out, model, tmp_path / "back", dtype=None, events=Events())


def test_a_weight_that_no_rule_knows_is_named(model, out):
    change_weights(model, model__layers__0__self_attn__q_norm__weight=torch.ones(8))
    refused(model, out, WeightMappingError, "model.layers.0.self_attn.q_norm.weight")


def test_a_weight_that_is_not_there_is_named(model, out):
    change_weights(model, **{QUERY.replace(".", "__"): None})
    refused(model, out, WeightMappingError, QUERY)


def test_a_shape_that_contradicts_the_config_is_named(model, out):
    change_config(model, intermediate_size=128)
    refused(model, out, WeightMappingError, "gate_proj", "[160, 64]", "[128, 64]")


def test_a_damaged_tokenizer_file_is_named(model, out):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text("{")
    refused(model, out, SourceError, "tokenizer_config.json", "not valid JSON")


def test_an_index_of_another_shape_is_named(model, out):
    (model / "model.safetensors.index.json").write_text("[]")
    refused(model, out, SourceError, "model.safetensors.index.json", "damaged")


def test_rotary_buffers_of_old_files_are_not_weights(model, out, tmp_path):
    change_weights(model, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    convert(model, out, dtype=None, events=Events())
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in exported_tensors(model, out, tmp_path / "back")


def test_tied_model_with_a_second_copy_of_its_embedding_converts(model, out):
    change_config(model, tie_word_embeddings=True)
    change_weights(model, lm_head__weight=load_file(model / WEIGHTS)["model.embed_tokens.weight"].clone())
    convert(model, out, dtype=None, events=Events())
    assert "output_layer.weight" not in TorchDistReader(latest_folder(out)).shapes


def test_tied_model_whose_output_weights_differ_is_refused(model, out):
    change_config(model, tie_word_embeddings=True)
    refused(model, out, WeightMappingError, "lm_head.weight differs", "tie_word_embeddings")


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -5000])
def test_truncated_safetensors_are_named(keep, model, out):
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refused(model, out, SourceError, WEIGHTS)


def test_damaged_safetensors_header_is_named(model, out):
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 64 + path.read_bytes()[72:])
    refused(model, out, SourceError, WEIGHTS)


def test_missing_shard_is_named(model, out):
    shard(model, tensors_a_file=8)
    (model / "model-00002-of-00003.safetensors").unlink()
    refused(model, out, SourceError, "model-00002-of-00003.safetensors")


def test_tensor_that_the_index_misplaces_is_named(model, out):
    shard(model, tensors_a_file=8)
    index = model / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][QUERY] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    refused(model, out, SourceError, QUERY)


def test_quantized_type_is_named(model, out):
    change_weights(model, **{QUERY.replace(".", "__"): torch.zeros(64, 64, dtype=torch.int8)})
    refused(model, out, SourceError, QUERY, "I8", "Available: BF16")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model_type": "llamas"}, ["'llamas'", "did you mean 'llama'?", "Available: llama, mistral"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"attention_bias": True}, ["attention_bias True", "mlp_bias False"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["rope_type 'longrope'", "llama3", "yarn"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": None}, ["rope_type 'dynamic'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"logit_scale": 0.5}, ["key logit_scale (0.5)", "remove it from config.json"]),
    ],
)
def test_what_no_family_computes_is_refused_by_key_and_value(changes, fragments, model, out):
    change_config(model, **changes)
    refused(model, out, UnsupportedModelError, *fragments)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers", "missing"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 8", "num_key_value_heads 3"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "missing"]),
    ],
)
def test_unusable_config_values_are_named(changes, fragments, model, out):
    change_config(model, **changes)
    refused(model, out, SourceError, *fragments)


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_both_spellings_of_a_config_give_the_same_architecture(scaling, model, tmp_path):
    architectures = []
    for spelling in ("old", "new"):
        if spelling == "old":
            drop, changes = (
                ("rope_parameters", "dtype"),
                {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "float32"},
            )
        else:
            rope = {"rope_type": "default", "rope_theta": 5e5} | (scaling or {})
            drop, changes = ("rope_theta", "rope_scaling", "torch_dtype"), {"rope_parameters": rope, "dtype": "float32"}
        change_config(model, drop=drop, **changes)
        (tmp_path / spelling).mkdir()
        convert(model, tmp_path / spelling, dtype=None, events=Events())
        architectures.append(read_manifest(tmp_path / spelling).architecture)
    assert architectures[0] == architectures[1]
    assert architectures[0].rotary_base == 5e5
    assert architectures[0].rope_scaling == scaling


def test_too_little_disk_space_is_refused_before_the_first_byte(model, out, monkeypatch):
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(model, out, DiskSpaceError, "needs")


def test_what_a_killed_attempt_left_is_cleared(model, out):
    (out / "release").mkdir()
    (out / "release" / "__0_0.distcp").write_bytes(b"half")
    convert(model, out, dtype=None, events=Events())
    TorchDistReader(latest_folder(out))
    assert not list(out.rglob("*.partial"))
