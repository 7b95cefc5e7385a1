"""A tokenized dataset, opened: a folder of ``mflow tokenize``, or a Megatron-LM pair ``PREFIX.bin`` + ``PREFIX.idx``.

A pair is text without a manifest; its sequences are the documents, as in megatron-core's GPTDataset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_ext.cache import kept_arrays
from megatron_ext.data.idxmap import Idxmap, data_file, index_file
from megatron_ext.data.manifest import LOSS_MASK, NAME, SIDES, TOKENS
from megatron_ext.errors import DatasetFormatError, SourceError

BLOCK = 1 << 24
"""Values that are read at once."""
Names = tuple[str, ...]


@dataclass(frozen=True)
class Pool:
    """Documents ``[first, last)`` of a dataset that come from one input of a blend, the input's weight and name."""

    first: int
    last: int
    weight: float
    name: str = ""


@dataclass(frozen=True)
class Dataset:
    """Token ids and loss masks of one kind of data, memory-mapped.

    Attributes:
        place: the folder, or the prefix of a pair.
        kind: ``text``, ``chat`` or ``preference``.
        facts: manifest.json as it stands; of a pair what can be said without reading all of it.
    """

    place: Path
    kind: str
    facts: Mapping[str, Any]

    @property
    def is_pair(self) -> bool:
        """Whether it is a Megatron-LM pair without a manifest."""
        return not self.place.is_dir()

    @property
    def sides(self) -> Names:
        """What stands before the names of its idxmaps; preference data has two sides."""
        return SIDES[self.kind]

    @cached_property
    def tokens(self) -> tuple[Idxmap, ...]:
        """Token ids of each side."""
        return tuple(Idxmap(self._prefix(side, TOKENS)) for side in self.sides)

    @cached_property
    def loss_masks(self) -> tuple[Idxmap, ...]:
        """Loss masks of each side; none for text, of which every token is trained.

        Raises:
            SourceError: a mask does not fit its tokens, or the sides differ in their number of documents.
        """
        if self.kind == "text":
            return ()
        masks = tuple(Idxmap(self._prefix(side, LOSS_MASK)) for side in self.sides)
        for tokens, mask in zip(self.tokens, masks, strict=True):
            if not np.array_equal(tokens.lengths, mask.lengths):
                raise SourceError(f"{self.place}: tokens and loss_mask differ in their lengths; make the dataset again")
        if len({len(tokens) for tokens in self.tokens}) > 1:
            raise SourceError(f"{self.place}: its two sides differ in their documents; make the dataset again")
        return masks

    @property
    def files(self) -> list[Path]:
        """The files it consists of."""
        if self.is_pair:
            return [data_file(self.place), index_file(self.place)]
        return sorted(path for path in self.place.iterdir() if path.is_file())

    @property
    def identity(self) -> str:
        """Digest of its files' names, sizes, times and inodes, and of its manifest: names what is cached about it."""
        stats = [(path.name, path.stat()) for path in self.files]
        values = [(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats]
        return xxhash.xxh3_128_hexdigest(json.dumps([values, dict(self.facts)], default=str).encode())

    @property
    def pools(self) -> tuple[Pool, ...]:
        """Its documents by the inputs that they come from, if those were given weights; else all in one.

        Raises:
            SourceError: the manifest's files do not add up to the documents.
        """
        if all(file.get("weight") is None for file in self.facts.get("files", [])):
            return (Pool(0, len(self.tokens[0]), 1.0),)
        return self.inputs

    @property
    def inputs(self) -> tuple[Pool, ...]:
        """Its documents by the inputs that they come from, whatever their weights. Raises as ``pools``."""
        count, files = len(self.tokens[0]), self.facts.get("files", [])
        if not files:
            return (Pool(0, count, 1.0, self.place.name),)
        pools: list[Pool] = []
        inputs: list[Any] = []
        at = 0
        for file in files:
            first, at = at, at + int(file["rows"] if file.get("documents") is None else file["documents"])
            given = file.get("entry")
            given = file.get("input") or file["name"] if given is None else given
            if inputs and inputs[-1] == given:
                pools[-1] = replace(pools[-1], last=at)
            else:
                name = file.get("input") or file["name"]
                pools.append(Pool(first, at, float(file.get("weight") or 1.0), name))
                inputs.append(given)
        if at != count:
            raise SourceError(f"{self.place}: its files hold {at} documents, but there are {count}; make it again")
        return tuple(pools)

    def max_token_id(self) -> int:
        """The largest token id: of the manifest, else found by reading all of them, once."""
        if "max_token_id" in self.facts:
            return int(self.facts["max_token_id"])
        found = kept_arrays("facts", self.identity, lambda: {"max_token_id": np.asarray(_largest(self.tokens))})
        return int(found["max_token_id"])

    def _prefix(self, side: str, name: str) -> Path:
        return self.place if self.is_pair else self.place / f"{side}{name}"


def open_dataset(place: Path) -> Dataset:
    """The dataset at ``place``: a folder with manifest.json, or the prefix (or a file) of a pair.

    Raises:
        SourceError: there is none, or its manifest is damaged.
        DatasetFormatError: it is of a kind that this version does not know.
    """
    if place.suffix in (".bin", ".idx") and place.is_file():
        place = place.with_suffix("")
    if not place.is_dir() and index_file(place).is_file():
        return _pair(place)
    path = place / NAME
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "has no manifest.json" if place.is_dir() else "does not exist"
        raise SourceError(
            f"{place} {what}; give a folder that mflow tokenize wrote, or the prefix of a Megatron-LM pair, "
            "PREFIX_text_document"
        ) from None
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}; make the dataset again") from None
    if not isinstance(facts, dict) or facts.get("format") != "megatron-flows/dataset":
        raise SourceError(f"{path} is not the manifest of a dataset; give a folder that mflow tokenize wrote")
    if facts.get("kind") not in SIDES:
        raise DatasetFormatError(
            f"dataset {place} is of kind {facts.get('kind')!r}; this version knows {', '.join(SIDES)}"
        )
    return Dataset(place, facts["kind"], facts)


def _pair(prefix: Path) -> Dataset:
    tokens = Idxmap(prefix)
    if tokens.dtype.kind not in "iu":
        raise DatasetFormatError(f"{index_file(prefix)} holds {tokens.dtype.name}, which are no token ids")
    return Dataset(prefix, "text", {"format": "megatron-lm/idxmap", "kind": "text", "dtype": tokens.dtype.name})


def _largest(idxmaps: tuple[Idxmap, ...]) -> int:
    blocks = (m.values[at : at + BLOCK] for m in idxmaps for at in range(0, len(m.values), BLOCK))
    return max((int(block.max()) for block in blocks), default=0)
