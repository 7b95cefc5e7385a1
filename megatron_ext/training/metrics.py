"""The training's diary: metrics.jsonl, TensorBoard and events, written by rank 0.

A record: step (counted from 1), loss (mean over trained tokens), lr, grad_norm, tokens (computed, without padding),
trained_tokens, tokens_per_second, tokens_per_second_per_device, step_time (seconds), flops (model FLOP a second),
mfu (share of the devices' peak, where it is known), memory (bytes, peak of rank 0), padding (share of
global_batch_size x seq_length that holds no token), consumed_tokens and samples (since step 1, the latter by the
dataset's inputs), sample_ids; in fp16 loss_scale and
skipped (1 if the step overflowed and changed nothing: it has no grad_norm); of a mixture of experts load_balancing_loss
and z_loss (means over layers, without their weights; a load-balancing loss of 1 is perfect balance) and expert_load
(choices of the busiest expert beside the mean, in the layer where that is largest). validation.jsonl holds step, loss
and the objective's metrics.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ext.events import Events
from megatron_ext.platforms.base import Platform
from megatron_ext.training.flops import training_flops
from megatron_ext.training.plan import Plan
from megatron_ext.training.setup import Setup
from megatron_ext.training.watch import Spikes, shown

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
NO_CURVE = {"step", "samples"}


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: what was computed, and what the update did."""

    loss: float
    trained_tokens: int
    lr: float
    grad_norm: float | None  # None: fp16 skipped the step
    extra: dict[str, float] = field(default_factory=dict)
    """Further values of this objective or precision, by name."""


