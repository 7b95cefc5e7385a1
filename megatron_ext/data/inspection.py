"""A look into a tokenized dataset: totals, lengths, and samples with the trained tokens marked.

A dataset folder brings the tokenizer that made its ids, so it can be looked into anywhere.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from megatron_ext.data.encoding import read_tokenizer
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.manifest import LOSS_MASK, TOKENIZER, TOKENS, DatasetManifest
from megatron_ext.errors import SourceError

SHOWN_TOKENS = 2048
"""Tokens of one sample that are shown at most."""
UNFINISHED = "�"
"""What decoding gives for a character whose bytes are not all there yet."""


@dataclass(frozen=True)
class Token:
    """One token of a sample: its id, the text it adds, and whether it is trained."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """One document, or its first ``SHOWN_TOKENS`` tokens; ``length`` counts them all."""

    document: int
    length: int
    trained: int
    tokens: tuple[Token, ...]

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
    """What ``inspect_dataset`` found."""

    name: str
    manifest: DatasetManifest
    samples: tuple[Sample, ...]

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens, 0 to 1."""
        return self.manifest.trained_tokens / self.manifest.tokens

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            **self.manifest.model_dump(mode="json"),
            "trained_share": round(self.trained_share, 6),
            "samples": [asdict(sample) for sample in self.samples],
        }


def inspect_dataset(dataset: Path, samples: int, tokenizer: Path | None = None) -> Inspection:
    """Look into a dataset folder.

    Args:
        dataset: folder that ``mflow tokenize`` wrote.
        samples: documents to decode, spread evenly over the dataset.
        tokenizer: a tokenizer.json to decode with; the dataset's own by default.

    Raises:
        SourceError: not a dataset, or a file of it is missing or damaged.
    """
    manifest = DatasetManifest.read(dataset)
    tokens, loss_mask = Idxmap(dataset / TOKENS), Idxmap(dataset / LOSS_MASK)
    if not len(tokens) == len(loss_mask) == manifest.documents or not np.array_equal(tokens.lengths, loss_mask.lengths):
        raise SourceError(f"{dataset} is damaged: tokens, loss mask and manifest differ; make it again")
    path = tokenizer or dataset / TOKENIZER
    if not path.is_file():
        raise SourceError(f"{path} does not exist; a dataset folder holds the tokenizer that made it")
    decoder = read_tokenizer(path)
    count = max(0, min(samples, len(tokens)))
    chosen = [number * len(tokens) // count for number in range(count)]
    return Inspection(
        name=dataset.name,
        manifest=manifest,
        samples=tuple(_sample(number, tokens[number], loss_mask[number], decoder) for number in chosen),
    )


def _sample(number: int, ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> Sample:
    shown = ids[:SHOWN_TOKENS].tolist()
    tokens = tuple(
        Token(id, text, trained)
        for id, text, trained in zip(
            shown, decode_each(shown, tokenizer), mask[:SHOWN_TOKENS].astype(bool).tolist(), strict=True
        )
    )
    return Sample(number, len(ids), int(mask.sum()), tokens)


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


def render_terminal(inspection: Inspection, console: Console) -> None:
    """Print it: trained tokens in colour, or between ``[[`` and ``]]`` where the console has no colour."""
    coloured = console.color_system is not None and not console.no_color
    for line in _facts(inspection):
        console.print(Text(line))
    console.print(Text("lengths in tokens:"))
    bars = inspection.manifest.lengths.histogram
    most = max(bar.documents for bar in bars)
    for bar in bars:
        console.print(Text(f"  up to {bar.up_to:>7,}  {bar.documents:>9,}  {'#' * round(40 * bar.documents / most)}"))
    marks = "in green" if coloured else "between [[ and ]]"
    for sample in inspection.samples:
        shown = "" if len(sample.tokens) == sample.length else f", the first {len(sample.tokens)} shown"
        head = f"document {sample.document}: {sample.length} tokens, {sample.trained} trained ({marks}){shown}"
        console.print()
        console.print(Text(head, style="bold"))
        text = Text()
        for run, trained in sample.runs():
            if coloured:
                text.append(run, style="bold green" if trained else "dim")
            else:
                text.append(f"[[{run}]]" if trained else run)
        console.print(text)


def render_html(inspection: Inspection) -> str:
    """The same as an HTML fragment without outside references; its style is its own."""
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in _facts(inspection))
    bars = inspection.manifest.lengths.histogram
    most = max(bar.documents for bar in bars)
    rows = "".join(
        f"<tr><td>up to {bar.up_to:,}</td><td>{bar.documents:,}</td>"
        f'<td><span class="bar" style="width:{100 * bar.documents / most:.1f}%"></span></td></tr>'
        for bar in bars
    )
    samples = "".join(_sample_html(sample) for sample in inspection.samples)
    return (
        f'<section class="mflow-dataset"><style>{STYLE}</style><ul>{facts}</ul>'
        f"<table><caption>lengths in tokens</caption>{rows}</table>{samples}</section>"
    )


STYLE = (
    ".mflow-dataset pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;padding:.6em;color:#555}"
    ".mflow-dataset mark{background:#c9f2cf;color:#063d12}"
    ".mflow-dataset td:last-child{width:20em}.mflow-dataset td{text-align:right;padding-right:1em}"
    ".mflow-dataset .bar{display:block;height:.8em;background:#6aa7e8}"
    ".mflow-dataset caption{text-align:left}"
)


def _sample_html(sample: Sample) -> str:
    shown = "" if len(sample.tokens) == sample.length else f", the first {len(sample.tokens)} shown"
    text = "".join(
        f"<mark>{html.escape(run)}</mark>" if trained else html.escape(run) for run, trained in sample.runs()
    )
    head = f"document {sample.document}: {sample.length} tokens, {sample.trained} trained{shown}"
    return f"<h4>{head}</h4><pre>{text}</pre>"


def _facts(inspection: Inspection) -> list[str]:
    manifest = inspection.manifest
    lengths = manifest.lengths
    lines = [
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.trained_tokens:,} trained "
        f"({inspection.trained_share:.1%})",
        f"length {lengths.min:,} to {lengths.max:,} tokens, {lengths.mean:,.1f} on average",
        f"chat template {manifest.chat_template.name}, rows {manifest.row_format}, "
        f"vocabulary {manifest.vocab_size:,} ({manifest.dtype})",
        f"why: {manifest.why}",
    ]
    if manifest.untrained_documents:
        lines.append(f"{manifest.untrained_documents:,} documents have no trained token")
    return lines
