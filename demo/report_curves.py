"""Loss curves of a run's metrics.jsonl as points for inline SVG: one line per loss term, logarithmic height."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlgpt.log import read_metrics

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 22


@dataclass(frozen=True)
class Line:
    """One loss term; `points` is what an SVG polyline wants."""

    name: str
    points: str
    last: float


@dataclass(frozen=True)
class Chart:
    """One run: its lines, and where the tick labels stand."""

    title: str
    lines: tuple[Line, ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM
    top: int = TOP


def loss_chart(title: str, metrics_file: Path) -> Chart | None:
    """The chart of one run; None when it has logged no loss yet."""
    return chart(title, loss_terms(read_metrics(metrics_file)))


def loss_terms(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(step, loss) by term, from `loss/TERM` entries; losses by source (`loss/TERM/SOURCE`) are left out.

    A resumed run may log a step twice: the later record counts.
    """
    terms: dict[str, dict[float, float]] = {}
    for record in records:
        for key, value in record.items():
            kind, _, term = key.partition("/")
            if kind == "loss" and "/" not in term and isinstance(value, int | float) and value > 0:
                terms.setdefault(term, {})[float(record["step"])] = float(value)
    return {term: sorted(points.items()) for term, points in terms.items()}


def chart(title: str, terms: Mapping[str, Sequence[tuple[float, float]]]) -> Chart | None:
    """Points of all terms in one image; None without any."""
    if not any(terms.values()):
        return None
    steps = [step for points in terms.values() for step, _ in points]
    losses = [math.log10(loss) for points in terms.values() for _, loss in points]
    low, high = min(losses), max(losses)
    if high - low < 0.1:
        low, high = low - 0.1, high + 0.1
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(loss: float) -> float:
        return round(TOP + (high - math.log10(loss)) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = tuple(
        Line(name, " ".join(f"{x(step)},{y(loss)}" for step, loss in points), points[-1][1])
        for name, points in terms.items()
    )
    y_ticks = tuple((y(10**level), f"{10**level:.2g}") for level in (low, (low + high) / 2, high))
    x_ticks = tuple((x(step), f"{step:.0f}") for step in (first, (first + last) / 2, last))
    return Chart(title, lines, y_ticks, x_ticks)
