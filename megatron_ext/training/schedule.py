"""The learning rate of each step: megatron-core's OptimizerParamScheduler, counted in steps."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.config import TrainConfig


def scheduler(optimizer: Any, train: TrainConfig, iterations: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0 to ``lr``, then decay to ``min_lr`` at step ``iterations``; call ``step(1)`` after each."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_iters,
        lr_decay_steps=iterations,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=iterations,
        wd_incr_style="constant",
        wsd_decay_steps=train.lr_wsd_decay_iters,
        lr_wsd_decay_style="linear",
    )


def learning_rate(optimizer: Any) -> float:
    """What the coming step will use."""
    return max(float(group["lr"]) for group in optimizer.param_groups)
