"""megatron-core loads a checkpoint whole, or not at all: nothing that it lacks or holds besides is passed over."""

import pytest
import torch
from mcore_worker import run_worker
from tiny import write_model

from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.manifest import read_manifest, write_manifest


@pytest.mark.parametrize(
    ("family", "bias", "words"),
    [
        ("qwen2", False, r"the model has no place for decoder\.layers\.self_attention\.linear_qkv\.bias"),
        ("mixtral", True, r"has no tensor decoder\.layers\.self_attention\.linear_qkv\.bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_tensor(family, bias, words, tmp_path):
    model, out = write_model(tmp_path / "hf", family, num_hidden_layers=2), tmp_path / "checkpoint"
    out.mkdir()
    convert(model, out, dtype=None, events=Events())
    manifest = read_manifest(out)
    other = manifest.architecture.model_copy(update={"add_qkv_bias": bias})
    write_manifest(out, manifest.model_copy(update={"architecture": other}))
    torch.save(torch.arange(12)[None], tmp_path / "tokens.pt")
    with pytest.raises(AssertionError, match=words):
        run_worker([{"checkpoint": str(out), "tokens": str(tmp_path / "tokens.pt"), "logits": "unwritten"}], tmp_path)
