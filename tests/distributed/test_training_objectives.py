"""Text, chats and preferences are trained by one engine; transformers judges what a pair's answers are worth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from training import (
    RUNTIME,
    TRAIN,
    column,
    events,
    records,
    run,
    write_checkpoint,
    write_job,
    write_preferences,
    write_text,
)

PP2 = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
PAIRS = {"train_iters": 6, "lr": 2e-3, "lr_warmup_iters": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 40 pairs, and the preference training of one process."""
    folder = tmp_path_factory.mktemp("objectives")
    checkpoint = write_checkpoint(folder / "base")
    write_preferences(folder / "pairs", checkpoint, 40)
    preferred(folder, "one")
    return folder


def preferred(base: Path, name: str, train: dict | None = None, runtime: dict | None = None, **inputs: Path) -> Path:
    checkpoint = base / "base" / "checkpoint"
    run(write_job(base / name, checkpoint, base / "pairs", PAIRS | (train or {}), runtime, **inputs))
    return base / name


def sides(dataset: Path) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    from megatron_ext.data.datasets import open_dataset

    found = open_dataset(dataset)
    return [(list(t), list(m)) for t, m in zip(found.tokens, found.loss_masks, strict=True)]


def test_the_reference_is_what_transformers_says_of_every_answer(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base / "base" / "hf", dtype=torch.float32).eval()
    expected = []
    for tokens, masks in sides(base / "pairs"):
        logps = []
        for document, mask in zip(tokens, masks, strict=True):
            ids = torch.from_numpy(document.astype(np.int64))[None]
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1)
            of_labels = scores.gather(1, ids[0, 1:, None])[:, 0]
            logps.append(float(of_labels[torch.from_numpy(mask[1:].astype(bool))].sum()))
        expected.append(logps)
    ours = np.load(base / "one" / "reference" / "logps.npy")
    assert ours.shape == (40, 2)
    np.testing.assert_allclose(ours, np.asarray(expected).T, atol=2e-4)


def test_preference_training_starts_at_log_two_and_learns_the_margin(base: Path) -> None:
    assert column(base / "one", "loss")[0] == pytest.approx(np.log(2), abs=1e-6)
    long = preferred(base, "long", {"train_iters": 40, "global_batch_size": 8})
    assert column(long, "loss")[-1] < 0.3
    assert column(long, "accuracy")[-1] == 1.0
    last = records(long)[-1]
    assert last["margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_reference_computes_as_the_training_does(base: Path, precision: str) -> None:
    """Before the first update a pair's margin is not almost nothing but nothing, in 16 bits too."""
    settings = {"precision": precision, "train_iters": 2, "initial_loss_scale": 256.0}
    out = preferred(base, precision, settings, {"micro_batch_size": 2})
    assert [column(out, name)[0] for name in ("margin", "reward_chosen", "reward_rejected")] == [0, 0, 0]
    assert column(out, "margin")[1] != 0


@pytest.mark.slow
@pytest.mark.distributed
def test_preferences_under_pipeline_stages_equal_one_process_with_the_reference_made_before(base: Path) -> None:
    """The reference is a job of its own there, as the flow has it."""
    checkpoint, out = base / "base" / "checkpoint", base / "reference"
    job = write_job(out, checkpoint, base / "pairs", PAIRS, PP2)
    job.write_text(json.dumps(json.loads(job.read_text()) | {"job": "reference"}))
    run(job)
    np.testing.assert_allclose(np.load(out / "logps.npy"), np.load(base / "one" / "reference" / "logps.npy"), atol=1e-4)
    two = preferred(base, "pp2", runtime=PP2, reference=out)
    assert not (two / "reference").exists()
    for name in ("loss", "grad_norm", "margin", "logps_chosen"):
        assert column(two, name) == pytest.approx(column(base / "one", name), abs=2e-4), name


def test_a_reference_of_another_model_is_refused(base: Path) -> None:
    other = write_checkpoint(base / "other", seed=5)
    refused = write_job(base / "mixed", other, base / "pairs", PAIRS, reference=base / "one" / "reference")
    run(refused, expect=2)
    (error,) = [e for e in events(refused) if e["event"] == "error"]
    assert error["type"] == "CheckpointError"
    assert "another checkpoint" in error["message"]


def test_text_is_trained_in_whole_windows_and_validated_on_what_is_held_out(base: Path) -> None:
    checkpoint = base / "base" / "checkpoint"
    text = write_text(base / "text", checkpoint, np.random.default_rng(2).integers(20, 200, 60).tolist())
    run(write_job(base / "windows", checkpoint, text, {"validation_fraction": 0.3}, {"eval_interval": 2}))
    assert set(column(base / "windows", "padding")) == {0.0}
    assert column(base / "windows", "tokens") == [TRAIN["seq_length"] * TRAIN["global_batch_size"]] * 4
    lines = [json.loads(line) for line in (base / "windows" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(6 < line["loss"] < 7 for line in lines)
    own = write_text(base / "own", checkpoint, [300, 100], seed=9)
    run(write_job(base / "validated", checkpoint, text, runtime={"micro_batch_size": 2}, validation=own))
    assert len((base / "validated" / "validation.jsonl").read_text().splitlines()) == 1


def test_the_planned_learning_rates_are_shown_before_the_first_step(base: Path) -> None:
    seen = events(Path(f"{base / 'one'}.job.json"))
    kinds = [event["event"] for event in seen]
    assert kinds.index("schedule") < kinds.index("metrics")
    (points,) = [event["points"] for event in seen if event["event"] == "schedule"]
    assert dict((step, pytest.approx(lr)) for step, lr in points)[1] == records(base / "one")[0]["lr"]
    assert RUNTIME["log_interval"] == 1
    assert [lr for _, lr in points] == pytest.approx(column(base / "one", "lr"))
