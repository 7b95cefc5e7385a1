"""Weights of a Hugging Face folder that keeps them in pickles: ``pytorch_model.bin``, single or sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import SourceError
from megatron_ext.families.base import Part
from megatron_ext.hf_folder import weight_files
from megatron_ext.weights.hf import NAMES, TensorInfo, check_index
from megatron_ext.weights.pickles import load_pickle


class BinReader:
    """The weights of the folder's ``.bin`` files; tensors are backed by the files' pages, and may share them.

    A file that torch before 1.6 wrote is the exception: it is read into memory whole.

    Raises:
        SourceError: a file is missing, truncated or damaged, a tensor that the index names is not in its file, or
            something in a file is no tensor of a type that is supported. Names it.
        UntrustedPickleError: a file wants a class that could run a program, and ``trust_pickle`` is not set.
    """

    def __init__(self, folder: Path, *, trust_pickle: bool = False) -> None:
        self._values: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        files: dict[str, str] = {}
        for path in weight_files(folder):
            for name, value in _named(load_pickle(path, trust=trust_pickle), path):
                if name in files:
                    raise SourceError(f"{name} is in {files[name]} and again in {path.name} of {folder}")
                files[name] = path.name
                self._values[name] = value
                self.tensors[name] = TensorInfo(value.dtype, tuple(value.shape))
        check_index(folder, files)

    def rows(self, part: Part, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``part`` from ``start`` on; not to be written to."""
        value = self._values[part.name]
        return (value if part.index is None else value[part.index])[start : start + count]


def _named(content: Any, path: Path) -> list[tuple[str, torch.Tensor]]:
    if not isinstance(content, Mapping) or not content:
        raise SourceError(f"{path} holds no weights by name; a Hugging Face model keeps a dictionary of tensors there")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise SourceError(f"{name!r} in {path} is no tensor; give a model that transformers saved")
        if value.layout != torch.strided or value.dtype not in NAMES:
            raise SourceError(
                f"{name} in {path} is of type {value.dtype}, {value.layout}; Available: "
                f"{', '.join(sorted(str(dtype) for dtype in NAMES))} (export the weights unquantized first)"
            )
    return [(name, value.detach()) for name, value in content.items()]
