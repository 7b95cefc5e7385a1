"""Which samples of a dataset are trained on, how long each is, and which share a sequence: decided once, and cached.

The launcher makes it before any rank starts, and every rank maps the same files, so nobody waits in a collective while
lengths, masks and hashes of a large dataset are read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import model_validator

from megatron_ext.cache import kept_arrays
from megatron_ext.config import Section, TrainConfig, require_multiple
from megatron_ext.data import splits
from megatron_ext.data.datasets import Dataset, Pool, open_dataset
from megatron_ext.data.packing import Packing, aligned, pack, separate
from megatron_ext.data.samples import TextStream, has_trained_label, text_stream
from megatron_ext.errors import DatasetFormatError

VERSION = 2
"""Of what is cached; another one makes it anew."""
Part = Literal["train", "validation"]
Arrays = dict[str, np.ndarray]


class Choice(Section):
    """Everything besides the data that a selection depends on; fields as in ``TrainConfig``."""

    seq_length: int
    seed: int
    packing: bool = True
    pack_alignment: int = 16
    overlong: Literal["truncate", "drop"] = "truncate"
    validation_fraction: float = 0.0
    part: Part = "train"

    @model_validator(mode="after")
    def _consistent(self) -> Choice:
        require_multiple(self.seq_length, self.pack_alignment)
        return self

    @classmethod
    def of(cls, train: TrainConfig, part: Part = "train") -> Choice:
        """The choice that a training makes."""
        return cls(**train.model_dump(include=set(cls.model_fields) - {"part"}), part=part)


@dataclass(frozen=True)
class Selection:
    """Samples and the sequences that they share.

    Attributes:
        documents: (N,) numbers of the samples: documents of the dataset, or windows of ``stream``.
        lengths: (N,) tokens of each that are kept, the last of them only a label; of a pair, those of both answers
            less one, so that a sample always has ``lengths - 1`` inputs.
        packing: which of those N share a sequence; counts inputs, so each sample's tokens less one.
        sequences: (P + 1,) number of the first sequence of each blended input, and at the end of all.
        weights: (P,) share of each in the blend.
        stream: of text, the documents laid one after the other.
        truncated, dropped_overlong, dropped_untrained: samples cut to seq_length, left out because they were longer,
            and left out because no trained token was (left) in them.
        held_out: documents that are on the other side of the validation split.
    """

    documents: np.ndarray
    lengths: np.ndarray
    packing: Packing
    sequences: np.ndarray
    weights: tuple[float, ...]
    stream: TextStream | None
    truncated: int
    dropped_overlong: int
    dropped_untrained: int
    held_out: int


def select(dataset: Dataset, choice: Choice) -> Selection:
    """Select and pack, or take what an earlier run or another process of this machine kept.

    Raises:
        DatasetFormatError: nothing is left to train on.
        SourceError: the dataset is damaged.
    """
    make = {"text": _text, "chat": _chat, "preference": _preference}[dataset.kind]
    key = xxhash.xxh3_128_hexdigest(f"{VERSION}:{dataset.identity}:{choice.model_dump_json()}".encode())
    arrays = kept_arrays("plans", key, lambda: make(dataset, choice))
    truncated, overlong, untrained, held_out, tokens, occupied = arrays["counts"].tolist()
    stream = None
    if dataset.kind == "text":
        order, ends, windows, starts = (arrays[name] for name in ("order", "ends", "sequences", "starts"))
        stream = TextStream(order, ends, windows, starts, choice.seq_length)
        count = int(arrays["sequences"][-1])
        arrays |= {
            "documents": np.arange(count),
            "lengths": np.broadcast_to(np.int64(choice.seq_length + 1), (count,)),
            "packed": np.arange(count),
            "bounds": np.arange(count + 1),
        }
    return Selection(
        documents=arrays["documents"],
        lengths=arrays["lengths"],
        packing=Packing(arrays["packed"], arrays["bounds"], choice.seq_length, tokens, occupied),
        sequences=arrays["sequences"],
        weights=tuple(pool.weight for pool in _pools(dataset, choice)),
        stream=stream,
        truncated=truncated,
        dropped_overlong=overlong,
        dropped_untrained=untrained,
        held_out=held_out,
    )


def packing_figures(place: Path, choice: Choice) -> dict[str, Any]:
    """How the dataset at ``place`` packs, for ``mflow pack``: bins, shares of filled places, seconds that it took.

    ``fill`` counts the places that samples take, alignment included; ``useful`` those that hold a token.

    Raises:
        UserError: as ``select``.
    """
    started = time.perf_counter()
    found = select(open_dataset(place), choice)
    return {
        "samples": len(found.documents),
        "bins": len(found.packing),
        "fill": round(found.packing.fill, 6),
        "useful": round(found.packing.useful, 6),
        "truncated": found.truncated,
        "dropped_overlong": found.dropped_overlong,
        "dropped_untrained": found.dropped_untrained,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _pools(dataset: Dataset, choice: Choice) -> tuple[Pool, ...]:
    """A validation set is gone through once, so its inputs' weights do not matter."""
    pools = dataset.pools
    return pools if choice.part == "train" else (Pool(pools[0].first, pools[-1].last, 1.0),)


