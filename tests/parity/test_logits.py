"""A converted checkpoint, loaded by megatron-core into the model that training builds, answers as transformers does."""

import pytest
import torch
from mcore_worker import run_worker
from tiny import write_model

from megatron_ext.events import Events
from megatron_ext.weights.convert import convert

TOKENS = 64
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SIX_HEADS = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 509}
ONE_KEY_HEAD = {"num_key_value_heads": 1, "head_dim": 24, "vocab_size": 509}
ALL_KEY_HEADS = {"num_key_value_heads": 8}
WINDOW = {"sliding_window": 17, "use_sliding_window": True}  # the tokens are almost four of it
CASES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama, llama3 rope scaling": {"rope_parameters": LLAMA3},
    "llama, linear rope scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama, yarn": {"rope_parameters": YARN},
    "llama, six heads": SIX_HEADS,
    "llama, one key head": ONE_KEY_HEAD,
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral, window": {"sliding_window": 17},
    "mistral, window of one": {"sliding_window": 1},
    "mistral, window, one key head": ONE_KEY_HEAD | {"sliding_window": 16},
    "mistral, no window, six heads": SIX_HEADS,
    "mixtral": {},
    "mixtral, stacked experts, window, six heads": SIX_HEADS | {"stacked_experts": True, "sliding_window": 17},
    "mixtral, one key head, three experts, all of them": ONE_KEY_HEAD | {
        "num_local_experts": 3, "num_experts_per_tok": 3
    },
    "qwen2": {},
    "qwen2 tied, one million base": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2, as many key heads as query heads": ALL_KEY_HEADS,
    "qwen2, six heads, yarn": SIX_HEADS | {"rope_parameters": YARN | {"beta_fast": 16.0, "attention_factor": 1.3}},
    "qwen2, window from layer 2 on": WINDOW | {"max_window_layers": 2},
    "qwen2, window in all layers": WINDOW | {"max_window_layers": 0},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen2_moe, stacked experts, weights that sum to one": {"stacked_experts": True, "norm_topk_prob": True},
    "qwen2_moe, no shared expert": {"shared_expert_intermediate_size": 0, "norm_topk_prob": True},
    "qwen3": {},
    "qwen3 tied, one key head": ONE_KEY_HEAD | {"tie_word_embeddings": True},
    "qwen3, window in every other layer": WINDOW | {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_key_value_heads": 8
    },
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe, weights that do not sum to one": {"norm_topk_prob": False},
    "qwen3_moe, one expert a token": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "qwen3_moe, stacked experts, one key head": ONE_KEY_HEAD | {"stacked_experts": True, "norm_topk_prob": False},
    "qwen3_moe, six experts, three a token": {
        "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "tie_word_embeddings": True
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def both_logits(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(transformers, megatron-core) logits of every case, fp32."""
    from transformers import AutoModelForCausalLM

    tmp = tmp_path_factory.mktemp("logits")
    tokens = torch.randint(0, 500, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp / "tokens.pt")
    steps, theirs = [], []
    for number, (case, overrides) in enumerate(CASES.items()):
        model = write_model(tmp / f"{number}-hf", case.split()[0].strip(","), seed=number, **overrides)
        checkpoint = tmp / f"{number}-mcore"
        checkpoint.mkdir()
        convert(model, checkpoint, dtype=None, events=Events())
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            theirs.append(reference(tokens).logits)
        if "window" in case and "no window" not in case:
            assert_window_matters(reference, tokens, theirs[-1])
        steps.append(
            {"checkpoint": str(checkpoint), "tokens": str(tmp / "tokens.pt"), "logits": str(tmp / f"{number}.pt")}
        )
    run_worker(steps, tmp)
    return {case: (theirs[i], torch.load(steps[i]["logits"])) for i, case in enumerate(CASES)}


def assert_window_matters(reference, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """The last token alone answers differently: it sees other tokens than the model with a window that hides none."""
    reference.config.sliding_window = TOKENS
    with torch.no_grad():
        assert (reference(tokens).logits - logits).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, both_logits):
    theirs, ours = both_logits[case]
    assert theirs.abs().max() > 1  # logits that all vanish would be equal, too
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-5)
