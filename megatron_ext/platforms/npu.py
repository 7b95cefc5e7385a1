"""Ascend NPUs: hccl, and MindSpeed's adaptor, which must be imported before megatron-core. Never run on hardware."""

from __future__ import annotations

import importlib
import importlib.util
import os

from megatron_ext.platforms.base import Platform, default_environment

PACKAGES = {"torch_npu": "torch-npu (comes with the CANN image)", "mindspeed": "MindSpeed"}


class NPU(Platform):
    name = "npu"
    backend = "hccl"
    pad_to_multiple = 16  # the cube unit's tile

    def missing(self) -> str | None:
        for module, package in PACKAGES.items():
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed; install {package} that fits your CANN, or use the ascend image"
        torch_npu = importlib.import_module("torch_npu")
        if not torch_npu.npu.is_available():
            return "torch_npu sees no device; check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
        return None

    def prepare(self) -> None:
        default_environment(
            CPU_AFFINITY_CONF="1",  # each rank stays on the cores near its device
            CUDA_DEVICE_MAX_CONNECTIONS="1",
            HCCL_CONNECT_TIMEOUT="1200",
            HCCL_EXEC_TIMEOUT="1800",  # as long as torch.distributed waits
            HCCL_IF_BASE_PORT="64000",  # hccl's own 60000 is among the ports that Linux gives to connections
            PYTORCH_NPU_ALLOC_CONF="expandable_segments:True",
            TASK_QUEUE_ENABLE="1",
        )
        if network := os.environ.get("GLOO_SOCKET_IFNAME"):
            default_environment(HCCL_SOCKET_IFNAME=network)
        importlib.import_module("torch_npu")
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        importlib.import_module("mindspeed.megatron_adaptor")

    def set_device(self, local_rank: int) -> None:
        importlib.import_module("torch_npu").npu.set_device(local_rank)

    def device_name(self) -> str:
        return importlib.import_module("torch_npu").npu.get_device_name()

    def peak_memory(self) -> int:
        return importlib.import_module("torch_npu").npu.max_memory_allocated()
