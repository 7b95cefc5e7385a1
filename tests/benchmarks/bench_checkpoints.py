"""Speed and memory of convert and export beside ``cp`` + fsync of the same bytes on the same disk.

Run: ``make bench-checkpoints`` (or ``python tests/benchmarks/bench_checkpoints.py --help``). Random bf16 weights in the
shape of Qwen2.5-1.5B are written to a temporary folder and stay in the page cache. Every measurement is a process of
its own: speed and CPU seconds are those of the stage (from reading config.json to the last fsync), the wall column is
the whole process with its imports. A ``cp`` + fsync runs right before each, and each ratio is to that one; medians of
all rounds. Anonymous memory is the peak of RssAnon of the whole process, and is taken on a 7B-shaped model too.

Both sides begin right after as much memory as they will fill was touched and freed (``machine.warm`` says why). The
exit code is 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from machine import described, warm

if TYPE_CHECKING:
    import torch

SHAPES = {
    "tiny": {"layers": 2, "hidden": 1536, "ffn": 8960, "heads": 12, "groups": 2, "vocabulary": 65536, "tied": True},
    "1.5B": {"layers": 28, "hidden": 1536, "ffn": 8960, "heads": 12, "groups": 2, "vocabulary": 151936, "tied": True},
    "7B": {"layers": 28, "hidden": 3584, "ffn": 18944, "heads": 28, "groups": 4, "vocabulary": 152064, "tied": False},
}
SHARD_BYTES = 4_000_000_000
WARM_BYTES = 4 << 30
GOALS = {"convert --verify none": 0.7, "convert --verify digest": 0.4, "export": 0.7}
"""Least ratio to cp."""
STAGE = """
import json, sys, time
from pathlib import Path
stage, model, checkpoint, out, verify = sys.argv[1:]
from megatron_ext.events import Events
from megatron_ext.folders import fsync_tree
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
print("ready", flush=True)
sys.stdin.readline()
imported, used = time.monotonic(), time.process_time()
Path(out).mkdir()
if stage == "convert":
    convert(Path(model), Path(out), dtype=None, events=Events(), verify=verify)
else:
    export(Path(checkpoint), Path(model), Path(out), dtype=None, events=Events())
fsync_tree(Path(out))
print(json.dumps({"seconds": time.monotonic() - imported, "cpu": time.process_time() - used}))
"""


@dataclass
class Series:
    """What was measured of one command, round by round; bytes and seconds."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="1.5B", help="of the model whose speed is measured")
    parser.add_argument("--without-7b", action="store_true", help="leave out the 7B-shaped model (needs 32 GB of disk)")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-checkpoints-") as name:
        place = Path(name)
        say(described(place))
        table, missed = speed_table(place, options.shape, options.rounds)
        say(table)
        if not options.without_7b:
            say(memory_table(place))
    if missed:
        sys.exit(f"below the goal: {', '.join(missed)}")


