"""CPU: gloo, and ``torch.cuda`` redirected to the CPU, because megatron-core calls it in some 500 places.

The redirect is installed before megatron is imported and only in worker processes. ``torch.cuda.is_available()``
stays False. Ascend's ``torch_npu.contrib.transfer_to_npu`` does the same for NPUs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from megatron_ext.platforms.base import Platform

FACTORIES = [
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "randperm",
    "linspace",
    "eye",
    "as_tensor",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_strided",
]
TENSOR_METHODS = ["to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]


class CPU(Platform):
    name = "cpu"
    backend = "gloo"

    def missing(self) -> str | None:
        return None

    def prepare(self) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        redirect()

    def set_device(self, local_rank: int) -> None:
        """There is one CPU."""

    def device_name(self) -> str:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else "CPU"

    def peak_memory(self) -> int:
        """Most bytes of main memory that this process has held."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stream:
    """A stream on which everything has already happened: CPU operations are synchronous."""

    cuda_stream = 0
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device = torch.device("cpu")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    """A point in time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``."""
        return (end.time - self.time) * 1e3


def redirect() -> None:
    """Point ``torch.cuda`` and everything that takes a device at the CPU. A second call does nothing."""
    import torch

    if getattr(torch.cuda, "_redirected_to_cpu", False):
        return
    _switch_compilation_off()
    _redirect_module()
    _redirect_random()
    _redirect_tensors()
    torch.cuda._redirected_to_cpu = True


def _switch_compilation_off() -> None:
    """megatron-core compiles small functions; dynamo's rules must be built before torch is patched, and not used. So
    must the list of what makes tensors, or those made on another device for a time are made on the CPU.
    """
    import torch
    from torch._dynamo import trace_rules
    from torch.utils import _device

    trace_rules.get_torch_obj_rule_map()
    _device._device_constructors()
    torch.compile = lambda model=None, *_, **__: model if model is not None else (lambda function: function)


def _redirect_module() -> None:
    import torch

    cuda, stream = torch.cuda, Stream()

    def nothing() -> Callable[..., None]:  # a new one for each name: dynamo has rules for each function, by identity
        return lambda *_, **__: None

    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 1
    cuda.get_device_name = lambda *_: "cpu"
    for name in [
        "set_device",
        "synchronize",
        "empty_cache",
        "set_stream",
        "reset_peak_memory_stats",
        "ipc_collect",
        "init",
    ]:
        setattr(cuda, name, nothing())
    cuda._lazy_init = nothing()
    cuda._lazy_call = lambda callable, **_: callable()
    cuda.Stream, cuda.Event = Stream, Event
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_, **__: stream)
    for name in ("stream", "device"):
        setattr(cuda, name, lambda *_, **__: contextlib.nullcontext())
    for name in ["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"]:
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.memory_stats = lambda *_, **__: {}
    cuda.mem_get_info = lambda *_, **__: (0, 0)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = nothing(), nothing()
    cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()


def _redirect_random() -> None:
    """One generator serves both names; ``torch.manual_seed`` itself calls ``torch.cuda.manual_seed_all``."""
    import torch

    torch.cuda.default_generators = (torch.default_generator,)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: None
        module.initial_seed = lambda: torch.initial_seed()


def _redirect_tensors() -> None:
    import torch

    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor = torch.Tensor
    for name in TENSOR_METHODS:
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))
    torch.nn.Module.to = _on_cpu(torch.nn.Module.to)
    tensor.cuda = torch.nn.Module.cuda = tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = lambda self, stream: None
    tensor.type = _cuda_type(tensor.type)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every CUDA device among its arguments replaced by the CPU, and no pinned memory."""
    import torch

    cpu = torch.device("cpu")

    def is_cuda(value: object) -> bool:
        if isinstance(value, str):
            return value.startswith("cuda")
        return isinstance(value, torch.device) and value.type == "cuda"

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if "device" in named and is_cuda(named["device"]):
            named["device"] = cpu
        if named.get("pin_memory"):
            named["pin_memory"] = False
        if any(map(is_cuda, arguments)):
            arguments = tuple(cpu if is_cuda(value) else value for value in arguments)
        return function(*arguments, **named)

    return wrapped


def _cuda_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type`` that answers ``torch.cuda.FloatTensor``: megatron-core's optimizers compare that string."""

    def type_(self: Any, dtype: Any = None, *arguments: Any, **named: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *arguments, **named)
        name = original(self)
        return name if name.startswith("torch.cuda") else name.replace("torch.", "torch.cuda.", 1)

    return type_
