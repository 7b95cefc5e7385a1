"""The model made trainable: mixed precision, megatron-core's DDP, and AdamW, sharded over data-parallel ranks."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.platforms import megatron_fixes

MIN_LOSS_SCALE = 1.0
"""fp16: below it the scale does not fall, however often a step overflows."""


def data_parallel(
    model: Any, train: TrainConfig, runtime: RuntimeConfig, *, first: bool = True
) -> DistributedDataParallel:
    """Wrap a bare GPTModel, or one of its virtual stages, for training; gradients are summed in fp32.

    Only the ``first`` virtual stage of a rank overlaps its communication in buckets.
    """
    config = model.config
    config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=runtime.use_distributed_optimizer,
        overlap_grad_reduce=runtime.overlap_grad_reduce,
        overlap_param_gather=runtime.overlap_param_gather,
        bucket_size=runtime.ddp_bucket_size,
        check_for_nan_in_grad=False,  # the loop looks at the loss before and at the norm after, and says more
    )
    wrapped = model if train.precision == "fp32" else Float16Module(config, model)
    return DistributedDataParallel(config, settings, wrapped, disable_bucketing=not first)


def reduce_once_a_step(models: list[DistributedDataParallel]) -> None:
    """Overlapped sums of gradients start with the last micro batch, not with each one."""
    waits = [model.no_sync for model in models]
    config: Any = models[0].config
    config.no_sync_func = waits if len(waits) > 1 else waits[0]


def adamw(models: list[DistributedDataParallel], train: TrainConfig, runtime: RuntimeConfig) -> MegatronOptimizer:
    """AdamW with fp32 main weights; biases and norms are not decayed."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.precision in ("bf16", "fp8"),
        fp16=train.precision == "fp16",
        initial_loss_scale=train.initial_loss_scale,
        loss_scale_window=train.loss_scale_window,
        min_loss_scale=MIN_LOSS_SCALE,
        params_dtype=models[0].config.params_dtype,
        use_distributed_optimizer=runtime.use_distributed_optimizer,
        overlap_param_gather=runtime.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, models, use_gloo_process_groups=False)
    if train.precision == "fp16":
        for model in models:
            model.config.grad_scale_func = optimizer.scale_loss
    for inner in megatron_fixes.torch_adamw(optimizer):
        megatron_fixes.fill_adam_state(inner)
        for group in inner.param_groups:
            group.update(fused=True, foreach=False)  # one pass over weights, gradients and moments
    return optimizer
