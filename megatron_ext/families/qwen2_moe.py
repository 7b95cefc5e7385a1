"""Qwen1.5 and Qwen2 mixture of experts: Qwen2's attention, SwiGLU experts, and a shared expert behind a sigmoid gate.

``norm_topk_prob`` false leaves the chosen experts' weights as the softmax over all experts gives them.
``shared_expert_intermediate_size`` 0, as upcycling writes it, is no shared expert: its empty weights and the gate of
nothing are not converted, and exports hold them as zeros. Legend: S ffn of the shared expert.
Source: transformers ``Qwen2MoeForCausalLM``.
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.families.shared import (
    EMBEDDINGS,
    EXPERTS_NORM,
    MC,
    MLP,
    SELF_ATTENTION,
    STACKED_EXPERTS,
    experts,
    qkv_bias,
    router,
)
from megatron_ext.weights.rules import Copy, GateUp

SHARED, HF_SHARED = MC + "mlp.shared_experts.", MLP + "shared_expert."
SIZE = "moe_shared_expert_intermediate_size"

FAMILY = ModelFamily(
    hf_architecture="Qwen2MoeForCausalLM",
    transformer_config={"add_qkv_bias": True},
    config_defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": False,
        "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
    },
    config_required={
        "hidden_act": "silu", "qkv_bias": True, "use_sliding_window": False,
        "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    weights=(
        *EMBEDDINGS,
        *SELF_ATTENTION,
        qkv_bias(),
        *EXPERTS_NORM,
        router(MLP + "gate.weight"),
        *experts(
            gate=MLP + "experts.{e}.gate_proj.weight", up=MLP + "experts.{e}.up_proj.weight",
            down=MLP + "experts.{e}.down_proj.weight",
        ),
        *STACKED_EXPERTS,
        GateUp(
            SHARED + "linear_fc1.weight", gate=HF_SHARED + "gate_proj.weight", up=HF_SHARED + "up_proj.weight",
            rows="S", only_if=SIZE,
        ),
        Copy(SHARED + "linear_fc2.weight", HF_SHARED + "down_proj.weight", "H S", axis=1, only_if=SIZE),
        Copy(SHARED + "gate_weight", MLP + "shared_expert_gate.weight", "1 H", only_if=SIZE),
    ),
    idle_weights=(
        Copy("", HF_SHARED + "gate_proj.weight", "S H", skip_if=SIZE),
        Copy("", HF_SHARED + "up_proj.weight", "S H", skip_if=SIZE),
        Copy("", HF_SHARED + "down_proj.weight", "H S", skip_if=SIZE),
        Copy("", MLP + "shared_expert_gate.weight", "1 H", skip_if=SIZE),
    ),
)  # fmt: skip
