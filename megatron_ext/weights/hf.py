"""Weights of a Hugging Face folder, read from single or sharded safetensors, or from pickles (``hf_bin``).

Source: the safetensors format, https://github.com/huggingface/safetensors#format: eight bytes of header length, a JSON
header (name -> dtype, shape, offsets), then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_ext.errors import SourceError
from megatron_ext.families.base import Part
from megatron_ext.hf_folder import read_index, weight_files, weights_index
from megatron_ext.weights.files import OpenFile, same_bits
from megatron_ext.weights.streams import row_bytes

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
    """``bf16``, ``fp16``, ``fp32``, ``fp64``, or ``mixed`` for several types (or another one)."""
    names = {dtype: name for name, dtype in SHORT.items()} | {torch.float64: "fp64"}
    return names.get(next(iter(dtypes)), "mixed") if len(dtypes) == 1 else "mixed"


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class HFWeights(Protocol):
    """The weights of a Hugging Face model: type and shape of each, and their rows; any thread may ask."""

    tensors: dict[str, TensorInfo]

    def rows(self, part: Part, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``part`` from ``start`` on; not to be written to."""
        ...


def open_weights(folder: Path, *, trust_pickle: bool = False) -> HFWeights:
    """The weights of the folder: its safetensors, or its ``pytorch_model.bin``; ``trust_pickle`` loads any of those.

    Raises:
        SourceError: a file is missing, truncated or damaged, or holds what no weight is; names it.
        UntrustedPickleError: a ``.bin`` file wants a class that could run a program.
    """
    if weight_files(folder)[0].suffix == ".safetensors":
        return SafetensorsReader(folder)
    from megatron_ext.weights.hf_bin import BinReader

    return BinReader(folder, trust_pickle=trust_pickle)


class SafetensorsReader:
    """The weights of a Hugging Face folder; headers are read at once, rows when they are asked for, by any thread.

    Raises:
        SourceError: a file is missing, truncated or damaged, a tensor that the index names is not in its file, or a
            tensor is of a type that is not supported. Names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._place: dict[str, tuple[OpenFile, int]] = {}
        for path in weight_files(folder):
            self._open(path)
        check_index(folder, {name: file.path.name for name, (file, _) in self._place.items()})

    def rows(self, part: Part, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``part`` from ``start`` on."""
        file, offset = self._place[part.name]
        out = torch.empty((count, *part.shape[1:]), dtype=self.tensors[part.name].dtype)
        row = (part.index or 0) * part.shape[0] + start
        try:
            file.fill(offset + row * row_bytes(part.shape, out.dtype), out)
        except (OSError, EOFError) as error:
            raise SourceError(f"{part.name} cannot be read from {file.path}: {error}") from None
        return out

    def _open(self, path: Path) -> None:
        header, start = read_header(path)
        try:
            file = OpenFile(path)
        except OSError as error:
            raise SourceError(f"{path} cannot be opened: {error.strerror}") from None
        for name, entry in header.items():
            if name in self._place:
                other = self._place[name][0].path.name
                raise SourceError(f"{name} is in {other} and again in {path.name} of {self._folder}")
            if entry["dtype"] not in DTYPES:
                raise SourceError(
                    f"{name} in {path} is of type {entry['dtype']}; Available: {', '.join(sorted(DTYPES))} "
                    "(export the weights unquantized first)"
                )
            self._place[name] = file, start + entry["data_offsets"][0]
            self.tensors[name] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))


def open_safetensors(path: Path) -> safe_open:
    """The open file, its header read and checked: lengths, offsets against shapes and sizes, overlaps and holes.

    Raises:
        SourceError: it is truncated or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} is truncated or damaged ({error}); download the model again") from None


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Entry (dtype, shape, data_offsets) of every tensor of a safetensors file, and where their bytes begin.

    Raises:
        SourceError: it is truncated or damaged.
    """
    with open_safetensors(path):
        pass
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is truncated or damaged ({error}); download the model again") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in its header twice")
    return found


def check_index(folder: Path, files: Mapping[str, str]) -> None:
    """Every tensor lies where the folder's index, if it has one, says; ``files`` is where each was found.

    Raises:
        SourceError: names the first that does not.
    """
    if (index := weights_index(folder)) is None:
        return
    for name, place in read_index(index).items():
        if files.get(name) != place:
            raise SourceError(f"{index} says that {name} is in {place}, but it is not; download the model again")


def same_tensor(reader: HFWeights, left: str, right: str) -> bool:
    """Whether two tensors hold the same bytes; read in pieces."""
    info, other = reader.tensors[left], reader.tensors[right]
    if info != other:
        return False
    step = max(1, (8 << 20) // row_bytes(info.shape, info.dtype))
    blocks = ((start, min(step, info.shape[0] - start)) for start in range(0, info.shape[0], step))
    return all(same_bits(*(reader.rows(Part(n, info.shape), *block) for n in (left, right))) for block in blocks)
