"""The parity matrix: every kind of parallelism and their combinations compute what one process computes.

One launch for each number of processes trains layout after layout; the test then compares each with one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import column, write_checkpoint, write_dataset, write_job, write_text

from megatron_ext.events import Events
from megatron_ext.weights.export import export

TP2, SP = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}
PP2, CP2 = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
WHOLE, OVERLAP = {"use_distributed_optimizer": False}, {"overlap_grad_reduce": True}
GATHER = OVERLAP | {"overlap_param_gather": True, "ddp_bucket_size": 10_000}
WIDE = {"micro_batch_size": 2}
LAYOUTS: dict[tuple[str, int], dict[str, dict[str, Any]]] = {
    ("dense", 1): {"one": {}, "wide": WIDE},
    ("dense", 2): {
        "tp": TP2, "tp-sp": TP2 | SP, "pp": PP2, "vpp": VPP2, "cp": CP2, "dp": {}, "dp-whole": WHOLE,
        "dp-overlap": OVERLAP, "dp-overlap-whole": OVERLAP | WHOLE, "dp-gather": GATHER, "dp-wide": WIDE,
    },
    ("dense", 4): {
        "tp-sp-pp": TP2 | SP | PP2, "tp-dp": TP2, "pp-dp-overlap": PP2 | OVERLAP, "tp-vpp": TP2 | VPP2, "cp-dp": CP2,
        "tp-sp-cp": TP2 | SP | CP2, "pp-cp": PP2 | CP2, "dp4": {}, "vpp-gather": VPP2 | GATHER,
    },
    ("experts", 1): {"one": {}, "wide": WIDE},
    ("experts", 2): {
        "ep": EP2, "tp-sp": TP2 | SP, "pp": PP2, "vpp": VPP2, "cp": CP2, "dp": {}, "ep-whole": EP2 | WHOLE,
        "ep-overlap": EP2 | OVERLAP, "ep-gather": EP2 | GATHER,
    },
    ("experts", 4): {
        "tp-sp-ep": TP2 | SP | EP2, "pp-ep": PP2 | EP2, "ep-dp": EP2, "tp-sp-pp": TP2 | SP | PP2, "cp-dp": CP2,
        "vpp-ep": VPP2 | EP2,
    },
}  # fmt: skip
LAUNCH = """
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.events import Events
from megatron_ext.training import parallel
from megatron_ext.training.job import run
from megatron_ext.worker import Job

prepared = parallel.parallel_state

@contextmanager
def recording(*arguments):
    with prepared(*arguments) as platform:
        import torch
        from megatron_ext.model.routing import routing_metrics
        from megatron_ext.training import steps

        def record(routers, layers, count):
            chosen = torch.zeros(layers, routers[0].num_experts)
            for router in routers:
                chosen[router.layer_number - 1] = router.seen[:-2]
            torch.distributed.all_reduce(chosen)
            if torch.distributed.get_rank() == 0:
                with (job.out / "choices.jsonl").open("a") as file:
                    file.write(json.dumps(chosen.tolist()) + chr(10))
            return routing_metrics(routers, layers, count)

        steps.routing_metrics = record
        yield platform

if __name__ == "__main__":
    parallel.parallel_state = recording
    for argument in sys.argv[1:]:
        os.environ["MASTER_PORT"], path = argument.split(":", 1)
        job = Job.model_validate_json(Path(path).read_text())
        run(job, Events())
"""
"""Beside each training of experts, ``choices.jsonl``: of each step, how many tokens every expert of every layer got."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    sizes = np.random.default_rng(1).integers(5, 60, 60).tolist()
    for model, model_type in (("dense", "llama"), ("experts", "mixtral")):
        checkpoint = write_checkpoint(folder / model, model_type)
        write_dataset(folder / model / "chats", checkpoint, sizes)
        write_text(folder / model / "text", checkpoint, [3 * size for size in sizes])
    return folder


