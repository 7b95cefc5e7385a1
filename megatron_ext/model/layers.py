"""The layers that the model is built from: Transformer Engine's, or megatron-core's own with torch's attention."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.families.base import Architecture
from megatron_ext.model.activation import swiglu
from megatron_ext.model.attention import SDPACoreAttention
from megatron_ext.model.norm import Norm
from megatron_ext.model.rotary import attention_factor
from megatron_ext.model.routing import Router


def attention_config(architecture: Architecture) -> dict[str, Any]:
    """Fields of TransformerConfig for the attention's window, norms and scale.

    megatron-core's and Transformer Engine's window counts the keys to the left and right of a query, without its own:
    a token that sees W tokens has the window (W - 1, 0).
    """
    window, layers = architecture.window_size, architecture.window_attn_skip_freq
    factor = attention_factor(architecture)  # scales cosine and sine of queries and keys, so scores by its square
    return {
        "qk_layernorm": architecture.qk_layernorm,
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": None if layers is None else list(layers),
        "softmax_scale": None if factor == 1.0 else factor**2 / architecture.kv_channels**0.5,
    }


def experts_config(
    architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig, fused: bool
) -> dict[str, Any]:
    """Fields of TransformerConfig for a mixture of experts; routing is computed in fp32.

    The coefficients are those of our router's losses: megatron-core's own stay off.
    """
    coefficient = train.moe_aux_loss_coeff
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}  # the default refuses variable_seq_lengths, dense too
    if architecture.num_moe_experts is None:
        return dispatcher
    return dispatcher | {
        "num_moe_experts": architecture.num_moe_experts,
        "moe_ffn_hidden_size": architecture.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": architecture.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": architecture.moe_shared_expert_intermediate_size is not None,
        "moe_router_topk": architecture.moe_router_topk,
        "moe_router_pre_softmax": architecture.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": architecture.moe_aux_loss_coeff if coefficient is None else coefficient,
        "moe_z_loss_coeff": train.moe_z_loss_coeff,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
        "expert_model_parallel_size": runtime.expert_model_parallel_size,
    }


def own_gate(architecture: Architecture, on_cpu: bool) -> bool:
    """Whether the layers take our ``swiglu``; megatron-core's compiled one is for devices."""
    return on_cpu and architecture.gated_linear_unit and architecture.activation == "silu"


def layer_spec(architecture: Architecture, config: TransformerConfig, fused: bool, vp_stage: int | None = None) -> Any:
    """Transformer Engine's layers if ``fused``, else megatron-core's own with SDPA."""
    experts = architecture.num_moe_experts
    if fused:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=architecture.qk_layernorm
        )
        if experts is not None:
            spec.submodules.mlp.submodules.router = Router
        return spec
    spec: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=architecture.qk_layernorm, normalization=architecture.normalization
    )
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    if architecture.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    mlp = spec.submodules.mlp.submodules
    if experts is not None:
        mlp.router = Router
        mlp.experts.submodules.activation_func = swiglu
        if mlp.shared_experts is not None:
            mlp.shared_experts.submodules.activation_func = swiglu
        # Transformer Engine does not fuse this norm into experts, so it has a name of its own:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    else:
        mlp.activation_func = swiglu
    layers = [spec] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)
