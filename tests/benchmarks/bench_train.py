"""Speed of the training loop beside a plain transformers + AdamW loop with SDPA attention, on this machine's CPU.

Run: ``make bench-train`` (or ``python tests/benchmarks/bench_train.py --help``). A Llama of 10 million parameters in
fp32; four sequences a step, ours and the text side at micro batch 1. Every side is a process of its own that trains one
optimizer step when it is told to; they take turns step by step, so that a busy machine is busy for all, and are started
afresh several times, because two processes of one program differ by some percent for as long as they live. The table
shows medians of steps, of the ratios of each turn, and ratios over all turns, by the clock and by CPU time, which a
busy machine hardly changes. Ours is the whole loop as ``mflow train`` runs it, its diary written every step; its
overhead is everything but forward, backward and the optimizer's step, reading batches included. Useful tokens are those
that are not padding. Chats are those of alpaca_en_demo.json in the folder that MFLOW_REAL_DATA names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

MODEL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
TRAIN = {"lr": 1e-4, "lr_warmup_iters": 0, "precision": "fp32", "train_iters": 100_000, "seed": 1}
SIDES: dict[str, dict[str, Any]] = {
    "ours, text": {"ours": True, "data": "text", "seq_length": 512, "batch": 4, "micro": 1},
    "transformers, text": {"ours": False, "data": "text", "seq_length": 512, "batch": 4, "micro": 1},
    "ours, chats packed": {"ours": True, "data": "chats", "seq_length": 1024, "batch": 4, "micro": 1},
    "transformers, chats padded to 1024": {
        "ours": False, "data": "chats", "seq_length": 1024, "batch": 4, "micro": 4, "pad": 1024
    },
    "transformers, chats padded to the longest of 4": {
        "ours": False, "data": "chats", "seq_length": 1024, "batch": 4, "micro": 4, "pad": None
    },
}  # fmt: skip
PAIRS = (
    ("ours, text", "transformers, text", 1.0),
    ("ours, chats packed", "transformers, chats padded to 1024", 2.0),
    ("ours, chats packed", "transformers, chats padded to the longest of 4", 1.0),
)
MOST_OVERHEAD = 0.03
MISSED: list[str] = []
"""Targets that were missed; any makes the exit code 1."""


def prepare(folder: Path, chats: Path | None) -> None:
    """Model, checkpoint and both datasets in ``folder``."""
    from tiny import write_tokenizer
    from training import write_checkpoint, write_text

    from megatron_ext.data.tokenization import tokenize
    from megatron_ext.events import Events

    checkpoint = write_checkpoint(folder, "llama", **MODEL)
    write_text(folder / "text", checkpoint, [2000] * 300)
    if chats:
        rows = [" ".join(map(str, row.values())) for row in json.loads(chats.read_text(encoding="utf-8"))]
        write_tokenizer(folder / "tokenizer", MODEL["vocab_size"], rows)
        (folder / "chats").mkdir()
        tokenize([chats], folder / "tokenizer", folder / "chats", events=Events())
        manifest = checkpoint / "manifest.json"
        facts = json.loads((folder / "chats" / "manifest.json").read_text())
        known = json.loads(manifest.read_text()) | {"tokenizer_digest": facts["tokenizer_digest"]}
        manifest.write_text(json.dumps(known))
        text = folder / "text" / "manifest.json"
        text.write_text(json.dumps(json.loads(text.read_text()) | {"tokenizer_digest": facts["tokenizer_digest"]}))


def wait() -> None:
    """Until the parent says that it is this side's turn; its end is ours."""
    if not sys.stdin.readline():
        os._exit(0)


