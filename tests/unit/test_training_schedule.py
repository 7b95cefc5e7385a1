"""The learning rate of each step is megatron-core's, warm-up and decay included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext.config import TrainConfig
from megatron_ext.events import Events


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


@pytest.mark.parametrize(("tokens", "told"), [(127, True), (128, False), (0, False)])
def test_a_warm_up_of_less_than_a_step_is_told(tokens: int, told: bool, tmp_path: Path) -> None:
    from megatron_ext.training.schedule import announce_schedule

    train = TrainConfig(seq_length=64, global_batch_size=2, train_iters=9, lr=1.0, lr_warmup_tokens=tokens)
    with Events(tmp_path / "events.jsonl") as events:
        announce_schedule(events, train, 9, tmp_path)
    notes = [json.loads(line).get("text", "") for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    sentence = f"no warm-up: train.lr_warmup_tokens {tokens} is less than one step of 128 tokens"
    assert (sentence in notes) == told
