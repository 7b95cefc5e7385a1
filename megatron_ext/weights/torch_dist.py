"""Megatron-Core's torch_dist layout, written and read in a stream: one process, no process group, no model.

A folder holds ``.metadata`` (a pickled torch.distributed.checkpoint Metadata), ``metadata.json``, ``common.pt`` and
``__<rank>_<writer>.distcp`` files of ``torch.save`` blobs. A tensor is stored in chunks at offsets of its global
shape; the layers of a model are stacked, so a layer's weight is a chunk of ``[L, …]``.
Source: torch.distributed.checkpoint.filesystem and megatron.core.dist_checkpointing.strategies.torch.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

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
from megatron_ext.weights.files import OpenFile, PlacedFile
from megatron_ext.weights.streams import row_blocks, row_bytes
from megatron_ext.weights.torch_dist_metadata import FORMAT, read_metadata
from megatron_ext.weights.torch_zip import ALIGNMENT, ZipLayout, lay_out, lay_out_tensor

MAX_FILE_BYTES = 4 << 30
CHUNK_BYTES = 64 << 20
"""Most bytes of a chunk: what a reader of torch loads at once, whatever small part of it it wants."""
BLOB_OVERHEAD = 2048
"""Bytes that ``torch.save`` adds to a tensor's own, at most."""
DAMAGED = (RuntimeError, ValueError, LookupError, EOFError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What torch and zipfile raise about damaged files."""


class TorchDistWriter:
    """Lays out every chunk of every weight of ``plan``, takes their rows in any order and from several threads.

    ``folder`` is the iteration's folder, ``dtypes`` the type of each key of ``plan``. ``close`` makes the folder a
    checkpoint; before that every reader refuses it.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(
        self, folder: Path, plan: Iterable[Weight], dtypes: Mapping[str, torch.dtype], architecture: Architecture
    ) -> None:
        folder.mkdir(parents=True)
        self._folder, self._dtypes = folder, dtypes
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._stored: dict[str, list[ChunkStorageMetadata]] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._chunks: dict[tuple[str, tuple[int, ...]], _Chunks] = {}
        self._sizes = [0]
        blobs = [blob for weight in plan for blob in self._lay_out(weight)]
        blobs += [self._extra_state(key) for key in extra_states(architecture)]
        self._files = [PlacedFile(folder / _file_name(i), size) for i, size in enumerate(self._sizes)]
        for file, start, layout in blobs:
            for offset, piece in layout.pieces:
                self._files[file].put(start + offset, piece)
        self._lock = threading.Lock()

    def write(self, weight: Weight, start: int, rows: torch.Tensor) -> None:
        """The rows of ``weight``, of its layer and expert, from ``start`` on."""
        chunks = self._chunks[weight.key, weight.index]
        if rows.dtype != self._dtypes[weight.key] or rows.shape[1:] != weight.own_shape[1:]:
            raise ValueError(f"{weight.key} was announced as {self._dtypes[weight.key]} {weight.own_shape}")
        width = row_bytes(weight.own_shape, rows.dtype)
        first = 0
        while first < len(rows):
            number, row = divmod(start + first, chunks.rows)
            piece = rows[first : first + chunks.rows - row]
            file, place = chunks.places[number]
            self._files[file].put(place + row * width, piece)
            first += len(piece)
        with self._lock:
            chunks.missing -= len(rows)

    def sync(self) -> None:
        """Wait until what was written before this call is on the disk, while other threads go on writing."""
        for file in self._files:
            file.sync()

    def abandon(self) -> None:
        """Let go of the files; what was written is no checkpoint."""
        for file in self._files:
            file.close()

    def close(self) -> None:
        """Check that every row came and write, last and by one rename, the metadata."""
        if missing := [place for place, chunks in self._chunks.items() if chunks.missing]:
            raise ValueError(f"{len(missing)} announced weights were not written whole, the first is {missing[0]}")
        for file in self._files:
            file.close()
        (self._folder / "common.pt").write_bytes(b"".join(piece for _, piece in lay_out({}, "common").pieces))
        (self._folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
        metadata = Metadata(
            state_dict_metadata=self._entries, planner_data={}, storage_data=self._storage, storage_meta=StorageMeta()
        )
        partial = self._folder / ".metadata.partial"
        partial.write_bytes(pickle.dumps(metadata))
        os.replace(partial, self._folder / ".metadata")

    def _lay_out(self, weight: Weight) -> Iterator[tuple[int, int, ZipLayout]]:
        """Place the chunks of ``weight``; gives file, offset and layout of each."""
        dtype, lead = self._dtypes[weight.key], (1,) * len(weight.index)
        known = self._stored.setdefault(weight.key, [])
        self._entries[weight.key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(weight.shape), known)
        blocks = list(row_blocks(weight, dtype, CHUNK_BYTES))
        chunks = self._chunks[weight.key, weight.index] = _Chunks(blocks[0][1], [], weight.own_shape[0])
        for start, count in blocks:
            shape = (*lead, count, *weight.own_shape[1:])
            place = torch.Size((*weight.index, start, *[0] * (len(shape) - len(lead) - 1)))
            layout, data = lay_out_tensor(dtype, shape)
            file, offset = self._blob(MetadataIndex(weight.key, place), layout)
            known.append(ChunkStorageMetadata(place, torch.Size(shape)))
            chunks.places.append((file, offset + data))
            yield file, offset, layout

    def _extra_state(self, key: str) -> tuple[int, int, ZipLayout]:
        """An empty object, as modules of Transformer Engine expect one beside their weights."""
        self._entries[key] = BytesStorageMetadata()
        layout = lay_out([None])
        return *self._blob(MetadataIndex(key), layout), layout

    def _blob(self, index: MetadataIndex, layout: ZipLayout) -> tuple[int, int]:
        if self._sizes[-1] >= MAX_FILE_BYTES:
            self._sizes.append(0)
        file = len(self._sizes) - 1
        start = -(-self._sizes[file] // ALIGNMENT) * ALIGNMENT
        self._sizes[file] = start + layout.size
        self._storage[index] = _StorageInfo(_file_name(file), start, layout.size)
        return file, start


@dataclass
class _Chunks:
    """A weight's chunks: ``rows`` in each but the last, file and offset of the data of each, rows yet to come."""

    rows: int
    places: list[tuple[int, int]]
    missing: int


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"


def extra_states(architecture: Architecture) -> Iterator[str]:
    """Keys of the (empty) objects that modules keep beside their weights: megatron-core's own linear layers, and those,
    the attention and the unfused norms of Transformer Engine.
    """
    layers, experts = architecture.num_layers, architecture.num_moe_experts
    modules = [f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "core_attention")]
    modules += [f"self_attention.{name}" for name in ("q_layernorm", "k_layernorm") if architecture.qk_layernorm]
    modules += ["pre_mlp_layernorm"] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    if architecture.moe_shared_expert_intermediate_size:
        modules += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    for layer in range(layers):
        for module in modules:
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for expert in range(experts or 0):
            for module in ("linear_fc1", "linear_fc2"):
                place = f"shard_{layer}.{expert}_{layers}.{experts}"
                yield f"decoder.layers.mlp.experts.experts.{module}._extra_state/{place}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


class TorchDistReader:
    """Reads any region of any tensor, whatever the tensor- and pipeline-parallel sizes it was saved at.

    Several threads may read at once. A chunk that lies as torch saves it is read piece by piece; another one is
    loaded whole by torch.

    Raises:
        CheckpointError: the folder is not a torch_dist checkpoint, or a file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, OpenFile] = {}
        self._starts: dict[tuple[str, int], int | None] = {}
        self._loaded: dict[tuple[str, int], torch.Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._chunks: dict[str, _ChunkIndex] = {}
        metadata = read_metadata(folder)
        self._storage = metadata.storage_data or {}
        try:
            for key, entry in metadata.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    self._add(key, entry)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / '.metadata'} is damaged: {error}") from None

    def rows(self, weight: Weight, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``weight``, of its layer and expert, from ``start`` on."""
        own = (count, *weight.own_shape[1:])
        begin = (*weight.index, start, *[0] * (len(own) - 1))
        return self.read(weight.key, begin, (*[1] * len(weight.index), *own)).reshape(own)

    def read(self, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The region of ``shape`` that begins at ``start`` of the tensor ``key``."""
        region, filled = None, 0
        for chunk in self._chunks[key].near(start, shape):
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            part = self._part(key, chunk, _box(low, high, chunk.offsets))
            if tuple(part.shape) == shape:
                return part
            region = part.new_empty(shape) if region is None else region
            region[_box(low, high, start)] = part
            filled += part.numel()
        if region is None or filled != prod(shape):
            raise CheckpointError(f"{self._folder} holds only a part of {key}; the checkpoint was not saved whole")
        return region

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def _add(self, key: str, entry: TensorStorageMetadata) -> None:
        for chunk in entry.chunks:
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if min(chunk.offsets, default=0) < 0 or any(e > n for e, n in zip(ends, entry.size, strict=True)):
                raise ValueError(f"{key} has a chunk at {tuple(chunk.offsets)} beyond its shape {tuple(entry.size)}")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{key} has no type")
        self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype
        self._chunks[key] = _ChunkIndex(entry.chunks)

    def _part(self, key: str, chunk: ChunkStorageMetadata, box: tuple[slice, ...]) -> torch.Tensor:
        """The part ``box`` of a chunk."""
        place = self._storage.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise CheckpointError(f"{self._folder / '.metadata'} does not place {key} at {tuple(chunk.offsets)}")
        path = self._folder / place.relative_path
        try:
            file = self._open(path)
            blob = (path.name, place.offset)
            if blob not in self._starts:
                self._starts[blob] = _data_start(file, place, self.dtypes[key], tuple(chunk.sizes))
            if (start := self._starts[blob]) is None:
                return self._load(file, place, self.dtypes[key], tuple(chunk.sizes))[box]
            return _read_box(file, start, self.dtypes[key], tuple(chunk.sizes), box)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; {key} was in it") from None
        except (*DAMAGED, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path} is truncated or damaged: {key} cannot be read ({reason})") from None

    def _open(self, path: Path) -> OpenFile:
        with self._lock:
            return self._files.get(path.name) or self._files.setdefault(path.name, OpenFile(path))

    def _load(self, file: OpenFile, place: _StorageInfo, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A chunk that another version of torch wrote, as a whole; the last two are kept."""
        with self._lock:
            blob = (file.path.name, place.offset)
            if blob not in self._loaded:
                while len(self._loaded) > 1:
                    del self._loaded[next(iter(self._loaded))]
                self._loaded[blob] = _load(file.section(place.offset, place.length), dtype, shape)
            return self._loaded[blob]


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


class _ChunkIndex:
    """The chunks of a tensor by their place on its first axes, where every chunk is 1 long: layer, maybe expert."""

    def __init__(self, chunks: list[ChunkStorageMetadata]) -> None:
        axes = min((len(chunk.sizes) for chunk in chunks), default=0)
        self._lead = next((axis for axis in range(axes) if any(chunk.sizes[axis] != 1 for chunk in chunks)), axes)
        self._chunks = chunks
        self._placed: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in chunks:
            self._placed.setdefault(tuple(chunk.offsets[: self._lead]), []).append(chunk)

    def near(self, start: tuple[int, ...], shape: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """All chunks that overlap the region, and maybe others."""
        if any(size != 1 for size in shape[: self._lead]):
            return self._chunks
        return self._placed.get(tuple(start[: self._lead]), [])


def _data_start(file: OpenFile, place: _StorageInfo, dtype: torch.dtype, shape: tuple[int, ...]) -> int | None:
    """Where the chunk's numbers begin in its file, if it lies there as torch saves it; else None.

    Raises:
        EOFError: the file ends before the chunk does.
    """
    layout, data = lay_out_tensor(dtype, shape)
    if place.length != layout.size:
        return None
    found = [file.bytes(place.offset + offset, len(piece)) for offset, piece in layout.pieces]
    return place.offset + data if layout.is_laid_out_in(found) else None


def _read_box(
    file: OpenFile, start: int, dtype: torch.dtype, shape: tuple[int, ...], box: tuple[slice, ...]
) -> torch.Tensor:
    """The part ``box`` of a tensor of ``shape`` whose numbers begin at ``start``; reads from its first to its last."""
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(part.start * stride for part, stride in zip(box, strides, strict=True))
    last = sum((part.stop - 1) * stride for part, stride in zip(box, strides, strict=True))
    span = torch.empty(last + 1 - first, dtype=dtype)
    file.fill(start + first * dtype.itemsize, span)
    return span.as_strided([part.stop - part.start for part in box], strides)


def _load(blob: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that ``torch.save`` wrote.

    Raises:
        ValueError: it is damaged, or not of this type and shape.
    """
    with zipfile.ZipFile(blob) as archive:  # checks checksums, which torch does not
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"{broken} is damaged")
    blob.seek(0)
    tensor = torch.load(blob, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        raise ValueError("it is not what .metadata says")
    return tensor
