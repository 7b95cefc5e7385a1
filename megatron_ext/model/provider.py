"""From an architecture and a configuration to megatron-core's GPTModel (this pipeline stage of it)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.families.base import Architecture
from megatron_ext.model.layers import attention_config, experts_config, layer_spec, own_gate
from megatron_ext.model.rotary import PositionedRotary
from megatron_ext.platforms.base import Platform
from megatron_ext.weights.vocab import padded_vocab_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def transformer_config(
    architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig, platform: Platform
) -> TransformerConfig:
    """megatron-core's configuration of the model. Weights are left as allocated: they come from a checkpoint."""
    interleaved = runtime.virtual_pipeline_model_parallel_size is not None
    dtype, on_cpu, fused = DTYPES[train.precision], platform.name == "cpu", platform.fused_layers(train.precision)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        normalization=architecture.normalization,
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=architecture.gated_linear_unit,
        activation_func=getattr(torch.nn.functional, architecture.activation),
        add_bias_linear=architecture.add_bias_linear,
        add_qkv_bias=architecture.add_qkv_bias,
        hidden_dropout=train.hidden_dropout,
        attention_dropout=train.attention_dropout,
        bf16=train.precision in ("bf16", "fp8"),
        fp16=train.precision == "fp16",
        fp8="hybrid" if train.precision == "fp8" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=runtime.tensor_model_parallel_size,
        pipeline_model_parallel_size=runtime.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=runtime.virtual_pipeline_model_parallel_size,
        context_parallel_size=runtime.context_parallel_size,
        sequence_parallel=runtime.sequence_parallel,
        variable_seq_lengths=runtime.pipeline_model_parallel_size > 1 and not interleaved,
        overlap_p2p_comm=interleaved,  # else two ranks mix up what they send each other as next and as previous stage
        batch_p2p_comm=not interleaved,
        **attention_config(architecture),
        **experts_config(architecture, train, runtime, fused),
        deallocate_pipeline_outputs=not (on_cpu and interleaved),  # gloo may still be sending what would be freed
        calculate_per_token_loss=True,
        use_cpu_initialization=on_cpu,
        init_method=_keep,  # megatron-core marks split weights only when it initialises them
        output_layer_init_method=_keep,
        embedding_init_method=_keep,
        apply_rope_fusion=fused,
        persist_layer_norm=fused,
        **_recomputation(runtime),
        use_te_activation_func=own_gate(architecture, on_cpu),  # not Transformer Engine's: the one that the spec names
        gradient_accumulation_fusion=on_cpu,
        bias_activation_fusion=not on_cpu and architecture.activation in ("silu", "gelu"),
        bias_dropout_fusion=not on_cpu,
    )


def _recomputation(runtime: RuntimeConfig) -> dict[str, Any]:
    if runtime.recompute_granularity != "full":
        granularity = None if runtime.recompute_granularity == "none" else runtime.recompute_granularity
        return {"recompute_granularity": granularity}
    return {
        "recompute_granularity": "full",
        "recompute_method": runtime.recompute_method,
        "recompute_num_layers": runtime.recompute_num_layers,
    }


def _keep(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_chunks(
    architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig, platform: Platform
) -> list[GPTModel]:
    """What this rank holds of the model: one part, or one for each virtual pipeline stage."""
    stages = range(runtime.virtual_pipeline_model_parallel_size or 1)
    return [build_model(architecture, train, runtime, platform, stage) for stage in stages]


def build_model(
    architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig, platform: Platform, vp_stage: int = 0
) -> GPTModel:
    """This rank's part of the model, on its device, weights not yet loaded. Needs an initialised parallel state.

    Call it on a (B, T) batch as ``model(tokens, positions, None, packed_seq_params=…)`` -> logits (B, T, V / tp).
    """
    config = transformer_config(architecture, train, runtime, platform)
    stage = vp_stage if runtime.virtual_pipeline_model_parallel_size else None
    model = GPTModel(
        config,
        layer_spec(architecture, config, platform.fused_layers(train.precision), stage),
        vocab_size=padded_vocab_size(
            architecture.vocab_size, runtime.tensor_model_parallel_size, runtime.make_vocab_size_divisible_by
        ),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=int(architecture.rotary_base),
        vp_stage=stage,
    )
    device = torch.cuda.current_device()
    model.rotary_pos_emb = PositionedRotary(architecture, device)
    return model.to(device)
