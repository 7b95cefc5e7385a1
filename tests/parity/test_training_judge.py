"""Fifty steps of our loop against fifty of a plain transformers + torch loop, written here: the same losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import column, records, run, write_checkpoint, write_dataset, write_job

from megatron_ext.data.idxmap import Idxmap

STEPS, WARMUP, LENGTH = 50, 5, 64
TRAIN = {
    "seq_length": LENGTH, "global_batch_size": 4, "train_iters": STEPS, "lr": 1e-3, "min_lr": 1e-4,
    "lr_decay_style": "cosine", "lr_warmup_iters": WARMUP, "weight_decay": 0.1, "clip_grad": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "train"),
    [("llama", {}), ("mixtral", {"packing": False})],
    ids=["llama packed", "mixtral one sample a row"],
)
def test_fifty_steps_have_the_losses_of_a_transformers_loop(tmp_path: Path, model_type: str, train: dict) -> None:
    checkpoint = write_checkpoint(tmp_path / "base", model_type, num_hidden_layers=2)
    data = write_dataset(tmp_path / "data", checkpoint, np.random.default_rng(3).integers(8, 60, 80).tolist())
    run(write_job(tmp_path / "ours", checkpoint, data, TRAIN | train))
    steps = [record["sample_ids"] for record in records(tmp_path / "ours")]
    expected = list(zip(*plain_loop(tmp_path / "base" / "hf", data, steps), strict=True))
    for name, values, tolerance in zip(("loss", "grad_norm", "lr"), expected, (1e-4, 2e-2, 1e-12), strict=True):
        assert column(tmp_path / "ours", name) == pytest.approx(values, abs=tolerance), name
    losses = column(tmp_path / "ours", "loss")
    assert losses[-1] < losses[0] - 0.3, "it never learned, so nothing was compared"


def plain_loop(model: Path, data: Path, steps: list[list[int]]) -> Any:
    """Loss, gradient norm and learning rate of each step: AdamW on samples that are each computed alone."""
    import torch
    import transformers

    torch.set_num_threads(1)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    tokens, mask = Idxmap(data / "tokens"), Idxmap(data / "loss_mask")
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": TRAIN["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    for step, samples in enumerate(steps):
        kept = [torch.from_numpy(mask[n][:LENGTH].astype(bool)) for n in samples]
        trained = sum(int(k[1:].sum()) for k in kept)
        total = 0.0
        for n, labelled in zip(samples, kept, strict=True):
            ids = torch.from_numpy(tokens[n][:LENGTH].astype(np.int64))
            logits = network(ids[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            loss = losses[labelled[1:]].sum() / trained
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), TRAIN["clip_grad"]).item()
        for group in optimizer.param_groups:
            group["lr"] = planned(step)
        optimizer.step()
        optimizer.zero_grad()
        yield total, norm, planned(step)


def planned(step: int) -> float:
    """Linear from 0 over the warm-up, then a half cosine down to the least; ``step`` counts from 0."""
    if step < WARMUP:
        return TRAIN["lr"] * step / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    return TRAIN["min_lr"] + (TRAIN["lr"] - TRAIN["min_lr"]) * (1 + math.cos(math.pi * share)) / 2
