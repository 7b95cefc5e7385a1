"""Models that keep their weights in pickles: pytorch_model.bin, single or sharded."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_model

from megatron_ext.errors import SourceError, UntrustedPickleError, WeightMappingError
from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export

SAFE, BIN = "model.safetensors", "pytorch_model.bin"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("pristine") / "hf", num_hidden_layers=2)


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "hf"))


def save_bin(model: Path, tensors: dict, **options) -> None:
    torch.save(tensors, model / BIN, **options)
    (model / SAFE).unlink(missing_ok=True)


def there_and_back(model: Path, **options) -> dict[str, torch.Tensor]:
    place = model.parent
    for name in ("checkpoint", "back"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).mkdir()
    convert(model, place / "checkpoint", dtype=None, events=Events(), verify="digest", **options)
    export(place / "checkpoint", model, place / "back", dtype=None, events=Events())
    return load_file(place / "back" / SAFE)


def refused(model: Path, error: type[Exception], *fragments: str) -> None:
    with pytest.raises(error) as caught:
        there_and_back(model)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert list((model.parent / "checkpoint").iterdir()) == []


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_single_bin_file_converts_like_the_safetensors_it_holds(zipped, model):
    tensors = load_file(model / SAFE)
    save_bin(model, tensors, _use_new_zipfile_serialization=zipped)
    assert_same(there_and_back(model), tensors)


def test_bin_shards_convert_wherever_their_tensors_lie(model):
    tensors = load_file(model / SAFE)
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
    for file, part in shards.items():
        torch.save({name: tensors[name] for name in part}, model / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (model / f"{BIN}.index.json").write_text(json.dumps(index))
    (model / SAFE).unlink()
    assert_same(there_and_back(model), tensors)
    (model / "pytorch_model-00002-of-00003.bin").unlink()
    refused(model, SourceError, "pytorch_model-00002-of-00003.bin")


def test_safetensors_are_preferred(model):
    tensors = load_file(model / SAFE)
    torch.save({"wrong": torch.ones(1)}, model / BIN)
    assert_same(there_and_back(model), tensors)


def test_parameters_transposed_views_and_shared_storages_keep_their_numbers(model):
    tensors = load_file(model / SAFE)
    together = torch.cat([tensors[f"model.layers.{i}.input_layernorm.weight"] for i in (0, 1)])
    odd = dict(tensors)
    odd["model.layers.0.input_layernorm.weight"], odd["model.layers.1.input_layernorm.weight"] = together.chunk(2)
    odd[EMBEDDING] = tensors[EMBEDDING].t().contiguous().t()
    odd["lm_head.weight"] = torch.nn.Parameter(tensors["lm_head.weight"])
    save_bin(model, odd)
    assert_same(there_and_back(model), tensors)


def test_a_tied_model_whose_output_weights_share_the_embedding_converts(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(model / SAFE)
    save_bin(model, tensors | {"lm_head.weight": tensors[EMBEDDING]})
    assert_same(there_and_back(model), {name: t for name, t in tensors.items() if name != "lm_head.weight"})


class Command:
    """Runs when it is loaded."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self):
        return os.system, (self.text,)


def test_a_bin_file_that_would_run_a_command_is_refused_by_name(model):
    trace = model.parent / "ran"
    save_bin(model, load_file(model / SAFE) | {"x": Command(f"touch {trace}")})
    refused(model, UntrustedPickleError, BIN, "posix.system", "--trust-pickle")
    assert not trace.exists()


class Foreign(torch.Tensor):
    """A class of nobody's."""


def test_a_foreign_class_is_refused_by_name_and_loads_when_trusted(model):
    tensors = load_file(model / SAFE)
    norm = tensors["model.norm.weight"].as_subclass(Foreign)
    save_bin(model, tensors | {"model.norm.weight": norm})
    refused(model, UntrustedPickleError, "Foreign", "--trust-pickle")
    assert_same(there_and_back(model, trust_pickle=True), tensors)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [([1, 2], "no weights by name"), ({}, "no weights by name"), ({"step": 3}, "'step'")],
)
def test_what_is_no_dictionary_of_tensors_is_named(content, fragment, model):
    save_bin(model, content)
    refused(model, SourceError, BIN, fragment)


def test_a_missing_weight_and_a_quantized_one_are_named(model):
    tensors = load_file(model / SAFE)
    save_bin(model, {name: t for name, t in tensors.items() if name != EMBEDDING})
    refused(model, WeightMappingError, EMBEDDING)
    save_bin(model, tensors | {EMBEDDING: tensors[EMBEDDING].to(torch.int8)})
    refused(model, SourceError, EMBEDDING, "torch.int8", "Available")


@pytest.mark.parametrize("keep", [0, 3, 1000, -1, -5000])
def test_a_truncated_bin_file_is_named(keep, model):
    save_bin(model, load_file(model / SAFE))
    (model / BIN).write_bytes((model / BIN).read_bytes()[:keep])
    refused(model, SourceError, BIN)
