"""The gate's second level on real models: transformers against megatron-core, each in a process of its own."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import write_model

import megatron_ext.families.llama as llama
from megatron_ext.errors import VerificationError
from megatron_ext.events import Events
from megatron_ext.weights.certificate import facts, read_certificate
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.rules import QKV
from megatron_ext.weights.verify import verify


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.slow
def test_a_windowed_model_that_is_rounded_on_the_way_passes(tmp_path):
    model = write_model(tmp_path / "hf", "mistral", num_hidden_layers=2, sliding_window=24, dtype="float32")
    checkpoint = folder(tmp_path / "checkpoint")
    summary = convert(model, checkpoint, dtype="bf16", verify="logits", platform="cpu", events=Events())
    figures = read_certificate(checkpoint).logits
    assert figures.max_difference <= figures.tolerance <= 1e-4 * figures.max_logit
    assert figures.max_logit > 1  # logits that all vanish would be equal, too
    assert (figures.window_size, figures.prompts["beyond the window"]) == (24, (1, 24 + 256))
    assert figures.prompts.keys() == {"random", "whole vocabulary", "beyond the window", "text"}
    assert summary["verified"]["logits"]["positions"] == figures.positions == 2 * 64 + 128 + 160 + 128
    assert "largest logit" in facts(read_certificate(checkpoint))["logits"]


def test_query_and_key_heads_that_changed_places_fail_at_the_attention_of_layer_0(tmp_path, monkeypatch):
    """Both ways by the same wrong rule: every bit comes back, and the model is another one."""
    model = write_model(tmp_path / "hf", num_hidden_layers=2, num_key_value_heads=8)
    rules = [replace(r, q=r.k, k=r.q) if isinstance(r, QKV) and r.columns else r for r in llama.FAMILY.weights]
    monkeypatch.setattr(llama, "FAMILY", replace(llama.FAMILY, weights=tuple(rules)))
    checkpoint = folder(tmp_path / "checkpoint")
    with pytest.raises(VerificationError, match="first layer that differs: attention of layer 0, by") as caught:
        convert(model, checkpoint, dtype=None, verify="logits", platform="cpu", events=Events())
    assert "the logits differ by" in str(caught.value)
    assert list(checkpoint.iterdir()) == []
    convert(model, checkpoint, dtype=None, verify="digest", events=Events())
    assert verify(checkpoint, model, level="digest", events=Events()).tensors


@pytest.mark.slow
def test_an_export_in_a_narrower_type_passes_against_the_rounded_checkpoint(tmp_path):
    model = write_model(tmp_path / "hf", "qwen2", num_hidden_layers=2, tie_word_embeddings=True)
    checkpoint, out = folder(tmp_path / "checkpoint"), folder(tmp_path / "out")
    convert(model, checkpoint, dtype=None, events=Events())
    export(checkpoint, model, out, dtype="bf16", verify="logits", platform="cpu", events=Events())
    figures = read_certificate(out).logits
    assert figures.max_difference <= figures.tolerance
