"""Real trainings for tests: a tiny base checkpoint, a chat dataset, and the worker as a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tiny import write_model

TRAIN = {
    "seq_length": 64, "global_batch_size": 4, "train_iters": 4, "lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 1,
    "precision": "fp32", "seed": 7,
}  # fmt: skip
RUNTIME = {"platform": "cpu", "num_threads": 1, "log_interval": 1}


def write_checkpoint(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A converted tiny model in ``folder/checkpoint``; its Hugging Face source is ``folder/hf``."""
    from megatron_ext.events import Events
    from megatron_ext.weights.convert import convert

    write_model(folder / "hf", model_type, **overrides)
    (folder / "checkpoint").mkdir()
    convert(folder / "hf", folder / "checkpoint", dtype=None, events=Events())
    return folder / "checkpoint"


def write_dataset(folder: Path, checkpoint: Path, lengths: list[int], seed: int = 0, **manifest: Any) -> Path:
    """Random chat samples of ``lengths`` tokens, of which about half are trained."""
    from megatron_ext.data.idxmap import IdxmapWriter

    folder.mkdir(parents=True)
    of_model = json.loads((checkpoint / "manifest.json").read_text())
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, of_model["vocab_size"], sum(lengths))
    mask = draw.random(sum(lengths)) < 0.5
    mask[np.cumsum(lengths) - 1] = True
    for name, values, dtype in (("tokens", tokens, np.uint16), ("loss_mask", mask, np.uint8)):
        with IdxmapWriter(folder / name, dtype) as writer:
            writer.add(values.astype(dtype), np.asarray(lengths))
    facts = {
        "format": "megatron-flows/dataset", "version": 1, "kind": "chat", "documents": len(lengths),
        "tokens": sum(lengths), "trained_tokens": int(mask.sum()), "vocab_size": of_model["vocab_size"],
        "max_token_id": int(tokens.max()), "tokenizer_digest": of_model["tokenizer_digest"], "seed": seed,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(facts | manifest))
    return folder


def write_job(
    out: Path, checkpoint: Path, dataset: Path, train: dict | None = None, runtime: dict | None = None
) -> Path:
    """The job file of a training into ``out``; it lies beside ``out``, as do its events."""
    out.mkdir(parents=True, exist_ok=True)
    job = {
        "job": "train", "config": TRAIN | (train or {}), "runtime": RUNTIME | (runtime or {}), "out": str(out),
        "inputs": {"checkpoint": str(checkpoint), "dataset": str(dataset)}, "events": f"{out}.events.jsonl",
    }  # fmt: skip
    path = Path(f"{out}.job.json")
    path.write_text(json.dumps(job))
    return path


def start(job: Path, **environment: str) -> subprocess.Popen:
    """The worker on ``job``, its log beside it."""
    command = [sys.executable, "-m", "megatron_ext.worker", str(job)]
    with Path(f"{job}.log").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )


def run(job: Path, expect: int = 0) -> list[dict]:
    """Run the worker on ``job`` to its end; the events of ``expect``ed exit code."""
    code = start(job).wait()
    assert code == expect, f"exit code {code}, log:\n{Path(f'{job}.log').read_text()[-3000:]}"
    return events(job)


def events(job: Path) -> list[dict]:
    path = Path(json.loads(job.read_text())["events"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def records(out: Path) -> list[dict]:
    """metrics.jsonl of a training folder."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def column(out: Path, name: str) -> list[float]:
    return [record[name] for record in records(out)]
