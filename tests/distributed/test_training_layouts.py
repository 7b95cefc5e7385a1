"""Tensor, pipeline and data parallelism compute what one process computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model
from training import column, records, run, write_checkpoint, write_dataset, write_job, write_text

from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import read_manifest, write_latest

TP2 = {"nproc_per_node": 2, "tensor_model_parallel_size": 2}
PP2 = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
DP2 = {"nproc_per_node": 2}
CP2 = {"nproc_per_node": 2, "context_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
GATHER = {**DP2, "overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 10_000}
KEEP = {"save_interval": 2, "keep_every": 2}
WAYS = {
    "selective": {"recompute_granularity": "selective"},
    "uniform": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
}


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


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_share_the_context_of_padded_samples_equal_one_process(base: Path) -> None:
    padded = {"packing": False}
    assert_same(trained(base, "padded-one", {}, padded), trained(base, "padded-cp2", CP2, padded))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("from-tp2", TP2, {}),
        ("from-dp2-as-sharded", {**DP2, "optimizer_state": "as_sharded"}, {}),
        ("to-pp2", {}, PP2),
        pytest.param("from-dp2", DP2, {}, marks=pytest.mark.slow),
        pytest.param("from-pp2", PP2, {}, marks=pytest.mark.slow),
        pytest.param("from-vpp2", VPP2, {}, marks=pytest.mark.slow),
        pytest.param("to-tp2", {}, TP2, marks=pytest.mark.slow),
        pytest.param("to-dp2-as-sharded", {"optimizer_state": "as_sharded"}, DP2, marks=pytest.mark.slow),
        pytest.param("whole", *[{**DP2, "use_distributed_optimizer": False}] * 2, marks=pytest.mark.slow),
    ],
)
def test_a_training_goes_on_under_another_layout(base: Path, name: str, before: dict, after: dict) -> None:
    trained(base, name, before | KEEP)
    assert_same(base / "one", resumed(base, name, after))


def resumed(base: Path, name: str, runtime: dict) -> Path:
    """The training ``name``, done again from its state after step 2."""
    out = Path(shutil.copytree(base / name, base / f"{name}-on", ignore=shutil.ignore_patterns("iter_0000004")))
    write_latest(out, 2)
    state = json.loads((out / "training_state.json").read_text())
    (out / "training_state.json").write_text(json.dumps(state | {"summary": None}))
    events = run(write_job(out, base / "base" / "checkpoint", base / "data", runtime=runtime))
    assert any("resumed after step 2" in event.get("text", "") for event in events)
    return out


@pytest.mark.parametrize("way", ["selective", "block", pytest.param("uniform", marks=pytest.mark.slow)])
def test_recomputation_changes_no_digit(base: Path, way: str) -> None:
    assert_same(base / "one", trained(base, way, WAYS[way]), tolerance=0)


@pytest.mark.distributed
def test_overlapped_communication_in_several_buckets_changes_nothing_and_goes_on_from_its_state(base: Path) -> None:
    whole = trained(base, "gather", GATHER | KEEP)
    assert_same(base / "one", whole)
    assert_same(base / "one", resumed(base, "gather", GATHER | KEEP))


def test_fp16_finds_its_loss_scale_and_follows_fp32(base: Path) -> None:
    out = trained(base, "fp16", {}, {"precision": "fp16", "initial_loss_scale": 2.0**14, "train_iters": 8})
    assert column(out, "skipped")[0] == 1.0
    assert column(out, "loss_scale")[0] > column(out, "loss_scale")[-1]
    assert column(out, "skipped")[-1] == 0.0
    assert column(out, "loss")[0] == pytest.approx(column(base / "one", "loss")[0], abs=1e-3)
    assert ["grad_norm" in record for record in records(out)] == [s == 0 for s in column(out, "skipped")]


def test_fp16_that_overflows_at_the_smallest_scale_stops(base: Path) -> None:
    """The losses are finite, but the embedding is so small beside the last norm that its gradient is not."""
    hf, checkpoint, out = write_model(base / "steep"), base / "steep-checkpoint", base / "fp16-dead"
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"] *= 1e3
    weights["model.embed_tokens.weight"] *= 1e-4
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    checkpoint.mkdir()
    convert(hf, checkpoint, dtype=None, events=Events())
    data = write_dataset(base / "steep-data", checkpoint, [40] * 20)
    settings = {"precision": "fp16", "initial_loss_scale": 2.0, "train_iters": 30, "seq_length": 48}
    job = write_job(out, checkpoint, data, settings | {"global_batch_size": 1})
    (error,) = [e for e in run(job, expect=1) if e["event"] == "error"]
    assert error["type"] == "TrainingDivergedError"
    assert "overflow in fp16 at the smallest loss scale 1, as those of the 19 steps before" in error["message"]
    assert [record["loss_scale"] for record in records(out)] == [2.0] * 2 + [1.0] * 19
    assert set(column(out, "skipped")) == {1.0}


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
