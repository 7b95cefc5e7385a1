"""NVIDIA GPUs: nccl, one device a rank, Transformer Engine's layers when it can be imported."""

from __future__ import annotations

import importlib.util
import os

from megatron_ext.platforms.base import Platform, default_environment


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
        if importlib.util.find_spec("transformer_engine") is None:
            return False
        try:
            import transformer_engine.pytorch  # noqa: F401
        except (ImportError, OSError, RuntimeError):
            return False
        return True

    def device_name(self) -> str:
        import torch

        return torch.cuda.get_device_name()

    def peak_memory(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()
