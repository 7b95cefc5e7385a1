"""One attempt at a dataset with one engine: blocks through workers into shards, with progress."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from megatron_ext.data import text_work
from megatron_ext.data.chat_templates import special_tokens
from megatron_ext.data.engine_proof import EngineDiffersError, Proof
from megatron_ext.data.engines import GIGATOKEN, GigatokenEngine, ReferenceEngine
from megatron_ext.data.pipeline import ordered
from megatron_ext.data.plan import Plan
from megatron_ext.data.shards import Shards
from megatron_ext.data.source_facts import SourceFacts
from megatron_ext.data.sources import Meter, Source
from megatron_ext.data.text_work import Done
from megatron_ext.errors import WorkerFailedError
from megatron_ext.events import Events


@dataclass(frozen=True)
class Start:
    """What is decided before the first row, and stays when a killed build goes on.

    Attributes:
        engine: what encodes.
        why: why it is not the fast one.
        moment: what templates take for now, in ISO's form.
    """

    engine: str
    why: str
    moment: str


PROGRESS_SECONDS = 0.5
COLUMNAR = (".parquet", ".arrow")
READ_AHEAD = 2
"""Blocks beyond one for each worker that wait, encoded or to be encoded."""


def build(
    plan: Plan, shards: Shards, start: Start, proof: Future[Proof], facts: SourceFacts, workers: int, events: Events
) -> None:
    """Make the shards that are missing.

    Args:
        plan: what to do.
        shards: opened; says where to go on.
        start: what encodes, and the moment that templates may write.
        proof: outcome of the stress set; awaited before the first shard is finished.
        facts: for the number of rows.
        workers: threads, or processes for many conversations.

    Raises:
        EngineDiffersError: the engine is not exact on this tokenizer or data.
        UserError: as ``tokenize``.
    """
    reading, engine = Reading(plan.sources), start.engine
    if plan.kind == "text":
        every, blocks = text_work.SHARD_BLOCKS, _text_blocks(plan, reading.sources, shards)
        submitting = _threads(plan, engine, workers)
    else:
        from megatron_ext.data import chat_work

        every, blocks = chat_work.SHARD_BLOCKS, _chat_blocks(plan, reading.sources, shards)
        submitting = _processes(plan, start, workers)
    held = 0
    with (
        submitting as submit,
        _Comparisons(plan.reference) as comparisons,
        ordered(reading.followed(blocks), submit, workers + READ_AHEAD) as results,
    ):
        progress = Progress(events, facts, shards)
        for done in results:
            progress.share = reading.shares.popleft()
            shards.add(done.sides, done.counts)
            progress.tell()
            comparisons.begin(done)
            held += 1
            if held == every or done.ends_source:
                require_exact(engine, proof)
                comparisons.require_equal()
                shards.finish_shard(done.source, done.row)
                held = 0
        progress.tell(last=True)


def require_exact(engine: str, proof: Future[Proof]) -> None:
    """Raise ``EngineDiffersError`` if the stress set failed."""
    if engine == GIGATOKEN and (why := proof.result().why):
        raise EngineDiffersError(why)


class _Comparisons:
    """What the reference must give, too: encoded in a thread of its own, awaited before a shard is finished."""

    def __init__(self, reference: ReferenceEngine) -> None:
        self._reference, self._pool = reference, ThreadPoolExecutor(1, thread_name_prefix="reference")
        self._running: list[Future[None]] = []

    def begin(self, done: Done) -> None:
        """Take up the comparison of a block, if it has one."""
        if done.comparison is not None and done.comparison.texts.count:
            self._running.append(self._pool.submit(done.comparison.require_equal, self._reference))

    def require_equal(self) -> None:
        """Wait for those that were begun.

        Raises:
            EngineDiffersError: the fast engine is not exact on this data.
        """
        while self._running:
            self._running.pop(0).result()

    def __enter__(self) -> _Comparisons:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Reading:
    """How much of all files was read when each block was: says how far it is where nobody knows the number of rows.

    Attributes:
        sources: the files, to be read in place of those that were given.
        shares: of the blocks that were read, in their order: share of the bytes up to the block's end.
    """

    def __init__(self, sources: list[Source]) -> None:
        self.sources = [replace(source, meter=Meter()) for source in sources]
        self._sizes = [source.size() or 0 for source in sources]
        self.shares: deque[float] = deque()

    def followed(self, blocks: Iterator[Any]) -> Iterator[Any]:
        """``blocks``, while ``shares`` grows by one for each."""
        for block in blocks:
            source, size = self.sources[block.source], self._sizes[block.source]
            assert source.meter is not None
            if block.ends_source:
                read = size
            elif source.kind in COLUMNAR:  # the bytes read of one, or unpacked to be one, say nothing about its rows
                read = size * block.row // source.meter.rows if source.meter.rows else 0
            else:
                read = min(source.meter.read, size)
            self.shares.append((sum(self._sizes[: block.source]) + read) / max(sum(self._sizes), 1))
            yield block


class Progress:
    """Tells how many rows are done, how fast, and how long the rest will take.

    Attributes:
        share: of the files' bytes, how much is done.
    """

    def __init__(self, events: Events, facts: SourceFacts, shards: Shards) -> None:
        self._events, self._facts, self._shards = events, facts, shards
        self._started = self._told = time.monotonic()
        self._rows, self._tokens, self._silent = shards.rows, shards.tokens, True
        self.share = 0.0
        events.progress(self._rows, facts.rows, "documents")

    def tell(self, *, last: bool = False) -> None:
        """Emit a progress event with the first tokens, and from then on if the last one is some time ago."""
        now, begins = time.monotonic(), self._silent and self._shards.tokens > self._tokens
        if now - self._told < PROGRESS_SECONDS and not (last or begins):
            return
        self._silent = False
        self._told, seconds = now, max(now - self._started, 1e-9)
        rows, total = self._shards.rows, self._facts.rows
        if total is None and self.share:
            total = round(rows / self.share)
        rate = (rows - self._rows) / seconds
        left = round((total - rows) / rate, 1) if total is not None and rate else None
        self._events.emit(
            "progress",
            done=rows,
            total=rows if last else total,
            unit="documents",
            tokens=self._shards.tokens,
            tokens_per_second=round((self._shards.tokens - self._tokens) / seconds),
            seconds_left=0.0 if last else left,
        )


Submit = Callable[[Any], "Future[Done]"]


def _text_blocks(plan: Plan, sources: list[Source], shards: Shards) -> Iterator[Any]:
    column = plan.options.columns.get("text", "text")
    skip = plan.options.on_bad_row == "skip"
    return text_work.text_blocks(sources, column, shards.position, skip=skip)


def _chat_blocks(plan: Plan, sources: list[Source], shards: Shards) -> Iterator[Any]:
    from megatron_ext.data import chat_work

    skip = plan.options.on_bad_row == "skip"
    return chat_work.chat_blocks(sources, plan.formats, plan.options.columns, shards.position, skip=skip)


@contextmanager
def _threads(plan: Plan, name: str, workers: int) -> Iterator[Submit]:
    engine: GigatokenEngine | ReferenceEngine = plan.reference  # which uses all cores by itself
    if name == GIGATOKEN:
        assert plan.definition is not None
        engine = GigatokenEngine(plan.definition, plan.reference, workers)
    worker = text_work.TextWorker(engine, plan.finish)
    # one thread encodes while another finishes what it encoded
    with _pool(min(workers, 2) if name == GIGATOKEN else 1) as submit:
        yield lambda block: submit(worker.work, block)


@contextmanager
def _pool(threads: int) -> Iterator[Callable[..., Future[Any]]]:
    """Threads that finish what they began and leave out what waits."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="encoder")
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _processes(plan: Plan, start: Start, workers: int) -> Iterator[Submit]:
    from megatron_ext.data import chat_work

    assert plan.template is not None
    spec = chat_work.ChatSpec(
        plan.folder,
        plan.template,
        special_tokens(plan.folder),
        plan.options,
        plan.finish,
        start.engine,
        datetime.fromisoformat(start.moment),
    )
    if workers == 1 or not plan.wants_processes:
        encoder = chat_work.ChatEncoder(plan.reference, plan.definition if start.engine == GIGATOKEN else None)
        own = threading.local()  # a template is used by one thread

        def work(block: chat_work.ChatBlock) -> Done:
            if not hasattr(own, "worker"):
                own.worker = chat_work.ChatWorker(spec, encoder)
            return own.worker.work(block)

        with _pool(min(workers, 2)) as submit:  # one thread renders while another encodes
            yield lambda block: submit(work, block)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=chat_work.start_process,
        initargs=(spec, os.getpid()),
    )
    try:
        yield lambda block: pool.submit(chat_work.work_in_process, block)
    except BrokenProcessPool:
        raise WorkerFailedError(
            "a process that renders conversations died, perhaps for want of memory; try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
