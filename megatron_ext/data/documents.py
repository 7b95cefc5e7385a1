"""Encoded documents, a batch at a time: end marks put on, too long ones cut, split or dropped; whole arrays at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from megatron_ext.data.counts import Counts

Overlong = Literal["truncate", "drop", "split"]


class Batch(NamedTuple):
    """Encoded documents one after the other.

    Attributes:
        ids: (T,) int32 or uint32 token ids.
        mask: (T,) uint8, 1 where the token is trained; None where all are (text).
        lengths: (N,) int64 tokens in each document; a document may be empty.
    """

    ids: np.ndarray
    mask: np.ndarray | None
    lengths: np.ndarray

    def select(self, kept: np.ndarray) -> Batch:
        """The documents where ``kept`` (N,) bool is true."""
        if kept.all():
            return self
        tokens = np.repeat(kept, self.lengths)
        return Batch(self.ids[tokens], None if self.mask is None else self.mask[tokens], self.lengths[kept])

    @property
    def starts(self) -> np.ndarray:
        """(N,) int64, where each document starts in ``ids``."""
        return np.cumsum(self.lengths) - self.lengths


@dataclass(frozen=True)
class Finish:
    """What is done to every document after encoding.

    Attributes:
        bos: id put before a document that does not start with it; None for none.
        eod: id put behind a document that does not end with it; None for none. Trained.
        max_length: tokens that a document may have, both marks included; None for no limit.
        overlong: what happens to a longer one. ``truncate`` keeps its head; of text the end mark stays, because it
            says where the next document begins, of a conversation it goes with the tail, because it is an answer's end
            that was cut off. ``split`` makes pieces of ``max_length``.
    """

    bos: int | None = None
    eod: int | None = None
    max_length: int | None = None
    overlong: Overlong = "truncate"

    def apply(self, sides: list[Batch], *, text: bool) -> tuple[list[Batch], Counts]:
        """Finish documents, none of them empty. One of which cutting leaves nothing trained is left out.

        Args:
            sides: one batch, or several of the same documents (chosen, rejected), which are dropped together.
            text: whether they are text, not conversations.
        """
        cuts = Counts()
        if self.max_length is not None:
            over = np.zeros(len(sides[0].lengths), dtype=bool)
            for side in sides:
                over |= self._marked_lengths(side) > self.max_length
            if self.overlong == "drop":
                cuts.dropped = int(over.sum())
                sides = [side.select(~over) for side in sides]
            elif self.overlong == "truncate":
                lost = np.logical_or.reduce([self._loses_answer(side) for side in sides])
                cuts.answers_cut_off, cuts.truncated = int(lost.sum()), int((over & ~lost).sum())
                sides = [side.select(~lost) for side in sides]
            else:
                cuts.split = int(over.sum())
        finished = [self._finished(side, cuts, text) for side in sides]
        return finished, cuts

    def _marked_lengths(self, side: Batch) -> np.ndarray:
        bos, eod = self._missing(side)
        return side.lengths + bos + eod

    def _loses_answer(self, side: Batch) -> np.ndarray:
        """(N,) bool: documents of a conversation whose trained tokens are all beyond ``max_length``."""
        if side.mask is None or self.max_length is None or not len(side.lengths):
            return np.zeros(len(side.lengths), dtype=bool)
        bos, eod = self._missing(side)
        over = side.lengths + bos + eod > self.max_length
        kept = np.where(over, np.minimum(side.lengths, self.max_length - bos), side.lengths)
        trained = from_zero(np.cumsum(side.mask, dtype=np.int64))
        before = trained[side.starts + side.lengths] - trained[side.starts]
        after = trained[side.starts + kept] - trained[side.starts]
        return (before > 0) & (after == 0)

    def _missing(self, side: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool each: documents that lack the mark at their start, at their end.

        What a template writes behind the end marker of the last trained answer (ChatML a line break) ends nothing; nor
        does it where it is trained like all else (``train_on_prompt``), one token long.
        """
        ids, starts, ends = side.ids, side.starts, side.starts + side.lengths
        none = np.zeros(len(starts), dtype=bool)
        bos = none if self.bos is None else ids[starts] != self.bos
        eod = none if self.eod is None else ids[ends - 1] != self.eod
        if side.mask is not None and eod.any() and side.mask.any():
            trained = np.flatnonzero(side.mask)
            last = trained[np.maximum(np.searchsorted(trained, ends) - 1, 0)]
            eod &= (last < starts) | (last >= ends) | (ids[last] != self.eod)
            before = np.maximum(ends - 2, starts)
            eod &= (last != ends - 1) | (ids[before] != self.eod) | (side.mask[before] == 0)
        return bos, eod

    def _finished(self, side: Batch, cuts: Counts, text: bool) -> Batch:
        if not len(side.lengths):
            return side
        bos, eod = self._missing(side)
        if self.max_length is not None and self.overlong == "truncate":
            over = side.lengths + bos + eod > self.max_length
            if over.any():
                room = self.max_length - bos - (text and self.eod is not None)
                kept = np.where(over, np.minimum(side.lengths, room), side.lengths)
                cuts.truncated_tokens += int((side.lengths - kept).sum())
                side = _heads(side, kept)
                eod = self._missing(side)[1] & (text | ~over)
        side = self._with_marks(side, bos, eod)
        return self._pieces(side) if self.overlong == "split" else side

    def _with_marks(self, side: Batch, bos: np.ndarray, eod: np.ndarray) -> Batch:
        """The documents with the marks that are missing."""
        if not (bos.any() or eod.any()):
            return side
        lengths = side.lengths + bos + eod
        ends = np.cumsum(lengths)
        first, last = (ends - lengths)[bos], ends[eod] - 1
        content = np.ones(int(ends[-1]), dtype=bool)
        content[first] = content[last] = False
        ids = np.empty(len(content), dtype=side.ids.dtype)
        ids[content] = side.ids
        ids[first], ids[last] = self.bos or 0, self.eod or 0
        mask = None
        if side.mask is not None:
            mask = np.empty(len(content), dtype=np.uint8)
            mask[content] = side.mask
            mask[first], mask[last] = 0, 1
        return Batch(ids, mask, lengths)

    def _pieces(self, side: Batch) -> Batch:
        """Documents of at most ``max_length``: the same tokens with more bounds, and no end mark alone."""
        if self.max_length is None or side.lengths.max() <= self.max_length:
            return side
        pieces = -(-side.lengths // self.max_length)
        lengths = np.full(int(pieces.sum()), self.max_length, dtype=np.int64)
        last = np.cumsum(pieces) - 1
        lengths[last] = side.lengths - (pieces - 1) * self.max_length
        if self.eod is not None:
            alone = last[(pieces > 1) & (lengths[last] == 1)]
            lengths[alone - 1] -= 1
            lengths[alone] += 1
        return Batch(side.ids, side.mask, lengths)


def _heads(side: Batch, kept: np.ndarray) -> Batch:
    """The first ``kept`` (N,) tokens of each document."""
    if np.array_equal(kept, side.lengths):
        return side
    place = np.arange(len(side.ids)) - np.repeat(side.starts, side.lengths)
    tokens = place < np.repeat(kept, side.lengths)
    return Batch(side.ids[tokens], None if side.mask is None else side.mask[tokens], kept)


def from_zero(ends: np.ndarray) -> np.ndarray:
    """(N + 1,) bounds from the (N,) ends of stretches that follow each other."""
    bounds = np.zeros(len(ends) + 1, dtype=ends.dtype)
    bounds[1:] = ends
    return bounds
