"""What training reads: token ids and which of them are trained, sample by sample.

A sample of chat is a document; one of text is a window of ``seq_length + 1`` tokens cut from the documents laid one
after the other in a shuffled order; one of preference data is a pair of documents with the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_ext.data.datasets import Dataset
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.errors import DatasetFormatError


class Answer(NamedTuple):
    """One side of a pair: (n,) token ids, prompt included, and (n,) bool, whether each is trained."""

    tokens: np.ndarray
    trained: np.ndarray


class Pair(NamedTuple):
    """An answer that was preferred to another."""

    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class TextStream:
    """Documents laid one after the other, and the windows cut from them, pool by pool of a blend.

    Windows overlap by one token: the last label of one is the first input of the next. What is left at the end of a
    pool (fewer than ``seq_length`` tokens) is in no window.

    Attributes:
        order: (N,) documents in the order in which they lie.
        ends: (N,) int64 position in the stream where each of them ends.
        windows: (P + 1,) number of the first window of each pool, and at the end of all.
        starts: (P,) position in the stream where each pool starts.
        seq_length: tokens that a window trains.
    """

    order: np.ndarray
    ends: np.ndarray
    windows: np.ndarray
    starts: np.ndarray
    seq_length: int

    def pieces(self, window: int) -> list[tuple[int, int, int]]:
        """(document, first token, last token + 1) of the parts of a window, in their order."""
        pool = int(np.searchsorted(self.windows, window, side="right")) - 1
        at = int(self.starts[pool]) + (window - int(self.windows[pool])) * self.seq_length
        stop = at + self.seq_length + 1
        place = int(np.searchsorted(self.ends, at, side="right"))
        found = []
        while at < stop:
            end = int(self.ends[place])
            begin = int(self.ends[place - 1]) if place else 0
            found.append((int(self.order[place]), at - begin, min(end, stop) - begin))
            at, place = min(end, stop), place + 1
        return [piece for piece in found if piece[1] < piece[2]]


def text_stream(lengths: np.ndarray, pools: list[np.ndarray], seq_length: int, seed: int) -> TextStream:
    """Lay documents one after the other and cut them into windows.

    In one epoch of one pool the windows are the samples of megatron-core's GPTDataset for the same seed, which shuffles
    with ``RandomState``; its order of samples is another.

    Args:
        lengths: (N,) tokens of every document of the dataset.
        pools: numbers of the documents of each pool.

    Raises:
        DatasetFormatError: a pool has no ``seq_length + 1`` tokens.
    """
    orders, counts, starts, total = [], [], [], 0
    for documents in pools:
        order = documents.astype(np.int32 if len(lengths) < 2**31 else np.int64)
        np.random.RandomState(seed % 2**32).shuffle(order)
        tokens = int(lengths[order].sum(dtype=np.int64))
        if tokens <= seq_length:
            raise DatasetFormatError(
                f"{len(order)} documents with {tokens} tokens together do not fill a window of seq_length "
                f"{seq_length} + 1 tokens; lower train.seq_length or give more text"
            )
        orders.append(order)
        counts.append((tokens - 1) // seq_length)
        starts.append(total)
        total += tokens
    order = np.concatenate(orders)
    ends = np.cumsum(lengths[order], dtype=np.int64)
    windows = np.concatenate([[0], np.cumsum(counts)])
    return TextStream(order, ends, windows, np.asarray(starts, dtype=np.int64), seq_length)


class Samples:
    """Reader of the samples of a chat or text dataset; memory-mapped, so that all ranks share the pages."""

    def __init__(self, dataset: Dataset, stream: TextStream | None = None) -> None:
        self.dataset, self.stream = dataset, stream
        self.tokens = dataset.tokens[0]
        self.mask = dataset.loss_masks[0] if dataset.loss_masks else None

    def read(self, number: int, length: int) -> Answer:
        """The first ``length`` tokens of document ``number``; of text, window ``number``."""
        if self.stream is not None:
            parts = [self.tokens[document][first:last] for document, first, last in self.stream.pieces(number)]
            tokens = np.concatenate(parts)
            return Answer(tokens, np.ones(len(tokens), dtype=bool))
        trained = np.ones(length, dtype=bool) if self.mask is None else self.mask[number][:length].astype(bool)
        return Answer(self.tokens[number][:length], trained)


class PreferencePairs:
    """Reader of a preference dataset: document i of each side belongs together.

    Attributes:
        lengths: (N, 2) int64 tokens of the chosen and the rejected answer, their prompt included.

    Raises:
        DatasetFormatError: the dataset is of another kind.
        SourceError: the sides do not fit each other.
    """

    def __init__(self, dataset: Dataset) -> None:
        if dataset.kind != "preference":
            raise DatasetFormatError(
                f"dataset {dataset.place} is of kind {dataset.kind}; preference training needs pairs: "
                "mflow tokenize --format preference"
            )
        self.masks, self.tokens = dataset.loss_masks, dataset.tokens
        self.lengths = np.stack([np.asarray(side.lengths, dtype=np.int64) for side in self.tokens], axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Pair:
        return self.read(number, int(self.lengths[number].max(initial=0)))

    def read(self, number: int, length: int) -> Pair:
        """Pair ``number``, each answer cut to ``length`` tokens."""
        sides = zip(self.tokens, self.masks, strict=True)
        return Pair(*(Answer(t[number][:length], m[number][:length].astype(bool)) for t, m in sides))

    def trainable(self, length: int) -> np.ndarray:
        """(N,) bool: whether both answers have a trained label when cut to ``length`` tokens."""
        return np.logical_and(*(has_trained_label(mask, np.minimum(mask.lengths, length)) for mask in self.masks))


def has_trained_label(mask: Idxmap, kept: np.ndarray) -> np.ndarray:
    """(N,) bool: whether a token among the first ``kept`` of each document is trained; the first has no predecessor."""
    kept = np.asarray(kept, dtype=np.int64)
    starts = mask.starts + 1
    bounds = np.stack([starts, np.maximum(mask.starts + kept, starts)], axis=1).ravel()
    bounds = bounds[: np.searchsorted(bounds, len(mask.values))]  # what starts at the end of the file is empty
    found = np.zeros(len(kept), dtype=bool)
    if len(bounds):
        largest = np.maximum.reduceat(mask.values, bounds)[::2]
        found[: len(largest)] = largest > 0
    return found & (kept > 1)
