"""Idxmap files (``PREFIX.bin`` + ``PREFIX.idx``): a streaming writer and a memory-mapped reader, numpy only.

Byte for byte what megatron-core writes for text: one sequence a document, no modes.
Source: ``megatron.core.datasets.indexed_dataset`` (header ``MMIDIDX``, version 1, little endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_ext.errors import DatasetFormatError, SourceError, VocabularyError

HEADER = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
CODES: dict[str, int] = {
    "uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8,
}  # fmt: skip
PREAMBLE = len(HEADER) + 1 + 8 + 8
"""Bytes before the first array of an index: header, type code, number of sequences, number of document bounds."""
INDEX_PART = 1 << 20
"""Documents whose entries of the index are written at once."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of token ids on disk: uint16 below 65,500 ids (megatron-core's rule), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class IdxmapWriter:
    """Writer of one idxmap: batches are appended to ``.bin``; leaving the ``with`` block without error writes ``.idx``.

    An idxmap without ``.idx`` is one whose writer was killed; a new writer starts over.
    """

    def __init__(self, prefix: Path, dtype: np.dtype | type) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        if self.dtype.name not in CODES:
            raise ValueError(f"an idxmap cannot hold {self.dtype.name}")
        self._lengths: list[np.ndarray] = []
        index_file(prefix).unlink(missing_ok=True)
        self._bin = data_file(prefix).open("wb")

    def add(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            values: (T,) all documents' values one after the other.
            lengths: (N,) length of each document; they sum to T.

        Raises:
            DatasetFormatError: a document is empty, which megatron-core cannot read.
            VocabularyError: a value does not fit the type on disk.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if int(lengths.sum()) != len(values):
            raise ValueError(f"lengths sum to {int(lengths.sum())}, but there are {len(values)} values")
        if len(lengths) == 0:
            return
        if lengths.min() < 1:
            number = sum(map(len, self._lengths)) + int(lengths.argmin())
            raise DatasetFormatError(f"document {number} of {self.prefix} is empty; an idxmap cannot hold it")
        limits = np.iinfo(self.dtype)
        if values.min() < limits.min or values.max() > limits.max:
            worst = int(values.max() if values.max() > limits.max else values.min())
            raise VocabularyError(f"id {worst} does not fit {self.dtype.name}, the type of {data_file(self.prefix)}")
        self._bin.write(np.ascontiguousarray(values, dtype=self.dtype.newbyteorder("<")).data)
        self._lengths.append(lengths.astype("<i4"))

    def __enter__(self) -> IdxmapWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        if kind is None:
            lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, dtype="<i4")
            write_index(self.prefix, self.dtype, lengths)


def write_index(prefix: Path, dtype: np.dtype | type, lengths: np.ndarray) -> None:
    """Write ``PREFIX.idx`` for documents of ``lengths`` (N,) values of ``dtype``, in memory of a fixed size.

    The arrays of an index: int32 length and int64 byte position of each sequence, int64 bounds of the documents.
    """
    count, itemsize = len(lengths), np.dtype(dtype).itemsize
    with index_file(prefix).open("wb") as file:
        file.write(HEADER + struct.pack("<BQQ", CODES[np.dtype(dtype).name], count, count + 1))
        for part in _parts(count):
            file.write(np.ascontiguousarray(lengths[part], dtype="<i4").data)
        before = 0
        for part in _parts(count):
            ends = np.cumsum(lengths[part], dtype="<i8")
            file.write(((ends - lengths[part] + before) * itemsize).data)
            before += int(ends[-1])
        for part in _parts(count + 1):
            file.write(np.arange(part.start, part.stop, dtype="<i8").data)


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, INDEX_PART):
        yield slice(start, min(start + INDEX_PART, count))


class Idxmap:
    """Reader of one idxmap; everything is memory-mapped, so opening is O(1) and processes share the pages.

    Attributes:
        values: (T,) every document's values one after the other, read only.
        lengths: (N,) int32, values in each sequence.
        starts: (N,) int64, position in ``values`` where each sequence starts.
        document_bounds: int64, numbers of the sequences that start a document, and at the end N.

    Raises:
        SourceError: a file is missing, is no idxmap, or is shorter than its index says.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index, data = index_file(prefix), data_file(prefix)
        for path in (index, data):
            if not path.is_file():
                raise SourceError(f"{path} does not exist; an idxmap is a .bin and an .idx file")
        with index.open("rb") as file:
            preamble = file.read(PREAMBLE)
        names = {code: name for name, code in CODES.items()}
        if len(preamble) < PREAMBLE or not preamble.startswith(HEADER) or preamble[len(HEADER)] not in names:
            raise SourceError(f"{index} is not the index of an idxmap (version 1)")
        code, count, bounds = struct.unpack("<BQQ", preamble[len(HEADER) :])
        self.dtype = np.dtype(names[code]).newbyteorder("<")
        if (size := index.stat().st_size) < (needed := PREAMBLE + 12 * count + 8 * bounds):
            raise SourceError(f"{index} is truncated: {size} bytes of {needed}; write the dataset again")
        raw = np.memmap(index, mode="r", dtype=np.uint8)
        self.lengths = raw[PREAMBLE : PREAMBLE + 4 * count].view("<i4")
        pointers = raw[PREAMBLE + 4 * count : PREAMBLE + 12 * count].view("<i8")
        self.starts: np.ndarray = np.asarray(pointers) // self.dtype.itemsize
        self.document_bounds = raw[PREAMBLE + 12 * count : PREAMBLE + 12 * count + 8 * bounds].view("<i8")
        held = data.stat().st_size
        needed = int(self.starts[-1] + self.lengths[-1]) * self.dtype.itemsize if count else 0
        if held < needed:
            raise SourceError(f"{data} is truncated: {held} bytes of {needed}; write the dataset again")
        self.values: np.ndarray = np.memmap(data, mode="r", dtype=self.dtype) if held else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        """Sequence ``number``, a read-only view."""
        start = int(self.starts[number])
        return self.values[start : start + int(self.lengths[number])]


def data_file(prefix: Path) -> Path:
    """``PREFIX.bin``."""
    return prefix.with_name(prefix.name + ".bin")


def index_file(prefix: Path) -> Path:
    """``PREFIX.idx``."""
    return prefix.with_name(prefix.name + ".idx")
