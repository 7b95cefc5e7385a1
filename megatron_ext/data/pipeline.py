"""Blocks of rows through workers, results in order: one thread reads ahead, workers encode, the caller writes."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")
WAIT_SECONDS = 0.2
"""How soon the reader notices that nobody takes its blocks any more."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ordered(
    blocks: Iterator[Any], submit: Callable[[Any], Future[R]], waiting: int
) -> Generator[Iterator[R], None, None]:
    """Submit each block as it is read and yield the results in the blocks' order.

    Args:
        blocks: read in a thread of its own.
        submit: hands a block to a worker.
        waiting: blocks that are submitted and not yet taken, at most.
    """
    results: queue.Queue[Future[R] | BaseException | None] = queue.Queue(waiting)
    stop = threading.Event()

    def put(item: Future[R] | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=WAIT_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for block in blocks:
                if stop.is_set() or not put(submit(block)):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 (the caller raises it)
            put(error)

    def take() -> Iterator[R]:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.result()

    reader = threading.Thread(target=read, name="reader", daemon=True)
    reader.start()
    try:
        yield take()
    finally:
        stop.set()
        while not results.empty():
            if isinstance(item := results.get_nowait(), Future):
                item.cancel()
        reader.join()
