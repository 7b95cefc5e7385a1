"""What a model family declares, and the architecture that every stage reads from a checkpoint's manifest.

Legend: V vocabulary, H hidden size, F ffn hidden size, A query heads, G query groups, D head_dim, L layers.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_ext.config import Section


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
    activation: str = Field("silu", description="name in torch.nn.functional")
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = Field(None, description="HF's rope parameters when rope_type is not default")
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
