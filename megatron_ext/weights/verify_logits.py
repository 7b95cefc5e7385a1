"""Level logits: transformers and megatron-core must answer the same prompts with the same logits, weights in fp32.

Each side runs in a process of its own: megatron-core needs a prepared platform (on a CPU torch.cuda is redirected), and
transformers must not see it. Large models run one after the other: two of 7B would not fit into memory at once.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_ext import errors
from megatron_ext.config import RuntimeConfig
from megatron_ext.errors import ConfigError, MegatronFlowsError, VerificationError, WorkerFailedError
from megatron_ext.events import Events, Follower
from megatron_ext.families.base import Architecture
from megatron_ext.guard import OWNERS
from megatron_ext.platforms.base import select
from megatron_ext.training.layout import parameters
from megatron_ext.weights.certificate import LogitsFigures
from megatron_ext.weights.manifest import CheckpointManifest
from megatron_ext.weights.prompts import Prompt, make_prompts
from megatron_ext.weights.verify_digest import Direction
from megatron_ext.worker import TERMINAL, Job

TOLERANCE = 1e-4
"""Largest difference that passes, relative to the largest logit."""
NEAR_TIE = 1e-5
"""Two logits nearer than this, relative to the largest logit, may change places."""
FP32 = 4
BOTH_AT_ONCE = 1 << 30
"""Bytes of weights in fp32 up to which both sides compute at the same time."""
PROMPTS = "prompts.safetensors"
SPARE = 1.15
"""Memory beside the weights: activations, logits, the libraries."""

Side = Literal["transformers", "megatron-core"]
SIDES: dict[Side, str] = {"transformers": "logits-transformers", "megatron-core": "logits-megatron"}
"""Whose logits -> the worker's job that computes them."""


@dataclass(frozen=True)
class Pair:
    """A checkpoint and a Hugging Face folder; ``rounded`` is the type that the weights of what was given pass through
    on their way to fp32, because what was made of them has it.
    """

    checkpoint: Path
    model: Path
    manifest: CheckpointManifest
    direction: Direction
    rounded: str | None
    trust_pickle: bool = False

    @property
    def common(self) -> Architecture:
        """The checkpoint's architecture, with the vocabulary that both sides have."""
        changes = self.manifest.changes
        if changes is None or self.direction == "to_model":
            return self.manifest.architecture
        return self.manifest.architecture.model_copy(update={"vocab_size": changes.source_config["vocab_size"]})


def require_memory(architecture: Architecture, platform: str) -> None:
    """Refuse what would run out of main memory; an accelerator's own is not looked at.

    Raises:
        ConfigError: names what is needed and what there is.
    """
    import psutil

    if select(platform).name != "cpu":
        return
    needed, free = int(SPARE * FP32 * parameters(architecture)), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"comparing logits needs {needed / 1e9:.1f} GB of memory (weights in fp32), and {free / 1e9:.1f} GB are "
            "free; verify with digest, or on a larger machine"
        )


def compare_logits(pair: Pair, events: Events, platform: str, *, judged: bool = True) -> LogitsFigures:
    """Compare the logits of both models on prompts that are always the same for one architecture.

    Raises:
        VerificationError: if ``judged``, they differ by more than ``TOLERANCE``, or prefer different tokens outside
            near-ties; names prompt and position, and the first layer whose output differs.
        WorkerFailedError: a side could not be computed; ends with the last lines of its log.
    """
    architecture = pair.common
    prompts = make_prompts(architecture, pair.model)
    with tempfile.TemporaryDirectory(prefix="mflow-logits-") as scratch:
        answers, device = _both(pair, prompts, Path(scratch), events, platform, hidden=False)
        verdict = judge(prompts, answers)
        if verdict.fault and judged:
            worst = [verdict.prompt]
            layers, _ = _both(pair, worst, Path(scratch), events, platform, hidden=True)
            where = first_layer_that_differs(layers, architecture.num_layers)
            raise VerificationError(f"{verdict.fault}; {where} ({pair.model} against {pair.checkpoint})")
    return LogitsFigures(
        prompts={prompt.name: tuple(prompt.tokens.shape) for prompt in prompts},
        positions=sum(prompt.tokens.shape[0] * len(prompt.positions) for prompt in prompts),
        max_difference=verdict.difference,
        max_logit=verdict.largest,
        tolerance=TOLERANCE * verdict.largest,
        top1_differs=verdict.top1_differs,
        window_size=architecture.window_size,
        precision="fp32",
        device=device,
    )


