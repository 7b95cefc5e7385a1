"""A family is one file, and light enough for a flow process."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext import families
from megatron_ext.errors import UnsupportedModelError
from megatron_ext.families import available, find_family
from megatron_ext.families.base import Architecture
from megatron_ext.families.hf_config import read_architecture


def test_a_file_named_after_a_model_type_is_a_family(tmp_path, monkeypatch):
    (tmp_path / "otherllama.py").write_text(Path(find_family.__code__.co_filename).with_name("llama.py").read_text())
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert "otherllama" in available()
    assert find_family("otherllama").hf_architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["base", "shared", "hf_config", "__init__", "../llama", 3, None])
def test_what_is_no_family_is_not_imported(name):
    with pytest.raises(UnsupportedModelError, match="Available: llama, mistral, mixtral, qwen2"):
        find_family(name)


def test_families_and_manifests_import_neither_torch_nor_transformers():
    code = (
        "import sys, megatron_ext.weights.manifest, megatron_ext.families as f, megatron_ext.families.hf_config\n"
        "[f.find_family(name) for name in f.available()]\n"
        "print(sorted({'torch', 'transformers', 'megatron', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_plan_covers_what_transformers_builds_for_the_real_config(name):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(name, num_hidden_layers=2, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    family = find_family(name)
    architecture: Architecture = read_architecture(family, config.to_dict())
    ours = {part.name: part.tensor_shape for weight in family.plan(architecture) for part in weight.parts}
    assert ours == theirs


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_defaults_of_left_out_config_keys_are_those_of_transformers(name):
    import transformers

    sizes = {
        "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 32, "intermediate_size": 8, "vocab_size": 16,
    }  # fmt: skip
    full = transformers.AutoConfig.for_model(name, **sizes).to_dict()
    family = find_family(name)
    assert read_architecture(family, {"model_type": name, **sizes}) == read_architecture(family, full)
