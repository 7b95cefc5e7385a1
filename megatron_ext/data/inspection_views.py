"""An inspection for people: at the terminal, and as HTML that stands alone."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from megatron_ext.data.inspection import Inspection, Sample

WITHOUT_PICTURE = (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""C1 controls, which a terminal obeys as it does escape sequences, and those that turn the direction of writing."""
VISIBLE: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    127: 0x2421,
    **{code: f"<U+{code:04X}>" for code in WITHOUT_PICTURE},
}
"""Control characters in the data are shown as their pictures or numbers: none of them reaches a terminal or a page."""
STYLE = (
    ".mflow-dataset pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;padding:.6em;color:#555}"
    ".mflow-dataset mark{background:#c9f2cf;color:#063d12}"
    ".mflow-dataset td:last-child{width:20em}.mflow-dataset td{text-align:right;padding-right:1em}"
    ".mflow-dataset .bar{display:block;height:.8em;background:#6aa7e8}"
    ".mflow-dataset caption{text-align:left}"
)


def render_terminal(inspection: Inspection, console: Console) -> None:
    """Print it: trained tokens in colour, or between ``[[`` and ``]]`` where the console has no colour."""
    coloured = console.color_system is not None and not console.no_color
    for line in facts(inspection):
        console.print(Text(line))
    console.print(Text("lengths in tokens:"))
    bars = inspection.lengths.histogram
    most = max(bar.documents for bar in bars)
    for bar in bars:
        console.print(Text(f"  up to {bar.up_to:>7,}  {bar.documents:>9,}  {'#' * round(40 * bar.documents / most)}"))
    marks = "in green" if coloured else "between [[ and ]]"
    for sample in inspection.samples:
        console.print()
        console.print(Text(_head(sample, f" ({marks})"), style="bold"))
        text = Text()
        for run, trained in sample.runs():
            shown = run.translate(VISIBLE)
            if coloured:
                text.append(shown, style="bold green" if trained else "dim")
            else:
                text.append(f"[[{shown}]]" if trained else shown)
        console.print(text)


def render_html(inspection: Inspection) -> str:
    """The same as an HTML fragment without outside references; its style is its own."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in facts(inspection))
    bars = inspection.lengths.histogram
    most = max(bar.documents for bar in bars)
    rows = "".join(
        f"<tr><td>up to {bar.up_to:,}</td><td>{bar.documents:,}</td>"
        f'<td><span class="bar" style="width:{100 * bar.documents / most:.1f}%"></span></td></tr>'
        for bar in bars
    )
    samples = "".join(_sample_html(sample) for sample in inspection.samples)
    return (
        f'<section class="mflow-dataset"><style>{STYLE}</style><ul>{lines}</ul>'
        f"<table><caption>lengths in tokens</caption>{rows}</table>{samples}</section>"
    )


def render_document(inspection: Inspection) -> str:
    """The same as an HTML file."""
    from megatron_ext.report import page

    note = "<p>Trained tokens are <mark>marked</mark>; the others are context.</p>"
    body = f"<h1>{page.esc(inspection.name)}</h1>{note}{render_html(inspection)}"
    return page.document(inspection.name, body)


def facts(inspection: Inspection) -> list[str]:
    """What there is to say in words; names of files and rows in it are data, too."""
    return [line.translate(VISIBLE) for line in _facts(inspection)]


def _facts(inspection: Inspection) -> list[str]:
    lengths, manifest = inspection.lengths, inspection.manifest
    lines = [
        f"{inspection.kind}: {inspection.documents:,} documents, {inspection.tokens:,} tokens, "
        f"{inspection.trained_tokens:,} trained ({inspection.trained_share:.1%})",
        f"length {lengths.min:,} to {lengths.max:,} tokens, {lengths.mean:,.1f} on average",
    ]
    if manifest is None:
        return [*lines, f"a Megatron-LM pair ({inspection.dtype}): no manifest says which tokenizer made it"]
    for name, side in manifest.sides.items():
        lines.append(f"{name}: {side.tokens:,} tokens, {side.trained_tokens:,} trained, {side.lengths.mean:,.1f} a row")
    template = f"chat template {manifest.chat_template.name}, " if manifest.chat_template else ""
    lines.append(f"{template}rows {manifest.row_format}, vocabulary {manifest.vocab_size:,} ({manifest.dtype})")
    lines.append(f"why: {manifest.why}")
    lines += manifest.losses()
    if manifest.histogram:
        top = ", ".join(f"{token.token!r} {token.count:,}" for token in manifest.histogram.top[:8])
        lines.append(f"{manifest.histogram.distinct:,} different tokens; the most frequent: {top}")
    if manifest.engine:
        lines.append(f"encoded by {manifest.engine.name} {manifest.engine.version}: {manifest.engine.why}")
    return lines


def _sample_html(sample: Sample) -> str:
    text = "".join(
        f"<mark>{html.escape(run.translate(VISIBLE))}</mark>" if trained else html.escape(run.translate(VISIBLE))
        for run, trained in sample.runs()
    )
    return f"<h4>{_head(sample)}</h4><pre>{text}</pre>"


def _head(sample: Sample, marks: str = "") -> str:
    shown = "" if len(sample.tokens) == sample.length else f", the first {len(sample.tokens)} shown"
    return f"{sample.name}: {sample.length} tokens, {sample.trained} trained{marks}{shown}"
