"""What a training will do, decided and checked before anything expensive starts. Torch-free: numpy and manifests.

The flow, ``mflow explain`` and every rank compute the same plan from the same files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.data.blends import sample_order
from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.packing import Packing
from megatron_ext.data.samples import TextStream
from megatron_ext.data.selection import Choice, Selection, select
from megatron_ext.errors import ConfigError, DatasetFormatError, ParallelismError, VocabularyError
from megatron_ext.families.base import Architecture
from megatron_ext.weights.manifest import CheckpointManifest

BYTES_A_PARAMETER = 16
"""fp32 weights, gradients' place excluded: weight, main weight and two moments of Adam in a resumable checkpoint."""


def check_layout(
    architecture: Architecture, train: TrainConfig, runtime: RuntimeConfig, world_size: int | None = None
) -> None:
    """Refuse parallel sizes that cannot run.

    Args:
        world_size: processes on all nodes, when a torchrun has started them; ``runtime.nproc_per_node`` by default.

    Raises:
        ParallelismError: names the value, what it must divide, and the remedy.
    """
    tp, pp = runtime.tensor_model_parallel_size, runtime.pipeline_model_parallel_size
    world = world_size or runtime.nproc_per_node
    if world % (tp * pp):
        place = "torchrun's number of processes" if world_size else "runtime.nproc_per_node"
        raise ParallelismError(
            f"{place} {world} is not a multiple of tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp}; start {tp * pp} processes or a multiple"
        )
    splits = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "hidden_size": architecture.hidden_size,
    }
    mlp = "moe_ffn_hidden_size" if architecture.num_moe_experts else "ffn_hidden_size"
    splits[mlp] = getattr(architecture, mlp)
    if shared := architecture.moe_shared_expert_intermediate_size:
        splits["moe_shared_expert_intermediate_size"] = shared
    for name, value in splits.items():
        if value % tp:
            fitting = [n for n in range(1, tp) if all(v % n == 0 for v in splits.values())]
            raise ParallelismError(
                f"runtime.tensor_model_parallel_size {tp} does not divide the model's {name} {value}; "
                f"this model takes {', '.join(map(str, fitting))}"
            )
    if architecture.num_layers % pp:
        fitting = [n for n in range(1, architecture.num_layers + 1) if architecture.num_layers % n == 0]
        raise ParallelismError(
            f"runtime.pipeline_model_parallel_size {pp} does not divide the model's {architecture.num_layers} layers; "
            f"this model takes {', '.join(map(str, fitting))}"
        )
    if runtime.sequence_parallel and tp == 1:
        raise ParallelismError(
            "runtime.sequence_parallel needs tensor_model_parallel_size of 2 or more, which is 1; switch one of them"
        )
    data_parallel = world // (tp * pp)
    _check_experts(architecture, runtime, data_parallel)
    if train.global_batch_size % (runtime.micro_batch_size * data_parallel):
        raise ParallelismError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of runtime.micro_batch_size "
            f"{runtime.micro_batch_size} x data-parallel size {data_parallel} (= {world} processes / ({tp} x {pp})); "
            "change the micro batch size or the number of processes"
        )


def _check_experts(architecture: Architecture, runtime: RuntimeConfig, data_parallel: int) -> None:
    ep, experts = runtime.expert_model_parallel_size, architecture.num_moe_experts
    if experts is None:
        if ep > 1:
            raise ParallelismError(
                f"runtime.expert_model_parallel_size {ep} needs a mixture of experts; this model is dense, set it to 1"
            )
        return
    fitting = [n for n in range(1, data_parallel + 1) if experts % n == 0 and data_parallel % n == 0]
    for name, value in {"the model's num_moe_experts": experts, "the data-parallel size": data_parallel}.items():
        if value % ep:
            raise ParallelismError(
                f"runtime.expert_model_parallel_size {ep} does not divide {name} {value}; this model takes "
                f"{', '.join(map(str, fitting))} at data-parallel size {data_parallel}"
            )
    if runtime.tensor_model_parallel_size > 1 and not runtime.sequence_parallel:
        raise ParallelismError(
            f"runtime.tensor_model_parallel_size {runtime.tensor_model_parallel_size} trains a mixture of experts with "
            "sequence_parallel only; set runtime.sequence_parallel true"
        )


