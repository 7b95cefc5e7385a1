"""Blending data sets by weight: a pure function of seed and position, so that resuming needs no replay.

The k-th sample (from 0) of a data set is due at ``(k + 1/2) / weight``, and samples come in the order in which they are
due: after any number of them the counts are the Sainte-Laguë apportionment, the nearest to the weights that there is.
As in megatron-core's BlendedDataset, a data set that is exhausted starts again, in another order; a small one with a
large weight is repeated, never the reason to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_ext.data.packing import shuffled
from megatron_ext.errors import ConfigError


def normalized(weights: Sequence[float]) -> np.ndarray:
    """(D,) float64 weights that sum to 1.

    Raises:
        ConfigError: a weight is not above 0.
    """
    values = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ConfigError(f"weights of blended data must be numbers above 0, not {', '.join(map(str, weights))}")
    return values / values.sum()


def turns(weights: Sequence[float], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn it is at the positions ``[start, stop)`` of the blend.

    Returns:
        (n,) int64 data set, and (n,) int64 how many samples of that data set came before.
    """
    share = normalized(weights)
    count = len(share)
    if stop <= start or count == 1:
        return np.zeros(max(0, stop - start), dtype=np.int64), np.arange(start, max(start, stop), dtype=np.int64)
    low = np.maximum(0, np.floor(share * start).astype(np.int64) - count)  # surely before position `start`
    high = np.ceil(share * stop).astype(np.int64) + count
    which = np.repeat(np.arange(count), high - low)
    offsets = np.cumsum(high - low) - (high - low)
    number = np.arange(len(which)) - np.repeat(offsets, high - low) + np.repeat(low, high - low)
    order = np.lexsort((which, (number + 0.5) / share[which]))[start - int(low.sum()) :][: stop - start]
    return which[order], number[order]


def sample_order(
    sizes: Sequence[int], weights: Sequence[float], n: int, seed: int, start: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The samples at positions ``[start, start + n)`` of a blend.

    Args:
        sizes: samples in each data set; each pass over a data set is shuffled anew.
        weights: its share of the blend, in any unit.

    Returns:
        (n,) int64 data set, and (n,) int64 sample within it.

    Raises:
        ConfigError: a weight is not above 0, or a data set is empty.
    """
    if len(sizes) != len(weights) or min(sizes, default=0) < 1:
        raise ConfigError(f"each blended data set needs a weight and a sample, not sizes {list(sizes)}")
    which, number = turns(weights, start, start + n)
    samples = np.empty(n, dtype=np.int64)
    for place, size in enumerate(sizes):
        mine = np.flatnonzero(which == place)
        passes, within = np.divmod(number[mine], size)
        for epoch in np.unique(passes).tolist():
            now = passes == epoch
            samples[mine[now]] = order(size, seed, epoch, place)[within[now]]
    return which, samples


@lru_cache(maxsize=16)
def order(count: int, seed: int, epoch: int, place: int = 0) -> np.ndarray:
    """(count,) the order of pass ``epoch`` over the data set at ``place``."""
    return shuffled(count, seed * 1_000_003 + epoch + place * 1_000_000_007)
