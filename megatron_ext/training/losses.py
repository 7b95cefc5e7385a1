"""Losses: a function from a micro batch's logits to a sum over tokens, samples or pairs, and their number.

Legend: T tokens of the row, V vocabulary, P pairs. megatron-core divides by that number over the whole global batch
(``calculate_per_token_loss``), so the loss does not depend on packing, micro batches or parallel layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_ext.config import PreferenceConfig
from megatron_ext.training.batches import Batch
from megatron_ext.training.preference import preference_losses

LossParts = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]
"""Sum to minimise, what it is divided by (over all ranks and micro batches), and sums for the log."""


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


@dataclass(frozen=True)
class LanguageLoss:
    """Cross entropy of the trained tokens: of all of them alike, or of each sample's mean alike."""

    vocab_size: int
    normalization: str
    metrics: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: Batch, output: torch.Tensor) -> LossParts:
        """``output``: (B, T, V / tp) logits of the last pipeline stage."""
        places, losses = _trained_losses(batch, output, self.vocab_size)
        if self.normalization == "token":
            return _parts(losses.sum(), places.numel(), places.numel())
        samples = batch.segment[places]
        tokens = torch.bincount(samples, minlength=batch.segments)
        return _parts((losses / tokens[samples]).sum(), int((tokens > 0).sum()), places.numel())


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss over pairs; ``reference`` are the (N, 2) log-probabilities of all pairs of the dataset."""

    vocab_size: int
    config: PreferenceConfig
    reference: torch.Tensor
    metrics: ClassVar[tuple[str, ...]] = (
        "accuracy", "margin", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected",
    )  # fmt: skip

    def __call__(self, batch: Batch, output: torch.Tensor) -> LossParts:
        """``output``: (B, T, V / tp) logits of the last pipeline stage."""
        logps, lengths = sequence_log_probabilities(batch, output, self.vocab_size)
        real = torch.from_numpy(batch.documents >= 0).to(logps.device)
        logps, lengths = logps[real], lengths[real]
        reference = self.reference[batch.documents[batch.documents >= 0]].to(logps)
        losses, rewards = preference_losses(logps, reference, lengths, self.config)
        margins = rewards[:, 0] - rewards[:, 1]
        sums = torch.cat([(margins > 0).sum()[None].to(logps), margins.sum()[None], rewards.sum(0), logps.sum(0)])
        trained = int(lengths.sum())
        return _parts(losses.sum(), len(losses), trained, dict(zip(self.metrics, sums.detach(), strict=True)))


def sequence_log_probabilities(
    batch: Batch, output: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, 2) sums of the log-probabilities of each answer's trained tokens, and (P, 2) how many those are."""
    places, losses = _trained_losses(batch, output, vocab_size)
    segments = batch.segment[places]
    sums = losses.new_zeros(batch.segments).index_add(0, segments, -losses)
    return sums.view(-1, 2), torch.bincount(segments, minlength=batch.segments).view(-1, 2)


def _trained_losses(batch: Batch, output: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = batch.loss_mask.nonzero()[:, 0]
    return places, token_losses(output.flatten(0, 1).index_select(0, places), batch.labels[places], vocab_size)


def _parts(total: torch.Tensor, count: int, trained: int, sums: dict[str, torch.Tensor] | None = None) -> LossParts:
    seen = {"loss": total.detach().double(), "count": count, "tokens": trained, **(sums or {})}
    return total, torch.tensor(count, dtype=torch.int, device=total.device), seen


def forward_step(loss: Callable[[Batch, torch.Tensor], LossParts]) -> Callable[..., Any]:
    """What megatron-core's schedules call for each micro batch."""

    def step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packed)
        return output, partial(loss, batch)

    return step
