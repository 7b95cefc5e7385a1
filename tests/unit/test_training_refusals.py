"""Layouts and precisions that are not built are refused before a process starts, by the name of the setting."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.errors import ConfigError, ParallelismError, PlatformError
from megatron_ext.families.base import Architecture
from megatron_ext.platforms.base import require_transformer_engine
from megatron_ext.training.layout import check_kind, check_layout
from megatron_ext.training.plan import check_schedule, warmup_iterations

MODEL = Architecture(
    num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=2, kv_channels=8,
    vocab_size=512, max_position_embeddings=512, layernorm_epsilon=1e-6,
)  # fmt: skip
WINDOWED = MODEL.model_copy(update={"window_size": 17})
CP2 = {"nproc_per_node": 2, "context_parallel_size": 2}
PP2 = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
SP2 = {"nproc_per_node": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}


def config(**values) -> TrainConfig:
    return TrainConfig(**({"seq_length": 32, "global_batch_size": 4, "lr": 1e-3, "train_iters": 10} | values))


@pytest.mark.parametrize(
    ("model", "train", "runtime", "named"),
    [
        (WINDOWED, {}, CP2, "context_parallel_size 2 is not built for a model with a sliding window (of 17 tokens)"),
        (MODEL, {"loss_normalization": "sequence"}, CP2, "context_parallel_size 2 is not built for train.loss_norm"),
        (
            MODEL,
            {"attention_dropout": 0.1},
            CP2,
            "parallel_size 2 is not built for train.attention_dropout 0.1",
        ),
        (MODEL, {"seq_length": 34, "pack_alignment": 2}, CP2, "4 shares, which do not divide train.seq_length 34"),
        (MODEL, {}, VPP2, "virtual_pipeline_model_parallel_size 2 needs pipeline_model_parallel_size of 2 or more"),
        (
            MODEL,
            {},
            PP2 | {"virtual_pipeline_model_parallel_size": 3},
            "pipeline_model_parallel_size 3 x pipeline_model_parallel_size 2 does not divide the model's 4 layers; "
            "at this pipeline size it takes 2",
        ),
        (MODEL, {"global_batch_size": 3}, PP2 | VPP2, "a number of micro batches that pipeline_model_parallel_size 2"),
    ],
)
def test_layouts_that_are_not_built_are_refused_by_name(model, train, runtime, named) -> None:
    with pytest.raises(ParallelismError) as refused:
        check_layout(model, config(**train), RuntimeConfig(**runtime))
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "train", "runtime", "named"),
    [
        ("chat", {}, CP2, "context_parallel_size 2 is not built for packed sequences; set train.packing to false, or"),
        (
            "preference",
            {"packing": False},
            CP2,
            "parallel_size 2 is not built for packed sequences; set it to 1",
        ),
        ("text", {"seq_length": 33, "pack_alignment": 1}, SP2, "2, which does not divide train.seq_length 33; take 32"),
        (
            "chat",
            {"seq_length": 33, "pack_alignment": 1},
            SP2 | {"pipeline_model_parallel_size": 2} | VPP2,
            "2, which does not divide train.seq_length 33; take 32",
        ),
    ],
)
def test_layouts_that_do_not_fit_a_kind_of_data_are_refused_by_name(kind, train, runtime, named) -> None:
    with pytest.raises(ParallelismError) as refused:
        check_kind(kind, config(**train), RuntimeConfig(**runtime))
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "train", "runtime"),
    [
        ("text", {}, CP2),
        ("chat", {"packing": False}, CP2),
        ("text", {}, SP2),
        ("chat", {"seq_length": 33, "pack_alignment": 1}, SP2),
        ("text", {"attention_dropout": 0.1}, {}),
        ("text", {}, PP2 | VPP2),
    ],
)
def test_what_is_built_passes(kind, train, runtime) -> None:
    check_layout(MODEL, config(**train), RuntimeConfig(**runtime))
    check_kind(kind, config(**train), RuntimeConfig(**runtime))


@pytest.mark.parametrize("platform", ["cpu", "npu"])
def test_fp8_is_refused_where_there_is_no_transformer_engine(platform: str) -> None:
    with pytest.raises(PlatformError, match=f"fp8 needs Transformer Engine, which {platform} has not; take bf16"):
        require_transformer_engine(platform)


@pytest.mark.parametrize("platform", ["cuda", "auto"])
def test_fp8_is_refused_before_launch_where_transformer_engine_is_not_installed(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"transformer_engine": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name])
    with pytest.raises(PlatformError, match=r"install transformer-engine\[pytorch,core_cu13\] .*, or take bf16"):
        require_transformer_engine(platform)
    found["transformer_engine"] = object()
    require_transformer_engine(platform)


def test_warm_up_in_tokens_becomes_whole_steps() -> None:
    tokens = 32 * 4
    assert warmup_iterations(config(lr_warmup_tokens=3 * tokens + 5)) == 3
    assert warmup_iterations(config(lr_warmup_tokens=0)) == 0
    with pytest.raises(ConfigError, match=r"lr_warmup_tokens 1280 \(= 10 steps\) is not below the 10 steps"):
        check_schedule(config(lr_warmup_tokens=10 * tokens), 10)
