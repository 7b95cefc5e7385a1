"""Tensor, pipeline and data parallelism compute what one process computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import column, run, write_checkpoint, write_dataset, write_job, write_text

from megatron_ext.events import Events
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import read_manifest, write_latest

TP2 = {"nproc_per_node": 2, "tensor_model_parallel_size": 2}
PP2 = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
DP2 = {"nproc_per_node": 2}
CP2 = {"nproc_per_node": 2, "context_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary of 511 does not divide by two, 60 samples, and the training of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    checkpoint = write_checkpoint(folder / "base", vocab_size=511)
    write_dataset(folder / "data", checkpoint, np.random.default_rng(1).integers(5, 70, 60).tolist())
    run(write_job(folder / "one", checkpoint, folder / "data", runtime={"make_vocab_size_divisible_by": 1}))
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
def test_tensor_and_sequence_parallel_ranks_equal_one_process(base: Path, tmp_path: Path) -> None:
    """The second rank holds nothing but padding of the vocabulary."""
    out = trained(base, "tp2sp", {**TP2, "sequence_parallel": True, "make_vocab_size_divisible_by": 512})
    assert_same(base / "one", out)
    assert read_manifest(out).padded_vocab_size == 1024
    assert read_manifest(base / "one").padded_vocab_size == 511
    assert_same_export(base, "one", "tp2sp", tmp_path)


def test_padding_of_the_vocabulary_changes_nothing(base: Path, tmp_path: Path) -> None:
    out = trained(base, "padded", {"make_vocab_size_divisible_by": 300})
    assert_same(base / "one", out, tolerance=1e-6)
    assert read_manifest(out).padded_vocab_size == 600
    assert_same_export(base, "one", "padded", tmp_path)


def assert_same_export(base: Path, name: str, other: str, tmp: Path) -> None:
    """The rows of the source's vocabulary, none of the padding, and the same weights after training."""
    for each in (name, other):
        (tmp / each).mkdir()
        export(base / each, base / "base" / "hf", tmp / each, dtype=None, events=Events())
    one, two = (load_file(tmp / each / "model.safetensors") for each in (name, other))
    assert {key: tuple(t.shape) for key, t in one.items()} == {key: tuple(t.shape) for key, t in two.items()}
    assert len(one["model.embed_tokens.weight"]) == len(one["lm_head.weight"]) == 511
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.distributed
def test_pipeline_stages_equal_one_process(base: Path) -> None:
    assert_same(base / "one", trained(base, "pp2", PP2))


@pytest.mark.distributed
def test_data_parallel_ranks_with_sharded_optimizer_equal_one_process(base: Path) -> None:
    assert_same(base / "one", trained(base, "dp2", DP2))


@pytest.mark.distributed
def test_interleaved_pipeline_stages_equal_one_process(base: Path) -> None:
    assert_same(base / "one", trained(base, "vpp2", VPP2))


@pytest.mark.distributed
def test_ranks_that_share_the_context_equal_one_process(base: Path) -> None:
    checkpoint = base / "base" / "checkpoint"
    text = write_text(base / "text", checkpoint, np.random.default_rng(2).integers(20, 200, 50).tolist())
    for name, runtime in (("text-one", {}), ("text-cp2", CP2)):
        run(write_job(base / name, checkpoint, text, runtime=runtime))
    assert_same(base / "text-one", base / "text-cp2")
    padded = {"packing": False}
    assert_same(trained(base, "padded-one", {}, padded), trained(base, "padded-cp2", CP2, padded))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "runtime"), [("from-tp2", TP2), pytest.param("from-dp2", DP2, marks=pytest.mark.slow)]
)
def test_a_training_goes_on_as_one_process(base: Path, name: str, runtime: dict) -> None:
    trained(base, name, {**runtime, "save_interval": 2, "keep_every": 2})
    out = Path(shutil.copytree(base / name, base / f"{name}-on", ignore=shutil.ignore_patterns("iter_0000004")))
    write_latest(out, 2)
    state = json.loads((out / "training_state.json").read_text())
    (out / "training_state.json").write_text(json.dumps(state | {"summary": None}))
    events = run(write_job(out, base / "base" / "checkpoint", base / "data"))
    assert any("resumed after step 2" in event.get("text", "") for event in events)
    assert_same(base / "one", out)


def test_recomputation_changes_no_digit(base: Path) -> None:
    ways = {
        "selective": {"recompute_granularity": "selective"},
        "uniform": {"recompute_granularity": "full", "recompute_num_layers": 2},
        "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    }
    for name, runtime in ways.items():
        assert_same(base / "one", trained(base, name, runtime), tolerance=0)


def test_fp16_finds_its_loss_scale_and_follows_fp32(base: Path) -> None:
    out = trained(base, "fp16", {}, {"precision": "fp16", "initial_loss_scale": 2.0**14, "train_iters": 8})
    assert column(out, "skipped")[0] == 1.0
    assert column(out, "loss_scale")[0] > column(out, "loss_scale")[-1]
    assert column(out, "skipped")[-1] == 0.0
    assert column(out, "loss")[0] == pytest.approx(column(base / "one", "loss")[0], abs=1e-3)


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
