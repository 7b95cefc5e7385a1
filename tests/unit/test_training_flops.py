"""Model FLOP, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.families.base import Architecture
from megatron_ext.training.flops import training_flops

DENSE = {
    "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 20, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 2, "vocab_size": 100, "max_position_embeddings": 64, "layernorm_epsilon": 1e-6,
}  # fmt: skip
ATTENTION_WEIGHTS = 8 * 2 * (4 + 2 + 2) + 2 * 4 * 8  # query, key and value; output
HEAD = 100 * 8


def flops(lengths: list[int], **changes: object) -> float:
    return training_flops(Architecture(**(DENSE | changes)), np.array(lengths))


def expected(tokens: int, mlp: float, pairs: float) -> float:
    """Forward once, backward twice; 2 FLOP a weight and token, 4 a pair of tokens, head and channel."""
    return 3 * (2 * tokens * (2 * (ATTENTION_WEIGHTS + mlp) + HEAD) + 4 * 4 * 2 * pairs)


def test_a_dense_model_whose_samples_do_not_see_each_other() -> None:
    mlp = 3 * 8 * 20
    assert flops([10, 6]) == expected(16, mlp, 2 * (50 + 18))
    assert flops([16]) == expected(16, mlp, 2 * 128) > flops([10, 6])


@pytest.mark.parametrize(("layers", "windowed"), [(None, 2), ((1, 0), 1), ((0, 0), 0)])
def test_a_window_counts_in_the_layers_that_have_it(layers: tuple[int, ...] | None, windowed: int) -> None:
    near, whole = 4 * 10 - 8, 50  # 10 tokens of which each sees 4
    pairs = windowed * near + (2 - windowed) * whole
    assert flops([10], window_size=4, window_attn_skip_freq=layers) == expected(10, 3 * 8 * 20, pairs)


def test_of_experts_those_that_a_token_goes_to_and_the_router() -> None:
    mlp = 2 * 3 * 8 * 5 + 8 * 6
    found = flops([10], num_moe_experts=6, moe_router_topk=2, moe_ffn_hidden_size=5)
    assert found == expected(10, mlp, 2 * 50)
