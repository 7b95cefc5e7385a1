"""Writes a training's checkpoints: under a partial name, flushed to the disk, renamed; the pointer moves last.

So whatever the moment of a kill, ``latest_checkpointed_iteration.txt`` names a whole checkpoint or there is none.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ext.config import RuntimeConfig
from megatron_ext.events import Events
from megatron_ext.folders import fsync_tree, recover_folder, replace_folder
from megatron_ext.weights.manifest import LATEST, MANIFEST, iteration_folder, latest_folder, write_latest


class Saver:
    """The checkpoints of one training folder. Every rank calls every method, in the same order."""

    def __init__(self, out: Path, runtime: RuntimeConfig, describe: Callable[[Path, int], None]) -> None:
        """``describe`` writes the manifest of a folder and a step; it runs on rank 0, before the pointer moves."""
        self._out, self._runtime, self._describe = out, runtime, describe
        self._pending: Background | None = None
        self._first = dist.get_rank() == 0
        self._unproven: Path | None = None

    def recover(self) -> None:
        """Put back or remove what a killed save left."""
        if not self._first:
            return
        for old in self._out.glob(".iter_*.replaced"):
            recover_folder(self._out / old.name.removeprefix(".").removesuffix(".replaced"))
        for partial in self._out.glob(".iter_*.partial"):
            shutil.rmtree(partial)
        if (self._out / LATEST).exists():
            self._unproven = latest_folder(self._out)

    def beside(self, folder: Path) -> Saver:
        """A saver of ``folder``, made if it is not there."""
        folder.mkdir(exist_ok=True)
        return Saver(folder, self._runtime, self._describe)

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing in the background."""
        return self._pending is not None and self._pending.running

    def save(self, step: int, content: dict[str, Any], events: Events) -> None:
        """Write the full state of ``step``; with ``runtime.async_save`` only copy it, and write beside the training."""
        self.finish(events)
        partial = self._open(step)
        if self._runtime.async_save:
            self._pending = Background(step, partial, content)
        else:
            dist_checkpointing.save(content, str(partial), _strategy())
            self._publish(step, partial)
            events.emit("checkpoint", step=step)

    def look(self, writing_anywhere: bool, events: Events) -> None:
        """Publish what was written in the background, once no rank writes any more."""
        if not writing_anywhere:
            self.finish(events)

    def finish(self, events: Events) -> None:
        """Wait for what is being written in the background, and publish it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.wait()
        self._publish(pending.step, pending.partial)
        events.emit("checkpoint", step=pending.step)

    def save_final(self, step: int, content: dict[str, Any], describe: Callable[[], None]) -> None:
        """Write the last checkpoint, with a manifest of its own; those before it go, but for ``keep_every``'s."""
        self.finish(Events())
        partial = self._open(step)
        dist_checkpointing.save(content, str(partial), _strategy())
        self._publish(step, partial, describe)
        if self._first:
            self._remove_old(iteration_folder(self._out, step), 0)

    def confirm(self) -> None:
        """A step from the newest checkpoint was sound: those that it replaces are removed."""
        newest, self._unproven = self._unproven, None
        if newest is not None:
            self._remove_old(newest, self._runtime.keep_last - 1)

    def distrust(self, step: int, events: Events) -> None:
        """A step was not sound: if it was the one after the newest checkpoint, the pointer goes back to that before."""
        self.finish(events)
        newest = self._unproven
        if newest is not None and newest == iteration_folder(self._out, step - 1):
            before = [folder for folder in sorted(self._out.glob("iter_*")) if folder < newest]
            if before:
                self._describe(self._out, _step_of(before[-1]))
                write_latest(self._out, _step_of(before[-1]))
            else:
                (self._out / LATEST).unlink()
            _flush(self._out)
        dist.barrier()

    def _open(self, step: int) -> Path:
        partial = self._out / f".{iteration_folder(self._out, step).name}.partial"
        if self._first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        return partial

    def _publish(self, step: int, partial: Path, describe: Callable[[], None] | None = None) -> None:
        if self._first:
            target = iteration_folder(self._out, step)
            fsync_tree(partial)
            replace_folder(partial, target)
            describe() if describe else self._describe(self._out, step)
            write_latest(self._out, step)
            _flush(self._out / MANIFEST, self._out / LATEST, self._out)
            self._unproven = target
        dist.barrier()

    def _remove_old(self, newest: Path, count: int) -> None:
        """Leave ``newest``, the ``count`` before it, and those of ``keep_every``."""
        every = self._runtime.keep_every
        folders = sorted(self._out.glob("iter_*"))
        before = [folder for folder in folders if folder < newest]
        kept = {newest, *before[max(0, len(before) - count) :]}
        kept |= {folder for folder in before if every and _step_of(folder) % every == 0}
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(folder)


class Background:
    """One save whose files a thread writes from copies while training goes on."""

    def __init__(self, step: int, partial: Path, content: dict[str, Any]) -> None:
        self.step, self.partial = step, partial
        self._request = dist_checkpointing.save(content, str(partial), _strategy(), async_sharded_save=True)
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if self._request.async_fn is not None:
            rank, _, results = self._request.async_fn_args
            buckets = [
                (path, key, (blobs, [(item, _copied(tensor)) for item, tensor in tensors]))
                for path, key, (blobs, tensors) in self._request.preload_fn()
            ]
            self._thread = threading.Thread(target=self._write, args=(rank, buckets, results), name="checkpoint-writer")
            self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until every rank has written; what went wrong in this rank's thread is raised here."""
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        dist.barrier()
        for finalize in self._request.finalize_fns:
            finalize()

    def _write(self, rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
        try:
            self._request.async_fn(rank, buckets, results, **self._request.async_fn_kwargs)
        except BaseException as error:  # noqa: BLE001 (raised again where the training waits)
            self._failure = error


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the next step does not change; from a device the tensor has already been copied."""
    return tensor.clone()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _strategy() -> Any:
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(strategy, group, True) if group.size() > 1 else strategy
