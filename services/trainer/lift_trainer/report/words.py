"""Numbers, names and settings as a reader expects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lift_trainer.report.markup import Child, Markup, join, tag

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def words(name: str) -> str:
    return name.replace("_", " ")


def shown(value: Any) -> str:
    """A setting."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(each)}" for name, each in value.items()) or "–"
    return str(value)


def short(value: float, unit: str = "") -> str:
    """`0.35`, `640`, `12.8k`, `1.2 PFLOP`: three figures and a prefix of the SI."""
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:.3g}{' ' if unit else ''}{unit}"


def size(count: int) -> str:
    """Bytes."""
    return short(count, "B") if count >= 1000 else f"{count} bytes"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def share(value: float) -> str:
    """Of a hundred; what cannot be one stays a number."""
    return f"{value * 100:.1f} %" if -1 <= value <= 1 else f"{value:.3g}"


def points(low: float, high: float) -> str:
    """An interval in points of a hundred."""
    return f"{signed(low)} to {signed(high)}"


def signed(value: float) -> str:
    """A difference in points of a hundred, with a minus as wide as the plus."""
    return f"{value * 100:+.1f}".replace("-", "−")


def facts(values: Mapping[str, Child]) -> Markup:
    """Names and what they are."""
    return tag(
        "dl", (join(tag("dt", name), tag("dd", value)) for name, value in values.items()), class_="facts"
    )


def settings(values: Mapping[str, Any]) -> Markup:
    return facts({words(name): shown(value) for name, value in values.items()})
