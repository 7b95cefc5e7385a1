"""An upcycled checkpoint in megatron-core answers as the dense model does, and the receipt says so."""

import pytest
import torch
from mcore_worker import run_worker
from tiny import write_model

from megatron_ext.config import UpcycleConfig
from megatron_ext.errors import VerificationError
from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.manifest import read_manifest
from megatron_ext.weights.upcycle import UpcycledExperts

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "llama, llama3 rope scaling, a head_dim of its own": {"rope_parameters": LLAMA3, "head_dim": 24},
    "mistral, window, odd vocabulary": {"sliding_window": 17, "vocab_size": 509},
    "qwen2 tied": {"tie_word_embeddings": True},
}
FIELDS = {"num_experts": 4, "topk": 3, "router_init_std": 1.0}
"""A router so wide that tokens go to different experts, with weights that are far from equal."""


@pytest.fixture(scope="module")
def logits(tmp_path_factory) -> dict[str, tuple[torch.Tensor, ...]]:
    """Of every case: transformers' dense model, megatron-core's dense model, megatron-core's experts; fp32."""
    from transformers import AutoModelForCausalLM

    tmp = tmp_path_factory.mktemp("upcycle")
    tokens = torch.randint(0, 500, (2, 64), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp / "tokens.pt")
    steps, theirs = [], []
    for number, (case, overrides) in enumerate(CASES.items()):
        model = write_model(tmp / f"{number}-hf", case.split()[0].strip(","), seed=number, **overrides)
        with torch.no_grad():
            theirs.append(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits)
        for name, options in (
            ("dense", {}),
            ("experts", {"upcycle": UpcycleConfig(**FIELDS), "extra_vocab_size": 5}),
        ):
            out = tmp / f"{number}-{name}"
            out.mkdir()
            convert(model, out, dtype=None, events=Events(), **options)
            steps.append({"checkpoint": str(out), "tokens": str(tmp / "tokens.pt"), "logits": f"{out}.pt"})
    run_worker(steps, tmp)
    ours = [torch.load(step["logits"]) for step in steps]
    return {case: (theirs[i], ours[2 * i], ours[2 * i + 1]) for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_experts_answer_as_the_dense_model(case, logits):
    theirs, dense, experts = logits[case]
    vocabulary = theirs.shape[-1]
    assert theirs.abs().max() > 1
    torch.testing.assert_close(experts[..., :vocabulary], dense[..., :vocabulary], rtol=0, atol=1e-5)
    torch.testing.assert_close(experts[..., :vocabulary], theirs, rtol=0, atol=1e-5)


def converted(tmp_path, verify="digest", **fields):
    model = write_model(tmp_path / "hf", num_hidden_layers=2)
    (tmp_path / "out").mkdir()
    config = UpcycleConfig(**FIELDS, **fields)
    return convert(model, tmp_path / "out", dtype=None, events=Events(), upcycle=config, verify=verify, platform="cpu")


@pytest.mark.parametrize("verify", ["digest", pytest.param("logits", marks=pytest.mark.slow)])
def test_the_receipt_states_the_difference_before_training(verify, tmp_path):
    receipt = converted(tmp_path, verify)["upcycle"]["step_zero"]
    assert 0 < receipt["max_difference"] <= 1e-5
    assert receipt["positions"] > 500
    assert read_manifest(tmp_path / "out").changes.step_zero.model_dump() == receipt


@pytest.mark.slow
def test_noise_is_measured_and_not_judged(tmp_path):
    assert converted(tmp_path, noise_std=0.01)["upcycle"]["step_zero"]["max_difference"] > 1e-3


@pytest.mark.slow
def test_experts_that_compute_something_else_are_refused_by_layer_and_not_published(tmp_path, monkeypatch):
    """Bits are compared through the same reader, so only logits can tell."""
    rows = UpcycledExperts.rows

    def wrong(self, part, start, count):
        return rows(self, part, start, count) * (
            1.5 if part.name == "model.layers.1.block_sparse_moe.experts.2.w2.weight" else 1
        )

    monkeypatch.setattr(UpcycledExperts, "rows", wrong)
    with pytest.raises(VerificationError, match="first layer that differs: layer 1"):
        converted(tmp_path)
    assert not list((tmp_path / "out").iterdir())