def answer(**values: float) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def ours(folder: Path, side: dict[str, Any], threads: int) -> None:
    """The loop itself, held at the start of every step; times are those from one hold to the next."""
    from training import write_job

    train = TRAIN | {"seq_length": side["seq_length"], "global_batch_size": side["batch"]}
    runtime = {
        "num_threads": threads,
        "micro_batch_size": side["micro"],
        "save_interval": 10**6,
        "eval_interval": 10**6,
    }
    path = write_job(
        folder / "run" / f"{side['data']} {os.getpid()}",
        folder / "checkpoint",
        folder / side["data"],
        train,
        runtime | {"log_interval": 1},
    )
    from megatron_ext.events import Events
    from megatron_ext.training.job import run
    from megatron_ext.training.parallel import parallel_state
    from megatron_ext.training.setup import prepare as read
    from megatron_ext.worker import Job

    job = Job.model_validate_json(path.read_text())
    setup = read(job)
    with parallel_state(setup.runtime, setup.train, threads):
        pass  # megatron-core can be imported now
    from megatron_ext.training import batches, metrics, steps

    spent = {"forward, backward": 0.0, "batches": 0.0, "update": 0.0}
    held: list[float] = []
    busy: list[float] = []

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **named)
            spent[name] += time.perf_counter() - began
            return result

        return call

    start, init = metrics.Diary.start_step, steps.Trainer.__init__

    def start_step(diary: Any) -> None:
        if held:
            seconds = time.perf_counter() - held.pop()
            computed = spent["forward, backward"] - spent["batches"] + spent["update"]
            answer(
                seconds=seconds,
                cpu=time.process_time() - busy.pop(),
                tokens=diary._last["tokens"],
                overhead=1 - computed / seconds,
                **spent,
            )
        wait()
        spent.update(dict.fromkeys(spent, 0.0))
        held.append(time.perf_counter())
        busy.append(time.process_time())
        start(diary)

    def build(trainer: Any, *arguments: Any, **named: Any) -> None:
        init(trainer, *arguments, **named)
        trainer._schedule = timed("forward, backward", trainer._schedule)
        trainer.state.optimizer.step = timed("update", trainer.state.optimizer.step)

    metrics.Diary.start_step, steps.Trainer.__init__ = start_step, build
    batches.Batches.of = timed("batches", batches.Batches.of)
    with Events(job.events) as events:
        run(job, events)