@dataclass
class Diary:
    """Keeps the time, and writes a record every ``log_interval`` steps and at the last one."""

    setup: Setup
    platform: Platform
    events: Events
    consumed: int = 0
    drawn: dict[str, int] = field(default_factory=dict)
    _tokens: int = 0
    _seconds: float = 0.0
    _flops: float = 0.0
    _all_seconds: float = 0.0
    _all_tokens: int = 0
    _last: dict[str, Any] = field(default_factory=dict)
    _validation: dict[str, float] = field(default_factory=dict)

    def open(self, step: int, validated: int) -> None:
        """Go on after ``step``, and ``validated`` as the last one that was: records of others are dropped."""
        self._first = dist.get_rank() == 0
        self._started = time.perf_counter()
        self._spikes = [Spikes("loss"), Spikes("grad_norm")]
        if not self._first:
            return
        kept = _cut(self.setup.out / METRICS, step)
        if looked := _cut(self.setup.out / VALIDATION, validated):
            self._validation = {name: value for name, value in json.loads(looked[-1]).items() if name != "step"}
        self._file = (self.setup.out / METRICS).open("a", encoding="utf-8")
        self._last = json.loads(kept[-1]) if kept else {}
        recorded, self.consumed = self._last.get("step", 0), self._last.get("consumed_tokens", 0)
        self._inputs = inputs_of(self.setup)
        self.drawn = {name: 0 for name in self._inputs[0]} | self._last.get("samples", {})
        for done in range(recorded, step):
            self._draw(done)
            self.consumed += self.step_tokens(done)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.setup.out / "tensorboard"), purge_step=step + 1)
        self.events.emit("progress", done=step, total=self.setup.plan.iterations, unit="steps")

    def step_lengths(self, step: int) -> np.ndarray:
        """(N,) computed tokens of each sample of step ``step`` (from 0), or of each answer of a pair; the last token is
        only a label.
        """
        dataset, plan = self.setup.dataset, self.setup.plan
        if dataset.kind != "preference":
            return np.concatenate([plan.lengths[plan.samples(s)] - 1 for s in plan.sequences(step).tolist()])
        pairs = plan.sample_ids(step)
        return np.concatenate([np.minimum(side.lengths[pairs], plan.answer_limit) - 1 for side in dataset.tokens])

    def step_tokens(self, step: int) -> int:
        """Tokens that step ``step`` (from 0) computes."""
        return int(self.step_lengths(step).sum())

    def _draw(self, step: int) -> None:
        """Count the samples of step ``step`` (from 0) for the inputs that they come from."""
        names, starts = self._inputs
        which = np.searchsorted(starts, first_documents(self.setup.plan, step), side="right") - 1
        for name, count in zip(names, np.bincount(which, minlength=len(names)).tolist(), strict=True):
            self.drawn[name] += count

    def start_step(self) -> None:
        self._began = time.perf_counter()

    def end_step(self, step: int, result: StepResult) -> None:
        """Record optimizer step ``step`` (from 1), which has just been done."""
        seconds, lengths = time.perf_counter() - self._began, self.step_lengths(step - 1)
        tokens = int(lengths.sum())
        self.consumed += tokens
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        self._flops += training_flops(self.setup.manifest.architecture, lengths)
        self._all_tokens, self._all_seconds = self._all_tokens + tokens, self._all_seconds + seconds
        if not self._first:
            return
        self._draw(step - 1)
        for spikes, value in zip(self._spikes, (result.loss, result.grad_norm), strict=True):
            if result.grad_norm is not None and (sentence := spikes.look(step, value)):
                self.events.note(f"{sentence}; its samples: {shown(self.setup.plan.sample_ids(step - 1))}")
        if step % self.setup.runtime.log_interval == 0 or step in (1, self.setup.plan.iterations):
            self._record(step, result, seconds, tokens)

    def _record(self, step: int, result: StepResult, seconds: float, tokens: int) -> None:
        speed, flops, devices = self._tokens / self._seconds, self._flops / self._seconds, dist.get_world_size()
        peak = self.platform.peak_flops(self.setup.train.precision)
        self._last = {
            "step": step,
            "loss": result.loss,
            "lr": result.lr,
            **({} if result.grad_norm is None else {"grad_norm": result.grad_norm}),
            **result.extra,
            "tokens": tokens,
            "trained_tokens": result.trained_tokens,
            "consumed_tokens": self.consumed,
            "samples": dict(self.drawn),
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / devices, 1),
            "step_time": round(seconds, 4),
            "flops": float(f"{flops:.4g}"),
            **({"mfu": round(flops / (peak * devices), 4)} if peak else {}),
            "memory": self.platform.peak_memory(),
            "padding": round(1 - tokens / (self.setup.train.global_batch_size * self.setup.train.seq_length), 4),
        }
        self._tokens, self._seconds, self._flops = 0, 0.0, 0.0
        self._file.write(json.dumps({**self._last, "sample_ids": self.setup.plan.sample_ids(step - 1)}) + "\n")
        self._file.flush()
        for name, value in self._last.items():
            if name not in NO_CURVE:
                self._board.add_scalar(f"train/{name}", value, step)
        for name, count in self.drawn.items():
            self._board.add_scalar(f"samples/{name}", count, step)
        self.events.emit("metrics", **{name: value for name, value in self._last.items() if name != "samples"})
        self.events.emit(
            "progress", done=step, total=self.setup.plan.iterations, unit="steps", tokens_per_second=round(speed, 1)
        )

    def validated(self, step: int, means: dict[str, float]) -> None:
        """Record what was found on the validation set after ``step``; nothing if there is none."""
        if not self._first or not means:
            return
        with (self.setup.out / VALIDATION).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **means}) + "\n")
        for name, value in means.items():
            self._board.add_scalar(f"validation/{name}", value, step)
        self._validation = means
        self.events.emit("validation", step=step, **means)

    def close(self) -> dict[str, Any]:
        """Flush, and say how it went: figures of this attempt, not of those before a resume."""
        if not self._first:
            return {}
        self._file.close()
        self._board.close()
        speed = self._all_tokens / self._all_seconds if self._all_seconds else 0.0
        return {
            "loss": self._last.get("loss"),
            **{f"validation_{name}": value for name, value in self._validation.items()},
            "consumed_tokens": self.consumed,
            "samples_drawn": self.drawn,
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / dist.get_world_size(), 1),
            "seconds": round(time.perf_counter() - self._started, 2),
        }


def inputs_of(setup: Setup) -> tuple[list[str], np.ndarray]:
    """Names of the dataset's inputs, and the number of each one's first document."""
    pools = setup.dataset.inputs
    return [pool.name for pool in pools], np.asarray([pool.first for pool in pools])


def first_documents(plan: Plan, step: int) -> np.ndarray:
    """(n,) document of each sample of step ``step`` (from 0); of text, the one in which its window begins."""
    samples = plan.sample_ids(step)
    return np.asarray(samples if plan.stream is None else [plan.stream.pieces(window)[0][0] for window in samples])


def _cut(path: Path, step: int) -> list[str]:
    """Leave the records of ``path`` until ``step``, and return them."""
    kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
    draft = path.with_name(f".{path.name}")
    draft.write_text("".join(kept), encoding="utf-8")
    os.replace(draft, path)
    return kept


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a kill may have cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
