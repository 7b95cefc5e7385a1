"""Dense to mixture of experts: every expert starts as a copy of the layer's MLP, under a random router.

The weights of the chosen experts are normalised to a sum of 1, so that equal experts compute what the dense MLP
computed, whatever the router says. Torch is imported when the first row is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_ext.config import UpcycleConfig
from megatron_ext.config_files import validated
from megatron_ext.errors import ConfigError, UnsupportedModelError
from megatron_ext.families import find_family
from megatron_ext.families.base import Architecture, Part, Weight
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.weights.random_rows import NormalRows

if TYPE_CHECKING:
    import torch

TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe"}
"""Dense family -> the family of its experts."""
NOT_IN_TARGET = {
    "mixtral": ("attention_bias", "mlp_bias", "layer_types", "use_sliding_window", "max_window_layers"),
    "qwen2_moe": (),
}
"""Keys of a dense config.json that the target's has no place for; what they ask for is checked."""
AUX_LOSS = 0.001


def parse_upcycle(text: str) -> UpcycleConfig:
    """``num_experts=8,topk=2`` and the further fields of UpcycleConfig.

    Raises:
        ConfigError: names the field.
    """
    values = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--upcycle {text!r}: {item!r} is not of the form key=value; try num_experts=8,topk=2")
        if key.strip() in values:
            raise ConfigError(f"--upcycle {text!r} gives {key.strip()} twice; give it once")
        values[key.strip()] = value.strip()
    return validated(UpcycleConfig, values, f"--upcycle {text}")


def upcycled_config(config: Mapping[str, Any], dense: Architecture, upcycle: UpcycleConfig) -> dict[str, Any]:
    """config.json of the mixture of experts that the dense model of ``config`` becomes.

    Raises:
        UnsupportedModelError: Hugging Face has no mixture of experts that computes the like; names the key.
    """
    name = config["model_type"]
    if name not in TARGETS:
        raise UnsupportedModelError(
            f"model_type {name!r} cannot be upcycled: there is no target for it; Available: {', '.join(TARGETS)}"
        )
    target = TARGETS[name]
    family = find_family(target)
    result = {key: value for key, value in config.items() if key not in NOT_IN_TARGET[target]}
    result |= {
        "architectures": [family.hf_architecture],
        "model_type": target,
        "rms_norm_eps": dense.layernorm_epsilon,
        "max_position_embeddings": dense.max_position_embeddings,
        "num_key_value_heads": dense.num_query_groups,
        "tie_word_embeddings": dense.share_embeddings_and_output_weights,
        "num_experts_per_tok": upcycle.topk,
        "output_router_logits": False,
        "router_aux_loss_coef": AUX_LOSS,
    }
    if (config.get("rope_parameters") or {}).get("rope_theta") is None:
        result["rope_theta"] = dense.rotary_base
    result |= _mixtral(dense, upcycle) if target == "mixtral" else _qwen2_moe(dense, upcycle)
    _require_same(read_architecture(family, result), dense, name, family.hf_architecture)
    return result


def _mixtral(dense: Architecture, upcycle: UpcycleConfig) -> dict[str, Any]:
    return {
        "num_local_experts": upcycle.num_experts,
        "sliding_window": dense.window_size,
        "router_jitter_noise": 0.0,
    }


def _qwen2_moe(dense: Architecture, upcycle: UpcycleConfig) -> dict[str, Any]:
    return {
        "num_experts": upcycle.num_experts,
        "moe_intermediate_size": dense.ffn_hidden_size,
        "shared_expert_intermediate_size": 0,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
    }


def _require_same(experts: Architecture, dense: Architecture, name: str, target: str) -> None:
    """Everything but the experts computes as before."""
    before = dense.model_dump()
    for field, value in experts.model_dump().items():
        if "moe" not in field and value != before[field]:
            raise UnsupportedModelError(
                f"this {name} has {field} {before[field]}, and Hugging Face's {target} has no such thing ({value}); "
                "upcycle a model without it"
            )


class UpcycledExperts:
    """A Hugging Face reader that presents the dense weights of ``source`` as those of a mixture of experts.

    Args:
        source: a reader with ``tensors`` (name -> type and shape) and ``rows``.
        dense, experts: the plans of the two models.
    """

    def __init__(self, source: Any, dense: Sequence[Weight], experts: Sequence[Weight], upcycle: UpcycleConfig) -> None:
        self._source, self._upcycle = source, upcycle
        self._copied: dict[tuple[str, int | None], Part] = {}
        self._routers: set[str] = set()
        self.tensors = {}
        mlp = {(weight.key, weight.index): weight.parts for weight in dense}
        for weight in experts:
            for number, part in enumerate(weight.parts):
                if len(weight.index) == 2:
                    origin = mlp[weight.key.replace("experts.experts.", ""), weight.index[:1]][number]
                    self._copied[part.name, part.index] = origin
                elif weight.key.endswith("mlp.router.weight"):
                    self._routers.add(part.name)
                    origin = mlp["decoder.layers.mlp.linear_fc1.weight", weight.index][0]
                else:
                    origin = part
                self.tensors[part.name] = replace(source.tensors[origin.name], shape=part.tensor_shape)

    def rows(self, part: Part, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``part`` from ``start`` on."""
        if part.name in self._routers:
            return self._drawn(part, start, count, self._upcycle.router_init_std).to(self.tensors[part.name].dtype)
        origin = self._copied.get((part.name, part.index))
        if origin is None:
            return self._source.rows(part, start, count)
        rows = self._source.rows(origin, start, count)
        if not self._upcycle.noise_std:
            return rows
        return (rows.float() + self._drawn(part, start, count, self._upcycle.noise_std)).to(rows.dtype)

    def _drawn(self, part: Part, start: int, count: int, std: float) -> torch.Tensor:
        name = part.name if part.index is None else f"{part.name}[{part.index}]"
        return NormalRows(self._upcycle.seed, name, part.shape[1]).rows(start, count) * std
