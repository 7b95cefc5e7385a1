"""The files of ``torch.save``, laid out before their tensors are known: every tensor's bytes have a place at once.

``torch.save`` writes a zip of uncompressed records: ``data.pkl`` (the pickled structure, with storages left out), one
record ``data/KEY`` for each storage, aligned to 64 bytes, and small ones about format and byte order. ``lay_out``
gives all of it but the tensors' own bytes, which then go to their places in any order and from any thread. Byte for
byte what torch writes, except that the checksums of the tensors' records stay 0, which torch does not look at.
Source: torch.serialization._save, caffe2/serialize/inline_container.cc and miniz.c of PyTorch.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2
from torch.storage import _dtype_to_storage_type_map

ALIGNMENT = 64
MAX32 = 0xFFFFFFFF
UTF8, SIZES_FOLLOW = 0x0800, 0x0008


@dataclass(frozen=True, eq=False)
class Announced:
    """A tensor whose bytes come later; the same object in two places of a structure is one tensor in both."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ZipLayout:
    """``size`` bytes in all; ``pieces`` are (offset, bytes) of everything but the announced tensors.

    ``places`` is where the bytes of each announced tensor go, contiguous in memory order. ``varying`` are the (offset,
    length) of what torch may write otherwise: checksums, and a fingerprint of them.
    """

    size: int
    pieces: tuple[tuple[int, bytes], ...]
    places: Mapping[Announced, int]
    varying: tuple[tuple[int, int], ...]

    def is_laid_out_in(self, others: Sequence[bytes]) -> bool:
        """Whether a file that holds ``others`` where this one holds its pieces differs in its tensors only."""
        return all(
            len(theirs) == len(ours) and self._masked(offset, theirs) == self._masked(offset, ours)
            for (offset, ours), theirs in zip(self.pieces, others, strict=True)
        )

    def _masked(self, start: int, piece: bytes) -> bytes:
        masked = bytearray(piece)
        for offset, length in self.varying:
            if start <= offset < start + len(piece):
                masked[offset - start : offset - start + length] = bytes(length)
        return bytes(masked)


def lay_out(value: Any, name: str = "archive") -> ZipLayout:
    """The file that ``torch.save(value)`` would write, where ``value`` holds ``Announced`` for its large tensors.

    Tensors proper are written whole among the pieces; objects are pickled as pickle does. ``name`` is the zip's folder:
    torch takes the file's name without its suffix, or ``archive`` when it writes into an open file.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, protocol=2)
    pickler.dump(value)
    zipped = _Zip(name)
    zipped.record("data.pkl", pickled.getvalue())
    zipped.record(".format_version", b"1")
    zipped.record(".storage_alignment", str(ALIGNMENT).encode())
    zipped.record("byteorder", sys.byteorder.encode())
    places = {}
    for storage in pickler.storages.values():
        if isinstance(storage.tensor, Announced):
            places[storage.tensor] = zipped.gap(f"data/{storage.key}", storage.tensor.nbytes)
        else:
            zipped.record(f"data/{storage.key}", bytes(storage.tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    zipped.record("version", b"3\n")
    zipped.varying.append(zipped.record(".data/serialization_id", b"0" * 40))
    zipped.end()
    return ZipLayout(zipped.size, tuple(zipped.pieces), places, tuple(zipped.varying))


@lru_cache(maxsize=256)
def lay_out_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[ZipLayout, int]:
    """The file of one tensor, and where its bytes go."""
    tensor = Announced(dtype, shape)
    layout = lay_out(tensor)
    return layout, layout.places[tensor]


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    tensor: Announced | torch.Tensor


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch does: a call of ``_rebuild_tensor_v2`` on a storage that is named, not written."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.storages: dict[int, _Storage] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = getattr(torch, _dtype_to_storage_type_map()[obj.tensor.dtype])
        return ("storage", kind, obj.key, "cpu", prod(obj.tensor.shape))

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, (Announced, torch.Tensor)):
            return NotImplemented
        storage = self.storages.setdefault(id(obj), _Storage(str(len(self.storages)), obj))
        shape = tuple(obj.shape)
        stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return _rebuild_tensor_v2, (storage, 0, shape, stride, False, OrderedDict())


class _Zip:
    """The bytes of a zip file around gaps."""

    def __init__(self, name: str) -> None:
        self._name, self._directory, self._checksums = name, bytearray(), []
        self.pieces: list[tuple[int, bytes]] = []
        self.varying: list[tuple[int, int]] = []
        self.size = 0

    def record(self, name: str, content: bytes) -> tuple[int, int]:
        """A record with its content; returns where it is, and its length."""
        self._add(self._header(name, len(content)) + content)
        offset = self.size - len(content)
        self._finish(name, len(content), zlib.crc32(content))
        return offset, len(content)

    def gap(self, name: str, size: int) -> int:
        """A record whose ``size`` bytes come later; returns where."""
        self._add(self._header(name, size))
        offset = self.size
        self.size += size
        self._finish(name, size, 0)
        return offset

    def end(self) -> None:
        """The directory of all records, in zip64 as torch always writes it."""
        start, size, count = self.size, len(self._directory), len(self._checksums)
        self.varying += [(start + offset, 4) for offset in self._checksums]
        self._add(bytes(self._directory))
        end64 = self.size
        self._add(struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start))
        self._add(struct.pack("<4sLQL", b"PK\6\7", 0, end64, 1))
        few, small, near = min(count, 0xFFFF), min(size, MAX32), min(start, MAX32)
        self._add(struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, few, few, small, near, 0))

    def _header(self, name: str, size: int) -> bytes:
        self._start = self.size
        path = f"{self._name}/{name}".encode()
        extra = _zip64((size, 0), self._start)  # as miniz does: the second size is not known yet
        begin = self._start + 30 + len(path) + len(extra) + 4
        padding = ALIGNMENT - begin % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        head = (b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(path), len(extra))
        return struct.pack("<4sHHHHHLLLHH", *head) + path + extra

    def _finish(self, name: str, size: int, crc: int) -> None:
        path, extra, small = f"{self._name}/{name}".encode(), _zip64((size, size), self._start), min(size, MAX32)
        self._checksums.append(len(self._directory) + 16)
        if size:
            self.varying.append((self.size + 4, 4))
            self._add(struct.pack("<4sLQQ" if extra else "<4sLLL", b"PK\7\10", crc, size, size))
        start = min(self._start, MAX32)
        entry = (b"PK\1\2", 0, 0, _flags(size), 0, 0, 0, crc, small, small, len(path), len(extra), 0, 0, 0, 0, start)
        fixed = struct.pack("<4sHHHHHHLLLHHHHHLL", *entry)
        self._directory += fixed + path + extra

    def _add(self, content: bytes) -> None:
        if self.pieces and self.pieces[-1][0] + len(self.pieces[-1][1]) == self.size:
            offset, before = self.pieces.pop()
            self.pieces.append((offset, before + content))
        else:
            self.pieces.append((self.size, content))
        self.size += len(content)


def _flags(size: int) -> int:
    return UTF8 | (SIZES_FOLLOW if size else 0)


def _zip64(sizes: tuple[int, int], start: int) -> bytes:
    """Extra field of a record that is too large, or lies too far, for 32 bits."""
    fields = [*(sizes if sizes[0] >= MAX32 else ()), *((start,) if start >= MAX32 else ())]
    return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
