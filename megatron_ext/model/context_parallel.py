"""Context parallelism for torch's attention: each rank holds two shares of every row, and gathers all keys and values.

A row of T tokens is cut into 2C shares for C ranks; rank r holds shares r and 2C - 1 - r, so that causal attention
costs every rank the same. This is the order of megatron-core and Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn.attention.bias import causal_lower_right


def own_places(length: int, rank: int, ranks: int) -> np.ndarray:
    """(T / C,) places of a row of ``length`` tokens that ``rank`` holds, in its order."""
    if ranks <= 1:
        return np.arange(length)
    shares = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate([shares[rank], shares[2 * ranks - 1 - rank]])


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Causal attention of this rank's queries (T/C, B, A, D) to all keys (T/C, B, G, D on each rank).

    Returns:
        (T/C, B, A, D).
    """
    rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    share = query.size(0) // 2
    keys, values = (_in_order(x, ranks).permute(1, 2, 0, 3) for x in (key, value))
    mixed = []
    for part, number in zip(query.split(share), (rank, 2 * ranks - 1 - rank), strict=True):
        seen = (number + 1) * share
        mixed.append(
            F.scaled_dot_product_attention(
                part.permute(1, 2, 0, 3), keys[:, :, :seen], values[:, :, :seen], causal_lower_right(share, seen),
                scale=scale, enable_gqa=keys.size(1) != query.size(2),
            ).permute(2, 0, 1, 3)
        )  # fmt: skip
    return torch.cat(mixed)


def _in_order(shares: torch.Tensor, ranks: int) -> torch.Tensor:
    """(T/C, …) of this rank to (T, …) of all; backward sums what every rank found for this one's."""
    group: Any = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(shares, tensor_parallel_output_grad=True, group=group)
    held = np.concatenate([own_places(len(gathered), rank, ranks) for rank in range(ranks)])
    return gathered.index_select(0, torch.from_numpy(np.argsort(held)).to(gathered.device))
