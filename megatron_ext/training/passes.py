"""The model on this rank, driven over batches by megatron-core's schedules: shared by training and what only looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_ext.errors import JobInterrupted
from megatron_ext.guard import STOP
from megatron_ext.model.provider import build_chunks
from megatron_ext.model.routing import watched_routers
from megatron_ext.platforms.base import Platform
from megatron_ext.training.batches import Batch, Batches
from megatron_ext.training.checkpoints import load_chunks
from megatron_ext.training.losses import forward_step
from megatron_ext.training.parallel import row_multiple
from megatron_ext.training.plan import Plan
from megatron_ext.training.setup import Base
from megatron_ext.training.watch import HEART


class Passes:
    """The model that a training starts from, on its device.

    Attributes:
        chunks: the bare GPTModels of this rank: one, or one for each virtual pipeline stage.
        models: what is run: the chunks, or what they are wrapped in.
        routers: of a mixture of experts, those of its layers on this rank.
    """

    def __init__(self, base: Base, platform: Platform) -> None:
        self.base, self.platform = base, platform
        self.chunks = build_chunks(base.manifest.architecture, base.train, base.runtime, platform)
        load_chunks(self.chunks, base.checkpoint)
        self.models: list[Any] = self.chunks
        self.routers = watched_routers(self.chunks) if base.manifest.architecture.num_moe_experts else []
        self._schedule = get_forward_backward_func()
        self._sums = torch.float32 if platform.name == "npu" else torch.float64

    @property
    def reporting(self) -> bool:
        """Whether the losses of this rank count: other stages have none, tensor-parallel ranks have the same."""
        return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0

    def batches_of(self, plan: Plan, dataset: Path) -> Batches:
        """This rank's share of a plan on ``dataset``."""
        train, runtime = self.base.train, self.base.runtime
        return Batches(
            plan,
            dataset,
            micro_batch_size=runtime.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            multiple=row_multiple(self.platform, train, runtime),
            fused=self.platform.fused_layers(train.precision),
            dense=plan.stream is not None or runtime.context_parallel_size > 1,
        )

    def run(
        self,
        loss: Any,
        batches: Batches,
        micro_batches: Callable[[], Iterator[Batch]],
        count: int,
        *,
        forward_only: bool,
    ) -> list[dict[str, Any]]:
        """What ``loss`` said of each of the ``count`` micro batches; empty on ranks whose losses do not count."""
        length, rows = batches.shape
        outputs = self._schedule(
            forward_step_func=forward_step(loss, loss.weights if self.routers and not forward_only else None),
            data_iterator=[micro_batches() for _ in self.models],
            model=self.models,
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return outputs if self.reporting else []

    def summed(self, outputs: list[dict[str, Any]], names: tuple[str, ...], *flags: bool) -> list[float]:
        """Sums over all micro batches and ranks of the values of ``names``, then of ``flags``."""
        device = torch.cuda.current_device()
        sums = torch.zeros(len(names) + len(flags), dtype=self._sums, device=device)
        for output in outputs:
            sums[: len(names)] += torch.stack([torch.as_tensor(output[name], device=device).to(sums) for name in names])
        sums[len(names) :] += torch.tensor(flags, device=device)
        dist.all_reduce(sums)
        return sums.tolist()

    def sweep(
        self, loss: Callable[[Batch, torch.Tensor], Any], plan: Plan, dataset: Any
    ) -> Iterator[list[dict[str, Any]]]:
        """Run forward over every sequence of ``plan`` once, without dropout; yields what ``loss`` said.

        Raises:
            JobInterrupted: a rank was asked to stop; on all of them.
        """
        batches, count = self.batches_of(plan, dataset), parallel_state.get_pipeline_model_parallel_world_size()
        with self._looking():
            for call in batches.sweep(count):
                HEART.beat()
                if self.summed([], (), STOP.asked)[0]:
                    raise JobInterrupted("stopped in the middle of a pass")
                shared = list(call)
                yield self.run(loss, batches, lambda shared=shared: iter(shared), count, forward_only=True)

    def loss_of(self, loss: Any, batches: Batches, step: int) -> float:
        """The mean loss of ``step`` (from 0) as the weights are now, without dropout."""
        with self._looking():
            outputs = self.run(loss, batches, lambda: batches.step(step), batches.count, forward_only=True)
            total, count = self.summed(outputs, ("loss", "count"))
        return total / count

    def broken_weights(self) -> int:
        """How many of the weights' tensors, over all ranks, have a norm that is not finite in fp32."""
        weights = [parameter.detach() for chunk in self.chunks for parameter in chunk.parameters()]
        norms = torch.stack([torch.linalg.vector_norm(weight, dtype=torch.float32) for weight in weights])
        found = (~torch.isfinite(norms)).sum().to(torch.float32)
        dist.all_reduce(found)
        return int(found)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Without gradients and dropout."""
        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for model in self.models:
                model.train()
