"""Mistral 7B and its kin, dense: grouped-query attention with a sliding window (v0.1: 4096) or none (from v0.2 on).

A ``sliding_window`` that is null is none; a config.json without the key means 4096, as in transformers.
Source: transformers ``MistralForCausalLM``.
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.families.shared import ATTENTION, DENSE_MLP, EMBEDDINGS, SELF_ATTENTION

FAMILY = ModelFamily(
    hf_architecture="MistralForCausalLM",
    config_defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "num_key_value_heads": 8, "sliding_window": 4096,
    },
    config_required={"hidden_act": "silu"},
    derived_weights=(ATTENTION + "rotary_emb.inv_freq",),
    weights=(*EMBEDDINGS, *SELF_ATTENTION, *DENSE_MLP),
)  # fmt: skip
