"""Tensor, pipeline and data parallelism compute what one process computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training import column, run, write_checkpoint, write_dataset, write_job

from megatron_ext.weights.manifest import read_manifest

TP2 = {"nproc_per_node": 2, "tensor_model_parallel_size": 2}
PP2 = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
DP2 = {"nproc_per_node": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary of 511 does not divide by two, 60 samples, and the training of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    checkpoint = write_checkpoint(folder / "base", vocab_size=511)
    write_dataset(folder / "data", checkpoint, np.random.default_rng(1).integers(5, 70, 60).tolist())
    run(write_job(folder / "one", checkpoint, folder / "data"))
    return folder


def trained(base: Path, name: str, runtime: dict, train: dict | None = None) -> Path:
    out = base / name
    run(write_job(out, base / "base" / "checkpoint", base / "data", train=train, runtime=runtime))
    return out


def assert_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    for name in ("loss", "grad_norm"):
        assert column(other, name) == pytest.approx(column(one, name), abs=tolerance), name
    assert column(other, "sample_ids") == column(one, "sample_ids")
    assert len(set(column(one, "loss"))) == 4, "the loss never moved"


@pytest.mark.distributed
def test_tensor_and_sequence_parallel_ranks_equal_one_process(base: Path) -> None:
    out = trained(base, "tp2sp", {**TP2, "sequence_parallel": True})
    assert_same(base / "one", out)
    assert read_manifest(out).padded_vocab_size == 512
    assert read_manifest(base / "one").padded_vocab_size == 511


@pytest.mark.distributed
def test_pipeline_stages_equal_one_process(base: Path) -> None:
    assert_same(base / "one", trained(base, "pp2", PP2))


@pytest.mark.distributed
def test_data_parallel_ranks_with_sharded_optimizer_equal_one_process(base: Path) -> None:
    assert_same(base / "one", trained(base, "dp2", DP2))


def test_micro_batch_size_does_not_change_the_result(base: Path) -> None:
    assert_same(base / "one", trained(base, "mbs4", {"micro_batch_size": 4}))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param(TP2, id="tp2"),
        pytest.param({**DP2, "use_distributed_optimizer": False}, id="dp2-whole-optimizer"),
        pytest.param({**DP2, "micro_batch_size": 2}, id="dp2-mbs2"),
        pytest.param({**TP2, "nproc_per_node": 4}, id="tp2-dp2"),
        pytest.param({**TP2, **PP2, "nproc_per_node": 4, "sequence_parallel": True}, id="tp2-pp2-sp"),
    ],
)
def test_every_layout_equals_one_process(base: Path, runtime: dict, request: pytest.FixtureRequest) -> None:
    assert_same(base / "one", trained(base, request.node.callspec.id, runtime))


@pytest.mark.slow
@pytest.mark.distributed
def test_bf16_layouts_agree_up_to_rounding(base: Path) -> None:
    one = trained(base, "bf16", {}, {"precision": "bf16"})
    assert_same(one, trained(base, "bf16-tp2", TP2, {"precision": "bf16"}), tolerance=0.05)