Answers = dict[Side, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Verdict:
    """What the comparison of all prompts came to; ``prompt`` is the one at fault, or else the one that differs most."""

    prompt: Prompt
    difference: float
    largest: float
    top1_differs: int
    fault: str | None


def judge(prompts: list[Prompt], answers: Answers) -> Verdict:
    """Compare the logits of both sides; a value that is not a number is infinitely far from everything."""
    theirs = {prompt.name: answers["transformers"][prompt.name] for prompt in prompts}
    ours = {  # without padding, and without rows that the other model does not have
        name: answers["megatron-core"][name][..., : left.shape[-1]] for name, left in theirs.items()
    }
    largest = max(float(left.abs().max()) for left in theirs.values())
    differences = {name: float(_gap(left, ours[name]).max()) for name, left in theirs.items()}
    worst = max(prompts, key=lambda prompt: differences[prompt.name])
    difference, tolerance = differences[worst.name], TOLERANCE * largest
    ties, fault = 0, None
    if not (math.isfinite(largest) and difference <= tolerance):
        fault = _difference(worst, theirs[worst.name], ours[worst.name], tolerance)
    for prompt in prompts:
        left, right = theirs[prompt.name], ours[prompt.name]
        changed = left.argmax(-1) != right.argmax(-1)
        best = left.topk(2, -1).values
        clear = changed & (best[..., 0] - best[..., 1] > NEAR_TIE * largest)
        if fault is None and clear.any():
            worst, fault = prompt, _preference(prompt, left, right, clear)
        ties += int(changed.sum())
    return Verdict(worst, difference, largest, ties, fault)


def _gap(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left - right).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _difference(prompt: Prompt, left: torch.Tensor, right: torch.Tensor, tolerance: float) -> str:
    gap = _gap(left, right)
    sequence, position, token = (int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    values = float(left[sequence, position, token]), float(right[sequence, position, token])
    return (
        f"the logits differ by {abs(values[0] - values[1]):.3g}, and {tolerance:.2g} would pass: prompt "
        f"{prompt.name!r}, position {prompt.positions[position]}, token {token}: {values[0]:.6g} by transformers, "
        f"{values[1]:.6g} by megatron-core"
    )


def _preference(prompt: Prompt, left: torch.Tensor, right: torch.Tensor, clear: torch.Tensor) -> str:
    sequence, position = (int(i) for i in clear.nonzero()[0])
    tokens = int(left[sequence, position].argmax()), int(right[sequence, position].argmax())
    return (
        f"the models prefer different tokens, and it is no near-tie: prompt {prompt.name!r}, position "
        f"{prompt.positions[position]}: token {tokens[0]} by transformers, {tokens[1]} by megatron-core"
    )


def first_layer_that_differs(answers: Answers, num_layers: int) -> str:
    """Sentence: the first place in the model where the outputs differ by more than the tolerance, and by how much."""
    places = ["embedding"]
    for layer in range(num_layers):
        places += [f"attention of layer {layer}", f"layer {layer}"]
    places.append("final norm")
    theirs, ours = answers["transformers"], answers["megatron-core"]
    for place in places:
        left, right = theirs[place], ours[place]
        most, largest = float((left - right).abs().max()), float(left.abs().max())
        if not most <= TOLERANCE * largest:
            return f"the first layer that differs: {place}, by {most:.3g} at most (largest value {largest:.3g})"
    return "all layers agree up to the final norm: the output layer differs"


def _both(
    pair: Pair, prompts: list[Prompt], scratch: Path, events: Events, platform: str, *, hidden: bool
) -> tuple[Answers, str]:
    """Logits (or, ``hidden``, the outputs of all layers) by side, and the device that computed them."""
    tensors = {f"{prompt.name}.tokens": prompt.tokens for prompt in prompts}
    save_file(tensors | {f"{prompt.name}.positions": prompt.positions for prompt in prompts}, scratch / PROMPTS)
    events.note(f"verifying: {' and '.join(SIDES)} compute {'the outputs of every layer' if hidden else 'logits'}")
    size = FP32 * parameters(pair.manifest.architecture)
    with ThreadPoolExecutor(1 if size > BOTH_AT_ONCE else 2) as pool:
        asking = {side: pool.submit(_in_worker, _job(side, pair, scratch, platform, hidden)) for side in SIDES}
        done = {side: asked.result() for side, asked in asking.items()}
    return {side: answers for side, (answers, _) in done.items()}, done["megatron-core"][1]["device"]


def _job(side: Side, pair: Pair, scratch: Path, platform: str, hidden: bool) -> Job:
    given = "transformers" if pair.direction == "to_checkpoint" else "megatron-core"
    out = scratch / SIDES[side]
    out.mkdir(exist_ok=True)
    return Job(
        job=SIDES[side],
        config={
            "hidden": hidden,
            "rounded": pair.rounded if side == given else None,
            "manifest": pair.manifest.model_dump(),
            "trust_pickle": pair.trust_pickle,
        },
        inputs={
            "model": str(pair.model),
            "checkpoint": str(pair.checkpoint),
            "prompts": str(scratch / PROMPTS),
        },
        out=out,
        events=out / "events.jsonl",
        runtime=RuntimeConfig(platform=platform),
    )


def _in_worker(job: Job) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run the job in a process that ends when this one does; its answers and its summary.

    Raises:
        MegatronFlowsError: what the job raised.
        WorkerFailedError: it died.
    """
    job_file, log = job.out / "job.json", job.out / "log.txt"
    job.events.unlink(missing_ok=True)
    job_file.write_text(job.model_dump_json(), encoding="utf-8")
    owners = ",".join(filter(None, [os.environ.get(OWNERS), str(os.getpid())]))
    alone = ("RANK", "LOCAL_RANK", "WORLD_SIZE", TERMINAL)
    environment = {name: value for name, value in os.environ.items() if name not in alone}
    with log.open("wb") as output:
        code = subprocess.run(
            [sys.executable, "-m", "megatron_ext.worker", str(job_file)],
            env=environment | {OWNERS: owners},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    last = {event["event"]: event for event in Follower(job.events).new()}
    if "error" in last:
        cause = getattr(errors, last["error"]["type"], MegatronFlowsError)
        raise cause(last["error"]["message"])
    if code or "result" not in last:
        said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise WorkerFailedError(f"{job.job} ended with exit code {code}; the last lines of its log:\n{said}")
    try:
        return load_file(job.out / "answers.safetensors"), last["result"]
    except (OSError, SafetensorError) as error:
        raise WorkerFailedError(f"{job.job} answered with a file that cannot be read: {error}") from None
