"""`mflow doctor`: what this machine can run; each finding is ok, missing or a problem, with what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil

from megatron_ext.config import Section

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "pyarrow", "lm-eval", "prefect")


class Finding(Section):
    """One line of the diagnosis."""

    name: str
    state: Literal["ok", "missing", "problem"]
    detail: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Look at devices, backends, versions, Transformer Engine, the artifact store, disk and the Prefect API."""
    return [*_machine(), *_packages(), *_devices(), _transformer_engine(), *_store(), _prefect_api()]


def _machine() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    detail = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory.total / 2**30:.0f} GiB memory"
    yield Finding(name="machine", state="ok", detail=detail)
    ok = sys.version_info >= (3, 11)
    remedy = "" if ok else "install Python 3.11 or newer"
    yield Finding(name="python", state="ok" if ok else "problem", detail=platform.python_version(), remedy=remedy)


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name=name, state="ok", detail=version(name))
        except PackageNotFoundError:
            use = "flows need it; the engine does not" if name == "prefect" else "the engine needs it"
            remedy = f"pip install -c constraints.txt {name}"
            yield Finding(name=name, state="missing", detail=use, remedy=remedy)


def _devices() -> Iterator[Finding]:
    if find_spec("torch") is None:
        return
    import torch

    yield Finding(name="platform cpu", state="ok", detail=f"gloo, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        yield Finding(name="platform cuda", state="ok", detail=f"{count} x {names}, nccl")
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        remedy = "" if torch.version.cuda else "on a GPU machine install a CUDA build of torch"
        yield Finding(name="platform cuda", state="missing", detail=f"no device; torch is {built}", remedy=remedy)
    if find_spec("torch_npu") is not None:
        yield Finding(name="platform npu", state="ok", detail="torch_npu is installed")
    else:
        remedy = "on Ascend use an image with CANN, torch-npu and MindSpeed"
        yield Finding(name="platform npu", state="missing", detail="torch_npu is not installed", remedy=remedy)


def _transformer_engine() -> Finding:
    try:
        return Finding(name="transformer engine", state="ok", detail=version("transformer-engine"))
    except PackageNotFoundError:
        remedy = "on a GPU machine: pip install 'megatron-flows[gpu]'"
        detail = "not installed; attention and norms run on torch's own kernels"
        return Finding(name="transformer engine", state="missing", detail=detail, remedy=remedy)


def _store() -> Iterator[Finding]:
    root = Path(os.environ.get("MFLOW_ARTIFACTS", "artifacts")).absolute()
    existing = next(path for path in [root, *root.parents] if path.exists())
    writable = os.access(existing, os.W_OK)
    remedy = "" if writable else "set MFLOW_ARTIFACTS to a folder that you may write"
    yield Finding(name="artifact store", state="ok" if writable else "problem", detail=str(root), remedy=remedy)
    free = shutil.disk_usage(existing).free
    enough = free > 10e9
    remedy = "" if enough else "a 7B model needs about 60 GB through the chain; set MFLOW_ARTIFACTS to a larger disk"
    yield Finding(name="disk", state="ok" if enough else "problem", detail=f"{free / 1e9:.0f} GB free", remedy=remedy)


def _prefect_api() -> Finding:
    url = os.environ.get("PREFECT_API_URL", "http://127.0.0.1:4200/api").rstrip("/")
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=3) as answer:
            answered = answer.status == 200
    except OSError:
        answered = False
    if answered:
        return Finding(name="prefect api", state="ok", detail=url)
    detail = f"no server answers at {url}; flows start a temporary one"
    return Finding(name="prefect api", state="missing", detail=detail, remedy="mflow up, or set PREFECT_API_URL")
