"""Packing: which documents share one training sequence. Best-fit decreasing, numpy only, a pure function of a seed."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from megatron_ext.errors import ParallelismError


@dataclass(frozen=True)
class Packing:
    """Documents grouped into bins of at most ``seq_length`` tokens, in training order.

    Attributes:
        documents: (N,) int64 document numbers, bin after bin.
        bounds: (B + 1,) int64; bin ``b`` holds ``documents[bounds[b]:bounds[b + 1]]``.
        seq_length: places of a bin.
        tokens: tokens in all bins.
        occupied: places that documents take in all bins, alignment included.
    """

    documents: np.ndarray
    bounds: np.ndarray
    seq_length: int
    tokens: int
    occupied: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        """Document numbers of bin ``number``."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"bin {number} of {len(self)}")
        number %= len(self)
        return self.documents[self.bounds[number] : self.bounds[number + 1]]

    @property
    def fill(self) -> float:
        """Share of all places that documents take, alignment included, 0 to 1."""
        return self.occupied / (len(self) * self.seq_length) if len(self) else 0.0

    @property
    def useful(self) -> float:
        """Share of all places that hold a token, 0 to 1."""
        return self.tokens / (len(self) * self.seq_length) if len(self) else 0.0


def aligned(lengths: np.ndarray, alignment: int) -> np.ndarray:
    """Places that documents of ``lengths`` tokens take: the next multiple of ``alignment``."""
    return -(-lengths // alignment) * alignment


def require_aligned(alignment: int, context_parallel_size: int) -> None:
    """Refuse bins whose documents cannot be cut into the two shares that each context-parallel rank takes.

    Raises:
        ParallelismError: names both values and the alignment that fits.
    """
    parts = 2 * context_parallel_size
    if context_parallel_size > 1 and alignment % parts:
        raise ParallelismError(
            f"train.pack_alignment {alignment} is not a multiple of {parts} (2 x context_parallel_size "
            f"{context_parallel_size}): each packed sample is cut into {parts} parts; set train.pack_alignment to "
            f"{-(-alignment // parts) * parts}"
        )


def shuffled(count: int, seed: int) -> np.ndarray:
    """(count,) int64: a permutation that depends on ``seed`` alone.

    Sorts the raw stream of PCG64, which numpy promises to keep; ``Generator.permutation`` it does not (NEP 19).
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable") if count else np.empty(0, np.int64)


def separate(lengths: np.ndarray, seq_length: int, seed: int, alignment: int = 1) -> Packing:
    """Every document in a bin of its own (no packing), in a shuffled order. Arguments as ``pack``."""
    lengths, places = _checked(lengths, seq_length, alignment)
    order = shuffled(len(lengths), seed)
    return Packing(order, np.arange(len(lengths) + 1), seq_length, int(lengths.sum()), int(places.sum()))


def pack(lengths: np.ndarray, seq_length: int, seed: int, alignment: int = 1) -> Packing:
    """Pack documents of ``lengths`` (N,) tokens into as few bins of ``seq_length`` tokens as best-fit decreasing finds.

    Longest first, each document goes into the fullest bin that still takes it. Documents of one length are placed
    together: the fullest fitting bin stays the fullest, so it takes ``room // length`` of them at once. 1 M documents
    take well under a second. ``seed`` decides which of several equally long documents goes where, the order of the
    bins, and the order inside a bin. Each document takes a multiple of ``alignment`` places.

    Raises:
        ValueError: a length is below 1 or takes more than ``seq_length`` places; truncate or drop such documents first.
    """
    lengths, places = _checked(lengths, seq_length, alignment)
    count = len(lengths)
    if count == 0:
        return separate(lengths, seq_length, seed)
    order = shuffled(count, seed)
    order = order[np.argsort(-places[order], kind="stable")]
    bin_of = np.empty(count, dtype=np.int64)
    bin_of[order], bins = _best_fit(places[order], seq_length)
    place_of_bin = np.empty(bins, dtype=np.int64)
    place_of_bin[shuffled(bins, seed + 1)] = np.arange(bins)
    place = place_of_bin[bin_of]
    first = shuffled(count, seed + 2)
    documents = first[np.argsort(place[first], kind="stable")]
    bounds = np.zeros(bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(place, minlength=bins), out=bounds[1:])
    return Packing(documents, bounds, seq_length, int(lengths.sum()), int(places.sum()))


def _best_fit(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, int]:
    """Bin of each document of ``lengths`` (descending), and the number of bins."""
    bin_of = np.empty(len(lengths), dtype=np.int64)
    open_bins: dict[int, list[int]] = {}  # room left -> bins with that room
    rooms: list[int] = []  # keys of open_bins, ascending
    bins = 0
    values, starts = np.unique(-lengths, return_index=True)  # ascending, so longest first
    ends = [*starts[1:].tolist(), len(lengths)]
    for length, at, end in zip((-values).tolist(), starts.tolist(), ends, strict=True):
        while at < end:
            where = bisect_left(rooms, length)
            room = rooms[where] if where < len(rooms) else seq_length
            each = room // length
            wanted = -(-(end - at) // each)
            if where < len(rooms):
                held = open_bins[room]
                chosen, open_bins[room] = held[-wanted:], held[:-wanted]
                if not open_bins[room]:
                    del open_bins[room], rooms[where]
            else:
                chosen = list(range(bins, bins + wanted))
                bins += wanted
            placed = min(len(chosen) * each, end - at)
            bin_of[at : at + placed] = np.repeat(np.asarray(chosen, dtype=np.int64), each)[:placed]
            at += placed
            last = placed - (len(chosen) - 1) * each
            for left, some in ((room - each * length, chosen[:-1]), (room - last * length, chosen[-1:])):
                if left and some:
                    if left not in open_bins:
                        open_bins[left] = []
                        insort(rooms, left)
                    open_bins[left].extend(some)
    return bin_of, bins


def _checked(lengths: np.ndarray, seq_length: int, alignment: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.asarray(lengths, dtype=np.int64)
    places = aligned(lengths, alignment)
    if len(lengths) and (lengths.min() < 1 or places.max() > seq_length):
        by = f" in multiples of {alignment}" if alignment > 1 else ""
        raise ValueError(
            f"document lengths must be 1 to seq_length {seq_length}{by}, not {lengths.min()} to {lengths.max()}; "
            "truncate or drop such documents first"
        )
    return lengths, places
