"""One optimizer step on megatron-core: forward and backward over the micro batches, then the update; and validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ext.errors import TrainingDivergedError
from megatron_ext.guard import STOP
from megatron_ext.model.routing import routing_metrics
from megatron_ext.platforms.base import Platform
from megatron_ext.training.checkpoints import TrainingState, optimizer_format
from megatron_ext.training.layout import parameters
from megatron_ext.training.losses import LanguageLoss, PreferenceLoss
from megatron_ext.training.metrics import StepResult
from megatron_ext.training.optimizer import MIN_LOSS_SCALE, adamw, data_parallel, reduce_once_a_step
from megatron_ext.training.passes import Passes
from megatron_ext.training.reference import reference_log_probabilities
from megatron_ext.training.saving import Saver
from megatron_ext.training.schedule import learning_rate, scheduler
from megatron_ext.training.setup import Setup
from megatron_ext.training.state import last_checkpoint
from megatron_ext.training.watch import shown

SKIPS = 20
"""Steps in a row that may overflow at the smallest loss scale."""
SUMS = ("loss", "count", "tokens")
"""What every loss says of a micro batch, beside its own metrics."""


@dataclass(frozen=True)
class Computed:
    """What forward and backward of one step found, over all ranks."""

    loss: float
    tokens: int  # trained ones
    stop: bool  # whether any rank was asked to stop
    writing: bool  # whether any rank still writes a checkpoint in the background
    metrics: dict[str, float]  # further means of the objective


class Trainer(Passes):
    """The model, its optimizer and its data on this rank."""

    def __init__(self, setup: Setup, platform: Platform, saver: Saver) -> None:
        super().__init__(setup, platform)
        self.setup, self.saver, self._skipped = setup, saver, 0
        train, vocab_size = setup.train, setup.manifest.vocab_size
        if setup.reference is None:
            self.loss = LanguageLoss(vocab_size, train.loss_normalization)
        else:
            reference = reference_log_probabilities(setup, self, setup.reference)
            self.loss = PreferenceLoss(vocab_size, train.preference, reference)
        self.models = [data_parallel(chunk, train, setup.runtime, first=i == 0) for i, chunk in enumerate(self.chunks)]
        if setup.runtime.overlap_grad_reduce:
            reduce_once_a_step(self.models)
        for model in self.models:
            model.train()
        optimizer = adamw(self.models, train, setup.runtime)
        schedule = scheduler(optimizer, train, setup.plan.iterations)
        saved = optimizer_format(setup.runtime.optimizer_state, parameters(setup.manifest.architecture))
        self.state = TrainingState(self.chunks, self.models, optimizer, schedule, saved)
        self.data = self.batches_of(setup.plan, setup.dataset.place)

    def compute(self) -> Computed:
        """Gradients of the coming step."""
        for model in self.models:
            model.zero_grad_buffer()
        self.state.optimizer.zero_grad()
        step = self.state.step
        outputs = self.run(self.loss, self.data, lambda: self.data.step(step), self.data.count, forward_only=False)
        names = (*SUMS, *self.loss.metrics)
        *sums, stops, writing = self.summed(outputs, names, STOP.asked, self.saver.writing)
        means = _means(dict(zip(names, sums, strict=True)))
        if self.routers:
            means |= routing_metrics(self.routers, self.setup.manifest.architecture.num_layers, sums[1])
        return Computed(means.pop("loss"), int(sums[2]), stops > 0, writing > 0, means)

    def update(self, computed: Computed) -> StepResult:
        """Apply the gradients, unless a gradient overflowed in fp16: then the scale falls and nothing else changes.

        Raises:
            TrainingDivergedError: at the smallest scale, too, all of the last ``SKIPS`` steps overflowed.
        """
        lr, scaled = learning_rate(self.state.optimizer), {}
        if self.setup.train.precision == "fp16":
            scaled["loss_scale"] = float(self.state.optimizer.get_loss_scale().item())
        applied, grad_norm, _ = self.state.optimizer.step()
        self.state.step += 1
        if scaled:
            scaled["skipped"] = float(not applied)
            self._count_skips(applied, scaled["loss_scale"])
        if applied:
            self.state.scheduler.step(1)
        norm = None if grad_norm is None else float(grad_norm)
        return StepResult(computed.loss, computed.tokens, lr, norm, {**computed.metrics, **scaled})

    def _count_skips(self, applied: bool, scale: float) -> None:
        self._skipped = 0 if applied or scale > MIN_LOSS_SCALE else self._skipped + 1
        if self._skipped == SKIPS:
            step = self.state.step
            raise TrainingDivergedError(
                f"the gradients of step {step} overflow in fp16 at the smallest loss scale {scale:g}, as those of the "
                f"{SKIPS - 1} steps before; its samples were {shown(self.setup.plan.sample_ids(step - 1))}; last "
                f"checkpoint: {last_checkpoint(self.setup.out)}; take train.precision bf16, or lower train.lr"
            )

    def validate(self) -> dict[str, float]:
        """Means over the validation set, by name; empty without one."""
        if self.setup.validation is None:
            return {}
        dataset, plan = self.setup.validation
        names, totals = (*SUMS, *self.loss.metrics), None
        for outputs in self.sweep(self.loss, plan, dataset):
            sums = torch.tensor(self.summed(outputs, names), dtype=torch.float64)
            totals = sums if totals is None else totals + sums
        assert totals is not None
        return _means(dict(zip(names, totals.tolist(), strict=True)))


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {name: value / sums["count"] for name, value in sums.items() if name not in ("count", "tokens")}
