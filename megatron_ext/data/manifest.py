"""``manifest.json`` of a dataset folder: what the token ids mean, so that no later stage has to guess."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from megatron_ext.config import Section
from megatron_ext.errors import SourceError

NAME = "manifest.json"
TOKENS, LOSS_MASK, TOKENIZER = "tokens", "loss_mask", "tokenizer.json"
"""Names in a dataset folder: the idxmap prefixes, and the copy of the tokenizer that made the ids."""


class TemplateRecord(Section):
    """Which chat template rendered the conversations."""

    name: str
    digest: str


class HistogramBar(Section):
    """Documents longer than the bar before and at most ``up_to`` tokens."""

    up_to: int
    documents: int


class LengthStatistics(Section):
    """Lengths of the documents in tokens."""

    min: int
    mean: float
    max: int
    histogram: tuple[HistogramBar, ...]

    @classmethod
    def of(cls, lengths: np.ndarray) -> LengthStatistics:
        """Statistics of (N,) lengths, N > 0; the bars end at powers of two."""
        exponents = np.ceil(np.log2(lengths)).astype(np.int64)
        counts = np.bincount(exponents)
        bars = [HistogramBar(up_to=2**e, documents=int(counts[e])) for e in range(exponents.min(), len(counts))]
        mean = round(float(lengths.mean()), 3)
        return cls(min=int(lengths.min()), mean=mean, max=int(lengths.max()), histogram=tuple(bars))


class SourceFile(Section):
    """One file that was read."""

    name: str
    rows: int
    digest: str
    format: str


class DatasetManifest(Section):
    """Everything that later stages need to know about a tokenized dataset."""

    format: Literal["megatron-flows/dataset"] = "megatron-flows/dataset"
    version: Literal[1] = 1
    kind: Literal["chat"] = "chat"
    documents: int
    tokens: int
    trained_tokens: int = Field(description="Tokens that count as labels; the loss mask is 1 there.")
    untrained_documents: int = Field(0, description="Documents without a trained token.")
    vocab_size: int = Field(description="Number of the tokenizer's tokens, added ones included.")
    max_token_id: int = Field(description="Largest id in the dataset.")
    tokenizer_digest: str
    chat_template: TemplateRecord
    row_format: str = Field(description="Format of the rows; several, with a comma between, if the files differ.")
    why: str = Field(description="What decided the format.")
    dtype: str
    lengths: LengthStatistics
    files: tuple[SourceFile, ...]

    @classmethod
    def read(cls, folder: Path) -> DatasetManifest:
        """The manifest of a dataset folder.

        Raises:
            SourceError: the folder is missing, is no dataset, or its manifest is damaged or of another version.
        """
        path = folder / NAME
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            what = "has no manifest.json" if folder.is_dir() else "does not exist"
            raise SourceError(f"{folder} is not a dataset: it {what}; make one with `mflow tokenize`") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise SourceError(
                f"{path} is not the manifest of a dataset that this version reads ({place}: {first['msg']}); "
                "make the dataset again with `mflow tokenize`"
            ) from None

    def write(self, folder: Path) -> None:
        """Write the manifest; last of all, so that a dataset with a manifest is whole."""
        (folder / NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
