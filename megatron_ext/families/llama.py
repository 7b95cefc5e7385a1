"""Llama 1 to 3.3, dense: grouped-query attention, SwiGLU, RMSNorm, rotary positions (llama3 scaling included).

Source: transformers ``LlamaForCausalLM``. Shapes are (out, in) as torch stores them:
V vocab, H hidden, F ffn, A query heads, G query groups, D head_dim.
"""

from megatron_ext.families.base import ModelFamily
from megatron_ext.weights.rules import QKV, Copy, GateUp

MC, HF = "decoder.layers.{i}.", "model.layers.{i}."
ATTENTION, MLP = HF + "self_attn.", HF + "mlp."

FAMILY = ModelFamily(
    hf_architecture="LlamaForCausalLM",
    transformer_config={"normalization": "RMSNorm", "gated_linear_unit": True},
    config_defaults={
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
    },
    config_required={"hidden_act": "silu"},
    derived_weights=(ATTENTION + "rotary_emb.inv_freq",),
    weights=(
        Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H", axis=0),
        Copy("decoder.final_layernorm.weight", "model.norm.weight", "H"),
        Copy("output_layer.weight", "lm_head.weight", "V H", axis=0, skip_if="share_embeddings_and_output_weights"),
        Copy(MC + "self_attention.linear_qkv.layer_norm_weight", HF + "input_layernorm.weight", "H"),
        QKV(
            MC + "self_attention.linear_qkv.weight",
            q=ATTENTION + "q_proj.weight", k=ATTENTION + "k_proj.weight", v=ATTENTION + "v_proj.weight",
        ),
        QKV(
            MC + "self_attention.linear_qkv.bias",
            q=ATTENTION + "q_proj.bias", k=ATTENTION + "k_proj.bias", v=ATTENTION + "v_proj.bias",
            columns="", only_if="add_bias_linear",
        ),
        Copy(MC + "self_attention.linear_proj.weight", ATTENTION + "o_proj.weight", "H A*D", axis=1),
        Copy(MC + "self_attention.linear_proj.bias", ATTENTION + "o_proj.bias", "H", only_if="add_bias_linear"),
        Copy(MC + "mlp.linear_fc1.layer_norm_weight", HF + "post_attention_layernorm.weight", "H"),
        GateUp(MC + "mlp.linear_fc1.weight", gate=MLP + "gate_proj.weight", up=MLP + "up_proj.weight"),
        GateUp(
            MC + "mlp.linear_fc1.bias", gate=MLP + "gate_proj.bias", up=MLP + "up_proj.bias",
            columns="", only_if="add_bias_linear",
        ),
        Copy(MC + "mlp.linear_fc2.weight", MLP + "down_proj.weight", "H F", axis=1),
        Copy(MC + "mlp.linear_fc2.bias", MLP + "down_proj.bias", "H", only_if="add_bias_linear"),
    ),
)  # fmt: skip
