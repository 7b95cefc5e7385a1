"""Megatron-Core's torch_dist layout, written and read in a stream: one process, no process group, no model.

A folder holds ``.metadata`` (a pickled torch.distributed.checkpoint Metadata), ``metadata.json``, ``common.pt`` and
``__<rank>_<writer>.distcp`` files of ``torch.save`` blobs. A tensor is stored in chunks at offsets of its global
shape; the layers of a model are stacked, so a layer's weight is a chunk of ``[L, …]``.
Source: torch.distributed.checkpoint.filesystem and megatron.core.dist_checkpointing.strategies.torch.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext.errors import CheckpointError

MAX_FILE_BYTES = 4 << 30
MAX_CHUNK_BYTES = 64 << 20
BLOB_OVERHEAD = 2048
"""Bytes that ``torch.save`` adds to a tensor's own, at most."""

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWriter:
    """Writes chunks as they come; ``close`` makes the folder a checkpoint."""

    def __init__(self, folder: Path, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> None:
        folder.mkdir(parents=True)
        self._folder, self._max_chunk_bytes = folder, max_chunk_bytes
        self._file: BinaryIO | None = None
        self._name, self._files = "", 0
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def tensor(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], part: torch.Tensor) -> None:
        """Write ``part``, at ``offset`` of the tensor ``key`` of global ``shape``, in pieces of bounded size."""
        entry = self._entries.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(shape), [])
        )
        for start, piece in self._pieces(part):
            place = torch.Size(a + b for a, b in zip(offset, start, strict=True))
            self._blob(MetadataIndex(key, place), _alone(piece))
            entry.chunks.append(ChunkStorageMetadata(place, piece.shape))

    def extra_state(self, key: str) -> None:
        """An empty object, as modules of Transformer Engine expect one beside their weights."""
        self._blob(MetadataIndex(key), [None])
        self._entries[key] = BytesStorageMetadata()

    def close(self) -> None:
        """Write the metadata, last, by one rename."""
        if self._file:
            self._file.close()
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
        metadata = Metadata(
            state_dict_metadata=self._entries, planner_data={}, storage_data=self._storage, storage_meta=StorageMeta()
        )
        partial = self._folder / ".metadata.partial"
        partial.write_bytes(pickle.dumps(metadata))
        os.replace(partial, self._folder / ".metadata")

    def _pieces(self, part: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        axis = next((i for i, size in enumerate(part.shape) if size > 1), None)
        if axis is None or part.nbytes <= self._max_chunk_bytes:
            yield (0,) * part.ndim, part
            return
        rows = max(1, self._max_chunk_bytes * part.shape[axis] // part.nbytes)
        for start in range(0, part.shape[axis], rows):
            length = min(rows, part.shape[axis] - start)
            yield tuple(start if i == axis else 0 for i in range(part.ndim)), part.narrow(axis, start, length)

    def _blob(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.tell() >= MAX_FILE_BYTES:
            if self._file:
                self._file.close()
            self._name = f"__0_{self._files}.distcp"
            self._files += 1
            self._file = (self._folder / self._name).open("wb")
        start = self._file.tell()
        torch.save(value, self._file)
        self._storage[index] = _StorageInfo(self._name, start, self._file.tell() - start)


def _alone(piece: torch.Tensor) -> torch.Tensor:
    """``piece`` with a storage of its own size: ``torch.save`` writes whole storages."""
    piece = piece.contiguous()
    return piece if piece.untyped_storage().nbytes() == piece.nbytes else piece.clone()


class TorchDistReader:
    """Reads any region of any tensor, whatever the tensor- and pipeline-parallel sizes it was saved at.

    Raises:
        CheckpointError: the folder is not a torch_dist checkpoint, or a file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        metadata = self._read_metadata()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.shapes[key] = tuple(entry.size)
                self.dtypes[key] = entry.properties.dtype
                self._chunks[key] = entry.chunks
        self._storage = metadata.storage_data or {}

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The region of ``shape`` that begins at ``start`` of the tensor ``key``."""
        region, filled = None, 0
        for chunk in self._chunks[key]:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            part = self._blob(key, chunk)[_box(low, high, chunk.offsets)]
            if tuple(part.shape) == shape:
                return part
            region = part.new_empty(shape) if region is None else region
            region[_box(low, high, start)] = part
            filled += part.numel()
        if region is None or filled != prod(shape):
            raise CheckpointError(f"{self._folder} holds only a part of {key}; the checkpoint was not saved whole")
        return region

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _blob(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._storage.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise CheckpointError(f"{self._folder / '.metadata'} does not place {key} at {tuple(chunk.offsets)}")
        path = self._folder / place.relative_path
        try:
            file = self._files.get(path.name) or self._files.setdefault(path.name, path.open("rb"))
            file.seek(place.offset)
            content = file.read(place.length)
            if len(content) < place.length or not content.startswith(b"PK"):  # torch.save writes zip files
                raise EOFError("not a blob of torch.save")
            blob = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; {key} was in it") from None
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path} is truncated or damaged: {key} cannot be read ({reason})") from None
        if not isinstance(blob, torch.Tensor) or blob.shape != chunk.sizes:
            raise CheckpointError(f"{path} is damaged: {key} at {tuple(chunk.offsets)} is not what .metadata says")
        return blob

    def _read_metadata(self) -> Metadata:
        path = self._folder / ".metadata"
        try:
            backend = json.loads((self._folder / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
            metadata = pickle.loads(path.read_bytes())
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise CheckpointError(f"{self._folder} has no {missing}; it is not a whole torch_dist checkpoint") from None
        except (
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            pickle.UnpicklingError,
            AttributeError,
            ImportError,
        ) as error:
            raise CheckpointError(f"{path} or metadata.json beside it is damaged: {error}") from None
        if backend != "torch_dist" or not isinstance(metadata, Metadata):
            raise CheckpointError(f"{self._folder} is saved as {backend!r}; Available: torch_dist")
        return metadata


def _box(low: list[int], high: list[int], origin: Any) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
