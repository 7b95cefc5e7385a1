"""Which documents are held out for validation: decided by the hash of each document's token ids, and by nothing else.

So a document keeps its side when files are added, removed or reordered, equal documents never lie on both sides, and
the training set of one fraction contains that of a larger one.
"""

from __future__ import annotations

import numpy as np
import xxhash

from megatron_ext.data.idxmap import Idxmap

BLOCK = 1 << 22
"""Tokens that are hashed at once, about."""


def assign(idxmap: Idxmap, fraction: float, seed: int) -> np.ndarray:
    """(N,) bool: whether each document is held out.

    Args:
        idxmap: the documents' token ids. Preference data: the chosen answers', whose documents begin with the prompt.
        fraction: share that is held out, 0 to 1; it is met in the mean, not exactly.
        seed: another seed holds out others.
    """
    held_out = np.zeros(len(idxmap), dtype=bool)
    if fraction <= 0:
        return held_out
    limit = round(fraction * 2**64)
    first = 0
    while first < len(idxmap):
        last = max(first + 1, int(np.searchsorted(idxmap.starts, idxmap.starts[first] + BLOCK)))
        start = int(idxmap.starts[first])
        stop = int(idxmap.starts[last - 1]) + int(idxmap.lengths[last - 1])
        block = memoryview(np.ascontiguousarray(idxmap.values[start:stop], dtype="<i4").data).cast("B")
        at = 0
        for number, length in enumerate(idxmap.lengths[first:last].tolist(), first):
            held_out[number] = xxhash.xxh3_64_intdigest(block[at : at + 4 * length], seed) < limit
            at += 4 * length
        first = last
    return held_out
