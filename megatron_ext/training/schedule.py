"""The learning rate of each step: megatron-core's OptimizerParamScheduler, counted in steps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.config import TrainConfig
from megatron_ext.events import Events
from megatron_ext.training.plan import warmup_iterations

SCHEDULE = "schedule.json"


def scheduler(optimizer: Any, train: TrainConfig, iterations: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0 to ``lr``, then decay to ``min_lr`` at step ``iterations``; call ``step(1)`` after each."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=warmup_iterations(train),
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


def planned(train: TrainConfig, iterations: int, points: int = 60) -> list[tuple[int, float]]:
    """(step, learning rate) of about ``points`` steps of the whole training, first and last included."""
    group = {"wd_mult": 1.0}
    schedule = scheduler(SimpleNamespace(param_groups=[group]), train, iterations)
    steps = sorted({1, iterations, *(1 + round(i * (iterations - 1) / points) for i in range(points))})
    found = []
    for step in steps:
        schedule.num_steps = step - 1
        found.append((step, float(schedule.get_lr(group))))
    return found


def announce_schedule(events: Events, train: TrainConfig, iterations: int, out: Path) -> None:
    """Show the planned learning rates before the first step, and keep them in ``out/schedule.json`` for the report."""
    curve = planned(train, iterations)
    (out / SCHEDULE).write_text(json.dumps({"iterations": iterations, "points": curve}) + "\n", encoding="utf-8")
    peak = max(curve, key=lambda point: point[1])
    events.note(
        f"learning rate: {train.lr_decay_style} over {iterations} steps, warm-up {warmup_iterations(train)}; "
        f"step {curve[0][0]}: {curve[0][1]:.3g}, peak at step {peak[0]}: {peak[1]:.3g}, "
        f"step {curve[-1][0]}: {curve[-1][1]:.3g}"
    )
    if train.lr_warmup_tokens and not warmup_iterations(train):
        step = train.global_batch_size * train.seq_length
        events.note(
            f"no warm-up: train.lr_warmup_tokens {train.lr_warmup_tokens} is less than one step of {step} tokens"
        )
    events.emit("schedule", points=curve)
