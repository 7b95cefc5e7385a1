"""Floating point operations that a model of some architecture needs for some tokens. Torch-free.

Counted as model FLOP: multiplications and additions of matrices, forward once and backward twice; recomputation,
padding, norms and the optimizer do not count. Source: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, with
causal attention counted as the half that is computed.
"""

from __future__ import annotations

import numpy as np

from megatron_ext.families.base import Architecture


def matrix_weights(architecture: Architecture) -> int:
    """Weights of the matrices that a token is multiplied with: of a mixture of experts, those of ``topk`` experts."""
    a = architecture
    qkv = a.hidden_size * a.kv_channels * (a.num_attention_heads + 2 * a.num_query_groups)
    attention = qkv + a.kv_channels * a.num_attention_heads * a.hidden_size
    matrices = 3 if a.gated_linear_unit else 2
    if a.num_moe_experts:
        experts = getattr(a, "moe_router_topk", 1) * matrices * a.hidden_size * (a.moe_ffn_hidden_size or 0)
        shared = matrices * a.hidden_size * (a.moe_shared_expert_intermediate_size or 0)
        mlp = experts + shared + a.hidden_size * a.num_moe_experts
    else:
        mlp = matrices * a.hidden_size * a.ffn_hidden_size
    return a.num_layers * (attention + mlp) + a.vocab_size * a.hidden_size


def training_flops(architecture: Architecture, lengths: np.ndarray) -> float:
    """FLOP of forward and backward of segments of ``lengths`` tokens, (N,) int."""
    a, sizes = architecture, lengths.astype(np.float64)
    whole = seen = sizes * sizes / 2
    windowed = 0
    if window := getattr(a, "window_size", None):
        windowed = a.num_layers if a.window_attn_skip_freq is None else sum(a.window_attn_skip_freq)
        seen = np.where(sizes > window, window * sizes - window * window / 2, whole)
    pairs = windowed * float(seen.sum()) + (a.num_layers - windowed) * float(whole.sum())
    attention = 4.0 * a.num_attention_heads * a.kv_channels * pairs
    return 3.0 * (2.0 * matrix_weights(a) * float(sizes.sum()) + attention)
