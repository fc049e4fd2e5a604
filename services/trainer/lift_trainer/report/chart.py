"""Line charts as inline SVG: axes, ticks, a legend, a value under the pointer; no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lift_trainer.report.markup import Markup, tag
from lift_trainer.report.words import short

MAX_POINTS = 240
DOTS = 48
"""Points of a line that answer the pointer."""
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 10, 34


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), x ascending, all finite."""
    style: str
    """CSS class: colour and dashes."""


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal reference."""

    name: str
    y: float


def line_chart(
    lines: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    width: int,
    height: int,
    level: Level | None = None,
    named: bool = True,
) -> Markup:
    """One SVG of `width` × `height` CSS pixels at most; it shrinks with its box.

    Args:
        named: whether `x_name` stands at the end of the axis.
    """
    lines = [Line(line.name, _thin(line.points), line.style) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([level.y] if level else [])
    x_ticks, y_ticks = ticks(0, max(xs), width // 110), ticks(min(ys), max(ys), height // 55)
    x_high, y_low, y_high = max(xs), min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def at_x(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * x / (x_high or 1)

    def at_y(y: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (1 - (y - y_low) / ((y_high - y_low) or 1))

    grid = [
        (
            tag("line", x1=LEFT, x2=width - RIGHT, y1=at_y(y), y2=at_y(y), class_="grid"),
            tag("text", number(y), x=LEFT - 8, y=at_y(y) + 4, text_anchor="end"),
        )
        for y in y_ticks
    ]
    below = [
        tag(
            "text",
            short(x) if x >= 1000 else number(x),
            x=at_x(x),
            y=height - BOTTOM + 18,
            text_anchor="middle",
        )
        for x in x_ticks
        if not named or at_x(x) < width - RIGHT - 7 * len(x_name) - 16
    ]
    reference = None
    if level is not None:
        y = at_y(level.y)
        reference = (
            tag("line", x1=LEFT, x2=width - RIGHT, y1=y, y2=y, class_="level"),
            tag("text", level.name, x=width - RIGHT, y=y + 16, text_anchor="end"),
        )
    drawn = [
        tag(
            "polyline",
            points=" ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points),
            class_=f"line {line.style}",
        )
        for line in lines
    ]
    hovers = [
        tag(
            "circle",
            tag("title", f"{line.name} · {x_name} {number(x)} · {y_name} {y:.4g}"),
            cx=at_x(x),
            cy=at_y(y),
            r=5,
            class_=f"dot {line.style}",
        )
        for line in lines
        for x, y in _some(line.points)
    ]
    last = tag("text", x_name, x=width - RIGHT, y=height - BOTTOM + 18, text_anchor="end") if named else None
    label = f"{y_name} by {x_name}: " + "; ".join(
        f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines
    )
    content = (grid, below, last, reference, drawn, hovers)
    return tag("svg", content, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values from `low` to `high`, roughly `about` of them, at least one."""
    if high <= low:
        return [low]
    raw = (high - low) / max(about, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor for factor in (1, 2, 5, 10) if factor * magnitude >= raw) * magnitude
    inside = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [index * step for index in inside] or [low]


def number(value: float) -> str:
    """`0.35`, `5`, `1,250`, `12.8k`, `3.1P`."""
    if abs(value) >= 10_000:
        return short(value)
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _some(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At even distances, the last one among them."""
    each = math.ceil(len(points) / DOTS)
    return points[(len(points) - 1) % each :: each]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS`, each the mean of its neighbours; the last one as it is."""
    each = math.ceil(len(points) / MAX_POINTS)
    if each == 1:
        return list(points)
    groups = [points[at : at + each] for at in range(0, len(points) - 1, each)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]
    return [*means, points[-1]]
