"""Weights of a Hugging Face folder: read from single or sharded safetensors, written as sharded safetensors.

Source: the safetensors format, https://github.com/huggingface/safetensors#format: eight bytes of header length, a JSON
header (name -> dtype, shape, offsets), then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from megatron_ext.errors import SourceError
from megatron_ext.families.base import Part
from megatron_ext.hf_folder import INDEX, weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONFIG_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def short_name(dtypes: set[torch.dtype]) -> str:
    """``bf16``, ``fp16``, ``fp32``, or ``mixed`` for several types (or another one)."""
    names = {dtype: name for name, dtype in SHORT.items()}
    return names.get(next(iter(dtypes)), "mixed") if len(dtypes) == 1 else "mixed"


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def open_safetensors(path: Path) -> safe_open:
    """The open file, its header read.

    Raises:
        SourceError: it is truncated or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} is truncated or damaged ({error}); download the model again") from None


class SafetensorsReader:
    """The weights of a Hugging Face folder; headers are read at once, a tensor's bytes when it is asked for.

    Raises:
        SourceError: a file is missing, truncated or damaged, a tensor that the index names is not in its file, or a
            tensor is of a type that is not supported. Names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, safe_open] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._place: dict[str, str] = {}
        for path in weight_files(folder):
            self._open(path)
        self._check_index()

    def get(self, name: str) -> torch.Tensor:
        """The tensor, backed by the file's pages as long as nobody copies it."""
        place = self._place[name]
        try:
            return self._files[place].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{name} cannot be read from {self._folder / place}: {error}") from None

    def rows(self, part: Part, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``part`` from ``start`` on, backed by the file's pages as long as nobody copies them."""
        tensor = self.get(part.name)
        return (tensor if part.index is None else tensor[part.index])[start : start + count]

    def _open(self, path: Path) -> None:
        file = self._files[path.name] = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if name in self._place:
                raise SourceError(f"{name} is in {self._place[name]} and again in {path.name} of {self._folder}")
            view = file.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise SourceError(
                    f"{name} in {path} is of type {view.get_dtype()}; Available: {', '.join(sorted(DTYPES))} "
                    "(export the weights unquantized first)"
                )
            self._place[name] = path.name
            self.tensors[name] = TensorInfo(DTYPES[view.get_dtype()], tuple(view.get_shape()))

    def _check_index(self) -> None:
        index = self._folder / INDEX
        if not index.exists():
            return
        for name, place in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if self._place.get(name) != place:
                raise SourceError(f"{index} says that {name} is in {place}, but it is not; download the model again")


class SafetensorsWriter:
    """Writes the weights of a model as ``model.safetensors``, or as shards with an index, in bounded memory.

    ``tensors`` says what will come, in the order of the shards; each is written at its place when it comes. No shard
    holds more than ``max_shard_size`` bytes of tensors, unless one tensor alone does.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_size: int) -> None:
        self._folder, self._tensors = folder, tensors
        self._place: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, BinaryIO] = {}
        self._missing = {name: prod(info.shape) for name, info in tensors.items()}
        shards = _split(tensors, max_shard_size)
        for number, names in enumerate(shards, start=1):
            single = len(shards) == 1
            path = folder / ("model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            self._lay_out(path, names)
        if len(shards) > 1:
            self._write_index()

    def write(self, part: Part, start: int, rows: torch.Tensor) -> None:
        """Write rows of ``part`` from ``start`` on, of exactly the announced type and shape."""
        info = self._tensors[part.name]
        if (rows.dtype, tuple(rows.shape[1:])) != (info.dtype, part.shape[1:]):
            raise ValueError(f"{part.name} was announced as {info}, not {rows.dtype} {tuple(rows.shape)}")
        path, offset = self._place[part.name]
        file = self._open.get(path) or self._open.setdefault(path, path.open("r+b"))
        row = (part.index or 0) * part.shape[0] + start
        file.seek(offset + row * prod(part.shape[1:]) * info.dtype.itemsize)
        file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy())
        self._missing[part.name] -= rows.numel()

    def close(self) -> None:
        """Close the files and check that everything announced was written."""
        for file in self._open.values():
            file.close()
        if missing := sorted(name for name, left in self._missing.items() if left):
            raise ValueError(f"{len(missing)} announced weights were not written whole, the first is {missing[0]}")

    def _lay_out(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, starts = 0, {}
        for name in sorted(names, key=lambda n: -self._tensors[n].dtype.itemsize):  # stable; keeps every tensor aligned
            info = self._tensors[name]
            starts[name] = offset
            end = offset + info.nbytes
            header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        self._place |= {name: (path, 8 + len(text) + start) for name, start in starts.items()}

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in self._tensors.values())},
            "weight_map": {name: path.name for name, (path, _) in sorted(self._place.items())},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards
