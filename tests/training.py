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
    draw, vocab_size = np.random.default_rng(seed), _facts(checkpoint)["vocab_size"]
    tokens = draw.integers(0, vocab_size, sum(lengths))
    mask = draw.random(sum(lengths)) < 0.5
    mask[np.cumsum(lengths) - 1] = True
    sides = {"": (tokens, mask, lengths)}
    return _write_dataset(folder, checkpoint, "chat", sides, {"seed": seed, **manifest})


def write_text(folder: Path, checkpoint: Path, lengths: list[int], seed: int = 0) -> Path:
    """Random text documents of ``lengths`` tokens."""
    tokens = np.random.default_rng(seed).integers(0, _facts(checkpoint)["vocab_size"], sum(lengths))
    return _write_dataset(folder, checkpoint, "text", {"": (tokens, None, lengths)}, {"seed": seed})


def write_preferences(folder: Path, checkpoint: Path, count: int, seed: int = 0) -> Path:
    """Random pairs of answers to random prompts of 5 to 19 tokens; answers of 3 to 14."""
    draw, vocab_size = np.random.default_rng(seed), _facts(checkpoint)["vocab_size"]
    prompts = [draw.integers(0, vocab_size, n) for n in draw.integers(5, 20, count)]
    sides = {}
    for side in ("chosen_", "rejected_"):
        answers = [draw.integers(0, vocab_size, n) for n in draw.integers(3, 15, count)]
        tokens = [np.concatenate(both) for both in zip(prompts, answers, strict=True)]
        masks = [np.repeat([0, 1], [len(p), len(a)]) for p, a in zip(prompts, answers, strict=True)]
        sides[side] = np.concatenate(tokens), np.concatenate(masks), [len(t) for t in tokens]
    return _write_dataset(folder, checkpoint, "preference", sides, {"seed": seed})


def _facts(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "manifest.json").read_text())


def _write_dataset(folder: Path, checkpoint: Path, kind: str, sides: dict[str, Any], manifest: dict[str, Any]) -> Path:
    from megatron_ext.data.idxmap import IdxmapWriter

    folder.mkdir(parents=True)
    of_model = _facts(checkpoint)
    for side, (tokens, mask, lengths) in sides.items():
        for name, values, dtype in (("tokens", tokens, np.uint16), ("loss_mask", mask, np.uint8)):
            if values is not None:
                with IdxmapWriter(folder / f"{side}{name}", dtype) as writer:
                    writer.add(values.astype(dtype), np.asarray(lengths))
    first, mask, lengths = next(iter(sides.values()))
    facts = {
        "format": "megatron-flows/dataset", "version": 1, "kind": kind, "documents": len(lengths),
        "tokens": len(first), "trained_tokens": int(len(first) if mask is None else mask.sum()),
        "vocab_size": of_model["vocab_size"], "max_token_id": max(int(t.max()) for t, _, _ in sides.values()),
        "tokenizer_digest": of_model["tokenizer_digest"],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(facts | manifest))
    return folder


def write_job(
    out: Path, checkpoint: Path, dataset: Path, train: dict | None = None, runtime: dict | None = None, **inputs: Path
) -> Path:
    """The job file of a training into ``out``; it lies beside ``out``, as do its events."""
    out.mkdir(parents=True, exist_ok=True)
    job = {
        "job": "train", "config": TRAIN | (train or {}), "runtime": RUNTIME | (runtime or {}), "out": str(out),
        "inputs": {role: str(path) for role, path in {"checkpoint": checkpoint, "dataset": dataset, **inputs}.items()},
        "events": f"{out}.events.jsonl",
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