def say(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def speed_table(place: Path, shape: str, rounds: int) -> tuple[str, list[str]]:
    """Every command beside cp, in rounds; the table, and what missed its goal."""
    model = write_model(place / "model", **SHAPES[shape])
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    Stage("convert", model, place / "checkpoint").measured()  # what export reads; and the model is in the page cache
    copy(model, place / "copy")
    commands = {
        "convert --verify none": ("convert", "none"),
        "convert --verify digest": ("convert", "digest"),
        "export": ("export", "none"),
    }
    series = {name: Series() for name in ("cp + fsync", *commands)}
    for _ in range(rounds):
        for name, (stage, verify) in commands.items():
            waiting = Stage(stage, model, place / "out", place / "checkpoint", verify)
            copied, cpu = copy(model, place / "copy")
            series["cp + fsync"].rates.append(size / copied)
            series["cp + fsync"].cpu.append(cpu)
            found = waiting.measured()
            shutil.rmtree(place / "out")
            series[name].rates.append(size / found["seconds"])
            series[name].ratios.append(copied / found["seconds"])
            series[name].cpu.append(found["cpu"])
            series[name].walls.append(found["wall"])
            series[name].anonymous.append(found["anonymous"])
    shutil.rmtree(place / "checkpoint")
    shutil.rmtree(model)
    rows = [f"| {name} | {_columns(values)} |" for name, values in series.items()]
    head = f"Qwen2.5-{shape} shape, {size / 1e9:.2f} GB bf16, medians of {rounds} rounds"
    titles = "| | GB/s | to cp in the same round (least to most) | CPU s | wall s, imports included | peak RssAnon MB |"
    missed = [name for name, least in GOALS.items() if statistics.median(series[name].ratios) < least]
    return "\n".join(["", head, "", titles, "|---|---|---|---|---|---|", *rows]), missed


def _columns(values: Series) -> str:
    rate, cpu = f"{statistics.median(values.rates) / 1e9:.2f}", f"{statistics.median(values.cpu):.1f}"
    if not values.ratios:
        return f"{rate} | 1 | {cpu} | | "
    spread = f"{statistics.median(values.ratios):.2f}x ({min(values.ratios):.2f}x to {max(values.ratios):.2f}x)"
    return f"{rate} | {spread} | {cpu} | {statistics.median(values.walls):.1f} | {max(values.anonymous) / 1e6:.0f}"


def memory_table(place: Path) -> str:
    """Anonymous memory of every command on a model of five times the size."""
    model = write_model(place / "large", **SHAPES["7B"])
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    rows = []
    found = Stage("convert", model, place / "large-checkpoint", verify="digest").measured()
    rows.append(f"| convert --verify digest | {found['seconds']:.1f} | {found['anonymous'] / 1e6:.0f} |")
    for path in model.glob("*.safetensors"):  # export reads only its config; half of the disk is free again
        path.unlink()
    found = Stage("export", model, place / "large-back", place / "large-checkpoint").measured()
    rows.append(f"| export | {found['seconds']:.1f} | {found['anonymous'] / 1e6:.0f} |")
    for name in ("large", "large-checkpoint", "large-back"):
        shutil.rmtree(place / name)
    head = f"Qwen2.5-7B shape, {size / 1e9:.1f} GB bf16, one run"
    return "\n".join(["", head, "", "| | s | peak RssAnon MB |", "|---|---|---|", *rows])


def copy(model: Path, target: Path) -> tuple[float, float]:
    """Seconds of ``cp`` and fsync, and of the processor; the copy is removed."""
    os.sync()
    warm(WARM_BYTES)
    used = _processor()
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(model), str(target)], check=True)
    for path in [*target.iterdir(), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - began
    used = _processor() - used
    shutil.rmtree(target)
    return seconds, used


def _processor() -> float:
    """Seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


class Stage:
    """Convert or export in a process of its own, which has imported and waits for ``measured``."""

    def __init__(self, stage: str, model: Path, out: Path, checkpoint: Path = Path(), verify: str = "none") -> None:
        began = time.monotonic()
        command = [sys.executable, "-c", STAGE, stage, str(model), str(checkpoint), str(out), verify]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self._process.stdout.readline()
        self._imports = time.monotonic() - began

    def measured(self) -> dict[str, float]:
        """Seconds of the stage, of its processor and of the whole process; peak RssAnon in bytes."""
        os.sync()
        warm(WARM_BYTES)
        began, peak, ended = time.monotonic(), [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(self._process.pid, peak, ended))
        watcher.start()
        output = self._process.communicate("go\n")[0]
        ended.set()
        watcher.join()
        if self._process.returncode != 0:
            sys.exit(f"{self._process.args} failed with exit code {self._process.returncode}")
        wall = self._imports + time.monotonic() - began
        return json.loads(output.splitlines()[-1]) | {"wall": wall, "anonymous": peak[0]}


def _watch(pid: int, peak: list[int], ended: threading.Event) -> None:
    status = Path(f"/proc/{pid}/status")
    while not ended.wait(0.005):
        with contextlib.suppress(OSError):  # it has just ended
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], int(line.split()[1]) * 1024)


def write_model(
    folder: Path, *, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocabulary: int, tied: bool
) -> Path:
    """A Qwen2 model of random weights, in shards, without a tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    head = hidden // heads
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "vocab_size": vocabulary, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": tied, "use_sliding_window": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for i in range(layers):
        part = f"model.layers.{i}."
        rows = {"q": heads * head, "k": groups * head, "v": groups * head}
        shapes |= {f"{part}self_attn.{name}_proj.weight": (count, hidden) for name, count in rows.items()}
        shapes |= {f"{part}self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
        shapes |= {
            f"{part}self_attn.o_proj.weight": (hidden, heads * head),
            f"{part}mlp.down_proj.weight": (hidden, ffn),
        }
        shapes |= {f"{part}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {f"{part}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(prod(s) for s in [*shards[-1].values(), shape]) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    index = {}
    generator = random.Random(1)
    pool = torch.randn(16 << 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: _drawn(pool, s, generator) for n, s in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _drawn(pool: torch.Tensor, shape: tuple[int, ...], generator: random.Random) -> torch.Tensor:
    """Random numbers fast enough for billions of them: the pool, over and over, from a random place on."""
    start = generator.randrange(len(pool))
    return pool.roll(-start).repeat(-(-prod(shape) // len(pool)))[: prod(shape)].reshape(shape)


if __name__ == "__main__":
    main()
