"""What a platform is: how a worker process gets ready for megatron-core on one kind of device."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod

from megatron_ext.errors import PlatformError, unknown


class Platform(ABC):
    """One kind of device. ``prepare`` runs in a worker process before megatron is imported, never anywhere else."""

    name: str
    backend: str  # of torch.distributed
    pad_to_multiple: int = 1  # tokens of a micro batch are padded to a multiple of this

    @abstractmethod
    def missing(self) -> str | None:
        """Why this platform cannot run here, with the remedy; None when it can."""

    @abstractmethod
    def prepare(self) -> None:
        """Set the environment and redirect what must be redirected before megatron-core is imported."""

    @abstractmethod
    def set_device(self, local_rank: int) -> None:
        """Bind this process to its device."""

    def transformer_engine(self) -> bool:
        """Whether Transformer Engine can be used."""
        return False

    def fused_layers(self, precision: str) -> bool:
        """Whether the model is built from Transformer Engine's layers: its attention over packed sequences (``thd``)
        has no fp32 kernel.
        """
        return precision != "fp32" and self.transformer_engine()

    def notes(self) -> list[str]:
        """Sentences for the person who starts a training here: what it does without."""
        return []

    @abstractmethod
    def device_name(self) -> str:
        """What the device calls itself."""

    def peak_memory(self) -> int:
        """Most bytes of device memory held so far."""
        return 0

    def peak_flops(self, precision: str) -> float | None:
        """Dense FLOP a second that the vendor promises of one device; None where it is not known."""
        return None


def platforms() -> dict[str, Platform]:
    """Every platform by name, in the order in which ``auto`` tries them."""
    from megatron_ext.platforms.cpu import CPU
    from megatron_ext.platforms.cuda import CUDA
    from megatron_ext.platforms.npu import NPU

    return {platform.name: platform for platform in (CUDA(), NPU(), CPU())}


def select(name: str) -> Platform:
    """The platform called ``name``; ``auto`` takes the first accelerator that works here, else the CPU.

    Raises:
        PlatformError: the platform is unknown or cannot run on this machine; says what is missing.
    """
    known = platforms()
    if name == "auto":
        return next(platform for platform in known.values() if platform.missing() is None)
    if name not in known:
        raise PlatformError(unknown("runtime.platform", name, [*known, "auto"]))
    if why := known[name].missing():
        raise PlatformError(f"runtime.platform {name}: {why}")
    return known[name]


def require_transformer_engine(name: str) -> None:
    """Refuse fp8 where Transformer Engine cannot be, without importing it: a broken install is found by the ranks.

    Args:
        name: of the platform, or ``auto``.

    Raises:
        PlatformError: says what is missing, and the remedy.
    """
    if name not in ("cuda", "auto"):
        raise PlatformError(f"train.precision fp8 needs Transformer Engine, which {name} has not; take bf16")
    if importlib.util.find_spec("transformer_engine") is None:
        raise PlatformError(
            "train.precision fp8 needs Transformer Engine, which is not installed; install "
            "transformer-engine[pytorch,core_cu13] on a machine with NVIDIA GPUs, or take bf16"
        )


def default_environment(**variables: str) -> None:
    """Set environment variables that are not set yet."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
