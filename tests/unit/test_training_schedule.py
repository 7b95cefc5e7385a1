"""The learning rate of each step is megatron-core's, warm-up and decay included."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_ext.config import TrainConfig


def rates(iterations: int, **values) -> list[float]:
    from megatron_ext.training.schedule import learning_rate, scheduler

    train = TrainConfig(global_batch_size=1, train_iters=iterations, lr=1.0, **values)
    optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}])
    schedule, seen = scheduler(optimizer, train, iterations), []
    for _ in range(iterations):
        seen.append(learning_rate(optimizer))
        schedule.step(1)
    return seen


def test_warm_up_rises_linearly_from_zero() -> None:
    assert rates(10, lr_warmup_iters=4, lr_decay_style="constant")[:6] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_cosine_falls_to_min_lr_over_the_whole_training() -> None:
    seen = rates(8, min_lr=0.2, lr_decay_style="cosine")
    assert seen == pytest.approx([0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)])


def test_linear_falls_to_min_lr() -> None:
    assert rates(5, lr_decay_style="linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_stays_until_its_last_steps() -> None:
    seen = rates(10, lr_warmup_iters=2, lr_decay_style="WSD", lr_wsd_decay_iters=4)
    assert seen == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
