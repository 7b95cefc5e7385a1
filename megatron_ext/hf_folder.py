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
INDEX = "model.safetensors.index.json"


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
    """The safetensors files of the model: those its index names, else the single file.

    Raises:
        SourceError: there are none, or the index names one that is missing.
    """
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{index} is damaged: {error}; download it again") from None
        if missing := [name for name in names if not (folder / name).exists()]:
            raise SourceError(f"{index} names {missing[0]}, which is not in {folder}; download the model again")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise SourceError(f"{folder} has no model.safetensors and no {INDEX}")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that define the tokenizer and its chat template, in a fixed order."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def tokenizer_digest(folder: Path) -> str:
    """xxh3-128 over names and contents of the tokenizer's files: the same tokenizer anywhere has the same digest."""
    hasher = xxhash.xxh3_128()
    for path in tokenizer_files(folder):
        hasher.update(f"{path.name}:{digest_file(path)};".encode())
    return hasher.hexdigest()
