"""What a checkpoint of a training holds, and how it is read back; ``saving`` writes it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import FileSystemReader

from megatron_ext.errors import CheckpointError, ConfigError, ParallelismError
from megatron_ext.weights.manifest import LATEST, latest_folder

if TYPE_CHECKING:
    from megatron_ext.training.setup import Setup

BESIDE_WEIGHTS = ("optimizer.", "chained_", "random")
"""Beginnings of the keys of a resumable checkpoint that are no weights."""
ASKED = ("max_lr", "min_lr", "betas", "eps")
"""Settings of the optimizer that are this training's, whatever the checkpoint's was asked for."""
LARGE = 1_000_000_000
"""Parameters of a model from which on ``runtime.optimizer_state: auto`` saves the state as it is sharded."""
FORMATS = {"any_layout": "fully_reshardable", "as_sharded": "dp_reshardable"}
"""``runtime.optimizer_state`` -> megatron-core's name."""


@dataclass
class TrainingState:
    """Everything that a step changes."""

    chunks: list[Any]  # the bare GPTModels of this rank: one, or one for each virtual pipeline stage
    models: list[Any]  # what megatron-core's DDP makes of them
    optimizer: Any
    scheduler: Any
    optimizer_format: str  # in which its state is saved, as megatron-core names it
    step: int = 0
    validated: int = 0  # the step after which the validation loss was last computed

    def gather(self) -> None:
        """Have every weight up to date, where gathering them is left to the coming forward pass."""
        for model in self.models:
            if model.ddp_config.overlap_param_gather:
                model.start_param_sync(force_sync=True)

    def layout(self) -> dict[str, Any]:
        """How the state is spread over ranks. Random states fit only the layout that wrote them."""
        return {
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
            "context_parallel_size": parallel_state.get_context_parallel_world_size(),
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "virtual_pipeline_model_parallel_size": len(self.chunks),
            "use_distributed_optimizer": isinstance(_first(self.optimizer), DistributedOptimizer),
            "world_size": dist.get_world_size(),
        }

    def buckets(self) -> dict[str, Any]:
        """What decides which gradients share a buffer, as the settings name it."""
        asked = self.models[0].ddp_config
        overlap = asked.overlap_grad_reduce
        return {"overlap_grad_reduce": overlap, "ddp_bucket_size": asked.bucket_size if overlap else None}


def optimizer_format(asked: str, parameters: int) -> str:
    """The name of megatron-core for ``runtime.optimizer_state``, of a model with so many parameters."""
    if asked == "auto":
        asked = "as_sharded" if parameters >= LARGE else "any_layout"
    return FORMATS[asked]


def load_weights(model: Any, checkpoint: Path) -> None:
    """Fill ``model`` (a bare GPTModel, any layout, any dtype) from a checkpoint folder. Raises as ``load_chunks``."""
    load_chunks([model], checkpoint)


def load_chunks(chunks: list[Any], checkpoint: Path) -> None:
    """Fill all that this rank holds of the model from a checkpoint folder.

    Raises:
        CheckpointError: the torch_dist files are damaged or of another model; names the tensor that one of them lacks.
    """
    folder = latest_folder(checkpoint)
    try:
        loaded, unread, lacking = dist_checkpointing.load(
            _weights(chunks), str(folder), strict=StrictHandling.RETURN_ALL
        )
    except (dist_checkpointing.core.CheckpointingException, OSError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}; convert the model again") from error
    if lacking:
        raise CheckpointError(f"{folder} has no tensor {min(lacking)} ({len(lacking)} missing), which the model needs")
    if unread := [key for key in unread if not key.startswith(BESIDE_WEIGHTS) and "_extra_state" not in key]:
        raise CheckpointError(f"the model has no place for {min(unread)} of {folder} ({len(unread)} such tensors)")
    _fill(chunks, loaded, folder)


def full_state(state: TrainingState) -> dict[str, Any]:
    """What a resumable checkpoint holds. Every rank calls it."""
    state.gather()
    weights = _everything(state.chunks)
    return {
        "model": weights,
        "optimizer": state.optimizer.sharded_state_dict(weights, metadata=_sharding(state.optimizer_format)),
        "optimizer_format": state.optimizer_format,
        "random": _random_states(),
        "scheduler": state.scheduler.state_dict(),
        "step": state.step,
        "validated": state.validated,
        "layout": state.layout(),
        "buckets": state.buckets(),
    }


def resume(setup: Setup, state: TrainingState) -> bool:
    """Continue from the newest full state in ``setup.out``, or else from that of ``setup.continued``.

    Raises:
        ParallelismError: the state cannot be read under this layout; says which sizes it needs.
        CheckpointError: the checkpoint to be continued holds weights alone.
        ConfigError: it was trained as long already.
    """
    if (setup.out / LATEST).exists():
        _load(latest_folder(setup.out), state)
    elif setup.continued:
        folder = latest_folder(setup.continued)
        _load(folder, state)
        if state.step >= setup.plan.iterations:
            raise ConfigError(
                f"{folder} was trained for {state.step} steps already, and this training has {setup.plan.iterations}; "
                "raise train.train_iters, or start anew with model.finetune true"
            )
    return state.step > 0


