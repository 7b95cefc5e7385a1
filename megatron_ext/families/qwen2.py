"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on query, key and value, SwiGLU, RMSNorm.

``use_sliding_window`` gives the layers from ``max_window_layers`` on, or those that ``layer_types`` names, a window.
Source: transformers ``Qwen2ForCausalLM``.
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.families.shared import DENSE_MLP, EMBEDDINGS, SELF_ATTENTION, qkv_bias

FAMILY = ModelFamily(
    hf_architecture="Qwen2ForCausalLM",
    transformer_config={"add_qkv_bias": True},
    config_defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": False, "num_key_value_heads": 32,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
    },
    config_required={"hidden_act": "silu"},
    weights=(*EMBEDDINGS, *SELF_ATTENTION, qkv_bias(), *DENSE_MLP),
)  # fmt: skip
