"""What a training will do, decided and checked before anything expensive starts. Torch-free: numpy and manifests.

The flow, ``mflow explain`` and every rank compute the same plan from the same files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import TrainConfig
from megatron_ext.data.blends import sample_order
from megatron_ext.data.datasets import Dataset, open_dataset
from megatron_ext.data.packing import Packing
from megatron_ext.data.samples import TextStream
from megatron_ext.data.selection import Choice, Selection, answer_limit, select
from megatron_ext.errors import ConfigError, VocabularyError
from megatron_ext.weights.manifest import CheckpointManifest

REFERENCE_DECIDES = ("seq_length", "pack_alignment", "precision")
"""Settings of the training on which the log-probabilities of a reference model depend."""


def check_vocabulary(checkpoint: CheckpointManifest, dataset: Dataset) -> None:
    """Refuse a dataset whose ids mean something else to this model.

    Raises:
        VocabularyError: another tokenizer, or an id beyond the embedding.
    """
    made_by, largest, place = dataset.facts.get("tokenizer_digest"), dataset.max_token_id(), dataset.place
    if made_by is not None and made_by != checkpoint.tokenizer_digest:  # a Megatron-LM pair does not say
        raise VocabularyError(
            f"dataset {place} was made with tokenizer {made_by[:12]}, the checkpoint belongs to "
            f"{checkpoint.tokenizer_digest[:12]}; run mflow tokenize with the tokenizer of this model"
        )
    if largest >= checkpoint.vocab_size:
        raise VocabularyError(
            f"dataset {place} holds token id {largest}, but the model has {checkpoint.vocab_size} "
            "embeddings; run mflow tokenize with the tokenizer of this model"
        )


@dataclass(frozen=True)
class Plan:
    """Which samples each step trains on: a pure function of dataset, configuration and step.

    Attributes:
        selection: samples and the sequences that they share.
        iterations: optimizer steps.
        alignment: each sample takes a multiple of this many places in its sequence.
        answer_limit: tokens that each answer of a pair is cut to.
    """

    selection: Selection
    global_batch_size: int
    iterations: int
    seed: int
    alignment: int
    answer_limit: int

    @property
    def documents(self) -> np.ndarray:
        """(N,) numbers of the samples: documents of the dataset; of text, windows of ``seq_length + 1`` tokens."""
        return self.selection.documents

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each sample that are kept; the last is only a label."""
        return self.selection.lengths

    @property
    def packing(self) -> Packing:
        """Which of the N samples share a sequence."""
        return self.selection.packing

    @property
    def stream(self) -> TextStream | None:
        """Of text, the documents laid one after the other."""
        return self.selection.stream

    def sequences(self, step: int) -> np.ndarray:
        """(global_batch_size,) numbers of the sequences of optimizer step ``step``, counted from 0."""
        first, size = self.selection.sequences, self.global_batch_size
        which, within = sample_order(
            np.diff(first).tolist(), self.selection.weights, size, self.seed, start=step * size
        )
        return first[which] + within

    def samples(self, sequence: int) -> np.ndarray:
        """Positions in ``documents`` of the samples in one sequence."""
        return self.packing[sequence]

    def sample_ids(self, step: int) -> list[int]:
        """Numbers in the dataset of all samples of optimizer step ``step``."""
        return [int(d) for s in self.sequences(step) for d in self.documents[self.samples(int(s))]]

    def summary(self) -> dict[str, Any]:
        """What a person wants to know about the plan; JSON-able."""
        found = self.selection
        return {
            "samples": len(self.documents),
            "sequences": len(self.packing),
            "truncated": found.truncated,
            "dropped_overlong": found.dropped_overlong,
            "dropped_untrained": found.dropped_untrained,
            "held_out": found.held_out,
            "fill": round(self.packing.fill, 4),
            "iterations": self.iterations,
            "epochs": round(self.iterations * self.global_batch_size / len(self.packing), 3),
        }


