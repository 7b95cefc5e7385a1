"""What a Hugging Face model folder holds, torch-free: its config, its weight files, its tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from megatron_ext.errors import SourceError
from megatron_ext.folders import digest_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
LAYOUTS = ((INDEX, "model.safetensors"), (BIN_INDEX, "pytorch_model.bin"))
"""Index of the shards, and single file, of safetensors and of pickles; the first that is there counts."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        SourceError: no such folder, no config.json, or not JSON.
    """
    if not folder.is_dir():
        raise SourceError(f"model folder {folder} does not exist; give a Hugging Face folder with config.json")
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{folder} has no config.json; is it a Hugging Face model folder?") from None
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights: those that its index names, else the single file; safetensors if any.

    Raises:
        SourceError: there are none, or the index is damaged or names one that is missing.
    """
    for index, single in LAYOUTS:
        if (folder / index).exists():
            return [folder / name for name in sorted(set(read_index(folder / index).values()))]
        if (folder / single).exists():
            return [folder / single]
    singles = " and no ".join(single for _, single in LAYOUTS)
    raise SourceError(f"{folder} has no {singles}, nor an index of shards ({INDEX}); download the model's weights")


def weights_index(folder: Path) -> Path | None:
    """The index of the model's shards, if it has one."""
    for index, single in LAYOUTS:
        if (folder / index).exists():
            return folder / index
        if (folder / single).exists():
            return None
    return None


def read_index(path: Path) -> dict[str, str]:
    """Name of each weight -> name of the file beside the index that holds it.

    Raises:
        SourceError: it is no such index, or names a file that is missing or lies elsewhere.
    """
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not files or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is damaged: {error}; download it again") from None
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise SourceError(f"{path} names {name}, which is not a file beside it; do not trust this model")
        if not (path.parent / name).is_file():
            raise SourceError(f"{path} names {name}, which is not in {path.parent}; download the model again")
    return files


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that define the tokenizer and its chat template, in a fixed order."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def tokenizer_digest(folder: Path) -> str:
    """xxh3-128 over names and contents of the tokenizer's files: the same tokenizer anywhere has the same digest."""
    hasher = xxhash.xxh3_128()
    for path in tokenizer_files(folder):
        hasher.update(f"{path.name}:{digest_file(path)};".encode())
    return hasher.hexdigest()
