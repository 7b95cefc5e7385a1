"""Checkpoints as torch_dist folders: load weights, save and resume the full state, keep the last, publish whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LATEST = "latest_checkpointed_iteration.txt"


def latest_folder(checkpoint: Path) -> Path:
    """``release`` or ``iter_NNNNNNN`` inside ``checkpoint``, as its tracker file says."""
    named = (checkpoint / LATEST).read_text(encoding="utf-8").strip()
    return checkpoint / (named if named == "release" else f"iter_{int(named):07d}")


def load_weights(model: Any, folder: Path) -> None:
    """Fill ``model`` (a bare GPTModel of any tensor- and pipeline-parallel layout) from a torch_dist folder."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(model.sharded_state_dict(metadata=sharding()), str(folder))
    model.load_state_dict(loaded, strict=False)


def sharding() -> dict[str, Any]:
    """What ``sharded_state_dict`` must know about the data-parallel group."""
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
