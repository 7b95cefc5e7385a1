"""How one weight moves between Hugging Face and megatron-core: rows that change place, one table for both directions.

Shapes are (out, in) as torch stores them: V vocabulary, H hidden size, F ffn hidden size, M ffn hidden size of an
expert, A query heads, G query groups, D head_dim, E experts. In a name ``{i}`` stands for the layer and ``{e}`` for the
expert; a Hugging Face name that ends in ``[{e}]`` is the expert's slice of a tensor that stacks all experts.
The module is torch-free: rules only call methods of the tensors that they are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Dims = Mapping[str, int]
"""Letter of the legend -> size."""


def shape_of(legend: str, dims: Dims) -> tuple[int, ...]:
    """Shape of a legend: ``"H A*D"`` with H=64, A=8, D=8 is (64, 64)."""
    return tuple(prod(dims[letter] for letter in axis.split("*")) for axis in legend.split())


class Move(NamedTuple):
    """Rows from ``source`` on of Hugging Face part ``part`` are the rows from ``target`` on in megatron-core."""

    part: int
    source: int
    target: int
    rows: int


class Split(NamedTuple):
    """How tensor parallelism cuts a megatron-core weight: ``axis`` evenly, within each of ``blocks`` equal blocks."""

    axis: int
    blocks: int = 1


@dataclass(frozen=True)
class Rule(ABC):
    """One megatron-core weight and the Hugging Face weights that hold the same rows.

    ``only_if`` and ``skip_if`` name a field of Architecture that must be set, or must not. ``layout`` is the Hugging
    Face layout that the rule belongs to, if the family has several.
    """

    mcore: str
    _: KW_ONLY
    only_if: str | None = None
    skip_if: str | None = None
    layout: str | None = None

    @property
    @abstractmethod
    def hf(self) -> tuple[str, ...]:
        """Names of the Hugging Face weights."""

    @property
    @abstractmethod
    def mcore_legend(self) -> str:
        """Shape of the megatron-core weight."""

    @property
    @abstractmethod
    def hf_legends(self) -> tuple[str, ...]:
        """Shapes of the Hugging Face weights, in the order of ``hf``; an expert's slice without the stack's axis."""

    @property
    @abstractmethod
    def split(self) -> Split | None:
        """Where tensor parallelism cuts the weight; None if every rank holds it whole."""

    @abstractmethod
    def moves(self, dims: Dims) -> tuple[Move, ...]:
        """Every row of the megatron-core weight exactly once, by ascending ``target``."""

    def to_mcore(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        """Hugging Face weights, in the order of ``hf``, to the megatron-core weight."""
        weight = parts[0].new_empty(shape_of(self.mcore_legend, dims))
        for part, source, target, rows in self.moves(dims):
            weight[target : target + rows] = parts[part][source : source + rows]
        return weight

    def to_hf(self, weight: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        """The exact inverse of ``to_mcore``."""
        parts = tuple(weight.new_empty(shape_of(legend, dims)) for legend in self.hf_legends)
        for part, source, target, rows in self.moves(dims):
            parts[part][source : source + rows] = weight[target : target + rows]
        return parts


@dataclass(frozen=True)
class Copy(Rule):
    """The same numbers in the same shape; ``axis`` is where tensor parallelism cuts them."""

    name: str
    legend: str
    _: KW_ONLY
    axis: int | None = None

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def mcore_legend(self) -> str:
        return self.legend

    @property
    def hf_legends(self) -> tuple[str, ...]:
        return (self.legend,)

    @property
    def split(self) -> Split | None:
        return None if self.axis is None else Split(self.axis)

    def moves(self, dims: Dims) -> tuple[Move, ...]:
        return (Move(0, 0, 0, shape_of(self.legend, dims)[0]),)


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value projections interleaved by query group: A/G query heads, one key head, one value head.

    ``columns`` is the legend of what follows the rows: ``"H"`` for weights, empty for biases.
    Source: ``SelfAttention.get_query_key_value_tensors`` of megatron-core.
    """

    q: str
    k: str
    v: str
    columns: str = "H"

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    @property
    def mcore_legend(self) -> str:
        return f"QKV*D {self.columns}"

    @property
    def hf_legends(self) -> tuple[str, ...]:
        return (f"A*D {self.columns}", f"G*D {self.columns}", f"G*D {self.columns}")

    @property
    def split(self) -> Split | None:
        return Split(0)

    def moves(self, dims: Dims) -> tuple[Move, ...]:
        head, queries = dims["D"], dims["A"] // dims["G"] * dims["D"]
        moves = []
        for group in range(dims["G"]):
            start = group * (queries + 2 * head)
            moves += [
                Move(0, group * queries, start, queries),
                Move(1, group * head, start + queries, head),
                Move(2, group * head, start + queries + head, head),
            ]
        return tuple(moves)


@dataclass(frozen=True)
class GateUp(Rule):
    """The two inputs of a gated activation, one above the other: gate (activated), then up.

    ``rows`` and ``columns`` are the legends of one of them; ``columns`` is empty for biases.
    """

    gate: str
    up: str
    columns: str = "H"
    rows: str = "F"

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    @property
    def mcore_legend(self) -> str:
        return f"2*{self.rows} {self.columns}"

    @property
    def hf_legends(self) -> tuple[str, ...]:
        return (f"{self.rows} {self.columns}",) * 2

    @property
    def split(self) -> Split | None:
        return Split(0, blocks=2)

    def moves(self, dims: Dims) -> tuple[Move, ...]:
        size = dims[self.rows]
        return (Move(0, 0, 0, size), Move(1, 0, size, size))


@dataclass(frozen=True)
class StackedGateUp(Rule):
    """Gate above up in one Hugging Face tensor, as Hugging Face's stacked experts keep them: the same rows."""

    name: str
    columns: str = "H"
    rows: str = "M"

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def mcore_legend(self) -> str:
        return f"2*{self.rows} {self.columns}"

    @property
    def hf_legends(self) -> tuple[str, ...]:
        return (self.mcore_legend,)

    @property
    def split(self) -> Split | None:
        return Split(0, blocks=2)

    def moves(self, dims: Dims) -> tuple[Move, ...]:
        return (Move(0, 0, 0, 2 * dims[self.rows]),)
