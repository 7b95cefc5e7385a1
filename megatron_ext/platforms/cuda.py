"""NVIDIA GPUs: nccl, one device a rank, Transformer Engine's layers when it can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cached_property

from megatron_ext.platforms.base import Platform, default_environment

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Part of the device's name -> dense bf16 and fp16 FLOP a second, without sparsity (NVIDIA's data sheets)."""


class CUDA(Platform):
    name = "cuda"
    backend = "nccl"
    pad_to_multiple = 64  # keeps matrix shapes friendly to tensor cores

    def missing(self) -> str | None:
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if (devices := torch.cuda.device_count()) < local_ranks:
            return f"{local_ranks} processes on this node but {devices} devices; lower runtime.nproc_per_node"
        return None

    def prepare(self) -> None:
        # one hardware queue keeps tensor-parallel communication in the order in which it was issued
        default_environment(CUDA_DEVICE_MAX_CONNECTIONS="1", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")

    def set_device(self, local_rank: int) -> None:
        import torch

        torch.cuda.set_device(local_rank)

    def transformer_engine(self) -> bool:
        """True when Transformer Engine and its torch extension import; a broken install is as good as none."""
        return self._transformer_engine is None

    def notes(self) -> list[str]:
        why = self._transformer_engine
        return [] if why is None else [f"layers are megatron-core's own with torch's attention: {why}"]

    @cached_property
    def _transformer_engine(self) -> str | None:
        """Why Transformer Engine cannot be used; None if it can."""
        if importlib.util.find_spec("transformer_engine") is None:
            return "transformer_engine is not installed"
        try:
            importlib.import_module("transformer_engine.pytorch")
        except (ImportError, OSError, RuntimeError) as error:
            return f"transformer_engine is installed, but does not import ({type(error).__name__}: {error})"
        return None

    def device_name(self) -> str:
        import torch

        return torch.cuda.get_device_name()

    def peak_memory(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()

    def peak_flops(self, precision: str) -> float | None:
        name = self.device_name()
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        return known if precision in ("bf16", "fp16") else None
