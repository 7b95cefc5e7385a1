"""The training's diary: metrics.jsonl, TensorBoard and events, written by rank 0.

A record: step (counted from 1), loss (mean over trained tokens), lr, grad_norm, tokens (computed, without padding),
trained_tokens, tokens_per_second, tokens_per_second_per_device, step_time (seconds), padding (share of
global_batch_size x seq_length that holds no token), consumed_tokens (since step 1), sample_ids.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.config import TrainConfig
from megatron_ext.events import Events
from megatron_ext.training.plan import Plan

METRICS = "metrics.jsonl"
CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "tokens_per_second_per_device", "step_time", "padding")


@dataclass
class Diary:
    """Keeps the time, and writes a record every ``log_interval`` steps and at the last one."""

    out: Path
    train: TrainConfig
    plan: Plan
    events: Events
    log_interval: int
    consumed: int = 0
    _tokens: int = 0
    _seconds: float = 0.0
    _all_seconds: float = 0.0
    _all_tokens: int = 0
    _last: dict[str, Any] = field(default_factory=dict)

    def open(self, step: int) -> None:
        """Go on after ``step``: records of steps that will be done again are dropped."""
        self._first = dist.get_rank() == 0
        self._started = time.perf_counter()
        if not self._first:
            return
        path = self.out / METRICS
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        draft = path.with_name(f".{METRICS}")
        draft.write_text("".join(kept), encoding="utf-8")
        os.replace(draft, path)
        self._file = path.open("a", encoding="utf-8")
        self._last = json.loads(kept[-1]) if kept else {}
        recorded, self.consumed = self._last.get("step", 0), self._last.get("consumed_tokens", 0)
        self.consumed += sum(self.step_tokens(s) for s in range(recorded, step))
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
        self.events.emit("progress", done=step, total=self.plan.iterations, unit="steps")

    def step_tokens(self, step: int) -> int:
        """Tokens that step ``step`` (from 0) computes: each sample's last token is only a label."""
        return sum(int((self.plan.lengths[self.plan.samples(s)] - 1).sum()) for s in self.plan.sequences(step).tolist())

    def start_step(self) -> None:
        self._began = time.perf_counter()

    def end_step(self, step: int, loss: float, trained_tokens: int, lr: float, grad_norm: float) -> None:
        """Record optimizer step ``step`` (from 1), which has just been done."""
        seconds, tokens = time.perf_counter() - self._began, self.step_tokens(step - 1)
        self.consumed += tokens
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        self._all_tokens, self._all_seconds = self._all_tokens + tokens, self._all_seconds + seconds
        if not self._first or (step % self.log_interval and step not in (1, self.plan.iterations)):
            return
        speed = self._tokens / self._seconds
        self._last = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "consumed_tokens": self.consumed,
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / dist.get_world_size(), 1),
            "step_time": round(seconds, 4),
            "padding": round(1 - tokens / (self.train.global_batch_size * self.train.seq_length), 4),
        }
        self._tokens, self._seconds = 0, 0.0
        self._file.write(json.dumps({**self._last, "sample_ids": self.plan.sample_ids(step - 1)}) + "\n")
        self._file.flush()
        for name in CURVES:
            self._board.add_scalar(f"train/{name}", self._last[name], step)
        self.events.emit("metrics", **self._last)
        self.events.emit(
            "progress", done=step, total=self.plan.iterations, unit="steps", tokens_per_second=round(speed, 1)
        )

    def close(self) -> dict[str, Any]:
        """Flush, and say how it went: figures of this attempt, not of those before a resume."""
        if not self._first:
            return {}
        self._file.close()
        self._board.close()
        speed = self._all_tokens / self._all_seconds if self._all_seconds else 0.0
        return {
            "loss": self._last.get("loss"),
            "consumed_tokens": self.consumed,
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / dist.get_world_size(), 1),
            "seconds": round(time.perf_counter() - self._started, 2),
        }


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a kill may have cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
