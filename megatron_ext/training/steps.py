"""One optimizer step on megatron-core: forward and backward over the micro batches, then the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_ext.guard import STOP
from megatron_ext.model.provider import build_model
from megatron_ext.platforms.base import Platform
from megatron_ext.training.batches import Batches
from megatron_ext.training.checkpoints import TrainingState, load_weights
from megatron_ext.training.losses import forward_step
from megatron_ext.training.metrics import StepResult
from megatron_ext.training.optimizer import adamw, data_parallel
from megatron_ext.training.parallel import row_multiple
from megatron_ext.training.plan import parameters
from megatron_ext.training.saving import Saver
from megatron_ext.training.schedule import learning_rate, scheduler

if TYPE_CHECKING:
    from megatron_ext.training.loop import Setup


@dataclass(frozen=True)
class Computed:
    """What forward and backward of one step found, over all ranks."""

    loss: float
    tokens: int  # trained ones
    stop: bool  # whether any rank was asked to stop
    writing: bool  # whether any rank still writes a checkpoint in the background


class Trainer:
    """The model, its optimizer and its data on this rank."""

    def __init__(self, setup: Setup, platform: Platform, saver: Saver) -> None:
        self.setup, self.saver, self.first = setup, saver, dist.get_rank() == 0
        train, runtime = setup.train, setup.runtime
        bare = build_model(setup.manifest.architecture, train, runtime, platform)
        load_weights(bare, setup.checkpoint)
        self.model = data_parallel(bare, train, runtime)
        self.model.train()
        optimizer = adamw(self.model, train, runtime)
        size = parameters(setup.manifest.architecture)
        self.state = TrainingState(bare, optimizer, scheduler(optimizer, train, setup.plan.iterations), size)
        self.batches = Batches(
            setup.plan,
            setup.dataset,
            micro_batch_size=runtime.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            multiple=row_multiple(platform, runtime),
            fused=platform.fused_layers(train.precision),
        )
        self.schedule = get_forward_backward_func()
        self.forward_step = forward_step(setup.manifest.vocab_size)
        self.sums = torch.float32 if platform.name == "npu" else torch.float64

    def compute(self) -> Computed:
        """Gradients of the coming step."""
        self.model.zero_grad_buffer()
        self.state.optimizer.zero_grad()
        runtime, train = self.setup.runtime, self.setup.train
        outputs = self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=self.batches.step(self.state.step),
            model=self.model,
            num_microbatches=self.batches.count,
            seq_length=train.seq_length * runtime.micro_batch_size,
            micro_batch_size=1,
            forward_only=False,
        )
        reporting = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        mine = outputs if reporting else []
        loss = sum((o["loss"] for o in mine), torch.zeros((), device=torch.cuda.current_device()))
        counts = [float(sum(o["tokens"] for o in mine)), float(STOP.asked), float(self.saver.writing)]
        sums = torch.cat([loss.to(self.sums)[None], torch.tensor(counts, dtype=self.sums, device=loss.device)])
        dist.all_reduce(sums)
        total, tokens, stops, writing = sums.tolist()
        return Computed(total / tokens, int(tokens), stops > 0, writing > 0)

    def update(self, computed: Computed) -> StepResult:
        """Apply the gradients, unless a gradient overflowed in fp16: then the scale falls and nothing else changes."""
        lr, extra = learning_rate(self.state.optimizer), {}
        if self.setup.train.precision == "fp16":
            extra["loss_scale"] = float(self.state.optimizer.get_loss_scale().item())
        applied, grad_norm, _ = self.state.optimizer.step()
        if extra:
            extra["skipped"] = float(not applied)
        if applied:
            self.state.scheduler.step(1)
        self.state.step += 1
        return StepResult(computed.loss, computed.tokens, lr, float(grad_norm if grad_norm is not None else 0.0), extra)
