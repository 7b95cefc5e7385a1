"""Losses: a function from a micro batch's logits to a sum over tokens, samples or pairs, and their number.

Legend: T tokens of the row, V vocabulary, P pairs. megatron-core divides by that number over the whole global batch
(``calculate_per_token_loss``), so the loss does not depend on packing, micro batches or parallel layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_ext.config import PreferenceConfig
from megatron_ext.model.routing import PADDING, encode_places
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
        own = logits if columns == vocab_size else logits[:, :vocab_size]
        return _CrossEntropy.apply(own, labels)
    first = parallel_state.get_tensor_model_parallel_rank() * columns
    own = min(max(vocab_size - first, 0), columns)
    if own < columns:
        logits = torch.cat([logits[:, :own], logits.new_full((len(logits), columns - own), -1e30)], 1)
    return vocab_parallel_cross_entropy(logits[:, None], labels[:, None])[:, 0]


class _CrossEntropy(torch.autograd.Function):
    """``F.cross_entropy`` of (T, V) logits whose gradient takes the place of what forward kept: torch's own holds two
    more arrays of (T, V).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_probabilities = F.log_softmax(logits, -1)
        ctx.save_for_backward(log_probabilities, labels)
        return -log_probabilities.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_probabilities, labels = ctx.saved_tensors
        result = log_probabilities.exp_()
        result.scatter_add_(1, labels[:, None], result.new_full((len(labels), 1), -1.0))
        return result.mul_(gradient[:, None]), None


@dataclass(frozen=True)
class LanguageLoss:
    """Cross entropy of the trained tokens: of all of them alike, or of each sample's mean alike."""

    vocab_size: int
    normalization: str
    metrics: ClassVar[tuple[str, ...]] = ()

    def weights(self, batch: Batch) -> np.ndarray:
        """(segments,) what is counted in each."""
        trained = batch.sizes[1]
        return trained if self.normalization == "token" else trained > 0

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

    def weights(self, batch: Batch) -> np.ndarray:
        """(segments,) what is counted in each: a pair at its chosen answer."""
        return np.stack([batch.documents >= 0, np.zeros_like(batch.documents, dtype=bool)], 1).ravel()

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
    places, flat = batch.loss_mask.nonzero()[:, 0], output.flatten(0, 1)
    if len(places) == len(flat):  # text: nothing to leave out, so nothing to copy
        return places, token_losses(flat, batch.labels, vocab_size)
    return places, token_losses(flat.index_select(0, places), batch.labels[places], vocab_size)


def _parts(total: torch.Tensor, count: int, trained: int, sums: dict[str, torch.Tensor] | None = None) -> LossParts:
    seen = {"loss": total.detach(), "count": count, "tokens": trained, **(sums or {})}
    return total, torch.tensor(count, dtype=torch.int, device=total.device), seen


def _places(batch: Batch, counted: np.ndarray) -> torch.Tensor:
    """(B, T) int64: for the router, of each place its sequence and what the loss counts in that; see ``routing``."""
    sequences = batch.sequences
    weights = np.bincount(sequences, weights=counted, minlength=sequences[-1] + 1).astype(np.int64)
    lengths, owners = np.append(batch.sizes[0], 0), np.append(sequences, 0)  # and of the padding at the row's end
    segments, positions = batch.segment.cpu().numpy(), batch.positions.flatten().cpu().numpy()
    rows = np.where(positions < lengths[segments], owners[segments], PADDING)
    places = encode_places(torch.from_numpy(rows), torch.from_numpy(weights))
    return places.view(batch.tokens.shape).to(batch.tokens.device)


def forward_step(
    loss: Callable[[Batch, torch.Tensor], LossParts], routed: Callable[[Batch], np.ndarray] | None = None
) -> Callable[..., Any]:
    """What megatron-core's schedules call for each micro batch.

    Args:
        routed: of a mixture of experts, what the loss counts in each segment: the weight of the router's losses.
    """

    def step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        places = {} if routed is None else {"padding_mask": _places(batch, routed(batch))}
        output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packed, **places)
        return output, partial(loss, batch)

    return step
