"""Qwen3 mixture of experts: a norm over each query and key head, and SwiGLU experts in every layer.

Source: transformers ``Qwen3MoeForCausalLM``; its files hold the experts one by one (as published, and as transformers
saves them) or stacked (as transformers 5 keeps them in memory). ``norm_topk_prob`` false leaves the chosen experts'
weights as the softmax over all experts gives them.
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.families.shared import (
    EMBEDDINGS,
    EXPERTS_NORM,
    MLP,
    QK_NORMS,
    SELF_ATTENTION,
    STACKED_EXPERTS,
    experts,
    router,
)

FAMILY = ModelFamily(
    hf_architecture="Qwen3MoeForCausalLM",
    transformer_config={"qk_layernorm": True},
    config_defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": False,
        "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
    },
    config_required={
        "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
        "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    config_ignored=("sliding_window", "max_window_layers"),  # without use_sliding_window
    weights=(
        *EMBEDDINGS,
        *SELF_ATTENTION,
        *QK_NORMS,
        *EXPERTS_NORM,
        router(MLP + "gate.weight"),
        *experts(
            gate=MLP + "experts.{e}.gate_proj.weight", up=MLP + "experts.{e}.up_proj.weight",
            down=MLP + "experts.{e}.down_proj.weight",
        ),
        *STACKED_EXPERTS,
    ),
)  # fmt: skip
