"""Rows on their way: a few threads read, transform and write pieces of them while what was written goes to the disk.

Whatever the model's size, only one piece a thread is in memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from megatron_ext.events import Events
from megatron_ext.families.base import Weight
from megatron_ext.weights.casting import Underflow, cast
from megatron_ext.weights.hf import TensorInfo
from megatron_ext.weights.rules import Move
from megatron_ext.weights.streams import (
    PIECE_BYTES,
    CheckpointReader,
    CheckpointWriter,
    HFReader,
    HFWriter,
    bounded,
    row_bytes,
)

MOST_THREADS = 8
SYNC_SECONDS, PROGRESS_SECONDS = 0.1, 0.5
Piece = list[tuple[Weight, Move]]
T = TypeVar("T")


def write_checkpoint(
    writer: CheckpointWriter,
    plan: Iterable[Weight],
    source: HFReader,
    dtypes: Mapping[str, torch.dtype],
    events: Events,
) -> None:
    """Write every row of the plan's megatron-core weights, each key in its type of ``dtypes``, and finish."""

    def move(piece: Piece) -> int:
        size = 0
        for weight, (part, first, target, count) in piece:
            name = weight.parts[part].name
            given = source.rows(weight.parts[part], first, count)
            rows = cast(given, dtypes[weight.key], name, first)
            lost.see(name, given, rows)
            writer.write(weight, target, rows)
            size += rows.nbytes
        return size

    plan, lost = list(plan), Underflow()
    progress = Progress(events, sum(row_bytes(w.own_shape, dtypes[w.key]) * w.own_shape[0] for w in plan))
    with _finished(writer):
        work_through(pieces(plan, dtypes), move, writer.sync, progress)
    lost.tell(events)


def write_model(
    writer: HFWriter,
    plan: Iterable[Weight],
    source: CheckpointReader,
    tensors: Mapping[str, TensorInfo],
    events: Events,
) -> None:
    """Write every row of the plan's Hugging Face weights, each in its type of ``tensors``, and finish."""

    def move(piece: Piece) -> int:
        size = 0
        for weight, (part, first, target, count) in piece:
            name = weight.parts[part].name
            given = source.rows(weight, target, count)
            rows = cast(given, tensors[name].dtype, name, first)
            lost.see(name, given, rows)
            writer.write(weight.parts[part], first, rows)
            size += rows.nbytes
        return size

    lost = Underflow()
    progress = Progress(events, sum(info.nbytes for info in tensors.values()))
    with _finished(writer):
        work_through(pieces(plan, source.dtypes), move, writer.sync, progress)
    lost.tell(events)


@contextmanager
def _finished(writer: CheckpointWriter | HFWriter) -> Iterator[None]:
    try:
        yield
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def pieces(plan: Iterable[Weight], dtypes: Mapping[str, torch.dtype], most: int = PIECE_BYTES) -> Iterator[Piece]:
    """All moves of the plan in its order, in pieces of about ``most`` bytes; larger only where one row is."""
    piece: Piece = []
    size = 0
    for weight in plan:
        width = row_bytes(weight.own_shape, dtypes[weight.key])
        for move in bounded(weight.moves, width, most):
            if piece and size + move.rows * width > most:
                yield piece
                piece, size = [], 0
            piece.append((weight, move))
            size += move.rows * width
    if piece:
        yield piece


class Progress:
    """Tells ``events`` about bytes and bytes per second, now and then and at the end."""

    def __init__(self, events: Events, total: int, unit: str = "bytes") -> None:
        self._events, self._total, self._unit = events, total, unit
        self._start = self._told = time.monotonic()

    def __call__(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self._events.progress(done, self._total, self._unit, rate=done / max(now - self._start, 1e-6))


def work_through(
    items: Iterable[T],
    work: Callable[[T], int],
    meanwhile: Callable[[], None],
    progress: Callable[..., None],
    threads: int | None = None,
) -> None:
    """Do ``work`` on every item, several at a time and begun in their order; ``work`` gives the bytes that it moved.

    ``meanwhile`` is called again and again by the caller's thread. The first error ends everything and is raised.
    """
    count = threads or min(MOST_THREADS, max(2, len(os.sched_getaffinity(0))))
    crew = _Crew(items, work)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(count, thread_name_prefix="rows") as pool:
        members = [pool.submit(crew.run) for _ in range(count)]
        try:
            while not _ended(members):
                meanwhile()
                progress(crew.moved)
        finally:
            crew.stopped = True
    torch.set_num_threads(before)
    for member in members:
        member.result()
    progress(crew.moved, last=True)


def _ended(members: list[Future[None]]) -> bool:
    """Wait a moment; whether all are done, or one has failed."""
    state = wait(members, SYNC_SECONDS, FIRST_EXCEPTION)
    return not state.not_done or any(member.exception() for member in state.done)


class _Crew(Generic[T]):
    """What the threads share: what is left to do, and how much was moved."""

    def __init__(self, items: Iterable[T], work: Callable[[T], int]) -> None:
        self._items, self._work, self._lock = iter(items), work, threading.Lock()
        self.stopped, self.moved = False, 0

    def run(self) -> None:
        """Work until nothing is left, or somebody stops."""
        torch.set_num_threads(1)  # the crew's members keep the processors busy
        for item in self._taken():
            moved = self._work(item)
            with self._lock:
                self.moved += moved

    def _taken(self) -> Iterator[T]:
        while not self.stopped:
            with self._lock:
                item = next(self._items, None)
            if item is None:
                return
            yield item
