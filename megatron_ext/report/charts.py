"""Line charts as inline SVG: no plotting library, no script, and colours that follow the page (light or dark)."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
MOST_POINTS = 500

Point = tuple[float, float]


def line_chart(
    points: Sequence[Point], title: str, x_label: str, *, beside: Sequence[Point] = (), from_zero: bool = False
) -> str:
    """``points`` (x, y), x rising, as one ``<svg>``, ``beside`` dashed; points that are not finite are left out.

    At most ``MOST_POINTS`` are drawn: the last one, and from each stretch of the others the mean, so that a thinned
    curve shows the trend instead of whichever step it happened to hit.
    """
    shown, dashed = (thinned([(x, y) for x, y in line if math.isfinite(x + y)]) for line in (points, beside))
    if not shown:
        return '<p class="empty">no values</p>'
    xs = [x for x, _ in [*shown, *dashed]]
    x_ticks = ticks(min(xs), max(xs))
    ys = [y for _, y in [*shown, *dashed]] + [0.0] * from_zero
    y_ticks = ticks(min(ys), max(ys))
    x0, x1 = min(xs), max(*xs, min(xs) + 1e-9)
    y0, y1 = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for value in y_ticks:
        _, y = at(x0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in (tick for tick in x_ticks if x0 <= tick <= x1):
        x, _ = at(value, y0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(value)}</text>')
    middle = (LEFT + WIDTH) // 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{html.escape(x_label)}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in shown))
    if len(shown) > 1:
        parts.append(f'<polyline class="line" points="{path}"/>')
    if dashed:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in dashed))
        parts.append(f'<polyline class="beside" points="{path}"/>')
        x, y = at(*dashed[-1])
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    last_x, last_y = at(*shown[-1])
    parts.append(f'<circle class="dot" cx="{last_x:.1f}" cy="{last_y:.1f}" r="3.5"/>')
    name = html.escape(title, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
        + "".join(parts)
        + "</svg>"
    )


def thinned(points: list[Point]) -> list[Point]:
    """At most ``MOST_POINTS`` points: means of equal stretches, and the last point as it is."""
    if len(points) <= MOST_POINTS:
        return points
    *body, last = points
    edges = [i * len(body) // (MOST_POINTS - 1) for i in range(MOST_POINTS)]
    means = []
    for start, end in itertools.pairwise(edges):
        xs, ys = zip(*body[start:end], strict=True)
        means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return [*means, last]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``; the ends may lie outside."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's label: ``0.0005`` as ``5e-4``, ``12000`` as ``12k``."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"
