"""What a model family declares, and the architecture that every stage reads from a checkpoint's manifest.

Legend: V vocabulary, H hidden size, F ffn hidden size, M ffn hidden size of an expert, A query heads, G query groups,
D head_dim, L layers, E experts, S ffn hidden size of the shared expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import Field

from megatron_ext.config import Section
from megatron_ext.weights.rules import Move, Rule, shape_of


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
        description="rope_type linear, llama3 or yarn, and its parameters under Hugging Face's names",
    )
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = Field(default=False, description="a norm over each query head and each key head")
    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    window_size: int | None = Field(
        default=None, ge=1, description="tokens that a token sees, itself and the ones before it; empty for all"
    )
    window_attn_skip_freq: tuple[int, ...] | None = Field(
        default=None, description="1 for each layer with the window, 0 for each without; empty: all have it"
    )
    num_moe_experts: int | None = Field(default=None, description="experts a layer; empty for a dense model")
    moe_ffn_hidden_size: int | None = Field(default=None, description="ffn hidden size of one expert, M")
    moe_shared_expert_intermediate_size: int | None = Field(
        default=None, description="ffn hidden size of an expert that every token is sent to, behind a sigmoid gate, S"
    )
    moe_router_topk: int | None = Field(default=None, description="experts that a token is sent to")
    moe_router_pre_softmax: bool = Field(
        default=False,
        description="the chosen experts' weights come from a softmax over all experts and sum to less than 1; "
        "else from a softmax over the chosen ones",
    )
    moe_aux_loss_coeff: float = Field(
        default=0.0, description="weight of the load-balancing loss that the model was trained with; no forward uses it"
    )

    def dims(self) -> dict[str, int]:
        """Sizes by the letters of the legend, 1, 2, and QKV: the query, key and value heads of all groups together."""
        return {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "A": self.num_attention_heads,
            "G": self.num_query_groups,
            "D": self.kv_channels,
            "L": self.num_layers,
            "QKV": self.num_attention_heads + 2 * self.num_query_groups,
            "E": self.num_moe_experts or 0,
            "M": self.moe_ffn_hidden_size or 0,
            "S": self.moe_shared_expert_intermediate_size or 0,
            "1": 1,
            "2": 2,
        }


class Part(NamedTuple):
    """A Hugging Face tensor, or slice ``index`` of one that stacks ``stacked`` experts; ``shape`` is the slice's."""

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    stacked: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole Hugging Face tensor."""
        return self.shape if self.index is None else (self.stacked, *self.shape)


@dataclass(frozen=True)
class Weight:
    """One megatron-core weight of one layer and expert, with names filled in.

    ``key`` and ``shape`` are those of the torch_dist checkpoint, where the layers of a model, and the experts of a
    layer, are stacked: ``index`` (layer, expert) places this weight on the first axes of ``shape``.
    """

    rule: Rule
    index: tuple[int, ...]
    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    moves: tuple[Move, ...]

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of this layer's and expert's part."""
        return self.shape[len(self.index) :]

    @property
    def padded_vocabulary(self) -> bool:
        """Whether a checkpoint may hold more rows than the model has, as padding."""
        return self.rule.mcore_legend.startswith("V ")


def placed(name: str, index: Iterable[int]) -> str:
    """``name`` with its layer and expert, for people: ``decoder.layers.mlp..., layer 3, expert 1``."""
    return ", ".join([name, *(f"{kind} {i}" for kind, i in zip(("layer", "expert"), index, strict=False))])


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
    config_ignored: tuple[str, ...] = ()
    """Keys that change nothing for this family, given what is required."""
    derived_weights: tuple[str, ...] = ()
    """Buffers that old files hold although the config determines them; not converted."""
    idle_weights: tuple[Rule, ...] = ()
    """Weights that the model has and nothing depends on: not converted, and zeros in an export."""

    @property
    def layouts(self) -> tuple[str, ...]:
        """Names of the Hugging Face layouts of the weights, the one that exports have first; empty if there is one."""
        return tuple(dict.fromkeys(rule.layout for rule in self.weights if rule.layout))

    def layout_of(self, names: Collection[str]) -> str | None:
        """The layout of a model that has weights of these names: the one that finds most of its own."""
        if not self.layouts:
            return None
        rules = {layout: [rule for rule in self.weights if rule.layout == layout] for layout in self.layouts}
        found = {
            layout: sum(part.format(i=0, e=0).partition("[")[0] in names for rule in own for part in rule.hf)
            for layout, own in rules.items()
        }
        return max(self.layouts, key=lambda layout: found[layout])

    def plan(self, architecture: Architecture, layout: str | None = None) -> Iterator[Weight]:
        """Every weight of the model, outermost first, then layer by layer; ``layout`` None is the exports'."""
        dims = architecture.dims()
        layout = layout or next(iter(self.layouts), None)
        active = [rule for rule in _applying(self.weights, architecture) if rule.layout in (None, layout)]
        yield from (_weight(rule, (), dims) for rule in active if "{i}" not in rule.mcore)
        for layer in range(architecture.num_layers):
            for rule in active:
                if "{e}" in rule.mcore:
                    yield from (_weight(rule, (layer, expert), dims) for expert in range(dims["E"]))
                elif "{i}" in rule.mcore:
                    yield _weight(rule, (layer,), dims)

    def idle(self, architecture: Architecture) -> list[Part]:
        """The tensors of ``idle_weights``, layer by layer."""
        dims = architecture.dims()
        rules = _applying(self.idle_weights, architecture)
        return [part for i in range(dims["L"]) for rule in rules for part in _weight(rule, (i,), dims).parts]


def _applying(rules: Iterable[Rule], architecture: Architecture) -> list[Rule]:
    """The rules whose fields are set, or not set, as they say."""
    fields = architecture.model_dump()
    return [
        rule
        for rule in rules
        if (rule.only_if is None or fields[rule.only_if]) and not (rule.skip_if and fields[rule.skip_if])
    ]


def _weight(rule: Rule, index: tuple[int, ...], dims: dict[str, int]) -> Weight:
    names = dict(zip("ie", index, strict=False))
    stack = (dims["L"], dims["E"])[: len(index)]
    parts = []
    for name, legend in zip(rule.hf, rule.hf_legends, strict=True):
        stem, bracket, _ = name.partition("[")
        expert = index[1] if bracket else None
        parts.append(Part(stem.format(**names), shape_of(legend, dims), expert, dims["E"] if bracket else 0))
    return Weight(
        rule=rule,
        index=index,
        key=rule.mcore.replace("{i}.", "").replace("{e}.", ""),
        shape=(*stack, *shape_of(rule.mcore_legend, dims)),
        parts=tuple(parts),
        moves=rule.moves(dims),
    )
