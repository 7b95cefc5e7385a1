"""A line chart as SVG, without a plotting library: a flow process must stay small."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 720, 320, 60, 40, 16
POINTS = 600


def curve(points: Sequence[tuple[float, float]], y_label: str, x_label: str) -> str:
    """``points`` (x, y) as an SVG document; thinned to ``POINTS`` of them."""
    step = max(1, len(points) // POINTS)
    shown = [*points[::step], *points[-1:]]
    (x0, x1), (y0, y1) = _span([x for x, _ in shown]), _span([y for _, y in shown])

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - MARGIN)
        up = HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - MARGIN)
        return f"{across:.1f},{up:.1f}"

    line = " ".join(place(x, y) for x, y in shown)
    axis = f"{LEFT},{MARGIN} {LEFT},{HEIGHT - BOTTOM} {WIDTH - MARGIN},{HEIGHT - BOTTOM}"
    texts = [
        (LEFT - 8, HEIGHT - BOTTOM, "end", f"{y0:.4g}"),
        (LEFT - 8, MARGIN + 10, "end", f"{y1:.4g}"),
        (LEFT - 8, HEIGHT // 2, "end", y_label),
        (LEFT, HEIGHT - BOTTOM + 20, "middle", f"{x0:.4g}"),
        (WIDTH - MARGIN, HEIGHT - BOTTOM + 20, "end", f"{x1:.4g}"),
        (WIDTH // 2, HEIGHT - 8, "middle", x_label),
    ]
    labels = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<polyline points="{axis}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>{labels}</svg>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
