"""A Hugging Face config.json, in the spelling of transformers 4 or 5, to an Architecture; refuses what it would drop.

transformers 5 writes ``rope_parameters``, ``dtype`` and ``num_local_experts`` where 4 wrote ``rope_theta`` with
``rope_scaling``, ``torch_dtype`` and, for some families, ``num_experts``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_ext.errors import SourceError, UnsupportedModelError, unknown
from megatron_ext.families.base import Architecture, ModelFamily

ROPE_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Rope type -> the parameters that it needs, and those that it may have."""
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
READ = {
    "model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "tie_word_embeddings",
}  # fmt: skip
"""Keys that every family reads; a family adds those of its ``config_defaults`` and ``config_required``."""
REQUIRED = {"quantization_config": None, "attention_bias": False, "mlp_bias": False, "rope_interleaved": False}
"""What must hold where a family does not say otherwise."""
WITHOUT_EFFECT = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range", "pretraining_tp",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "attention_dropout", "auto_map",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "is_decoder", "is_encoder_decoder",
    "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "max_length", "max_sequence_length", "model_max_length", "use_mrope", "is_llama_config", "gradient_checkpointing",
    "unsloth_version", "unsloth_fixed", "transformers.js_config",
}  # fmt: skip
"""Keys that change nothing that is converted: token ids, loading, initialization, generation, training-time dropout."""
MOST = {"num_hidden_layers": 4096, "num_experts": 4096}
"""Beyond this a config.json is damaged, and a list of all its weights would fill the memory."""
NULL_MEANS_SOMETHING = {"sliding_window", "num_key_value_heads"}
"""Keys whose null is not the family's default, as in transformers: no window; as many as num_attention_heads."""
REQUANTIZE = "export the weights unquantized first"


def read_architecture(family: ModelFamily, config: Mapping[str, Any]) -> Architecture:
    """The Architecture that megatron-core must build for the model of ``config``.

    A key that is null counts as left out, except those of NULL_MEANS_SOMETHING.

    Raises:
        UnsupportedModelError: the config asks for arithmetic that this family does not convert; names key and value.
        SourceError: a key is missing or holds no usable value; names it.
    """
    config = _spelled_as_here(config)
    _refuse_what_differs(family, config)
    given = {key: value for key, value in config.items() if value is not None or key in NULL_MEANS_SOMETHING}
    values = {**family.config_defaults, **given}
    heads = _size(values, "num_attention_heads")
    groups = _size(values, "num_key_value_heads", default=heads)
    hidden = _size(values, "hidden_size")
    if heads % groups:
        raise SourceError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if values.get("head_dim") is None and hidden % heads:
        raise SourceError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    base, scaling = read_rope(values)
    window, layers = _window(family, values)
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
        activation=values.get("hidden_act") or "silu",
        rotary_base=base,
        rope_scaling=scaling,
        share_embeddings_and_output_weights=_flag(values, "tie_word_embeddings"),
        add_bias_linear=_all_linear_biases(values) if "mlp_bias" in family.config_defaults else False,
        window_size=window,
        window_attn_skip_freq=layers,
        **_experts(family, values),
        **family.transformer_config,
    )


def read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Rotary base, and the scaling parameters if the rope type is not default.

    Raises:
        UnsupportedModelError: a rope type or parameter not in ROPE_SCALINGS, or rotary positions on a part of the head.
    """
    old, new = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    for key, given in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(given, Mapping):
            raise SourceError(f"config.json: {key} must be an object, not {given!r}")
    old, new = ({key: value for key, value in given.items() if value is not None} for given in (old, new))
    if old and new and any(new.get(key, value) != value for key, value in old.items()):
        raise SourceError("config.json: rope_scaling and rope_parameters contradict each other; remove one of them")
    rope = {**old, **new}
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    base = _number({"rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0)}, "rope_theta")
    if part not in (None, 1.0):
        raise UnsupportedModelError(f"config.json: partial_rotary_factor {part} is not supported; Available: 1.0")
    if kind not in ("default", *ROPE_SCALINGS):
        raise UnsupportedModelError(unknown("rope_type", kind, ["default", *ROPE_SCALINGS], "in config.json"))
    needed, optional = ROPE_SCALINGS.get(kind, ((), ()))
    if unread := sorted(set(rope) - ROPE_KEYS - {*needed, *optional}):
        raise UnsupportedModelError(f"config.json: rope parameter {unread[0]!r} of rope_type {kind!r} is not supported")
    if kind == "default":
        return base, None
    given = {name: _number(rope, name) for name in needed}
    given |= {name: _optional(rope, name) for name in optional if name in rope}
    return base, {"rope_type": kind, **given}


def _spelled_as_here(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers takes ``num_experts`` and ``num_local_experts`` for the same."""
    renamed = dict(config)
    if "num_local_experts" in renamed:
        here, there = renamed.get("num_experts"), renamed.pop("num_local_experts")
        if here is not None and there is not None and here != there:
            raise SourceError(
                f"config.json: num_experts {here} and num_local_experts {there} contradict each other; "
                "remove one of them"
            )
        renamed["num_experts"] = there if there is not None else here
    return renamed


