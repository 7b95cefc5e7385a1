"""Llama 1 to 3.3, dense: grouped-query attention, SwiGLU, RMSNorm, rotary positions (llama3 scaling included).

Source: transformers ``LlamaForCausalLM``. Shapes are (out, in) as torch stores them: H hidden, F ffn.
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.families.shared import ATTENTION, DENSE_MLP, EMBEDDINGS, MC, MLP, SELF_ATTENTION, qkv_bias
from megatron_ext.weights.rules import Copy, GateUp

FAMILY = ModelFamily(
    hf_architecture="LlamaForCausalLM",
    config_defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
    },
    config_required={"hidden_act": "silu"},
    derived_weights=(ATTENTION + "rotary_emb.inv_freq",),
    weights=(
        *EMBEDDINGS,
        *SELF_ATTENTION,
        *DENSE_MLP,
        qkv_bias(only_if="add_bias_linear"),
        Copy(MC + "self_attention.linear_proj.bias", ATTENTION + "o_proj.bias", "H", only_if="add_bias_linear"),
        GateUp(
            MC + "mlp.linear_fc1.bias", gate=MLP + "gate_proj.bias", up=MLP + "up_proj.bias",
            columns="", only_if="add_bias_linear",
        ),
        Copy(MC + "mlp.linear_fc2.bias", MLP + "down_proj.bias", "H", only_if="add_bias_linear"),
    ),
)  # fmt: skip
