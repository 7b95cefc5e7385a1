"""Losses: a function from a micro batch's logits to a sum over trained tokens, and their number.

Legend: T tokens of the row, V vocabulary. megatron-core divides by the number of trained tokens of the whole global
batch (``calculate_per_token_loss``), so the loss does not depend on packing, micro batches or parallel layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_ext.training.batches import Batch


def token_losses(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Cross entropy of each token, in fp32.

    Args:
        logits: (T, V / tp) of this tensor-parallel rank.
        labels: (T,) token ids.
        vocab_size: rows beyond it are padding and take no probability.
    """
    logits = logits.float()
    ranks, columns = parallel_state.get_tensor_model_parallel_world_size(), logits.size(-1)
    if ranks == 1:
        return F.cross_entropy(logits[:, :vocab_size], labels, reduction="none")
    first = parallel_state.get_tensor_model_parallel_rank() * columns
    own = min(max(vocab_size - first, 0), columns)
    if own < columns:
        logits = torch.cat([logits[:, :own], logits.new_full((len(logits), columns - own), -1e30)], 1)
    return vocab_parallel_cross_entropy(logits[:, None], labels[:, None])[:, 0]


def sft_loss(batch: Batch, vocab_size: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum of the losses of trained tokens, their number, and both detached for the log.

    Args:
        output: (1, T, V / tp) logits of the last pipeline stage.
    """
    trained = batch.loss_mask.nonzero()[:, 0]
    losses = token_losses(output[0].index_select(0, trained), batch.labels[0].index_select(0, trained), vocab_size)
    total = losses.sum()
    count = torch.tensor(trained.numel(), dtype=torch.int, device=total.device)
    return total, count, {"loss": total.detach().double(), "tokens": trained.numel()}


def forward_step(vocab_size: int) -> Callable[[Iterator[Batch], Any], tuple[torch.Tensor, Callable[..., Any]]]:
    """What megatron-core's schedules call for each micro batch."""

    def step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.segments)
        return output, partial(sft_loss, batch, vocab_size)

    return step