def _refuse_what_differs(family: ModelFamily, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or [family.hf_architecture]
    if family.hf_architecture not in architectures:
        raise UnsupportedModelError(
            f"config.json: architectures {architectures} is not supported; Available: {family.hf_architecture}"
        )
    defaults = {key: value for key, value in REQUIRED.items() if key not in family.config_defaults}
    for key, value in {**defaults, **family.config_required}.items():
        if config.get(key) is not None and config[key] != value:
            remedy = REQUANTIZE if key == "quantization_config" else f"Available: {value!r}"
            shown = str(config[key])
            raise UnsupportedModelError(
                f"config.json: {key} {shown:.80} is not supported for a {family.hf_architecture}; {remedy}"
            )
    known = READ | WITHOUT_EFFECT | {*defaults, *family.config_defaults, *family.config_required}
    for key in sorted(set(config) - known - set(family.config_ignored)):
        if config[key] is not None:
            shown = str(config[key])
            raise UnsupportedModelError(
                f"config.json: key {key} ({shown:.80}) is not read for a {family.hf_architecture}; remove it from "
                "config.json if it changes nothing of what the model computes, else this model cannot be converted"
            )


def _window(family: ModelFamily, values: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...] | None]:
    """Tokens of the sliding window, and which layers have it; None, None without a window."""
    if "sliding_window" not in family.config_defaults:
        return None, None
    layers = _size(values, "num_hidden_layers")
    used = values.get("sliding_window") is not None and values.get("use_sliding_window", True)
    types = values.get("layer_types")
    if types is None:
        first = values.get("max_window_layers") or 0
        pattern = [int(used and layer >= first) for layer in range(layers)]
    elif set(types) <= {"full_attention", "sliding_attention"} and len(types) == layers:
        pattern = [int(kind == "sliding_attention") for kind in types]
    else:
        raise UnsupportedModelError(
            f"config.json: layer_types must name each of the {layers} layers full_attention or sliding_attention"
        )
    if not any(pattern):
        return None, None
    if not used:
        raise SourceError("config.json: layer_types has sliding_attention, but no sliding_window is set and used")
    return _size(values, "sliding_window"), None if all(pattern) else tuple(pattern)


def _experts(family: ModelFamily, values: Mapping[str, Any]) -> dict[str, Any]:
    if "num_experts" not in family.config_defaults:
        return {}
    experts, topk = _size(values, "num_experts"), _size(values, "num_experts_per_tok")
    normalised = bool(values["norm_topk_prob"])
    if topk > experts:
        raise SourceError(f"config.json: num_experts_per_tok {topk} is more than the {experts} experts of a layer")
    if topk == 1 and normalised:
        raise UnsupportedModelError(
            "config.json: num_experts_per_tok 1 with normalised weights is not supported: every weight would be 1 and "
            "the router could not learn. Available: 2 or more, or norm_topk_prob false"
        )
    return {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": _size(values, "moe_intermediate_size", default=_size(values, "intermediate_size")),
        "moe_shared_expert_intermediate_size": _shared_expert(values),
        "moe_router_topk": topk,
        "moe_router_pre_softmax": not normalised,
        "moe_aux_loss_coeff": float(values.get("router_aux_loss_coef") or 0.0),
    }


def _shared_expert(values: Mapping[str, Any]) -> int | None:
    """Size of the shared expert; None where it is 0 or the family has none."""
    key = "shared_expert_intermediate_size"
    return _size(values, key) if values.get(key) else None


def _all_linear_biases(config: Mapping[str, Any]) -> bool:
    attention, mlp = bool(config["attention_bias"]), bool(config["mlp_bias"])
    if attention != mlp:
        raise UnsupportedModelError(
            f"config.json: attention_bias {attention} with mlp_bias {mlp} is not supported: megatron-core has biases "
            "in all linear layers of a block or in none. Available: both true, both false"
        )
    return attention


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(f"config.json: {key} must be a positive integer, not {_shown(values, key)}")
    if value > MOST.get(key, value):
        raise SourceError(f"config.json: {key} {value} is more than the {MOST[key]} that any model has; correct it")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise SourceError(f"config.json: {key} must be a positive number, not {_shown(values, key)}")
    return value


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value not in (None, True, False):
        raise SourceError(f"config.json: {key} must be true or false, not {value!r}")
    return bool(value)


def _optional(values: Mapping[str, Any], key: str) -> float | bool:
    return bool(values[key]) if key == "truncate" else _number(values, key)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return "missing" if values.get(key) is None else repr(values[key])
