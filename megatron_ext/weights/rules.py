"""How one weight changes shape between Hugging Face and megatron-core: each rule serves both directions.

Shapes are (out, in) as torch stores them: V vocabulary, H hidden size, F ffn hidden size, A query heads, G query
groups, D head_dim. ``{i}`` in a name stands for the layer. The module itself is torch-free: rules only call methods
of the tensors that they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Dims = Mapping[str, int]
"""Letter of the legend -> size."""


def shape_of(legend: str, dims: Dims) -> tuple[int, ...]:
    """Shape of a legend: ``"H A*D"`` with H=64, A=8, D=8 is (64, 64)."""
    return tuple(prod(dims[letter] for letter in axis.split("*")) for axis in legend.split())


class Rule(Protocol):
    """One megatron-core weight and the Hugging Face weights that hold the same numbers.

    ``only_if`` and ``skip_if`` name a boolean field of Architecture.
    """

    mcore: str
    only_if: str | None
    skip_if: str | None

    @property
    def hf(self) -> tuple[str, ...]:
        """Names of the Hugging Face weights."""

    @property
    def mcore_legend(self) -> str:
        """Shape of the megatron-core weight."""

    @property
    def hf_legends(self) -> tuple[str, ...]:
        """Shapes of the Hugging Face weights, in the order of ``hf``."""

    def to_mcore(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        """Hugging Face weights, in the order of ``hf``, to the megatron-core weight."""

    def to_hf(self, weight: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        """The exact inverse of ``to_mcore``."""


@dataclass(frozen=True)
class Copy:
    """The same numbers in the same shape."""

    mcore: str
    name: str
    legend: str
    only_if: str | None = None
    skip_if: str | None = None

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def mcore_legend(self) -> str:
        return self.legend

    @property
    def hf_legends(self) -> tuple[str, ...]:
        return (self.legend,)

    def to_mcore(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        return parts[0]

    def to_hf(self, weight: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return (weight,)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections interleaved by query group: A/G query heads, one key head, one value head.

    ``columns`` is the legend of what follows the rows: ``"H"`` for weights, empty for biases.
    Source: ``SelfAttention.get_query_key_value_tensors`` of megatron-core.
    """

    mcore: str
    q: str
    k: str
    v: str
    columns: str = "H"
    only_if: str | None = None
    skip_if: str | None = None

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    @property
    def mcore_legend(self) -> str:
        return f"QKV*D {self.columns}"

    @property
    def hf_legends(self) -> tuple[str, ...]:
        return (f"A*D {self.columns}", f"G*D {self.columns}", f"G*D {self.columns}")

    def to_mcore(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        grouped = [part.reshape(dims["G"], -1, *part.shape[1:]) for part in parts]
        heads = [part.shape[1] for part in grouped]
        fused = parts[0].new_empty(dims["G"], sum(heads), *parts[0].shape[1:])
        for target, source in zip(fused.split(heads, dim=1), grouped, strict=True):
            target.copy_(source)
        return fused.reshape(-1, *fused.shape[2:])

    def to_hf(self, weight: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        rows = [dims["A"] // dims["G"] * dims["D"], dims["D"], dims["D"]]
        grouped = weight.reshape(dims["G"], sum(rows), *weight.shape[1:])
        return tuple(part.reshape(-1, *weight.shape[1:]) for part in grouped.split(rows, dim=1))


@dataclass(frozen=True)
class GateUp:
    """The two inputs of a gated activation, one above the other: gate (activated), then up."""

    mcore: str
    gate: str
    up: str
    columns: str = "H"
    only_if: str | None = None
    skip_if: str | None = None

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    @property
    def mcore_legend(self) -> str:
        return f"2*F {self.columns}"

    @property
    def hf_legends(self) -> tuple[str, ...]:
        return (f"F {self.columns}",) * 2

    def to_mcore(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        fused = parts[0].new_empty(2 * dims["F"], *parts[0].shape[1:])
        for target, source in zip(fused.split(dims["F"]), parts, strict=True):
            target.copy_(source)
        return fused

    def to_hf(self, weight: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return weight.split(dims["F"])
