"""The loss means what transformers' loss means, and packing does not change it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training import column, events, records, run, write_checkpoint, write_dataset, write_job

from megatron_ext.config import TrainConfig
from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.idxmap import Idxmap, IdxmapWriter
from megatron_ext.data.samples import Samples
from megatron_ext.training.plan import make_plan

LENGTHS = [3, 64, 17, 31, 64, 5, 22, 9, 90, 40, 2, 13]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loss")
    checkpoint = write_checkpoint(folder / "base", "qwen2")
    write_dataset(folder / "data", checkpoint, LENGTHS)
    return folder


def train_on_all(base: Path, name: str, packing: bool, alignment: int = 16) -> Path:
    """Three steps, each on every sample of the dataset once."""
    settings = {"packing": packing, "seq_length": 64, "train_iters": 3, "lr_warmup_iters": 0}
    settings |= {"pack_alignment": alignment}
    plan = make_plan(TrainConfig(**settings, global_batch_size=1, lr=1e-3), base / "data")
    settings["global_batch_size"] = len(plan.packing)
    run(write_job(base / name, base / "base" / "checkpoint", base / "data", settings))
    return base / name


def transformers_loss(base: Path) -> float:
    """Mean loss of the trained tokens of all samples."""
    mask, means = Idxmap(base / "data" / "loss_mask"), transformers_means(base)
    counts = {n: int(mask[n][1:64].sum()) for n in means}
    return sum(means[n] * counts[n] for n in means) / sum(counts.values())


def transformers_means(base: Path) -> dict[int, float]:
    """Mean loss of each sample's trained tokens, cut to 64 tokens, each alone, labels masked with -100."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base / "base" / "hf").eval()
    tokens, mask = Idxmap(base / "data" / "tokens"), Idxmap(base / "data" / "loss_mask")
    means = {}
    for n in range(len(tokens)):
        ids = torch.from_numpy(tokens[n][:64].astype(np.int64))[None]
        kept = torch.from_numpy(mask[n][:64].astype(bool))[None]
        labels = ids.masked_fill(~kept, -100)
        if kept[:, 1:].any():
            with torch.no_grad():
                means[n] = model(ids, labels=labels).loss.item()
    return means


def test_loss_of_masked_labels_equals_transformers_and_packing_changes_nothing(base: Path) -> None:
    packed, separate = train_on_all(base, "packed", True, 1), train_on_all(base, "separate", False, 1)
    assert column(packed, "loss")[0] == pytest.approx(transformers_loss(base), abs=1e-5)
    assert column(packed, "loss") == pytest.approx(column(separate, "loss"), abs=1e-6)
    assert column(packed, "grad_norm") == pytest.approx(column(separate, "grad_norm"), rel=1e-6)
    for name in ("tokens", "trained_tokens"):
        assert column(packed, name) == column(separate, name)
    assert [sorted(r["sample_ids"]) for r in records(packed)] == [sorted(r["sample_ids"]) for r in records(separate)]
    assert column(packed, "padding")[0] < 0.2 < 0.5 < column(separate, "padding")[0]


@pytest.mark.parametrize(
    "packing", [pytest.param(True, id="packed"), pytest.param(False, id="separate", marks=pytest.mark.slow)]
)
def test_the_loss_by_sequence_is_the_mean_of_the_samples_means(base: Path, packing: bool) -> None:
    settings = {"packing": packing, "loss_normalization": "sequence", "train_iters": 3, "lr_warmup_iters": 0}
    settings["global_batch_size"] = 4 if packing else 8
    found = {}
    for micro in (1, 4):
        found[micro] = base / f"sequence-{packing}-{micro}"
        job = write_job(
            found[micro], base / "base" / "checkpoint", base / "data", settings, {"micro_batch_size": micro}
        )
        run(job)
    means = transformers_means(base)
    first = records(found[1])[0]["sample_ids"]
    assert len(first) > 4
    assert column(found[1], "loss")[0] == pytest.approx(np.mean([means[n] for n in first]), abs=1e-5)
    assert column(found[4], "loss") == pytest.approx(column(found[1], "loss"), abs=1e-5)
    assert column(found[4], "grad_norm") == pytest.approx(column(found[1], "grad_norm"), rel=1e-5)


def test_alignment_moves_samples_apart_and_changes_nothing(base: Path) -> None:
    tight, loose = train_on_all(base, "tight", True, 1), train_on_all(base, "loose", True, 16)
    assert len(records(loose)[0]["sample_ids"]) == len(records(tight)[0]["sample_ids"])
    assert column(loose, "padding")[0] > column(tight, "padding")[0]
    for name, close in (("loss", 1e-6), ("grad_norm", 1e-6)):
        assert column(loose, name) == pytest.approx(column(tight, name), rel=close)
    for name in ("tokens", "trained_tokens"):
        assert column(loose, name) == column(tight, name)


def test_a_megatron_pair_is_trained_on_as_it_is_every_token_with_transformers_loss(base: Path) -> None:
    import torch
    import transformers

    draw, prefix = np.random.default_rng(5), base / "corpus_text_document"
    with IdxmapWriter(prefix, np.uint16) as writer:
        writer.add(draw.integers(0, 400, 400), np.asarray([150, 30, 220]))
    windows = make_plan(TrainConfig(seq_length=64, global_batch_size=1, train_iters=1, lr=1e-3, seed=7), prefix)
    settings = {"train_iters": 2, "lr_warmup_iters": 0, "global_batch_size": len(windows.packing)}
    run(write_job(base / "text", base / "base" / "checkpoint", prefix, settings))

    model = transformers.AutoModelForCausalLM.from_pretrained(base / "base" / "hf").eval()
    samples, losses = Samples(open_dataset(prefix), windows.stream), []
    for number in range(6):
        ids = torch.from_numpy(samples.read(number, 65).tokens.astype(np.int64))[None]
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert column(base / "text", "loss")[0] == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert column(base / "text", "trained_tokens") == [6 * 64, 6 * 64]
    assert column(base / "text", "padding") == [0, 0]


def test_a_loss_that_is_not_a_number_stops_the_training_and_names_step_samples_and_checkpoint(base: Path) -> None:
    settings = {"lr": 1e30, "clip_grad": 0.0, "lr_warmup_iters": 0, "train_iters": 5}
    job = write_job(base / "diverged", base / "base" / "checkpoint", base / "data", settings)
    (error,) = [e for e in run(job, expect=1) if e["event"] == "error"]
    assert error["type"] == "TrainingDivergedError"
    assert error["exit_code"] == 1
    assert "of step 2 is nan" in error["message"] or "of step 2 is inf" in error["message"]
    assert "last good checkpoint: none" in error["message"]
    plan = make_plan(TrainConfig(global_batch_size=4, lr=1e-3, seq_length=64, train_iters=5, seed=7), base / "data")
    assert ", ".join(map(str, plan.sample_ids(1))) in error["message"]
    assert not any(e["event"] == "result" for e in events(job))
