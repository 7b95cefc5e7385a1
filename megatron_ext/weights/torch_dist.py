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
from megatron_ext.families.base import Architecture, Weight

MAX_FILE_BYTES = 4 << 30
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

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        folder.mkdir(parents=True)
        self._folder, self._architecture = folder, architecture
        self._file: BinaryIO | None = None
        self._name, self._files = "", 0
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """Write ``rows`` of ``weight``, from row ``start`` on, as one chunk."""
        entry = self._entries.setdefault(
            weight.key, TensorStorageMetadata(TensorProperties(dtype=rows.dtype), torch.Size(weight.shape), [])
        )
        place = torch.Size((*weight.index, start, *[0] * (rows.ndim - 1)))
        chunk = rows[(None,) * len(weight.index)]
        self._blob(MetadataIndex(weight.key, place), _alone(chunk))
        entry.chunks.append(ChunkStorageMetadata(place, chunk.shape))

    def close(self) -> None:
        """Write the extra states and, last, by one rename, the metadata."""
        for key in extra_states(self._architecture):
            self._extra_state(key)
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

    def _extra_state(self, key: str) -> None:
        """An empty object, as modules of Transformer Engine expect one beside their weights."""
        self._blob(MetadataIndex(key), [None])
        self._entries[key] = BytesStorageMetadata()

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


def extra_states(architecture: Architecture) -> Iterator[str]:
    """Keys of the (empty) objects that modules keep beside their weights: megatron-core's own linear layers, and those,
    the attention and the unfused norms of Transformer Engine.
    """
    layers, experts = architecture.num_layers, architecture.num_moe_experts
    modules = [f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "core_attention")]
    modules += [f"self_attention.{name}" for name in ("q_layernorm", "k_layernorm") if architecture.qk_layernorm]
    modules += ["pre_mlp_layernorm"] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    for layer in range(layers):
        for module in modules:
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for expert in range(experts or 0):
            for module in ("linear_fc1", "linear_fc2"):
                place = f"shard_{layer}.{expert}_{layers}.{experts}"
                yield f"decoder.layers.mlp.experts.experts.{module}._extra_state/{place}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


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
        self._last: tuple[_StorageInfo | None, torch.Tensor | None] = (None, None)

    def rows(self, weight: Weight, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``weight``, of its layer and expert, from ``start`` on."""
        own = (count, *weight.own_shape[1:])
        begin = (*weight.index, start, *[0] * (len(own) - 1))
        return self.read(weight.key, begin, (*[1] * len(weight.index), *own)).reshape(own)

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
        if place is self._last[0]:
            return self._last[1]
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
        self._last = place, blob
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