def make_plan(train: TrainConfig, dataset: Path, max_position_embeddings: int | None = None) -> Plan:
    """Decide the samples, sequences and steps of ``train`` on ``dataset``.

    Raises:
        DatasetFormatError: no sample is left to train on.
        ConfigError: the schedule does not fit the number of steps, or a sample is longer than the model's context.
    """
    opened, choice = open_dataset(dataset), Choice.of(train)
    found = select(opened, choice)
    _require_positions(train, opened, found, max_position_embeddings)
    iterations = _iterations(train, len(found.packing))
    check_schedule(train, iterations)
    return Plan(found, train.global_batch_size, iterations, train.seed, train.pack_alignment, answer_limit(choice))


def validation_plan(
    train: TrainConfig, dataset: Path, own: Path | None = None, max_position_embeddings: int | None = None
) -> Plan | None:
    """One pass over the validation set: the dataset ``own``, else what ``train.validation_fraction`` holds out.

    Its last step may come round to sequences of the first one again. None where there is no validation set.

    Raises:
        DatasetFormatError: no sample is in it.
        ConfigError: a sample is longer than the model's context.
    """
    if own is None and not train.validation_fraction:
        return None
    whole = train.model_copy(update={"validation_fraction": 1.0})
    opened, choice = open_dataset(own or dataset), Choice.of(whole if own else train, "validation")
    found = select(opened, choice)
    _require_positions(train, opened, found, max_position_embeddings)
    steps = math.ceil(len(found.packing) / train.global_batch_size)
    return Plan(found, train.global_batch_size, steps, train.seed, train.pack_alignment, answer_limit(choice))


def _require_positions(train: TrainConfig, dataset: Dataset, found: Selection, known: int | None) -> None:
    longest = answer_limit(Choice.of(train)) if dataset.kind == "preference" else _longest(found)
    if known is not None and longest > known:
        raise ConfigError(
            f"train.seq_length {train.seq_length} lets samples of {longest} tokens through, but the model knows "
            f"{known} positions; lower train.seq_length to {known}"
        )


def _longest(found: Selection) -> int:
    return found.packing.seq_length if found.stream is not None else int(found.lengths.max())


def planned_iterations(train: TrainConfig, dataset: Path) -> int:
    """Optimizer steps of ``train`` on the dataset folder ``dataset``. Raises as ``make_plan``."""
    return iterations_without_data(train) or make_plan(train, dataset).iterations


def iterations_without_data(train: TrainConfig) -> int | None:
    """Optimizer steps where no dataset is needed to know them: None for ``train_epochs``."""
    if train.train_tokens is not None:
        return max(1, train.train_tokens // (train.global_batch_size * train.seq_length))
    return train.train_iters


def _iterations(train: TrainConfig, sequences: int) -> int:
    if train.train_epochs is None:
        return iterations_without_data(train) or 1
    return max(1, math.ceil(train.train_epochs * sequences / train.global_batch_size))


def warmup_iterations(train: TrainConfig) -> int:
    """Steps of warm-up."""
    if train.lr_warmup_tokens is None:
        return train.lr_warmup_iters
    return train.lr_warmup_tokens // (train.global_batch_size * train.seq_length)


def check_schedule(train: TrainConfig, iterations: int) -> None:
    """Refuse a warm-up or decay that does not fit into ``iterations`` steps.

    Raises:
        ConfigError: names the setting, its value and the steps there are.
    """
    decay = train.lr_wsd_decay_iters if train.lr_decay_style == "WSD" and train.lr_wsd_decay_iters else 0
    warmup = warmup_iterations(train)
    name = (
        f"train.lr_warmup_iters {warmup}"
        if train.lr_warmup_tokens is None
        else f"train.lr_warmup_tokens {train.lr_warmup_tokens} (= {warmup} steps)"
    )
    if warmup and warmup >= iterations:
        raise ConfigError(f"{name} is not below the {iterations} steps of this training; lower it")
    if warmup + decay > iterations:
        raise ConfigError(
            f"{name} + lr_wsd_decay_iters {decay} is more than the {iterations} steps of this training; "
            "lower one of them"
        )
