"""Weights of a Hugging Face folder, written as one safetensors file or as shards with an index.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from megatron_ext.families.base import Part
from megatron_ext.hf_folder import INDEX
from megatron_ext.weights.files import PlacedFile
from megatron_ext.weights.hf import NAMES, TensorInfo


class SafetensorsWriter:
    """Takes the weights of a model for ``model.safetensors``, or for shards with an index, in any order.

    ``tensors`` says what will come, in the order of the shards; rows go to their places when they come, from any
    thread. No shard holds more than ``max_shard_size`` bytes of tensors, unless one tensor alone does.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_size: int) -> None:
        self._folder, self._tensors = folder, tensors
        self._place: dict[str, tuple[PlacedFile, int]] = {}
        self._files: list[PlacedFile] = []
        self._missing = {name: prod(info.shape) for name, info in tensors.items()}
        self._lock = threading.Lock()
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
        file, offset = self._place[part.name]
        row = (part.index or 0) * part.shape[0] + start
        file.put(offset + row * prod(part.shape[1:]) * info.dtype.itemsize, rows)
        with self._lock:
            self._missing[part.name] -= rows.numel()

    def sync(self) -> None:
        """Wait until what was written before this call is on the disk, while other threads go on writing."""
        for file in self._files:
            file.sync()

    def abandon(self) -> None:
        """Let go of the files; what was written is no model."""
        for file in self._files:
            file.close()

    def close(self) -> None:
        """Close the files and check that everything announced was written."""
        self.abandon()
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
        file = PlacedFile(path, 8 + len(text) + offset)
        file.put(0, len(text).to_bytes(8, "little") + text)
        self._files.append(file)
        self._place |= {name: (file, 8 + len(text) + start) for name, start in starts.items()}

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in self._tensors.values())},
            "weight_map": {name: file.path.name for name, (file, _) in sorted(self._place.items())},
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