def plain(folder: Path, side: dict[str, Any], threads: int) -> None:
    """transformers, torch's fused AdamW and clipping; the samples of the dataset in a random order."""
    import numpy as np
    import torch
    import transformers

    from megatron_ext.data.idxmap import Idxmap

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN["lr"], weight_decay=0.1, fused=True)
    tokens = Idxmap(folder / side["data"] / "tokens")
    mask = Idxmap(folder / side["data"] / "loss_mask") if side["data"] == "chats" else None
    length, draw, micros = side["seq_length"], np.random.default_rng(1), side["batch"] // side["micro"]
    while True:
        wait()
        began, busy, useful = time.perf_counter(), time.process_time(), 0
        for _ in range(micros):
            numbers = draw.integers(0, len(tokens), side["micro"]).tolist()
            rows = [np.asarray(tokens[n][: length + (mask is None)]).astype(np.int64) for n in numbers]
            width = side.get("pad") or max(map(len, rows))
            ids, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), -100)
            for row, (n, values) in enumerate(zip(numbers, rows, strict=True)):
                ids[row, : len(values)] = values
                kept = np.ones(len(values), bool) if mask is None else mask[n][: len(values)].astype(bool)
                labels[row, : len(values)] = np.where(kept, values, -100)
            whole = all(len(values) == width for values in rows)
            attention = (
                None if whole else torch.from_numpy(np.stack([np.arange(width) < len(v) for v in rows]).astype(int))
            )
            useful += sum(len(values) - 1 for values in rows)
            inputs, wanted = torch.from_numpy(ids), torch.from_numpy(labels)
            if mask is None:
                inputs, wanted = inputs[:, :-1], wanted[:, 1:]
            logits = model(inputs, attention_mask=attention, use_cache=False).logits
            if mask is not None:
                logits, wanted = logits[:, :-1], wanted[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
            (loss / micros).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        answer(seconds=time.perf_counter() - began, cpu=time.process_time() - busy, tokens=useful)


def turns(folder: Path, names: list[str], rounds: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """What each side measured in each of ``rounds`` turns, after two that do not count."""
    command = [sys.executable, __file__, "--folder", str(folder), "--threads", str(threads), "--side"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    sides = {}
    for name in names:
        with (folder / f"{name}.log").open("w") as log:
            sides[name] = subprocess.Popen([*command, name], stderr=log, **pipes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name, side in sides.items():
            side.stdin.write("go\n")
            side.stdin.flush()
            line = side.stdout.readline()
            while line and not line.startswith("{"):
                line = side.stdout.readline()
            if not line:
                raise SystemExit(f"{name} ended:\n{(folder / f'{name}.log').read_text()[-3000:]}")
            if turn > 1:
                found[name].append(json.loads(line))
    for side in sides.values():
        side.stdin.close()
        side.wait(timeout=60)
    return found


def machine(threads: int) -> str:
    """This machine in a line, and how busy it is."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    import torch

    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, {threads} thread(s) a side, load {load}; {versions}"


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown."""

    def speed(step: dict[str, float]) -> float:
        return step["tokens"] / step["seconds"]

    lines = ["| loop | useful tokens/s | tokens a step | overhead of the loop |", "|---|---|---|---|"]
    for name, steps in found.items():
        overhead = f"{statistics.median(s['overhead'] for s in steps):.1%}" if "overhead" in steps[0] else ""
        tokens = statistics.median(s["tokens"] for s in steps)
        lines.append(f"| {name} | {statistics.median(map(speed, steps)):.0f} | {tokens:.0f} | {overhead} |")
        if overhead and (share := statistics.median(s["overhead"] for s in steps)) > MOST_OVERHEAD:
            MISSED.append(f"{name}: the loop takes {share:.1%} of a step, the target is {MOST_OVERHEAD:.0%}")
    lines += [
        "",
        "| ratio of useful tokens/s | median turn | in all | in all, a CPU second | target |",
        "|---|---|---|---|---|",
    ]
    for one, other, target in PAIRS:
        if one in found and other in found:
            ratios = [speed(a) / speed(b) for a, b in zip(found[one], found[other], strict=True)]
            whole, cpu = (
                sum(s["tokens"] for s in found[one]) / sum(s[clock] for s in found[one])
                / (sum(s["tokens"] for s in found[other]) / sum(s[clock] for s in found[other]))
                for clock in ("seconds", "cpu")
            )  # fmt: skip
            median = statistics.median(ratios)
            lines.append(f"| {one} / {other} | {median:.2f}x | {whole:.2f}x | {cpu:.2f}x | {target}x |")
            if whole < target:
                MISSED.append(f"{one} / {other}: {whole:.3f}x in all, the target is {target}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4, help="times that every side is started")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, each time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = SIDES[arguments.side]
        (ours if side["ours"] else plain)(arguments.folder, side, arguments.threads)
        return
    chats = Path(os.environ.get("MFLOW_REAL_DATA", "")) / "alpaca_en_demo.json"
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), chats if chats.exists() else None)
        sys.stdout.write(machine(arguments.threads) + "\n")
        for data in ("text", "chats") if chats.exists() else ("text",):
            names = [side for side, values in SIDES.items() if values["data"] == data]
            found: dict[str, list[dict[str, float]]] = {side: [] for side in names}
            for _ in range(arguments.starts):
                for side, steps in turns(Path(name), names, arguments.rounds, arguments.threads).items():
                    found[side] += steps
            sys.stdout.write(f"\n{table(found)}\n")
            sys.stdout.flush()
    if not chats.exists():
        sys.stdout.write("\nchats were not measured: MFLOW_REAL_DATA names no folder with alpaca_en_demo.json\n")
    if MISSED:
        sys.exit("targets missed:\n" + "\n".join(f"- {one}" for one in MISSED))


if __name__ == "__main__":
    main()
