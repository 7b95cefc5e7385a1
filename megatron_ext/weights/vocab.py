"""Vocabulary: rows for tokens that were added to the tokenizer, and the padding that a parallel layout asks for.

Legend: V rows of the source, X extra rows, H columns. Torch is imported when the first row is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from megatron_ext.config import VocabInit
from megatron_ext.families.base import Part
from megatron_ext.weights.random_rows import NormalRows

if TYPE_CHECKING:
    import torch

SEED = 1234
"""Of rows that start as ``normal``; each tensor has a stream of its own."""
READ_BYTES = 4 << 20


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, divisible_by: int = 1) -> int:
    """Rows of the embedding when it is split: the next multiple of ``divisible_by`` x the tensor-parallel size."""
    multiple = tensor_model_parallel_size * divisible_by
    return math.ceil(vocab_size / multiple) * multiple


class ExtendedVocabulary:
    """A Hugging Face reader whose vocabulary weights have ``extra`` rows more than those of ``source``.

    Args:
        source: a reader with ``tensors`` (name -> type and shape) and ``rows``.
        names: the weights that get rows: embedding and, if it is not tied, output layer; (V, H) each.
        init: ``mean`` of the V rows (computed in fp32), ``zeros``, or ``normal`` with mean and standard deviation of
            each of the H columns. All are rounded to the type of the source.
    """

    def __init__(self, source: Any, names: Collection[str], extra: int, init: VocabInit) -> None:
        self._source, self._names, self._init = source, names, init
        self._rows_of = {name: source.tensors[name].shape[0] for name in names}
        self._columns: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._lock = Lock()
        self.tensors = dict(source.tensors)
        for name in names:
            info = source.tensors[name]
            self.tensors[name] = replace(info, shape=(info.shape[0] + extra, *info.shape[1:]))

    def rows(self, part: Part, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``part`` from ``start`` on."""
        if part.name not in self._names:
            return self._source.rows(part, start, count)
        import torch

        old = self._rows_of[part.name]
        kept = max(0, min(start + count, old) - start)
        if kept == count:
            return self._source.rows(part, start, count)
        new = self._new(part, start + kept - old, count - kept)
        return torch.cat([self._source.rows(part, start, kept), new]) if kept else new

    def _new(self, part: Part, start: int, count: int) -> torch.Tensor:
        """(count, H) extra rows from the ``start``-th extra one on."""
        import torch

        dtype, width = self.tensors[part.name].dtype, self.tensors[part.name].shape[1]
        if self._init == "zeros":
            return torch.zeros(count, width, dtype=dtype)
        with self._lock:
            mean, deviation = self._columns.get(part.name) or self._columns.setdefault(
                part.name, self._statistics(part)
            )
        if self._init == "mean":
            return mean.to(dtype).repeat(count, 1)
        drawn = NormalRows(SEED, part.name, width).rows(start, count)
        return (mean + deviation * drawn).to(dtype)

    def _statistics(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """(H,) mean and standard deviation of the V old rows, fp32, summed up in fp64 block by block."""
        import torch

        old, width = self._rows_of[part.name], self.tensors[part.name].shape[1]
        total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        step = max(1, READ_BYTES // (8 * width))
        for start in range(0, old, step):
            block = self._source.rows(part, start, min(step, old - start)).double()
            total += block.sum(0)
            squares += block.square().sum(0)
        mean = total / old
        deviation = (squares / old - mean.square()).clamp(min=0).sqrt()
        return mean.float(), deviation.float()