def _load(folder: Path, state: TrainingState) -> None:
    common = dist_checkpointing.load_common_state_dict(str(folder))
    if "optimizer_format" not in common:
        raise CheckpointError(
            f"{folder} holds weights alone; model.finetune false needs a resumable checkpoint: full_state/ of a "
            "training with runtime.keep_final_state, or one that runtime.keep_every kept"
        )
    _check_resumable(folder, common, state)
    same_layout = common["layout"] == state.layout()
    weights = _weights(state.chunks)
    wanted = {
        "model": weights,
        "optimizer": state.optimizer.sharded_state_dict(
            weights, is_loading=True, metadata=_sharding(common["optimizer_format"])
        ),
    }
    if same_layout:
        wanted["random"] = _random_states()
    loaded = dist_checkpointing.load(wanted, str(folder))
    _fill(state.chunks, loaded["model"], folder)
    asked = [{name: group[name] for name in ASKED if name in group} for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(loaded["optimizer"])
    for group, settings in zip(state.optimizer.param_groups, asked, strict=True):
        group.update(settings)
    state.scheduler.override_opt_param_scheduler = True  # as this training asks for, which may be longer
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.step, state.validated = loaded["step"], loaded.get("validated", loaded["step"])
    if same_layout:
        _set_random_states(loaded["random"])


def final_weights(state: TrainingState, base: Path) -> dict[str, Any]:
    """The weights alone, each in the type it had in the checkpoint ``base``. Every rank calls it."""
    state.gather()
    types = _types(latest_folder(base))
    weights = _everything(state.chunks)

    def cast(value: Any) -> Any:
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key in types:
            value.data = value.data.detach().to(types[value.key])
            if isinstance(value, ShardedTensor):
                value.dtype = types[value.key]
        return value

    dict_list_map_inplace(cast, weights)
    return weights


def _check_resumable(folder: Path, common: dict[str, Any], state: TrainingState) -> None:
    before, now = common["layout"], state.layout()
    fixed = ["use_distributed_optimizer", "expert_model_parallel_size"]  # experts have an optimizer of their own
    if common["optimizer_format"] == "dp_reshardable":  # which keeps the buffers as they are
        fixed += ["tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"]
        buckets = common.get("buckets", {})  # of states that were written since it is kept
        before, now = before | buckets, now | state.buckets()
        fixed += buckets
    for name in fixed:
        if before[name] != now[name]:
            raise ParallelismError(
                f"{folder} was written with runtime.{name} {before[name]} and cannot be resumed with {now[name]}; set "
                "it back, or train in another folder (runtime.optimizer_state says what a state can be resumed under)"
            )


def _first(optimizer: Any) -> Any:
    return getattr(optimizer, "chained_optimizers", [optimizer])[0]


def _sharding(optimizer_format: str | None = None) -> dict[str, Any]:
    """What ``sharded_state_dict`` must know."""
    known = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {**known, "distrib_optim_sharding_type": optimizer_format} if optimizer_format else known


def _everything(chunks: list[Any]) -> dict[str, Any]:
    """What to write of the model: tensors, and the objects that Transformer Engine's layers keep beside them."""
    return {f"chunk{i}": chunk.sharded_state_dict(metadata=_sharding()) for i, chunk in enumerate(chunks)}


def _weights(chunks: list[Any]) -> dict[str, Any]:
    """What to read of the model: its tensors. Of the objects beside them, which are for FP8, some are missing in a
    checkpoint that layers without Transformer Engine wrote.
    """
    return {
        part: {name: value for name, value in state.items() if "_extra_state" not in name}
        for part, state in _everything(chunks).items()
    }


def _fill(chunks: list[Any], loaded: dict[str, Any], folder: Path) -> None:
    """Every parameter of this rank from ``loaded``; objects of Transformer Engine stay as they are."""
    for i, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[f"chunk{i}"], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            names = ", ".join([*missing, *result.unexpected_keys][:4])
            raise CheckpointError(f"the weights of {folder} do not fit the model: {names}; convert the model again")


def _types(folder: Path) -> dict[str, torch.dtype]:
    """Key -> type of every tensor in a torch_dist folder."""
    entries = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {key: entry.properties.dtype for key, entry in entries.items() if hasattr(entry, "properties")}


def _random_states() -> ShardedObject:
    """Every generator of this rank; data-parallel ranks differ, because dropout sees other shapes there."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", states, (dist.get_world_size(),), (dist.get_rank(),))


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
