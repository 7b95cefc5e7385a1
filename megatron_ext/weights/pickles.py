"""Files of ``torch.save`` from strangers: loaded as data, never as programs.

A pickle may call any function while it is loaded. So only tensors, containers and the names in ``HARMLESS`` are let in,
and of those names nothing runs, either: they become placeholders. Whatever else a file wants is refused by name.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import (
    add_safe_globals,
    clear_safe_globals,
    get_safe_globals,
    get_unsafe_globals_in_checkpoint,
)

from megatron_ext.errors import SourceError, UntrustedPickleError


class Placeholder:
    """Stands in a loaded file for an object of a class whose value nobody here reads."""

    def __new__(cls, *args: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        """Whatever the object was made of is dropped."""

    def __setstate__(self, state: Any) -> None:
        """Whatever the object held is dropped."""


MEGATRON_ENUMS = (
    "enums.ModelType", "enums.Fp8Recipe", "enums.Fp4Recipe", "transformer.enums.ModelType",
    "transformer.enums.AttnBackend", "transformer.enums.AttnMaskType", "transformer.enums.AttnType",
    "transformer.enums.LayerType", "transformer.enums.CudaGraphScope", "rerun_state_machine.RerunDiagnostic",
    "rerun_state_machine.RerunMode", "rerun_state_machine.RerunState", "optimizer.optimizer_config.OptimizerConfig",
    "optimizer.optimizer_config.AdamOptimizerConfig", "optimizer.optimizer_config.SGDOptimizerConfig",
    "transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
)  # fmt: skip
"""Classes of megatron.core that the ``args`` of a Megatron-LM checkpoint hold."""
BEFORE_1_6 = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How files of torch.save begin that are no zip: with torch's number for them."""
DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    AssertionError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What torch and zipfile raise for a file that is not whole."""
CHECKED_BYTES = 1 << 20
"""Read at once to compute checksums."""
NUMPY = ("_reconstruct", "scalar")
HARMLESS: dict[str, Any] = {
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": SimpleNamespace,
    **dict.fromkeys((f"megatron.core.{name}" for name in MEGATRON_ENUMS), Placeholder),
    **dict.fromkeys((f"megatron.{place}model.enums.ModelType" for place in ("", "legacy.")), Placeholder),
    **dict.fromkeys((f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in NUMPY), Placeholder),
    **dict.fromkeys(("numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType"), Placeholder),
    **dict.fromkeys(("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath"), Placeholder),
    **dict.fromkeys(("signal.Signals", "signal.SIGTERM", "signal.SIGINT"), Placeholder),
    **dict.fromkeys(("signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGHUP"), Placeholder),
    "_io.BytesIO": Placeholder,
}
"""Name in a pickle -> what it becomes. Settings and random states; the weights themselves need none of them."""


def load_pickle(path: Path, *, trust: bool = False) -> Any:
    """What ``torch.save`` wrote to ``path``; tensors are backed by the file's pages as long as nobody copies them.
    If torch before 1.6 wrote it, they are in memory. Before that the whole file is read once in this process, and held
    against the checksums that it carries; torch itself does not look at them.

    ``trust`` loads the file whatever it wants, as a program: only for files whose writer is trusted.

    Raises:
        UntrustedPickleError: the file wants a function or class that is not in ``HARMLESS``; names it.
        SourceError: it is missing, truncated, damaged, or no file of ``torch.save``.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(BEFORE_1_6))
        zipped = magic.startswith(b"PK\x03\x04")
        if not zipped and magic != BEFORE_1_6:
            raise SourceError(f"{path} is damaged, or torch did not write it; download it again")
        if trust:
            if zipped:
                _check_sums(path)
            return torch.load(os.fspath(path), map_location="cpu", mmap=zipped, weights_only=False)
        with _only_harmless():
            if zipped and (unsafe := sorted(get_unsafe_globals_in_checkpoint(os.fspath(path)))):
                raise _untrusted(path, ", ".join(unsafe[:3]))
            if zipped:
                _check_sums(path)
            return torch.load(os.fspath(path), map_location="cpu", mmap=zipped, weights_only=True)
    except FileNotFoundError:
        raise SourceError(f"{path} is missing") from None
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise _untrusted(path, wanted[1]) from None
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        raise _untrusted(path, f"something odd ({reason.partition(chr(10))[0]})") from None
    except (AttributeError, ImportError) as error:
        raise SourceError(f"{path} needs a class that is not installed here: {error}") from None
    except PermissionError:
        raise
    except DAMAGE as error:
        raise SourceError(f"{path} is truncated or damaged ({str(error).partition(chr(10))[0]})") from None


def _check_sums(path: Path) -> None:
    """Hold every record of the zip file against its checksum, where it has one: 0 stands for none.

    Raises:
        BadZipFile: a record differs; names it.
    """
    status = path.stat()
    _checked_sums(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _checked_sums(path: Path, *_state: int) -> None:
    with zipfile.ZipFile(path) as records:
        for record in (record for record in records.infolist() if record.CRC):
            with records.open(record) as content:
                while content.read(CHECKED_BYTES):
                    pass


@contextmanager
def _only_harmless() -> Iterator[None]:
    """Let in the names of ``HARMLESS``, and none that some library has registered with torch meanwhile."""
    registered = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([(value, name) for name, value in HARMLESS.items()])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(registered)


def _untrusted(path: Path, wants: str) -> UntrustedPickleError:
    return UntrustedPickleError(
        f"{path} is a pickle that wants {wants}, which is not among the harmless names of a checkpoint; it was not "
        "loaded, because it could run any program. If you trust whoever wrote it, pass --trust-pickle"
    )
