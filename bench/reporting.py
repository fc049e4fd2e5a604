"""What the benchmarks of the cache and the server share: spreads, tables, and what machine it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))

    @property
    def quartiles(self) -> list[float]:
        return [self.low, self.high]


def machine(*packages: str) -> Record:
    """What the numbers were measured on; versions of those packages that are installed."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: version for package in packages if (version := _version(package))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def rounded(record: Record) -> Record:
    """To four digits, for a line on the terminal."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(one) for one in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {name: short(value) for name, value in record.items()}


def markdown(tables: dict[str, list[Record]]) -> str:
    """Tables by their names, one below the other."""
    return "\n".join(_table(name, records) for name, records in tables.items())


def _table(name: str, records: list[Record]) -> str:
    columns = list(dict.fromkeys(column for record in records for column in record))
    lines = [f"### {name}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for record in records:
        lines.append("| " + " | ".join(_said(record.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def _said(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " … ".join(map(_said, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