def check_vocabulary(checkpoint: CheckpointManifest, dataset: dict[str, Any], place: Path) -> None:
    """Refuse a dataset whose ids mean something else to this model.

    Raises:
        VocabularyError: another tokenizer, or an id beyond the embedding.
    """
    made_by = dataset.get("tokenizer_digest")
    if made_by is not None and made_by != checkpoint.tokenizer_digest:  # a Megatron-LM pair does not say
        raise VocabularyError(
            f"dataset {place} was made with tokenizer {made_by[:12]}, the checkpoint belongs to "
            f"{checkpoint.tokenizer_digest[:12]}; run mflow tokenize with the tokenizer of this model"
        )
    if dataset["max_token_id"] >= checkpoint.vocab_size:
        raise VocabularyError(
            f"dataset {place} holds token id {dataset['max_token_id']}, but the model has {checkpoint.vocab_size} "
            "embeddings; run mflow tokenize with the tokenizer of this model"
        )


def read_dataset_manifest(dataset: Path) -> dict[str, Any]:
    """What is known of a chat or text dataset: its manifest; of a Megatron-LM pair, its largest id, found by reading.

    Raises:
        SourceError: no dataset there.
        DatasetFormatError: it holds pairs, which supervised fine-tuning cannot read.
    """
    found = open_dataset(dataset)
    if found.kind == "preference":
        raise DatasetFormatError(
            f"dataset {dataset} is of kind 'preference'; supervised fine-tuning needs a chat or text dataset"
        )
    return {**found.facts, "max_token_id": found.max_token_id()}


@dataclass(frozen=True)
class Plan:
    """Which samples each step trains on: a pure function of dataset, configuration and step.

    Attributes:
        selection: samples and the sequences that they share.
        iterations: optimizer steps.
        alignment: each sample takes a multiple of this many places in its sequence.
    """

    selection: Selection
    global_batch_size: int
    iterations: int
    seed: int
    alignment: int

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
    found = select(open_dataset(dataset), Choice.of(train))
    _require_positions(train, found, max_position_embeddings)
    iterations = _iterations(train, len(found.packing))
    check_schedule(train, iterations)
    return Plan(found, train.global_batch_size, iterations, train.seed, train.pack_alignment)


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
    found = select(open_dataset(own or dataset), Choice.of(whole if own else train, "validation"))
    _require_positions(train, found, max_position_embeddings)
    steps = math.ceil(len(found.packing) / train.global_batch_size)
    return Plan(found, train.global_batch_size, steps, train.seed, train.pack_alignment)


def _require_positions(train: TrainConfig, found: Selection, known: int | None) -> None:
    if known is not None and (longest := _longest(found)) > known:
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


def check_schedule(train: TrainConfig, iterations: int) -> None:
    """Refuse a warm-up or decay that does not fit into ``iterations`` steps.

    Raises:
        ConfigError: names the setting, its value and the steps there are.
    """
    decay = train.lr_wsd_decay_iters if train.lr_decay_style == "WSD" and train.lr_wsd_decay_iters else 0
    if train.lr_warmup_iters and train.lr_warmup_iters >= iterations:
        raise ConfigError(
            f"train.lr_warmup_iters {train.lr_warmup_iters} is not below the {iterations} steps of this training; "
            "lower it"
        )
    if train.lr_warmup_iters + decay > iterations:
        raise ConfigError(
            f"train.lr_warmup_iters {train.lr_warmup_iters} + lr_wsd_decay_iters {decay} is more than the {iterations} "
            "steps of this training; lower one of them"
        )


def parameters(architecture: Architecture) -> int:
    """Weights of a model of this shape, norms and biases included."""
    a = architecture
    qkv = a.kv_channels * (a.num_attention_heads + 2 * a.num_query_groups)
    attention = a.hidden_size * qkv + a.kv_channels * a.num_attention_heads * a.hidden_size
    ffn = a.ffn_hidden_size if a.num_moe_experts is None else a.moe_ffn_hidden_size or a.ffn_hidden_size
    mlp = (3 if a.gated_linear_unit else 2) * a.hidden_size * ffn
    if a.num_moe_experts is not None:
        mlp = a.num_moe_experts * (mlp + a.hidden_size)  # each expert, and its row of the router
    if a.moe_shared_expert_intermediate_size:
        mlp += (3 * a.moe_shared_expert_intermediate_size + 1) * a.hidden_size  # and its gate
    bias = (qkv if a.add_qkv_bias or a.add_bias_linear else 0) + 2 * a.hidden_size
    bias += 2 * a.kv_channels if a.qk_layernorm else 0
    embeddings = a.vocab_size * a.hidden_size * (1 if a.share_embeddings_and_output_weights else 2)
    return a.num_layers * (attention + mlp + bias) + embeddings + a.hidden_size


def disk_needed(architecture: Architecture) -> int:
    """Bytes that a training writes at most at one time: two resumable checkpoints and the final weights."""
    return (2 * BYTES_A_PARAMETER + 4) * parameters(architecture)
