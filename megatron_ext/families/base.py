"""What a model family declares, and the architecture that every stage reads from a checkpoint's manifest.

Legend: V vocabulary, H hidden size, F ffn hidden size, A query heads, G query groups, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from megatron_ext.config import Section
from megatron_ext.weights.rules import Rule, shape_of


class Architecture(Section):
    """One model's shape and arithmetic in megatron-core's names; torch-free, JSON-able, kept in the manifest."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int = Field(description="head_dim, D")
    vocab_size: int = Field(description="true rows of the embedding, without padding")
    max_position_embeddings: int
    layernorm_epsilon: float
    activation: str = Field(default="silu", description="name in torch.nn.functional")
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = Field(
        default=None,
        description="rope_type linear or llama3, and its parameters under Hugging Face's names",
    )
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True

    def dims(self) -> dict[str, int]:
        """Sizes by the letters of the legend, 2, and QKV: the query, key and value heads of all groups."""
        return {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "A": self.num_attention_heads,
            "G": self.num_query_groups,
            "D": self.kv_channels,
            "QKV": self.num_attention_heads + 2 * self.num_query_groups,
            "2": 2,
        }


@dataclass(frozen=True)
class Weight:
    """One megatron-core weight of one layer, with names filled in.

    ``key`` and ``shape`` are those of the torch_dist checkpoint, where the layers of a model are stacked:
    ``shape`` starts with L if ``layer`` is not None.
    """

    rule: Rule
    layer: int | None
    key: str
    shape: tuple[int, ...]
    padded_vocabulary: bool
    hf: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelFamily:
    """How one ``model_type`` of Hugging Face maps to megatron-core's GPTModel; ``weights`` serve both directions."""

    hf_architecture: str
    weights: tuple[Rule, ...]
    transformer_config: Mapping[str, Any] = field(default_factory=dict)
    """Architecture fields that all models of the family share."""
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that a config.json without the key stands for (defaults of the Hugging Face config class)."""
    config_required: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must hold this value when present: anything else computes what megatron-core would not."""
    derived_weights: tuple[str, ...] = ()
    """Buffers that old files hold although the config determines them; not converted."""

    def plan(self, architecture: Architecture) -> Iterator[Weight]:
        """Every weight of the model, outermost first, then layer by layer."""
        fields, dims = architecture.model_dump(), architecture.dims()
        active = [
            rule
            for rule in self.weights
            if (rule.only_if is None or fields[rule.only_if]) and not (rule.skip_if and fields[rule.skip_if])
        ]
        for layer in (None, *range(architecture.num_layers)):
            for rule in active:
                if ("{i}" in rule.mcore) == (layer is not None):
                    shape = shape_of(rule.mcore_legend, dims)
                    yield Weight(
                        rule=rule,
                        layer=layer,
                        key=rule.mcore.replace("layers.{i}.", "layers."),
                        shape=shape if layer is None else (architecture.num_layers, *shape),
                        padded_vocabulary=rule.mcore_legend.startswith("V "),
                        hf={
                            name.format(i=layer): shape_of(legend, dims)
                            for name, legend in zip(rule.hf, rule.hf_legends, strict=True)
                        },
                    )
