"""What a training of a mixture of experts refuses before it starts, and how it counts weights. No torch needed."""

from __future__ import annotations

import pytest

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.errors import ParallelismError
from megatron_ext.families import find_family
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.training.layout import check_layout, parameters

TRAIN = TrainConfig(seq_length=32, global_batch_size=8, train_iters=10, lr=1e-3)
CONFIG = {
    "model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 512,
    "num_key_value_heads": 4, "intermediate_size": 48, "num_local_experts": 6,
}  # fmt: skip
MIXTRAL = read_architecture(find_family("mixtral"), CONFIG)
DENSE = read_architecture(
    find_family("llama"), {k: v for k, v in CONFIG.items() if k != "num_local_experts"} | {"model_type": "llama"}
)


@pytest.mark.parametrize(
    ("architecture", "runtime", "named"),
    [
        (DENSE, {"nproc_per_node": 2, "expert_model_parallel_size": 2}, ["expert_model_parallel_size 2", "is dense"]),
        (MIXTRAL, {"nproc_per_node": 4, "expert_model_parallel_size": 4}, ["num_moe_experts 6", "takes 1, 2 at"]),
        (MIXTRAL, {"nproc_per_node": 4, "expert_model_parallel_size": 3}, ["data-parallel size 4", "takes 1, 2 at"]),
        (MIXTRAL, {"expert_model_parallel_size": 2}, ["data-parallel size 1", "takes 1 at"]),
        (
            MIXTRAL,
            {"nproc_per_node": 4, "tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
            ["tensor_model_parallel_size 2", "sequence_parallel true"],
        ),
        (
            MIXTRAL.model_copy(update={"moe_ffn_hidden_size": 45}),
            {"nproc_per_node": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            ["moe_ffn_hidden_size 45"],
        ),
    ],
)
def test_layouts_that_cannot_run_are_refused_with_value_and_remedy(architecture, runtime, named) -> None:
    with pytest.raises(ParallelismError) as refused:
        check_layout(architecture, TRAIN, RuntimeConfig(**runtime))
    for part in named:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "runtime",
    [
        {},
        {"nproc_per_node": 2, "expert_model_parallel_size": 2},
        {"nproc_per_node": 4, "expert_model_parallel_size": 2},
        {"nproc_per_node": 4, "expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {
            "nproc_per_node": 4, "expert_model_parallel_size": 2, "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ],
)  # fmt: skip
def test_layouts_that_can_run_pass(runtime) -> None:
    check_layout(MIXTRAL, TRAIN, RuntimeConfig(**runtime))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3", "qwen3_moe"])
def test_parameters_are_counted_as_transformers_counts_them(name) -> None:
    import torch
    import transformers

    shape = {key: value for key, value in CONFIG.items() if key not in ("model_type", "num_local_experts")}
    config = transformers.AutoConfig.for_model(name, **shape, head_dim=16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = parameters(read_architecture(find_family(name), config.to_dict()))
    assert counted == sum(weight.numel() for weight in model.parameters())
