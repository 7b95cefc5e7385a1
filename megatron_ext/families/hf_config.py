"""A Hugging Face config.json, in the spelling of transformers 4 or 5, to an Architecture; refuses what it would drop.

transformers 5 writes ``rope_parameters`` and ``dtype``; 4 wrote ``rope_theta``, ``rope_scaling`` and ``torch_dtype``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ext.errors import SourceError, UnsupportedModelError, unknown
from megatron_ext.families.base import Architecture, ModelFamily

ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Rope type -> the parameters that it needs."""
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
HANDLED = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters", "rope_theta",
    "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias", "architectures", "quantization_config",
    "partial_rotary_factor",
}  # fmt: skip
WITHOUT_EFFECT = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range", "pretraining_tp",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "attention_dropout",
    "sliding_window", "max_window_layers", "layer_types", "auto_map", "_attn_implementation",
    "_attn_implementation_autoset",
    "is_decoder", "is_encoder_decoder", "return_dict", "output_attentions", "output_hidden_states", "use_mrope",
}  # fmt: skip
"""Keys that change nothing that is converted: token ids, loading, initialization, training-time dropout."""


def read_architecture(family: ModelFamily, config: Mapping[str, Any]) -> Architecture:
    """The Architecture that megatron-core must build for the model of ``config``.

    Raises:
        UnsupportedModelError: the config asks for arithmetic that this family does not convert; names key and value.
        SourceError: a key is missing or holds no usable value; names it.
    """
    _refuse_what_differs(family, config)
    values = {**family.config_defaults, **{k: v for k, v in config.items() if v is not None}}
    heads = _size(values, "num_attention_heads")
    groups = _size(values, "num_key_value_heads", default=heads)
    hidden = _size(values, "hidden_size")
    if heads % groups:
        raise SourceError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if "head_dim" not in values and hidden % heads:
        raise SourceError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    base, scaling = read_rope(values)
    return Architecture(
        num_layers=_size(values, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_size(values, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=_size(values, "head_dim", default=hidden // heads),
        vocab_size=_size(values, "vocab_size"),
        max_position_embeddings=_size(values, "max_position_embeddings"),
        layernorm_epsilon=_number(values, "rms_norm_eps"),
        activation=values.get("hidden_act", "silu"),
        rotary_base=base,
        rope_scaling=scaling,
        share_embeddings_and_output_weights=bool(values.get("tie_word_embeddings", False)),
        add_bias_linear=_all_linear_biases(values) if "mlp_bias" in family.config_defaults else False,
        **family.transformer_config,
    )


def unread_keys(family: ModelFamily, config: Mapping[str, Any]) -> list[str]:
    """Keys of ``config`` that neither shaped the Architecture nor are known to change nothing."""
    return sorted(set(config) - HANDLED - WITHOUT_EFFECT - set(family.config_required))


def read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Rotary base, and the scaling parameters if the rope type is not default.

    Raises:
        UnsupportedModelError: a rope type or parameter not in ROPE_SCALINGS, or rotary positions on a part of the head.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    base = _number({"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0))}, "rope_theta")
    if part != 1.0:
        raise UnsupportedModelError(f"config.json: partial_rotary_factor {part} is not supported; Available: 1.0")
    if kind not in ("default", *ROPE_SCALINGS):
        raise UnsupportedModelError(unknown("rope_type", kind, ["default", *ROPE_SCALINGS], "in config.json"))
    if unread := sorted(key for key in set(rope) - ROPE_KEYS - {*ROPE_SCALINGS.get(kind, ())} if rope[key] is not None):
        raise UnsupportedModelError(f"config.json: rope parameter {unread[0]!r} of rope_type {kind!r} is not supported")
    if kind == "default":
        return base, None
    return base, {"rope_type": kind, **{name: _number(rope, name) for name in ROPE_SCALINGS[kind]}}


def _refuse_what_differs(family: ModelFamily, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or [family.hf_architecture]
    if family.hf_architecture not in architectures:
        raise UnsupportedModelError(
            f"config.json: architectures {architectures} is not supported; Available: {family.hf_architecture}"
        )
    for key, value in {"quantization_config": None, **family.config_required}.items():
        if config.get(key) is not None and config[key] != value:
            remedy = "export the weights unquantized first" if key == "quantization_config" else f"Available: {value!r}"
            shown = str(config[key])
            raise UnsupportedModelError(f"config.json: {key} {shown:.80} is not supported; {remedy}")


def _all_linear_biases(config: Mapping[str, Any]) -> bool:
    attention, mlp = bool(config["attention_bias"]), bool(config["mlp_bias"])
    if attention != mlp:
        raise UnsupportedModelError(
            f"config.json: attention_bias {attention} with mlp_bias {mlp} is not supported: megatron-core has biases "
            "in all linear layers of a block or in none. Available: both true, both false"
        )
    return attention


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(f"config.json: {key} must be a positive integer, not {_shown(values, key)}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise SourceError(f"config.json: {key} must be a positive number, not {_shown(values, key)}")
    return value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "missing"
