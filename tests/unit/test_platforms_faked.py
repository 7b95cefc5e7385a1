"""Choosing a platform, its environment and its launch line, with modules that stand in for the vendors'.

Nothing here says that a training runs on an NPU: no kernel, number or memory of one is seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TE = """
import json
from megatron_ext.platforms.cuda import CUDA
cuda = CUDA()
print(json.dumps([cuda.transformer_engine(), cuda.fused_layers("bf16"), cuda.fused_layers("fp32"), cuda.notes()]))
"""
TORCH_NPU = """
import sys
import torch
import torch.distributed as dist
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register

sys.order = [*getattr(sys, "order", []), "torch_npu"]

class npu:
    is_available = is_initialized = staticmethod(lambda: DEVICES > 0)
    device_count = staticmethod(lambda: DEVICES)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda number: sys.order.append(number))
    get_device_name = staticmethod(lambda: "Ascend910")
    max_memory_allocated = staticmethod(lambda: 5)
    _is_in_bad_fork = staticmethod(lambda: False)

register("npu", npu())
gloo = lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout)
dist.Backend.register_backend("hccl", gloo, devices=["cpu"])
"""
SEEN = "import sys; sys.order.append(__name__); assert not [m for m in sys.modules if m.startswith('megatron.')]"
NPU = """
import json, os, sys
import torch, torch.distributed as dist
from megatron_ext.platforms.base import select
assert "mindspeed" not in sys.modules, "looking imports nothing of it"
npu = select("auto")
assert npu is not None and npu.name == "npu" and select("npu").name == "npu"
npu.prepare()
assert not [name for name in sys.modules if name.startswith("megatron.")]
npu.set_device(3)
dist.init_process_group(npu.backend, store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
names = [name for name in os.environ if name.split("_")[0] in ("HCCL", "TASK", "CPU", "PYTORCH") or "CONN" in name]
print(json.dumps({
    "order": sys.order, "backend": dist.get_backend(), "environment": {name: os.environ[name] for name in names},
    "accelerator": str(torch.accelerator.current_accelerator()), "device": npu.device_name(),
    "te": npu.fused_layers("bf16"),
}))
"""  # fmt: skip
LAUNCH = """
import json
from pathlib import Path
import torch.distributed.run
from megatron_ext import worker
torch.distributed.run.main = lambda arguments: print(json.dumps(arguments))
job = worker.Job(job="train", config={}, inputs={}, out=Path("out"), runtime={"platform": "npu", "nproc_per_node": 8})
assert worker.start_torchrun(Path("job.json"), job) == 0
"""


def fake(folder: Path, **modules: str) -> Path:
    """Modules with these sources: ``a__b`` is ``a.b``, a package each."""
    for name, source in modules.items():
        place = folder.joinpath(*name.split("__"))
        place.mkdir(parents=True)
        (place / "__init__.py").write_text(source)
    return folder


def said(script: str, folder: Path | None = None, **environment: str):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HCCL_", "GLOO_"))}
    path = os.pathsep.join(filter(None, [str(folder or ""), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", script], env=kept | {"PYTHONPATH": path} | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("source", "usable", "note"),
    [
        ("", True, None),
        ("raise ImportError('libcudnn.so.9')", False, "not import (ImportError: libcudnn.so.9)"),
        ("raise RuntimeError('torch was upgraded')", False, "does not import (RuntimeError: torch was upgraded)"),
    ],
    ids=["works", "broken", "other torch"],
)  # fmt: skip
def test_transformer_engine_is_taken_where_it_imports(
    tmp_path: Path, source: str, usable: bool, note: str | None
) -> None:
    folder = fake(tmp_path, transformer_engine="", transformer_engine__pytorch=source)
    found, fused, fused_fp32, notes = said(TE, folder)
    assert (found, fused, fused_fp32) == (usable, usable, False)
    assert len(notes) == (0 if note is None else 1)
    assert note is None or note in notes[0]


def test_without_transformer_engine_the_layers_are_our_own_and_a_note_says_so() -> None:
    script = f"import importlib.util; importlib.util.find_spec = lambda name: None\n{TE}"
    assert said(script)[:3] == [False, False, False]
    assert said(script)[3] == [
        "layers are megatron-core's own with torch's attention: transformer_engine is not installed"
    ]


@pytest.fixture
def ascend(tmp_path: Path) -> Path:
    return fake(
        tmp_path, torch_npu=TORCH_NPU.replace("DEVICES", "8"), torch_npu__contrib="",
        torch_npu__contrib__transfer_to_npu=SEEN, mindspeed="", mindspeed__megatron_adaptor=SEEN,
    )  # fmt: skip


def test_an_npu_is_found_and_made_ready_before_megatron_is_imported(ascend: Path) -> None:
    found = said(NPU, ascend, GLOO_SOCKET_IFNAME="lo", HCCL_CONNECT_TIMEOUT="7")
    assert found["order"] == ["torch_npu", "torch_npu.contrib.transfer_to_npu", "mindspeed.megatron_adaptor", 3]
    assert (found["backend"], found["accelerator"], found["device"], found["te"]) == ("hccl", "npu", "Ascend910", False)
    assert found["environment"] == {
        "CPU_AFFINITY_CONF": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "HCCL_CONNECT_TIMEOUT": "7",
        "HCCL_EXEC_TIMEOUT": "1800", "HCCL_IF_BASE_PORT": "64000", "HCCL_SOCKET_IFNAME": "lo",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "TASK_QUEUE_ENABLE": "1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "mindspeed", "named"),
    [(8, False, "mindspeed is not installed; install MindSpeed"), (0, True, "torch_npu sees no device; check npu-smi")],
)
def test_an_npu_that_cannot_run_says_what_is_missing(tmp_path: Path, devices: int, mindspeed: bool, named: str) -> None:
    modules = {"torch_npu": TORCH_NPU.replace("DEVICES", str(devices))} | ({"mindspeed": ""} if mindspeed else {})
    script = "import json; from megatron_ext.platforms.npu import NPU; print(json.dumps(NPU().missing()))"
    assert named in said(script, fake(tmp_path, **modules))


def test_ranks_on_npus_are_launched_by_torchrun_one_a_device() -> None:
    line = said(LAUNCH)
    assert line == [
        "--standalone", "--nproc-per-node=8", "--max-restarts=0", "--shutdown-timeout=120", "-m",
        "megatron_ext.worker", "job.json",
    ]  # fmt: skip
