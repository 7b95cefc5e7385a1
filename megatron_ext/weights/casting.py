"""Rows in another type: what the type cannot hold is refused, never written as infinity."""

from __future__ import annotations

import torch

from megatron_ext.errors import PrecisionError
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
