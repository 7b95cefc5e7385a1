"""Mixtral: Mistral's attention, and a mixture of SwiGLU experts instead of the MLP, chosen by a softmax over the top k.

Source: transformers ``MixtralForCausalLM``; its files hold the experts one by one (as published, and as transformers
saves them) or stacked (as transformers 5 keeps them in memory).
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.families.shared import (
    EMBEDDINGS,
    EXPERTS_NORM,
    HF,
    MLP,
    PER_EXPERT,
    SELF_ATTENTION,
    STACKED,
    STACKED_EXPERTS,
    experts,
    router,
)

MOE = HF + "block_sparse_moe."

FAMILY = ModelFamily(
    hf_architecture="MixtralForCausalLM",
    config_defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None,
        "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "router_aux_loss_coef": 0.001,
    },
    config_required={"hidden_act": "silu", "router_jitter_noise": 0.0, "norm_topk_prob": True},
    weights=(
        *EMBEDDINGS,
        *SELF_ATTENTION,
        *EXPERTS_NORM,
        router(MOE + "gate.weight", PER_EXPERT),
        *experts(
            gate=MOE + "experts.{e}.w1.weight", up=MOE + "experts.{e}.w3.weight", down=MOE + "experts.{e}.w2.weight"
        ),
        router(MLP + "gate.weight", STACKED),
        *STACKED_EXPERTS,
    ),
)  # fmt: skip
