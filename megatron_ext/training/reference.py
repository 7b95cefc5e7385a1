"""Log-probabilities that the model before training gives to both answers of every pair: a stage of its own.

So that preference training holds one model, and a resumed training cannot meet another reference. ``logps.npy`` is
(N, 2) float32 by the dataset's document, chosen then rejected; NaN where nothing is trained.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.errors import CheckpointError
from megatron_ext.events import Events
from megatron_ext.folders import fsync_tree
from megatron_ext.training.batches import Batch
from megatron_ext.training.losses import sequence_log_probabilities
from megatron_ext.training.plan import REFERENCE_DECIDES, validation_plan
from megatron_ext.training.setup import Base
from megatron_ext.training.state import training_digest

if TYPE_CHECKING:
    from megatron_ext.training.passes import Passes

LOGPS, MANIFEST = "logps.npy", "manifest.json"


def reference_log_probabilities(base: Base, passes: Passes, folder: Path) -> torch.Tensor:
    """(N, 2) of every pair of the dataset, from ``folder``; computed there with ``passes`` if it holds none yet.

    Raises:
        CheckpointError: they were computed with another checkpoint, dataset or length.
    """
    if not (folder / MANIFEST).exists():
        dist.barrier()  # every rank has looked before one of them writes
        folder.mkdir(parents=True, exist_ok=True)
        compute(base, passes, folder, Events())
    kept = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if kept["digest"] != reference_digest(base):
        raise CheckpointError(
            f"reference {folder} was computed with another checkpoint, dataset, {', '.join(REFERENCE_DECIDES)} than "
            "this training's; compute it anew, or leave it out"
        )
    return torch.from_numpy(np.load(folder / LOGPS))


def reference_digest(base: Base) -> str:
    """xxh3-128 of everything that decides the log-probabilities."""
    settings = {name: getattr(base.train, name) for name in REFERENCE_DECIDES}
    return training_digest(settings, base.checkpoint, base.dataset.place)


def compute(base: Base, passes: Passes, folder: Path, events: Events) -> dict[str, Any]:
    """Write the log-probabilities of every pair of the dataset into ``folder``; counts and means."""
    place, positions = base.dataset.place, base.manifest.architecture.max_position_embeddings
    plan = validation_plan(base.train.model_copy(update={"overlong": "truncate"}), place, place, positions)
    assert plan is not None  # of a dataset of its own there is one
    count, done = len(base.dataset.tokens[0]), 0
    found = torch.zeros((count, 3), dtype=torch.float32)
    vocab_size = base.manifest.vocab_size

    def look(batch: Batch, output: torch.Tensor) -> Any:
        logps, _ = sequence_log_probabilities(batch, output, vocab_size)
        real = batch.documents >= 0
        rows = found[batch.documents[real]]
        rows[:, :2] = logps[torch.from_numpy(real).to(logps.device)].float().cpu()
        rows[:, 2] = 1
        found[batch.documents[real]] = rows
        return logps.sum(), torch.ones((), dtype=torch.int, device=logps.device), {}

    for _ in passes.sweep(look, plan, place):
        done = min(done + passes.base.runtime.micro_batch_size * dist.get_world_size(), len(plan.packing))
        events.progress(done, len(plan.packing), "sequences")
    if not passes.reporting:
        found.zero_()
    gathered = found.to(torch.cuda.current_device())
    dist.all_reduce(gathered)
    values, times = gathered[:, :2].cpu(), gathered[:, 2:].cpu()
    logps = torch.where(times > 0, values / times.clamp(min=1), torch.nan).numpy()
    pairs = int((times > 0).sum())
    if dist.get_rank() == 0:
        np.save(folder / LOGPS, logps)
        fsync_tree(folder)  # before the manifest says that they are whole
        facts = {"format": "megatron-flows/reference", "version": 1, "digest": reference_digest(base), "pairs": pairs}
        draft = folder / f".{MANIFEST}"
        draft.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder / MANIFEST)
    dist.barrier()
    return {
        "pairs": pairs,
        "documents": count,
        "logps_chosen": float(np.nanmean(logps[:, 0])),
        "logps_rejected": float(np.nanmean(logps[:, 1])),
    }