def _side(dataset: Dataset, choice: Choice) -> np.ndarray:
    """(N,) bool: documents on the asked side of the split."""
    held_out = splits.assign(dataset.tokens[0], choice.validation_fraction, choice.seed)
    return held_out if choice.part == "validation" else ~held_out


def answer_limit(choice: Choice) -> int:
    """Tokens that an answer of a pair may have, its prompt included: half a sequence, and one that is only a label."""
    return choice.seq_length // 2 // choice.pack_alignment * choice.pack_alignment + 1


def _chat(dataset: Dataset, choice: Choice) -> Arrays:
    tokens, (mask,) = dataset.tokens[0], dataset.loss_masks
    lengths = np.asarray(tokens.lengths, dtype=np.int64)
    kept = np.minimum(lengths, choice.seq_length)
    long, trained = lengths > choice.seq_length, has_trained_label(mask, kept)
    return _packed(dataset, choice, long, trained, kept, kept - 1)


def _preference(dataset: Dataset, choice: Choice) -> Arrays:
    lengths = np.stack([np.asarray(side.lengths, dtype=np.int64) for side in dataset.tokens], axis=1)
    limit = answer_limit(choice)
    kept = np.minimum(lengths, limit)
    trained = [has_trained_label(mask, side) for mask, side in zip(dataset.loss_masks, kept.T, strict=True)]
    places = aligned(kept - 1, choice.pack_alignment).sum(1)
    return _packed(dataset, choice, np.any(lengths > limit, axis=1), np.logical_and(*trained), kept.sum(1) - 1, places)


def _packed(
    dataset: Dataset, choice: Choice, long: np.ndarray, trained: np.ndarray, kept: np.ndarray, places: np.ndarray
) -> Arrays:
    """Leave out what cannot be trained on, and pack the rest.

    Args:
        long, trained: (N,) bool: the sample is longer than it may be; something is trained in what is kept of it.
        kept, places: (N,) tokens of it that are kept; places that they take as inputs.
    """
    side, drop = _side(dataset, choice), choice.overlong == "drop"
    chosen = side & trained & ~(long & drop)
    counts = [
        0 if drop else int((side & long & trained).sum()),
        int((side & long).sum()) if drop else 0,
        int((side & ~trained & ~(long & drop)).sum()),
        int((~side).sum()),
    ]
    documents = np.flatnonzero(chosen)
    if len(documents) == 0:
        raise DatasetFormatError(
            f"dataset {dataset.place}: none of {len(kept)} samples has a trained token within train.seq_length "
            f"{choice.seq_length}{_where(choice)}; raise it or look at the data with mflow inspect"
        )
    kept, places = kept[documents], places[documents]
    packings, first = [], [0]
    for number, pool in enumerate(_pools(dataset, choice)):
        a, b = np.searchsorted(documents, [pool.first, pool.last]).tolist()
        if a == b:
            raise DatasetFormatError(
                f"dataset {dataset.place}: blended input {number + 1} has no sample to train on within "
                f"train.seq_length {choice.seq_length}{_where(choice)}; leave it out or look at it with mflow inspect"
            )
        arrange = pack if choice.packing else separate
        packing = arrange(places[a:b], choice.seq_length, choice.seed + 3 * number, choice.pack_alignment)
        packings.append((a, packing))
        first.append(first[-1] + len(packing))
    ends = [packing.bounds[1:] + a for a, packing in packings]
    counts += [int((kept - 1).sum()), sum(p.occupied for _, p in packings)]
    return {
        "documents": documents,
        "lengths": kept,
        "packed": np.concatenate([packing.documents + a for a, packing in packings]),
        "bounds": np.concatenate([[0], *ends]),
        "sequences": np.asarray(first),
        "counts": np.asarray(counts),
    }


def _text(dataset: Dataset, choice: Choice) -> Arrays:
    lengths, side = np.asarray(dataset.tokens[0].lengths), _side(dataset, choice)
    pools = [pool.first + np.flatnonzero(side[pool.first : pool.last]) for pool in _pools(dataset, choice)]
    try:
        stream = text_stream(lengths, pools, choice.seq_length, choice.seed)
    except DatasetFormatError as error:
        raise DatasetFormatError(f"dataset {dataset.place}: {error}{_where(choice)}") from None
    trained = int(stream.windows[-1]) * choice.seq_length
    return {
        "order": stream.order,
        "ends": stream.ends,
        "sequences": stream.windows,
        "starts": stream.starts,
        "counts": np.asarray([0, 0, 0, int((~side).sum()), trained, trained]),
    }


def _where(choice: Choice) -> str:
    if not choice.validation_fraction:
        return ""
    return f" (train.validation_fraction {choice.validation_fraction}, {choice.part} side)"
