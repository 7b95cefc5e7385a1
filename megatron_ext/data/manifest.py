"""``manifest.json`` of a dataset folder: what the token ids mean, so that no later stage has to guess."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from megatron_ext.config import Section, TokenizeOptions
from megatron_ext.errors import SourceError

NAME = "manifest.json"
TOKENS, LOSS_MASK, TOKENIZER = "tokens", "loss_mask", "tokenizer.json"
"""Names in a dataset folder: the idxmap prefixes, and the copy of the tokenizer that made the ids."""
SIDES = {"text": ("",), "chat": ("",), "preference": ("chosen_", "rejected_")}
"""Kind of a dataset -> what stands before the names of its idxmaps: document i of every side belongs together."""
TOP_TOKENS = 20
Kind = Literal["text", "chat", "preference"]


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
    def of(cls, lengths: np.ndarray | Iterable[np.ndarray]) -> LengthStatistics:
        """Statistics of (N,) lengths, N > 0, at once or in parts; the bars end at powers of two."""
        counts = np.zeros(64, dtype=np.int64)
        smallest, largest, total, number = 1 << 62, 0, 0, 0
        for part in [lengths] if isinstance(lengths, np.ndarray) else lengths:
            counts += np.bincount(np.ceil(np.log2(part)).astype(np.int64), minlength=64)
            smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
            total, number = total + int(part.sum(dtype=np.int64)), number + len(part)
        filled = np.flatnonzero(counts)
        bars = [HistogramBar(up_to=2**e, documents=int(counts[e])) for e in range(filled[0], filled[-1] + 1)]
        return cls(min=smallest, mean=round(total / number, 3), max=largest, histogram=tuple(bars))


class SourceFile(Section):
    """One file that was read."""

    name: str
    rows: int = Field(description="Rows that became documents, or were left out for what they are (empty, overlong).")
    digest: str = Field(description="xxh3-128 of its bytes; of what the server says identifies them, for a URL.")
    format: str
    weight: float | None = Field(
        default=None,
        description="Share in a blend, relative to the other inputs; used when training reads. Nothing where none was "
        "given: 1 beside inputs that have some.",
    )
    input: str = Field(default="", description="What the user wrote that named this file: itself, a glob, a folder.")
    entry: int | None = Field(
        default=None, description="Number of that input, from 0; the files of one input share its weight."
    )
    documents: int | None = Field(
        default=None, description="Documents that it became; they follow those of the file before."
    )


class Side(Section):
    """Totals of one of several token sequences that a row became: ``chosen`` or ``rejected``."""

    tokens: int
    trained_tokens: int
    untrained_documents: int
    lengths: LengthStatistics


class FrequentToken(Section):
    """A token and how often it occurs."""

    id: int
    token: str
    count: int


class FrequencyBar(Section):
    """Tokens that occur more often than in the bar before and at most ``up_to`` times."""

    up_to: int
    ids: int
    tokens: int


class TokenHistogram(Section):
    """How often which tokens occur."""

    distinct: int = Field(description="Ids that occur at all.")
    top: tuple[FrequentToken, ...]
    bars: tuple[FrequencyBar, ...]

    @classmethod
    def of(cls, counts: np.ndarray, names: dict[int, str]) -> TokenHistogram:
        """Histogram of (V,) occurrences by id; ``names`` are the tokens as the vocabulary writes them."""
        most = np.argsort(-counts, kind="stable")[:TOP_TOKENS]
        top = [FrequentToken(id=int(i), token=names.get(int(i), ""), count=int(counts[i])) for i in most if counts[i]]
        there = counts[counts > 0]
        exponents = np.ceil(np.log10(there)).astype(np.int64)
        bars = [
            FrequencyBar(up_to=10**e, ids=int((exponents == e).sum()), tokens=int(there[exponents == e].sum()))
            for e in range(int(exponents.max(initial=-1)) + 1)
        ]
        return cls(distinct=len(there), top=tuple(top), bars=tuple(bars))


class EngineRecord(Section):
    """What made the ids, and what is known about their being those of the reference, ``tokenizers``."""

    name: str = Field(description="gigatoken, tokenizers, or python (the slow tokenizer).")
    version: str
    why: str
    stress_texts: int = Field(
        default=0, description="Texts of the stress set, each encoded alike by engine and reference."
    )
    compared_documents: int = Field(default=0, description="Documents of this data encoded by both, id for id alike.")
    compared_bytes: int = 0
    reference_documents: int = Field(default=0, description="Documents left to the reference, for their characters.")


class LeftOut(Section):
    """Rows and documents that are not, or not whole, in the dataset."""

    skipped_rows: int = Field(default=0, description="Rows that do not fit (on_bad_row skip).")
    first_skipped: tuple[str, ...] = Field(default=(), description="The first few of them, with the reason.")
    empty_rows: int = Field(default=0, description="Rows without a text, or without an answer to train.")
    dropped: int = Field(default=0, description="Documents longer than max_length, left out.")
    truncated: int = Field(default=0, description="Documents cut to max_length.")
    truncated_tokens: int = Field(default=0, description="Tokens that were cut off.")
    answers_cut_off: int = Field(
        default=0, description="Documents left out because all that would be trained was beyond max_length."
    )
    split: int = Field(default=0, description="Documents cut into several of at most max_length.")


class DatasetManifest(Section):
    """Everything that later stages need to know about a tokenized dataset."""

    format: Literal["megatron-flows/dataset"] = "megatron-flows/dataset"
    version: Literal[1] = 1
    kind: Kind = Field(
        default="chat", description="text: tokens; chat: and a loss mask; preference: two sides of both."
    )
    documents: int
    tokens: int = Field(description="Of all sides.")
    trained_tokens: int = Field(description="Tokens that count as labels; the loss mask is 1 there. Text: all.")
    untrained_documents: int = Field(default=0, description="Documents without a trained token.")
    vocab_size: int = Field(description="Number of the tokenizer's tokens, added ones included.")
    max_token_id: int = Field(description="Largest id in the dataset.")
    tokenizer_digest: str
    chat_template: TemplateRecord | None = None
    row_format: str = Field(description="Format of the rows; several, with a comma between, if the files differ.")
    why: str = Field(description="What decided the format.")
    dtype: str
    lengths: LengthStatistics = Field(description="Of all documents, on all sides.")
    files: tuple[SourceFile, ...]
    sides: dict[str, Side] = Field(default_factory=dict, description="Preference data: chosen and rejected.")
    options: TokenizeOptions = Field(default=TokenizeOptions(), description="What was asked for.")
    eod_id: int | None = Field(default=None, description="The id that append_eod put behind every document.")
    bos_id: int | None = Field(default=None, description="The id that prepend_bos put before every document.")
    left_out: LeftOut = LeftOut()
    histogram: TokenHistogram | None = None
    engine: EngineRecord | None = None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Names of the idxmaps in the folder, without suffix: tokens (and loss mask) of each side."""
        kinds = (TOKENS,) if self.kind == "text" else (TOKENS, LOSS_MASK)
        return tuple(side + name for side in SIDES[self.kind] for name in kinds)

    def losses(self) -> list[str]:
        """What of the data is not, or not whole, in the dataset, or will not be trained: a sentence each."""
        out, beyond = self.left_out, f"max_length {self.options.max_length or ''}".rstrip()
        empty = "empty" if self.kind == "text" else "empty or had no answer, and left out"
        sentences = (
            (
                out.skipped_rows,
                "row",
                "skipped, for not fitting" + "".join(f"; {row}" for row in out.first_skipped[:1]),
            ),
            (out.empty_rows, "row", empty),
            (out.dropped, "document", f"longer than {beyond} and dropped"),
            (out.answers_cut_off, "document", f"dropped, because {beyond} left nothing of the answer"),
            (out.truncated, "document", f"cut to {beyond}, {out.truncated_tokens:,} tokens lost"),
            (out.split, "document", f"cut into several of at most {beyond}"),
        )
        said = [f"{n:,} {what}{' was' if n == 1 else 's were'} {fate}" for n, what, fate in sentences if n]
        if untrained := self.untrained_documents:
            said.append(f"{untrained:,} document{' has' if untrained == 1 else 's have'} no trained token")
        return said

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
