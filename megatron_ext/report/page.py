"""The report's page: style, and HTML from plain values. Every value from a recipe, a file or the data is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--text:#1d2126;--dim:#667080;--line:#e2e4e8;--accent:#2458d3;
--good:#0a7d43;--bad:#b3261e;--trained:#d5f2dd;--trained-text:#0b3d1e}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2025;--text:#e4e7eb;--dim:#98a2b0;--line:#2e343c;
--accent:#86a8ff;--good:#5fd08f;--bad:#ff8a80;--trained:#1f5135;--trained-text:#d6f5e0}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:64rem;margin:0 auto;padding:2.2rem 1.2rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:2.6rem 0 .8rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
h3,h4{font-size:.95rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0}.dim,.empty{color:var(--dim)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:.8rem;margin:1.4rem 0 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem}
.card b{display:block;font-size:1.45rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.card span{color:var(--dim);font-size:.85rem;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem .9rem .5rem}
figcaption{font-size:.9rem;font-weight:600;margin-bottom:.3rem}figcaption span{color:var(--dim);font-weight:400}
svg.chart{display:block;width:100%;height:auto}
.chart text{font-size:12.5px;fill:var(--dim);font-variant-numeric:tabular-nums}
.chart .grid{stroke:var(--line)}.chart .line{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.chart .dot{fill:var(--accent)}
.chart .beside{fill:none;stroke:var(--dim);stroke-width:1.6;stroke-dasharray:5 4}.chart .mark{fill:var(--dim)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th{color:var(--dim);font-weight:500;text-align:left;font-size:.82rem}
th,td{padding:.38rem .9rem .38rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.better{color:var(--good);font-weight:600}td.worse{color:var(--bad);font-weight:600}
td.long{overflow-wrap:anywhere}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.bar{display:block;height:.6rem;border-radius:.3rem;background:var(--accent);min-width:2px}td.bars{width:34%;padding-top:.75rem}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 2.4rem}
.columns>div{margin-bottom:1.3rem}.columns h3:first-child{margin-top:.2rem}.spaced{margin-top:1.4rem}
table.facts{table-layout:fixed}table.facts td:first-child{width:42%}
main .mflow-dataset ul{padding-left:1.1rem;margin:.4rem 0 1rem}
main .mflow-dataset table{max-width:32rem;margin:1rem 0}
main .mflow-dataset .bar{background:var(--accent);height:.6rem}
main .mflow-dataset h4{color:var(--dim);font-weight:500;font-size:.85rem}
main .mflow-dataset pre{background:var(--card);color:var(--dim);border:1px solid var(--line);border-radius:.5rem;
padding:.7rem .9rem;margin:.3rem 0;font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
max-height:28rem;overflow:auto}
main .mflow-dataset mark,mark{background:var(--trained);color:var(--trained-text);
border-radius:.2rem;padding:.05em .1em}
footer{margin-top:3rem;color:var(--dim);font-size:.85rem}
@media(max-width:36rem){main{padding:1.3rem .9rem 3rem}h1{font-size:1.4rem}td.bars,th.bars{display:none}}
@media print{main{max-width:none}.card,figure{break-inside:avoid}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page itself forbids whatever is not in it."""


def esc(value: object) -> str:
    """Text that means nothing to HTML."""
    return html.escape(str(value), quote=True)


def document(title: str, body: str) -> str:
    """A whole page that refers to nothing outside itself."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>"


def cards(entries: Sequence[tuple[str, str]]) -> str:
    """Headline figures: (figure, what it is)."""
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{esc(figure)}</b><span>{esc(what)}</span></div>' for figure, what in entries)
        + "</div>"
    )


def figure(caption: str, note: str, chart: str) -> str:
    """One chart (trusted SVG) with its caption."""
    return f"<figure><figcaption>{esc(caption)} <span>{esc(note)}</span></figcaption>{chart}</figure>"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), marks: Sequence[str] = ()
) -> str:
    """Plain cells; ``numbers`` are the columns set right; ``marks`` names a class for the last cell of each row."""

    def kind(i: int) -> str:
        return ' class="number"' if i in numbers else ""

    head = "".join(f"<th{kind(i)}>{esc(cell)}</th>" for i, cell in enumerate(header))
    lines = []
    for number, row in enumerate(rows):
        cells = [f"<td{kind(i)}>{esc(cell)}</td>" for i, cell in enumerate(row)]
        if marks and marks[number]:
            cells[-1] = f'<td class="number {marks[number]}">{esc(row[-1])}</td>'
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def bars(header: Sequence[str], rows: Sequence[tuple[str, str, float, str]]) -> str:
    """Rows of (name, note, size, size as text), each with a bar as long as its size."""
    most = max((size for _, _, size, _ in rows), default=0.0) or 1.0
    head = (
        f"<th>{esc(header[0])}</th><th>{esc(header[1])}</th><th class=number>{esc(header[2])}</th><th class=bars></th>"
    )
    lines = "".join(
        f'<tr><td>{esc(name)}</td><td class="dim long"><code>{esc(note)}</code></td><td class="number">{esc(text)}</td>'
        f'<td class="bars"><span class="bar" style="width:{100 * size / most:.1f}%"></span></td></tr>'
        for name, note, size, text in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'


def facts(title: str, values: Mapping[str, Any]) -> str:
    """Names and values, one a line."""
    rows = "".join(
        f'<tr><td class="dim">{esc(name)}</td><td class="long"><code>{esc(plain(value))}</code></td></tr>'
        for name, value in values.items()
    )
    return f'<div><h3>{esc(title) or "&nbsp;"}</h3><table class="facts">{rows}</table></div>'


def plain(value: Any) -> str:
    """A recipe's value as a person writes it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(item)}" for name, item in value.items())
    return str(value)
