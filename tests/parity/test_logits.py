"""A converted checkpoint, loaded by megatron-core into the model that training builds, answers as transformers does."""

import pytest
import torch
from mcore_worker import run_worker
from tiny import write_model

from megatron_ext.events import Events
from megatron_ext.weights.convert import convert

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama, llama3 rope scaling": {"rope_parameters": LLAMA3},
    "llama, linear rope scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama, one key head": {"num_key_value_heads": 1},
    "llama, head_dim of its own": {"head_dim": 24},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, odd vocabulary": {"vocab_size": 509},
    "qwen2": {},
    "qwen2 tied, one million base": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2, as many key heads as query heads": {"num_key_value_heads": 8},
}


@pytest.fixture(scope="module")
def both_logits(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(transformers, megatron-core) logits of every case, fp32."""
    from transformers import AutoModelForCausalLM

    tmp = tmp_path_factory.mktemp("logits")
    tokens = torch.randint(0, 500, (2, 64), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp / "tokens.pt")
    steps, theirs = [], []
    for number, (case, overrides) in enumerate(CASES.items()):
        model = write_model(tmp / f"{number}-hf", case.split()[0].strip(","), seed=number, **overrides)
        checkpoint = tmp / f"{number}-mcore"
        checkpoint.mkdir()
        convert(model, checkpoint, dtype=None, events=Events())
        with torch.no_grad():
            theirs.append(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits)
        steps.append({"checkpoint": str(checkpoint), "tp": 1, "pp": 1, "tokens": str(tmp / "tokens.pt")})
        steps[-1]["logits"] = str(tmp / f"{number}.pt")
    run_worker(steps, tmp)
    return {case: (theirs[i], torch.load(steps[i]["logits"])) for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, both_logits):
    theirs, ours = both_logits[case]
    assert theirs.abs().max() > 1  # logits that all vanish would be equal, too
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-5)
