"""Random rows that depend on a seed and a name only: not on the order or the blocks in which they are asked for.

The numbers come from NumPy: torch's normal_ differs with the processor's vector width.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

VALUES = 1 << 18
"""Values that are drawn at once, rounded down to whole rows."""


class NormalRows:
    """Standard normal rows of ``columns`` values, fp32; ``name`` tells one tensor's stream from another's."""

    def __init__(self, seed: int, name: str, columns: int) -> None:
        self._stream, self._columns = f"{seed}:{name}", columns
        self._step = max(1, VALUES // columns)

    def rows(self, start: int, count: int) -> torch.Tensor:
        """(count, columns) rows from ``start`` on."""
        import torch

        out = np.empty((count, self._columns), dtype=np.float32)
        for number in range(start // self._step, -(-(start + count) // self._step)):
            first = number * self._step
            low, high = max(start, first), min(start + count, first + self._step)
            out[low - start : high - start] = self._drawn(number, high - first)[low - first :]
        return torch.from_numpy(out)

    def _drawn(self, number: int, rows: int) -> np.ndarray:
        seed = hashlib.sha256(f"{self._stream}:{number}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "little")))
        return generator.standard_normal((rows, self._columns), dtype=np.float32)
