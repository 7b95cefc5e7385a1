"""Scores of two models side by side: base and tuned, their difference and its error. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One metric of one task; ``base`` None when there is no baseline or it lacks the metric."""

    task: str
    metric: str
    tuned: float
    tuned_stderr: float | None
    base: float | None = None
    base_stderr: float | None = None

    @property
    def difference(self) -> float | None:
        return None if self.base is None else self.tuned - self.base

    @property
    def difference_stderr(self) -> float | None:
        """Of two independent scores: root of the summed squares."""
        if self.base is None or self.base_stderr is None or self.tuned_stderr is None:
            return None
        return math.hypot(self.base_stderr, self.tuned_stderr)


def compare(tuned: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> list[Score]:
    """The scores in ``tuned`` (the content of a results.json) beside those of ``base``, task by task."""
    rows = []
    for task, metrics in tuned["tasks"].items():
        other = base["tasks"].get(task, {}) if base else {}
        for metric, value in metrics.items():
            if metric.endswith("_stderr") or value is None:
                continue
            error = f"{metric}_stderr"
            rows.append(Score(task, metric, value, metrics.get(error), other.get(metric), other.get(error)))
    return rows


def with_error(value: float | None, error: float | None) -> str:
    """``0.950 ± 0.012``; a dash where there is no value."""
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def comparison_cells(
    tuned: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, for a terminal, a Prefect table or the report."""
    scores = compare(tuned, base)
    if base is None:
        return ["task", "metric", "score"], [[s.task, s.metric, with_error(s.tuned, s.tuned_stderr)] for s in scores]
    rows = [
        [s.task, s.metric, with_error(s.base, s.base_stderr), with_error(s.tuned, s.tuned_stderr), _signed(s)]
        for s in scores
    ]
    return ["task", "metric", "base", "tuned", "difference"], rows


def comparison_table(tuned: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> str:
    """The scores as aligned plain text, one line a metric."""
    header, rows = comparison_cells(tuned, base)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _signed(score: Score) -> str:
    if score.difference is None:
        return "–"
    error = score.difference_stderr
    return f"{score.difference:+.3f}" + (f" ± {error:.3f}" if error is not None else "")
