"""Which platform a worker takes, and that the CPU's redirect stays in the process that asked for it."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from megatron_ext.errors import PlatformError
from megatron_ext.platforms import megatron_fixes
from megatron_ext.platforms.base import select
from megatron_ext.platforms.cuda import CUDA


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_auto_takes_the_cpu_where_there_is_no_accelerator_and_asking_for_one_says_what_is_missing() -> None:
    assert select("auto").name == select("cpu").name == "cpu"
    with pytest.raises(PlatformError, match=r"runtime\.platform cuda: torch .* built without CUDA|no CUDA device"):
        select("cuda")
    with pytest.raises(PlatformError, match="torch_npu is not installed"):
        select("npu")


def test_unknown_platforms_name_the_nearest() -> None:
    with pytest.raises(PlatformError, match="did you mean 'cuda'"):
        select("cudaa")


def test_selecting_changes_nothing_and_preparing_redirects() -> None:
    script = """
import torch
from megatron_ext.platforms import megatron_fixes
from megatron_ext.platforms.base import select
from megatron_ext.platforms.cuda import CUDA
before = torch.cuda.current_device, torch.zeros, torch.Tensor.to
cpu = select("cpu")
assert before == (torch.cuda.current_device, torch.zeros, torch.Tensor.to)
cpu.prepare(); cpu.prepare()
assert torch.cuda.current_device() == torch.device("cpu") and not torch.cuda.is_available()
assert torch.zeros(2, device="cuda:0").cuda().to("cuda").device.type == "cpu"
assert torch.ones(1).type() == "torch.cuda.FloatTensor" and torch.ones(1).type(torch.int).dtype == torch.int
torch.manual_seed(3); a = torch.rand(2); torch.cuda.manual_seed(3); assert torch.equal(a, torch.rand(2))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_transformer_engine_builds_the_layers_in_bf16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packed attention has no fp32 kernel: "No dot product attention backend is available"."""
    monkeypatch.setattr(CUDA, "transformer_engine", lambda self: True)
    assert CUDA().fused_layers("bf16")
    assert not CUDA().fused_layers("fp32")
    assert not select("cpu").fused_layers("bf16")


def test_a_megatron_core_of_another_series_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package_info = types.SimpleNamespace(MAJOR=0, MINOR=17, PATCH=0, __version__="0.17.0")
    core = types.SimpleNamespace(package_info=package_info)
    monkeypatch.setitem(sys.modules, "megatron", types.SimpleNamespace(core=core))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    with pytest.raises(PlatformError, match=r"megatron-core 0\.17\.0 .* install megatron-core 0\.16\.1"):
        megatron_fixes.apply("cpu")
