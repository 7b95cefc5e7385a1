"""Level digest: every tensor of a checkpoint against the Hugging Face tensors that hold the same rows, bit for bit.

Both sides are read from their files, in pieces of bounded size, by two threads; each thread has readers of its own.
The rows are mapped back by the family's moves one by one, not by the code that put them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import torch
import xxhash

from megatron_ext.errors import CheckpointError, SourceError, VerificationError, WeightMappingError
from megatron_ext.events import Events
from megatron_ext.families.base import Part, Weight, placed
from megatron_ext.weights.files import bytes_of, same_bits
from megatron_ext.weights.hf import NAMES, TensorInfo
from megatron_ext.weights.pipeline import Progress
from megatron_ext.weights.rules import Move
from megatron_ext.weights.streams import PIECE_BYTES, CheckpointReader, HFReader, bounded, row_bytes

THREADS = 2
Direction = Literal["to_checkpoint", "to_model"]
"""Which side was made from the other, hence in whose type bits must be equal: the checkpoint's, or the model's."""


@dataclass(frozen=True)
class Sides:
    """The two folders, for messages, and how each is opened; a thread opens its own readers."""

    checkpoint: Path
    model: Path
    open_checkpoint: Callable[[], CheckpointReader]
    open_model: Callable[[], HFReader]


@dataclass(frozen=True)
class Compared:
    """What was found equal."""

    digests: dict[str, str]
    megatron_tensors: int
    bytes: int


def compare(
    plan: list[Weight], sides: Sides, tensors: dict[str, TensorInfo], direction: Direction, events: Events
) -> Compared:
    """Compare every row of every weight of the plan, and take the digest of every Hugging Face tensor.

    Raises:
        VerificationError: the first tensor, in the order of the plan, that differs or cannot be read; names both
            sides, layer and expert, row and values.
        WeightMappingError: rules that leave rows out, or give them twice.
    """
    require_every_row(plan)
    units = list(_units(plan))
    readers: SimpleQueue[tuple[CheckpointReader, HFReader]] = SimpleQueue()
    with ExitStack() as stack:
        for _ in range(THREADS):
            checkpoint = sides.open_checkpoint()
            stack.callback(checkpoint.close)
            readers.put((checkpoint, sides.open_model()))

        def work(unit: tuple[Weight, list[Part]]) -> tuple[int, dict[str, str]]:
            weight, fresh = unit
            pair = readers.get()
            try:
                running = {part.name: _Running(tensors[part.name]) for part in fresh if part.index is None}
                size = _compare_weight(weight, *pair, sides, tensors, direction, running)
                found = {name: hasher.hexdigest() for name, hasher in running.items() if hasher.whole}
                rest = (part for part in fresh if part.name not in found)
                return size, found | {part.name: tensor_digest(part, tensors[part.name], pair[1]) for part in rest}
            finally:
                readers.put(pair)

        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="verify")
        stack.callback(pool.shutdown, cancel_futures=True)  # before the readers are closed
        sizes = [row_bytes(w.own_shape, checkpoint.dtypes[w.key]) * w.own_shape[0] for w, _ in units]
        done, equal, digests = 0, 0, {}
        progress = Progress(events, sum(sizes), "bytes compared")
        for stored, (size, found) in zip(sizes, pool.map(work, units), strict=True):
            done += stored
            equal += size
            digests |= found
            progress(done, last=done == sum(sizes))
    return Compared(digests, len({weight.key for weight in plan}), equal)


def require_every_row(plan: list[Weight]) -> None:
    """Every row of every megatron-core weight comes from exactly one place, and no Hugging Face row is left out.

    Raises:
        WeightMappingError: names the weight and the first such row.
    """
    taken: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    lengths: dict[tuple[str, int | None], int] = {}
    for weight in plan:
        end = 0
        for move in weight.moves:
            if move.target != end:
                raise WeightMappingError(f"the rule of {weight.key} gives row {min(end, move.target)} twice or never")
            end += move.rows
            part = weight.parts[move.part]
            taken.setdefault((part.name, part.index), []).append((move.source, move.source + move.rows))
            lengths[part.name, part.index] = part.shape[0]
        if end != weight.own_shape[0]:
            raise WeightMappingError(f"the rule of {weight.key} leaves out row {end} and what follows")
    for (name, index), spans in taken.items():
        end = 0
        for start, stop in sorted(spans):
            if start > end:
                break
            end = max(end, stop)
        if end < lengths[name, index]:
            raise WeightMappingError(f"no rule converts row {end} of {name}" + ("" if index is None else f"[{index}]"))
    for part in (part for weight in plan for part in weight.parts):
        if part.index is not None and (missing := [e for e in range(part.stacked) if (part.name, e) not in taken]):
            raise WeightMappingError(f"no rule converts expert {missing[0]} of {part.name}")


def tensor_digest(part: Part, info: TensorInfo, source: HFReader) -> str:
    """xxh3-128 over type, shape and bytes of the Hugging Face tensor that ``part`` belongs to."""
    running, whole = _Running(info), Part(part.name, info.shape)
    step = max(1, PIECE_BYTES // row_bytes(info.shape, info.dtype))
    for start in range(0, info.shape[0], step):
        running.update(start, source.rows(whole, start, min(step, info.shape[0] - start)))
    return running.hexdigest()


class _Running:
    """Digest of a Hugging Face tensor whose rows are seen, one after the other, while they are compared."""

    def __init__(self, info: TensorInfo) -> None:
        self._hasher = xxhash.xxh3_128(f"{NAMES[info.dtype]} {list(info.shape)} ".encode())
        self._next, self._rows = 0, info.shape[0]

    def update(self, start: int, rows: torch.Tensor) -> None:
        """The rows from ``start`` on; ignored if others should have come before."""
        if start == self._next:
            self._next += len(rows)
            self._hasher.update(bytes_of(rows))

    @property
    def whole(self) -> bool:
        """Whether all rows have been seen in their order."""
        return self._next == self._rows

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


def _units(plan: list[Weight]) -> Iterator[tuple[Weight, list[Part]]]:
    """Each weight with those of its parts whose tensor no weight before it had."""
    seen: set[str] = set()
    for weight in plan:
        fresh = {part.name: part for part in weight.parts if part.name not in seen}
        seen |= fresh.keys()
        yield weight, list(fresh.values())


def _compare_weight(
    weight: Weight,
    checkpoint: CheckpointReader,
    model: HFReader,
    sides: Sides,
    tensors: dict[str, TensorInfo],
    direction: Direction,
    running: dict[str, _Running],
) -> int:
    """Bytes that are equal; what is read of the model goes into ``running`` digests, too."""
    stored, size = checkpoint.dtypes[weight.key], 0
    try:
        for move in bounded(weight.moves, row_bytes(weight.own_shape, stored), PIECE_BYTES):
            part = weight.parts[move.part]
            ours = checkpoint.rows(weight, move.target, move.rows)
            theirs = model.rows(part, move.source, move.rows)
            if part.name in running:
                running[part.name].update(move.source, theirs)
            if direction == "to_checkpoint":
                theirs = theirs.to(stored)
            else:
                ours = ours.to(tensors[part.name].dtype)
            if not same_bits(ours, theirs):
                raise VerificationError(_difference(weight, move, ours, theirs, sides))
            size += theirs.nbytes
    except (CheckpointError, SourceError) as error:
        names = ", ".join(part.name for part in weight.parts)
        raise VerificationError(f"{names} cannot be compared: {error}") from None
    return size


def _difference(weight: Weight, move: Move, ours: torch.Tensor, theirs: torch.Tensor, sides: Sides) -> str:
    """Sentence: which tensor, where, and both values at the first place that differs."""
    columns = max(1, ours[0].numel())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    differs = ours.reshape(-1).view(bits) != theirs.reshape(-1).view(bits)
    first = int(differs.nonzero()[0])
    row, column = divmod(first, columns)
    part = weight.parts[move.part]
    expert = "" if part.index is None else f"[{part.index}]"
    values = [float(side.reshape(-1)[first]) for side in (theirs, ours)]
    return (
        f"{part.name}{expert} differs at row {move.source + row}, column {column}: {values[0]:.9g} in {sides.model}, "
        f"{values[1]:.9g} in {sides.checkpoint} ({placed(weight.key, weight.index)}, row {move.target + row}); "
        f"{int(differs.sum()):,} of the {differs.numel():,} values beside it differ"
    )