def launch(base: Path, model: str, data: str, processes: int) -> None:
    """Train every layout of ``processes`` processes, one after the other, in one start of them."""
    jobs = []
    train = {"train_iters": 20, "global_batch_size": 8, "lr_warmup_iters": 2, "lr": 3e-4}
    if model == "experts":
        train |= {"moe_aux_loss_coeff": 0.02, "moe_z_loss_coeff": 0.001}
    for name, runtime in LAYOUTS[model, processes].items():
        if data == "chats" and "cp" in name:
            continue  # refused: context parallelism of packed sequences is not built
        out, runtime = base / f"{model}-{data}-{name}", {"nproc_per_node": processes, **runtime}
        jobs.append(write_job(out, base / model / "checkpoint", base / model / data, train, runtime))
    jobs = [f"{port}:{job}" for port, job in zip(free_ports(len(jobs)), jobs, strict=True)]
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
    ranks = []
    for rank in range(processes):
        of_rank = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (base / f"{model}-{data}-{processes}.{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", LAUNCH, *jobs], env=os.environ | of_rank, stdout=log, stderr=log
                )
            )
    codes = [rank.wait() for rank in ranks]
    logs = [(base / f"{model}-{data}-{processes}.{rank}.log").read_text()[-3000:] for rank in range(processes)]
    assert codes == [0] * processes, "\n".join(logs)


def free_ports(count: int) -> list[int]:
    """A port for each job, since the processes of the next one must not meet at the store of the one before; none that
    the system gives to connections, for those of the jobs before would take it.
    """
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 12000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def exported(base: Path, model: str, name: str) -> dict[str, torch.Tensor]:
    out = base / f"{name}-exported"
    if not out.exists():
        out.mkdir()
        export(base / name, base / model / "hf", out, dtype=None, events=Events())
    return load_file(out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("data", ["text", "chats"])
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_every_layout_has_the_losses_and_weights_of_one_process(base: Path, model: str, data: str) -> None:
    found = {}
    for processes in (1, 2, 4):
        launch(base, model, data, processes)
        for name in LAYOUTS[model, processes]:
            out = base / f"{model}-{data}-{name}"
            if out.exists():
                found[f"{processes}: {name}"] = difference(base, model, f"{model}-{data}-one", out.name)
    (base / f"{model}-{data}.json").write_text(json.dumps(found, indent=1))
    wrong = {name: far for name, far in found.items() if far["loss"] > 1e-5 or far["weights"] > 5e-4}
    assert not wrong, found
    flipped = {name: far["flipped"] for name, far in found.items() if far["flipped"]}
    assert not flipped, f"tokens between two experts went to the other one: {flipped}"
    losses = column(base / f"{model}-{data}-one", "loss")
    assert len(set(losses)) > 15, "the loss never moved"


def difference(base: Path, model: str, one: str, other: str) -> dict[str, float]:
    """Largest difference of a loss, of a router's metric, and of a tensor (L2, relative)."""
    weights, others = exported(base, model, one), exported(base, model, other)
    far = {name: float((others[name] - value).norm() / value.norm()) for name, value in weights.items()}
    names = ["loss"] + (["load_balancing_loss", "z_loss", "expert_load"] if model == "experts" else [])
    columns = {
        name: float(np.abs(np.subtract(column(base / one, name), column(base / other, name))).max()) for name in names
    }
    return {**columns, "weights": max(far.values()), "flipped": flipped(base / one, base / other)}


def flipped(one: Path, other: Path) -> float:
    """How many choices of experts differ at least, over all steps and layers; 0 of a dense model."""
    choices = [place / "choices.jsonl" for place in (one, other)]
    if not choices[0].exists():
        return 0
    counts, others = (np.asarray([json.loads(line) for line in path.read_text().splitlines()]) for path in choices)
    assert counts.shape == others.shape
    assert counts.sum() > 0
    return float(np.abs(counts - others).sum() / 2)
