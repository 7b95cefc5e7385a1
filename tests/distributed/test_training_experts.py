"""A mixture of experts trains under expert, data and tensor parallelism as one process trains it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import column, run, write_checkpoint, write_dataset, write_job

from megatron_ext.events import Events
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import MANIFEST, write_latest

DP2 = {"nproc_per_node": 2}
EP2 = {**DP2, "expert_model_parallel_size": 2}
KEEP = {"save_interval": 2, "keep_every": 2}
BALANCE = {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
TP2 = {**DP2, "tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose window is shorter than its samples, and the training of one process."""
    folder = tmp_path_factory.mktemp("experts")
    checkpoint = write_checkpoint(folder / "base", "mixtral", sliding_window=17)
    write_dataset(folder / "data", checkpoint, np.random.default_rng(1).integers(5, 70, 60).tolist())
    run(write_job(folder / "one", checkpoint, folder / "data"))
    return folder


def job(base: Path, name: str, runtime: dict) -> Path:
    return write_job(base / name, base / "base" / "checkpoint", base / "data", runtime=runtime | KEEP)


def exported(base: Path, name: str) -> dict[str, torch.Tensor]:
    out = base / f"{name}-exported"
    out.mkdir(exist_ok=True)
    export(base / name, base / "base" / "hf", out, dtype=None, events=Events())
    return load_file(out / "model.safetensors")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("ep2", EP2),
        pytest.param("dp2", DP2, marks=pytest.mark.slow),
        pytest.param("ep2-whole-optimizer", {**EP2, "use_distributed_optimizer": False}, marks=pytest.mark.slow),
        pytest.param("tp2-sp", TP2, marks=pytest.mark.slow),
        pytest.param("tp2-sp-ep2", {**TP2, **EP2, "nproc_per_node": 4}, marks=pytest.mark.slow),
        pytest.param(
            "pp2-ep2", {**EP2, "nproc_per_node": 4, "pipeline_model_parallel_size": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_layouts_of_experts_equal_one_process(base: Path, name: str, runtime: dict) -> None:
    run(job(base, name, runtime))
    for figure in ("loss", "grad_norm"):
        assert column(base / name, figure) == pytest.approx(column(base / "one", figure), abs=1e-5), figure
    assert len(set(column(base / "one", "loss"))) == 4, "the loss never moved"
    source, one, other = (
        load_file(base / "base" / "hf" / "model.safetensors"),
        exported(base, "one"),
        exported(base, name),
    )
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    assert [key for key in one if torch.equal(one[key], source[key])] == []


@pytest.fixture(scope="module")
def balanced(base: Path) -> Path:
    """The training of one process with losses of the router that weigh something."""
    run(write_job(base / "balanced", base / "base" / "checkpoint", base / "data", BALANCE))
    return base


@pytest.mark.parametrize(
    "way",
    [
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_method": "block"},
        pytest.param(
            {
                "recompute_granularity": "full", "recompute_method": "block", "nproc_per_node": 2,
                "pipeline_model_parallel_size": 2,
            },
            marks=[pytest.mark.distributed, pytest.mark.slow],
        ),
    ],
    ids=["selective", "uniform", "block", "block-pp2"],
)  # fmt: skip
def test_recomputation_keeps_the_losses_of_the_router(
    balanced: Path, way: dict, request: pytest.FixtureRequest
) -> None:
    """By block the second layer, which is not recomputed, hears of the places of each micro batch, too."""
    out, tolerance = balanced / request.node.callspec.id, 1e-5 if "nproc_per_node" in way else 0
    run(write_job(out, balanced / "base" / "checkpoint", balanced / "data", BALANCE, way))
    for figure in ("loss", "grad_norm", "load_balancing_loss", "z_loss", "expert_load"):
        assert column(out, figure) == pytest.approx(column(balanced / "balanced", figure), abs=tolerance), figure
    one, other = exported(balanced, "balanced"), exported(balanced, out.name)
    torch.testing.assert_close(other, one, rtol=0, atol=tolerance)
    assert all(loss > 0.9 for loss in column(out, "load_balancing_loss"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_training_under_expert_parallelism_goes_on_from_its_state_under_the_same(base: Path) -> None:
    whole, out = base / "ep2", base / "resumed"
    if not whole.exists():
        run(job(base, "ep2", EP2))
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("iter_0000004", MANIFEST))
    write_latest(out, 2)
    state = json.loads((out / "training_state.json").read_text())
    (out / "training_state.json").write_text(json.dumps(state | {"summary": None}))
    (error,) = [e for e in run(job(base, "resumed", {}), expect=2) if e["event"] == "error"]
    assert "was written with runtime.expert_model_parallel_size 2" in error["message"]
    events = run(job(base, "resumed", EP2))
    assert any("resumed after step 2" in event.get("text", "") for event in events)
    for figure in ("loss", "grad_norm"):
        assert column(out, figure) == pytest.approx(column(base / "one", figure), abs=1e-5), figure
    torch.testing.assert_close(exported(base, out.name), exported(base, "one"), rtol=0, atol=1e-5)
