"""What a torch_dist folder says about itself: its format, and a pickled table of its tensors, read without trust."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from megatron_ext.errors import CheckpointError, UntrustedPickleError
from megatron_ext.weights.pickles import Placeholder

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
KNOWN: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (metadata, "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata"),
            (metadata, "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING"),
            (planner, "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData"),
            (filesystem, "_StorageInfo _StoragePrefix"),
        )
        for name in names.split()
    },
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
}
OURS = ("torch.", "megatron.", "pathlib.", "collections.", "datetime.", "uuid.")
"""Beginnings of names that some version of torch or megatron-core may put there; none of them is run."""


class _Unpickler(pickle.Unpickler):
    """Builds the table's own classes only; whatever else torch or megatron-core put there becomes a placeholder."""

    def find_class(self, module: str, name: str) -> Any:
        if known := KNOWN.get((module, name)):
            return known
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(OURS):
            return Placeholder
        raise UntrustedPickleError(f"{module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """The table of the checkpoint's tensors.

    Raises:
        CheckpointError: the folder is not a whole torch_dist checkpoint.
        UntrustedPickleError: the table, which is a pickle, wants what could run a program; names it.
    """
    path = folder / ".metadata"
    try:
        backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise CheckpointError(f"{folder} has no {missing}; it is not a whole torch_dist checkpoint") from None
    except UntrustedPickleError as error:
        raise UntrustedPickleError(
            f"{path} is a pickle that wants {error}, which no checkpoint of megatron-core holds; it was not loaded, "
            "because it could run any program: do not use this checkpoint"
        ) from None
    except (
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        MemoryError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise CheckpointError(f"{path} or metadata.json beside it is damaged: {error}") from None
    if backend != FORMAT["sharded_backend"] or not isinstance(found, Metadata):
        raise CheckpointError(f"{folder} is saved as {backend!r}; Available: {FORMAT['sharded_backend']}")
    return found
