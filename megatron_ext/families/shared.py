"""Weights that families with Llama's kind of layer name alike; a family is put together from these.

Shapes are (out, in) as torch stores them: V vocab, H hidden, F ffn, M ffn of an expert, A query heads, G query groups,
D head_dim, E experts.
"""

from megatron_ext.weights.rules import QKV, Copy, GateUp, Rule, StackedGateUp

MC, HF = "decoder.layers.{i}.", "model.layers.{i}."
ATTENTION, MLP = HF + "self_attn.", HF + "mlp."
EXPERT = MC + "mlp.experts.experts.{e}."
PER_EXPERT, STACKED = "per expert", "stacked"
"""Layouts of experts in Hugging Face's files: a weight for each expert, or one tensor for all experts of a layer."""

EMBEDDINGS: tuple[Rule, ...] = (
    Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H", axis=0),
    Copy("decoder.final_layernorm.weight", "model.norm.weight", "H"),
    Copy("output_layer.weight", "lm_head.weight", "V H", axis=0, skip_if="share_embeddings_and_output_weights"),
)
SELF_ATTENTION: tuple[Rule, ...] = (
    Copy(MC + "self_attention.linear_qkv.layer_norm_weight", HF + "input_layernorm.weight", "H"),
    QKV(
        MC + "self_attention.linear_qkv.weight",
        q=ATTENTION + "q_proj.weight", k=ATTENTION + "k_proj.weight", v=ATTENTION + "v_proj.weight",
    ),
    Copy(MC + "self_attention.linear_proj.weight", ATTENTION + "o_proj.weight", "H A*D", axis=1),
)  # fmt: skip
QK_NORMS: tuple[Rule, ...] = (
    Copy(MC + "self_attention.q_layernorm.weight", ATTENTION + "q_norm.weight", "D"),
    Copy(MC + "self_attention.k_layernorm.weight", ATTENTION + "k_norm.weight", "D"),
)
DENSE_MLP: tuple[Rule, ...] = (
    Copy(MC + "mlp.linear_fc1.layer_norm_weight", HF + "post_attention_layernorm.weight", "H"),
    GateUp(MC + "mlp.linear_fc1.weight", gate=MLP + "gate_proj.weight", up=MLP + "up_proj.weight"),
    Copy(MC + "mlp.linear_fc2.weight", MLP + "down_proj.weight", "H F", axis=1),
)
EXPERTS_NORM: tuple[Rule, ...] = (
    Copy(MC + "pre_mlp_layernorm.weight", HF + "post_attention_layernorm.weight", "H"),
)  # fmt: skip
STACKED_EXPERTS: tuple[Rule, ...] = (
    StackedGateUp(EXPERT + "linear_fc1.weight", MLP + "experts.gate_up_proj[{e}]", layout=STACKED),
    Copy(EXPERT + "linear_fc2.weight", MLP + "experts.down_proj[{e}]", "H M", axis=1, layout=STACKED),
)


def qkv_bias(only_if: str | None = None) -> QKV:
    """Biases of the query, key and value projections."""
    return QKV(
        MC + "self_attention.linear_qkv.bias",
        q=ATTENTION + "q_proj.bias", k=ATTENTION + "k_proj.bias", v=ATTENTION + "v_proj.bias",
        columns="", only_if=only_if,
    )  # fmt: skip


def router(gate: str, layout: str | None = None) -> Copy:
    """The layer that weighs the experts."""
    return Copy(MC + "mlp.router.weight", gate, "E H", layout=layout)


def experts(gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Experts as Hugging Face keeps them one by one; in the names ``{e}`` is the expert."""
    return (
        GateUp(EXPERT + "linear_fc1.weight", gate=gate, up=up, rows="M", layout=PER_EXPERT),
        Copy(EXPERT + "linear_fc2.weight", down, "H M", axis=1, layout=PER_EXPERT),
    )
