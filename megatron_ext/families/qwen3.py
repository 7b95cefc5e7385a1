"""Qwen3, dense: grouped-query attention with a norm over each query and key head, head_dim 128, SwiGLU, RMSNorm.

``use_sliding_window`` gives the layers from ``max_window_layers`` on, or those that ``layer_types`` names, a window.
Source: transformers ``Qwen3ForCausalLM``.
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.families.shared import DENSE_MLP, EMBEDDINGS, QK_NORMS, SELF_ATTENTION

FAMILY = ModelFamily(
    hf_architecture="Qwen3ForCausalLM",
    transformer_config={"qk_layernorm": True},
    config_defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": False, "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
    },
    config_required={"hidden_act": "silu", "attention_bias": False},
    weights=(*EMBEDDINGS, *SELF_ATTENTION, *QK_NORMS, *DENSE_MLP),
)  # fmt: skip
