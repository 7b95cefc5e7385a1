"""Fifty steps of our loop against fifty of a plain transformers + torch loop, written here: the same losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import column, records, run, write_checkpoint, write_dataset, write_job

from megatron_ext.config import TrainConfig
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.training.plan import make_plan

STEPS, WARMUP, LENGTH = 50, 5, 64
TRAIN = {
    "seq_length": LENGTH, "global_batch_size": 4, "train_iters": STEPS, "lr": 1e-3, "min_lr": 1e-4,
    "lr_decay_style": "cosine", "lr_warmup_iters": WARMUP, "weight_decay": 0.1, "clip_grad": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "train"),
    [("llama", {}), ("qwen2", {}), ("mixtral", {"packing": False, "moe_aux_loss_coeff": 0.0})],
    ids=["llama packed", "qwen2 packed, its embedding also its output", "mixtral one sample a row"],
)
def test_fifty_steps_have_the_losses_of_a_transformers_loop(tmp_path: Path, model_type: str, train: dict) -> None:
    ours, expected = both(tmp_path, model_type, TRAIN | train)
    for name, values, tolerance in zip(("loss", "grad_norm", "lr"), expected, (1e-4, 2e-2, 1e-12), strict=False):
        assert column(ours, name) == pytest.approx(values, abs=tolerance), name
    losses = column(ours, "loss")
    assert losses[-1] < losses[0] - 0.3, "it never learned, so nothing was compared"


@pytest.mark.parametrize("micro_batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_losses_of_the_router_train_it_as_their_formulas_do(tmp_path: Path, micro_batch_size: int) -> None:
    """Coefficients so large that losses and norms are theirs; packed rows, so that most rows hold several samples."""
    losses = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1, "train_iters": 6}
    ours, expected = both(tmp_path, "mixtral", TRAIN | losses, micro_batch_size)
    names = ("loss", "grad_norm", "lr", "load_balancing_loss", "z_loss")
    for name, values, tolerance in zip(names, expected, (1e-5, 1e-4, 1e-12, 1e-5, 1e-4), strict=True):
        assert column(ours, name) == pytest.approx(values, abs=tolerance), name
    assert all(1 <= load <= 2 for load in column(ours, "expert_load")), "4 experts, of which a token takes 2"
    assert column(ours, "z_loss")[-1] < column(ours, "z_loss")[0]


def both(folder: Path, model_type: str, train: dict, micro_batch_size: int = 1) -> tuple[Path, list[tuple]]:
    """The folder of our training, and the columns of the plain loop's."""
    shape = {"num_hidden_layers": 2} | ({"tie_word_embeddings": True} if model_type == "qwen2" else {})
    checkpoint = write_checkpoint(folder / "base", model_type, **shape)
    data = write_dataset(folder / "data", checkpoint, np.random.default_rng(3).integers(8, 60, 80).tolist())
    runtime = {"micro_batch_size": micro_batch_size}
    run(write_job(folder / "ours", checkpoint, data, train, runtime))
    plan = make_plan(TrainConfig(**{"precision": "fp32", "seed": 7, **train}), data)
    steps = [
        [plan.documents[plan.samples(int(s))].tolist() for s in plan.sequences(step)]
        for step in range(train["train_iters"])
    ]
    assert [record["sample_ids"] for record in records(folder / "ours")] == [
        [n for row in rows for n in row] for rows in steps
    ]
    return folder / "ours", list(zip(*plain_loop(folder / "base" / "hf", data, steps, train), strict=True))


def plain_loop(model: Path, data: Path, steps: list[list[list[int]]], train: dict) -> Any:
    """What each step found, AdamW on samples that are each computed alone; a step has rows, and a row has samples."""
    import torch
    import transformers

    torch.set_num_threads(1)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    gates, routed = [m for name, m in network.named_modules() if name.endswith("mlp.gate")], {}
    for gate in gates:
        gate.register_forward_hook(
            lambda gate, args, _: routed[gate].append(args[0].flatten(0, -2)[:-1] @ gate.weight.T)
        )
    tokens, mask = Idxmap(data / "tokens"), Idxmap(data / "loss_mask")
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": train["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    for step, rows in enumerate(steps):
        kept = {n: torch.from_numpy(mask[n][:LENGTH].astype(bool)) for row in rows for n in row}
        trained = sum(int(kept[n][1:].sum()) for row in rows for n in row)
        found = np.zeros(3)
        for row in rows:
            routed.update({gate: [] for gate in gates})
            losses = []
            for n in row:
                ids = torch.from_numpy(tokens[n][:LENGTH].astype(np.int64))
                logits = network(ids[None]).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[kept[n][1:]])
            share = sum(map(len, losses)) / trained
            balance, z = router_losses([torch.cat(routed[gate]) for gate in gates])
            loss = torch.cat(losses).sum() / trained
            weighted = train.get("moe_aux_loss_coeff", 0.0) * balance + train.get("moe_z_loss_coeff", 0.0) * z
            (loss + share * weighted).backward()
            found += loss.item(), share * balance.item(), share * z.item()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), train["clip_grad"]).item()
        for group in optimizer.param_groups:
            group["lr"] = planned(step, train["train_iters"])
        optimizer.step()
        optimizer.zero_grad()
        layers = max(1, len(gates))
        yield found[0], norm, planned(step, train["train_iters"]), found[1] / layers, found[2] / layers


def router_losses(layers: list) -> tuple[Any, Any]:
    """Load-balancing and z-loss of a row, added over layers, from (T, E) logits; two experts a token."""
    import torch

    balance = z = torch.zeros(())
    for logits in layers:
        chosen = logits.new_zeros(logits.shape).scatter(1, logits.topk(2, dim=1).indices, 1.0)
        shares, means = chosen.mean(0) / 2, logits.softmax(-1).mean(0)
        balance = balance + logits.shape[1] * (shares * means).sum()
        z = z + logits.logsumexp(-1).square().mean()
    return balance, z


def planned(step: int, steps: int) -> float:
    """Linear from 0 over the warm-up, then a half cosine down to the least; ``step`` counts from 0."""
    if step < WARMUP:
        return TRAIN["lr"] * step / WARMUP
    share = (step - WARMUP) / (steps - WARMUP)
    return TRAIN["min_lr"] + (TRAIN["lr"] - TRAIN["min_lr"]) * (1 + math.cos(math.pi * share)) / 2
