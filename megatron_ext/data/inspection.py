"""A look into a tokenized dataset: totals, lengths, and samples with the trained tokens marked.

A dataset folder brings the tokenizer that made its ids, so it can be looked into anywhere; a Megatron-LM pair does not,
and shows numbers unless a tokenizer is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megatron_ext.data.datasets import Dataset, open_dataset
from megatron_ext.data.idxmap import index_file
from megatron_ext.data.inspection_views import render_html, render_terminal
from megatron_ext.data.manifest import TOKENIZER, DatasetManifest, LengthStatistics
from megatron_ext.data.tokenizers import read_tokenizer, tokenizer_file
from megatron_ext.errors import DatasetFormatError, SourceError

__all__ = ["Inspection", "Sample", "Token", "decode_each", "inspect_dataset", "render_html", "render_terminal"]

SHOWN_TOKENS = 2048
"""Tokens of one sample that are shown at most."""
UNFINISHED = "�"
"""What decoding gives for a character whose bytes are not all there yet."""
PART = 1 << 20
"""Documents whose lengths are counted at once."""


@dataclass(frozen=True)
class Token:
    """One token of a sample: its id, the text it adds, and whether it is trained."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """One document (of preference data: one side of it), or its first ``SHOWN_TOKENS``; ``length`` counts them all."""

    document: int
    length: int
    trained: int
    tokens: tuple[Token, ...]
    side: str = ""

    @property
    def name(self) -> str:
        """``document 3``, ``document 3, rejected``."""
        return f"document {self.document}" + (f", {self.side}" if self.side else "")

    def runs(self) -> list[tuple[str, bool]]:
        """Text in stretches of tokens that are all trained, or all not."""
        runs: list[tuple[str, bool]] = []
        for token in self.tokens:
            if runs and runs[-1][1] == token.trained:
                runs[-1] = (runs[-1][0] + token.text, token.trained)
            else:
                runs.append((token.text, token.trained))
        return runs


@dataclass(frozen=True)
class Inspection:
    """What ``inspect_dataset`` found; ``manifest`` is None for a Megatron-LM pair."""

    name: str
    kind: str
    documents: int
    tokens: int
    trained_tokens: int
    lengths: LengthStatistics
    dtype: str
    manifest: DatasetManifest | None
    samples: tuple[Sample, ...]

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens, 0 to 1."""
        return self.trained_tokens / self.tokens

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        left_out = self.manifest.left_out if self.manifest else None
        return {
            **(self.manifest.model_dump(mode="json") if self.manifest else {}),
            "kind": self.kind,
            "documents": self.documents,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": round(self.trained_share, 6),
            "dropped": left_out.dropped if left_out else 0,
            "truncated": left_out.truncated if left_out else 0,
            "lengths": self.lengths.model_dump(mode="json"),
            "dtype": self.dtype,
            "samples": [asdict(sample) for sample in self.samples],
        }


def inspect_dataset(dataset: Path, samples: int, tokenizer: Path | None = None) -> Inspection:
    """Look into a dataset.

    Args:
        dataset: folder that ``mflow tokenize`` wrote, or the prefix of a Megatron-LM pair.
        samples: documents to decode, spread evenly over the dataset.
        tokenizer: a tokenizer.json, or a folder with a tokenizer, to decode with; the dataset's own by default.

    Raises:
        SourceError: not a dataset, or a file of it is missing or damaged.
        DatasetFormatError: it holds no tokens.
    """
    is_pair = index_file(dataset.with_suffix("") if dataset.suffix in (".bin", ".idx") else dataset).is_file()
    manifest = None if is_pair else DatasetManifest.read(dataset)
    opened = open_dataset(dataset)
    count = len(opened.tokens[0])
    if manifest and (count != manifest.documents or not _whole(opened)):
        raise SourceError(f"{dataset} is damaged: tokens, loss mask and manifest differ; make it again")
    lengths = manifest.lengths if manifest else _lengths(opened)
    tokens = manifest.tokens if manifest else int(np.sum(opened.tokens[0].lengths, dtype=np.int64))
    chosen = [number * count // samples for number in range(samples)] if 0 <= samples < count else range(count)
    decode = _decoder(dataset, opened, tokenizer) if chosen else decode_as_numbers
    return Inspection(
        name=opened.place.name,
        kind=opened.kind,
        documents=count,
        tokens=tokens,
        trained_tokens=manifest.trained_tokens if manifest else tokens,
        lengths=lengths,
        dtype=opened.tokens[0].dtype.name,
        manifest=manifest,
        samples=tuple(sample for number in chosen for sample in _samples(opened, number, decode)),
    )


def _whole(dataset: Dataset) -> bool:
    """Whether every idxmap is there and fits the others."""
    counts = {len(tokens) for tokens in dataset.tokens}
    return len(dataset.loss_masks) in (0, len(dataset.tokens)) and len(counts) == 1


def _lengths(dataset: Dataset) -> LengthStatistics:
    lengths = dataset.tokens[0].lengths
    if not len(lengths) or not int(lengths.max()):
        raise DatasetFormatError(f"{dataset.place} holds no tokens; preprocess the text again")
    parts = (np.asarray(lengths[at : at + PART]) for at in range(0, len(lengths), PART))
    return LengthStatistics.of(part[part > 0] for part in parts if part.any())


def _decoder(place: Path, dataset: Dataset, tokenizer: Path | None) -> Callable[[list[int]], list[str]]:
    if tokenizer is None and dataset.is_pair:
        return decode_as_numbers
    path = tokenizer or place / TOKENIZER
    if path.is_dir():
        path = tokenizer_file(path)
    elif not path.is_file():
        raise SourceError(f"{path} does not exist; a dataset folder holds the tokenizer that made it")
    decoder = read_tokenizer(path)
    return lambda ids: decode_each(ids, decoder)


def _samples(dataset: Dataset, number: int, decode: Callable[[list[int]], list[str]]) -> Iterator[Sample]:
    for place, side in enumerate(dataset.sides):
        ids = dataset.tokens[place][number]
        mask = dataset.loss_masks[place][number].astype(bool) if dataset.loss_masks else np.ones(len(ids), dtype=bool)
        shown = ids[:SHOWN_TOKENS].tolist()
        texts = decode(shown)
        tokens = tuple(Token(*one) for one in zip(shown, texts, mask[:SHOWN_TOKENS].tolist(), strict=True))
        yield Sample(number, len(ids), int(mask.sum()), tokens, side.rstrip("_"))


def decode_as_numbers(ids: list[int]) -> list[str]:
    """Ids as text, for data that comes without a tokenizer."""
    return [f"{number} " for number in ids]


def decode_each(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each token adds to what came before; a token that ends inside a character adds none."""
    texts: list[str] = []
    start = read = 0  # ids[start:read] are decoded again as context, ids[read:] are not yet shown
    for end in range(1, len(ids) + 1):
        context = tokenizer.decode(ids[start:read], skip_special_tokens=False)
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        if text.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(context) :])
            start, read = read, end
    return texts
