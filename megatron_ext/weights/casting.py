"""Rows in another type: what the type cannot hold is refused, never written as infinity."""

from __future__ import annotations

import torch

from megatron_ext.errors import PrecisionError
from megatron_ext.events import Events
from megatron_ext.weights.hf import SHORT, short_name


def cast(rows: torch.Tensor, dtype: torch.dtype, name: str, first: int) -> torch.Tensor:
    """``rows`` of tensor ``name``, from row ``first`` on, in ``dtype``.

    Raises:
        PrecisionError: a finite value became infinite; names tensor, place and value.
    """
    result = rows.to(dtype)
    if rows.dtype == dtype or torch.finfo(dtype).max >= torch.finfo(rows.dtype).max or result.isfinite().all():
        return result
    lost = (result.isinf() & rows.isfinite()).nonzero()
    if not len(lost):
        return result
    place = [int(index) for index in lost[0]]
    value, row = float(rows[tuple(place)]), first + place[0]
    column = f", column {place[1]}" if len(place) > 1 else ""
    wide = [short for short, other in SHORT.items() if torch.finfo(other).max >= abs(value)]
    raise PrecisionError(
        f"{name} holds {value:.6g} at row {row}{column}, which {short_name({dtype})} cannot: its largest value is "
        f"{torch.finfo(dtype).max:.6g}; " + (f"use --dtype {' or '.join(wide)}" if wide else "leave out --dtype")
    )


class Underflow:
    """Tensors that became zero, whole, because their type ends above their values; any thread may show it rows."""

    def __init__(self) -> None:
        self._zero: set[str] = set()
        self._kept: set[str] = set()

    def see(self, name: str, rows: torch.Tensor, result: torch.Tensor) -> None:
        """Some ``rows`` of tensor ``name``, and what became of them."""
        if name in self._kept or torch.finfo(result.dtype).tiny <= torch.finfo(rows.dtype).tiny:
            return
        if result.any():
            self._kept.add(name)
        elif rows.any():
            self._zero.add(name)

    def tell(self, events: Events) -> None:
        """Name them."""
        if lost := sorted(self._zero - self._kept):
            events.note(
                f"{lost[0]} became zero ({len(lost)} such tensors): all its values are too small for the type; "
                "bf16 and fp32 keep them"
            )
