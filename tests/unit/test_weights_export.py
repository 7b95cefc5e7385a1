"""What export refuses, how it shards, and which files it copies."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bare import bare_weight
from safetensors.torch import load_file
from tiny import write_model

from megatron_ext.errors import CheckpointError, UnsupportedModelError, VocabularyError
from megatron_ext.events import Events
from megatron_ext.families.base import Part
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.hf import TensorInfo
from megatron_ext.weights.hf_writer import SafetensorsWriter
from megatron_ext.weights.manifest import read_manifest, write_latest, write_manifest
from megatron_ext.weights.torch_dist import TorchDistReader, TorchDistWriter


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "checkpoint").mkdir()
    convert(write_model(folder / "hf", num_hidden_layers=2), folder / "checkpoint", dtype=None, events=Events())
    return folder


@pytest.fixture
def place(pristine, tmp_path) -> Path:
    """A folder with hf/, checkpoint/ and an empty out/."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out").mkdir()
    return tmp_path


def run(place: Path, **options) -> dict:
    return export(place / "checkpoint", place / "hf", place / "out", dtype=None, events=Events(), **options)


def refused(place: Path, error: type[Exception], *fragments: str) -> None:
    with pytest.raises(error) as caught:
        run(place)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert list((place / "out").iterdir()) == []


def change_config(place: Path, **changes) -> None:
    path = place / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_one_shard_needs_no_index(place):
    run(place)
    assert [path.name for path in (place / "out").glob("model*")] == ["model.safetensors"]


def test_no_shard_is_larger_than_asked_and_the_index_names_them_all(place):
    run(place, max_shard_size=150_000)
    index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (place / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {}
    for name in files:
        for tensor, value in load_file(place / "out" / name).items():
            assert index["weight_map"][tensor] == name
            sizes[name] = sizes.get(name, 0) + value.nbytes
    assert max(sizes.values()) <= 150_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]


def test_transformers_loads_shards_and_gives_the_same_logits(place):
    from transformers import AutoModelForCausalLM

    run(place, max_shard_size=150_000)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(place / name)(tokens).logits for name in ("hf", "out")]
    assert torch.equal(*logits)


def test_weights_hidden_files_and_the_model_card_are_not_copied(place):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", ".gitattributes", "README.md", "LICENSE"):
        (place / "hf" / name).write_text("x")
    (place / "hf" / "original").mkdir()
    (place / "hf" / "additional_chat_templates").mkdir()
    (place / "hf" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    run(place)
    copied = {str(path.relative_to(place / "out")) for path in (place / "out").rglob("*") if path.is_file()}
    assert copied >= {"LICENSE", "config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"}
    assert not copied & {"pytorch_model.bin", "pytorch_model.bin.index.json", ".gitattributes", "README.md"}


def test_checkpoint_of_another_architecture_is_refused_by_field(place):
    change_config(place, num_hidden_layers=3)
    refused(place, CheckpointError, "num_layers 2", "says 3")


def test_checkpoint_of_another_rope_is_refused_although_every_shape_fits(place):
    change_config(place, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    refused(place, CheckpointError, "rotary_base")


def test_checkpoint_of_another_family_is_refused(place):
    change_config(place, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    refused(place, CheckpointError, "family llama", "qwen2")


def test_unknown_model_type_is_refused(place):
    change_config(place, model_type="gpt2")
    refused(place, UnsupportedModelError, "'gpt2'", "Available: llama, mistral")


def test_another_tokenizer_is_refused(place):
    path = place / "hf" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    refused(place, VocabularyError, "tokenizer")


@pytest.mark.parametrize("name", ["manifest.json", "latest_checkpointed_iteration.txt", "release/.metadata"])
def test_incomplete_checkpoint_names_the_missing_file(name, place):
    (place / "checkpoint" / name).unlink()
    refused(place, CheckpointError, Path(name).name)


def test_pointer_to_an_iteration_that_is_not_there_is_named(place):
    (place / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("12\n")
    refused(place, CheckpointError, "iter_0000012")


def test_manifest_of_another_kind_is_refused(place):
    (place / "checkpoint" / "manifest.json").write_text('{"format": "megatron-flows/dataset"}')
    refused(place, CheckpointError, "manifest.json", "format")


def test_truncated_weights_are_named_and_leave_nothing(place):
    path = place / "checkpoint" / "release" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100_000])
    refused(place, CheckpointError, "__0_0.distcp", "truncated or damaged")


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_damaged_metadata_is_named(name, place):
    path = place / "checkpoint" / "release" / name
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    refused(place, CheckpointError, name)


def test_optimizer_state_beside_the_weights_is_not_exported(place):
    release = place / "checkpoint" / "release"
    source = TorchDistReader(release)
    values = {key: source.read(key, (0,) * len(shape), shape) for key, shape in source.shapes.items()}
    values |= {f"optimizer.{key}": torch.zeros(shape) for key, shape in source.shapes.items()}
    plan = [bare_weight(key, tuple(value.shape)) for key, value in values.items()]
    dtypes = {key: value.dtype for key, value in values.items()}
    architecture = read_manifest(place / "checkpoint").architecture
    writer = TorchDistWriter(place / "checkpoint" / "iter_0000003", plan, dtypes, architecture)
    for weight in plan:
        writer.write(weight, 0, values[weight.key])
    writer.close()
    shutil.rmtree(release)
    write_latest(place / "checkpoint", 3)
    run(place)
    exported, original = (load_file(place / name / "model.safetensors") for name in ("out", "hf"))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_embedding_with_fewer_rows_than_the_vocabulary_is_refused(place):
    manifest = read_manifest(place / "checkpoint")
    larger = manifest.architecture.model_copy(update={"vocab_size": 600})
    write_manifest(place / "checkpoint", manifest.model_copy(update={"architecture": larger}))
    change_config(place, vocab_size=600)
    refused(place, CheckpointError, "embedding.word_embeddings.weight", "[512, 64]", "[600, 64]")


def test_tensors_of_odd_sizes_and_several_types_are_written_where_readers_expect_them(tmp_path):
    types = [torch.bfloat16, torch.float32, torch.float16, torch.float32]
    tensors = {f"t{i}": torch.arange(3 + 2 * i).to(kind) for i, kind in enumerate(types)}
    announced = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    writer = SafetensorsWriter(tmp_path, announced, max_shard_size=1000)
    for name in reversed(tensors):
        writer.write(Part(name, announced[name].shape), 0, tensors[name])
    writer.close()
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_weight_that_was_announced_and_never_came_is_a_crash_not_a_hole(tmp_path):
    writer = SafetensorsWriter(tmp_path, {"a": TensorInfo(torch.float32, (2,))}, max_shard_size=1000)
    with pytest.raises(ValueError, match="a"):
        writer.close()


def test_shape_that_contradicts_the_manifest_is_named(place):
    manifest = read_manifest(place / "checkpoint")
    smaller = manifest.architecture.model_copy(update={"ffn_hidden_size": 128})
    write_manifest(place / "checkpoint", manifest.model_copy(update={"architecture": smaller}))
    change_config(place, intermediate_size=128)
    refused(place, CheckpointError, "linear_fc1.weight", "[2, 320, 64]", "[2, 256, 64]")
