"""Processes and their groups: from the environment that torchrun sets to megatron-core's parallel state."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.errors import PlatformError
from megatron_ext.events import Events
from megatron_ext.platforms.base import Platform, select


@contextmanager
def parallel_state(runtime: RuntimeConfig, train: TrainConfig, num_threads: int) -> Iterator[Platform]:
    """Prepare the platform, join the other ranks, set up the groups of every kind of parallelism, seed every RNG.

    Must be entered before anything imports megatron-core; works alone and under torchrun.

    Raises:
        PlatformError: the platform asked for cannot run here.
    """
    platform = select(runtime.platform)
    if train.precision == "fp8" and not platform.transformer_engine():
        raise PlatformError(f"train.precision fp8 needs Transformer Engine, which {platform.name} has not; take bf16")
    platform.prepare()
    quiet()
    set_num_threads(num_threads)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext.platforms import megatron_fixes

    megatron_fixes.apply(platform.name)
    platform.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()  # alone: no port, nothing to collide with
    dist.init_process_group(platform.backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
    parallel_state.initialize_model_parallel(
        runtime.tensor_model_parallel_size,
        runtime.pipeline_model_parallel_size,
        runtime.virtual_pipeline_model_parallel_size,
        context_parallel_size=runtime.context_parallel_size,
        expert_model_parallel_size=runtime.expert_model_parallel_size,
        create_gloo_process_groups=False,
    )
    seed_all(train.seed)
    try:
        yield platform
    finally:
        parallel_state.destroy_model_parallel()
        tensor_parallel.get_cuda_rng_tracker().reset()
        dist.destroy_process_group()


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch; pipeline stages differ, and tensor-parallel ranks where they must."""
    import random

    import numpy as np
    import torch
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def quiet() -> None:
    """Hide what megatron-core says about packages that are not installed and interfaces that it will change."""
    for module in (r"megatron\.", r"torch\.distributed\."):
        warnings.filterwarnings("ignore", module=module)


def set_num_threads(num_threads: int) -> None:
    """Fix the CPU threads of this process: results are bit-equal at one count only."""
    import torch

    torch.set_num_threads(num_threads)


def row_multiple(platform: Platform, train: TrainConfig, runtime: RuntimeConfig) -> int:
    """Rows of tokens are padded to a multiple of this: what the device likes, and what sequence parallelism splits.

    Interleaved pipeline stages send tensors of one shape, so there every row is as long as the longest can be.
    """
    if runtime.virtual_pipeline_model_parallel_size:
        return train.seq_length * runtime.micro_batch_size
    split = runtime.tensor_model_parallel_size if runtime.sequence_parallel else 1
    return math.lcm(platform.pad_to_multiple, split)


def announce(events: Events, platform: Platform, num_threads: int) -> None:
    """Say which processes train, so that whoever stops the run can signal each of them."""
    import torch.distributed as dist

    pids: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    for sentence in platform.notes():
        events.note(sentence)
    events.emit("ranks", pids=pids, platform=platform.name, device=platform.device_name(), num_threads=num_threads)


def first_rank() -> bool:
    """Whether this process writes what is written once."""
    import torch.distributed as dist

    return dist.get_rank() == 0
