"""Counts of what was tried and what was found, printed as they come."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KEEP = 10
"""Directories that are kept for a look at what broke."""


def keep(fill: Callable[[Path], object]) -> str:
    """Keep what shows a violation, in a new directory that `fill` makes; where that is."""
    top = Path(tempfile.gettempdir()) / "torture"
    top.mkdir(exist_ok=True)
    if len(list(top.iterdir())) >= KEEP:
        return f"not kept: {top} is full"
    place = Path(tempfile.mkdtemp(dir=top)) / "root"
    fill(place)
    return str(place)


@dataclass
class Tally:
    """One part of the suite: cases by kind, and violations, each with how to see it again."""

    part: str
    cases: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def count(self, kind: str, problems: list[str], where: str) -> None:
        """One case, and what is wrong with it."""
        self.cases[kind] += 1
        for problem in problems:
            self.violate(kind, problem, where)

    def violate(self, kind: str, problem: str, where: str) -> None:
        self.violations[kind] += 1
        if self.violations[kind] <= 10:
            print(f"  VIOLATION {self.part}, {kind}, {where}: {problem}", flush=True)

    def remark(self, text: str) -> None:
        """Something that is no case but must be said, now and at the end."""
        self.remarks.append(text)
        print(f"  {self.part}: {text}", flush=True)

    def say(self) -> None:
        self.seconds = time.monotonic() - self.began
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.cases.items()))
        print(
            f"{self.part}: {counts}; {self.violations.total()} violations; {self.seconds:.0f} s", flush=True
        )


def table(tallies: list[Tally]) -> str:
    lines = [f"{'part':<10} {'kind':<44} {'cases':>8} {'violations':>11} {'seconds':>8}"]
    for tally in tallies:
        kinds = sorted({*tally.cases, *tally.violations})
        for i, kind in enumerate(kinds):
            seconds = f"{tally.seconds:8.0f}" if i == 0 else ""
            lines.append(
                f"{tally.part if i == 0 else '':<10} {kind:<44} {tally.cases[kind]:>8,}"
                f" {tally.violations[kind]:>11,} {seconds}".rstrip()
            )
        lines += [f"{'':<10} ! {remark}" for remark in tally.remarks]
    return "\n".join(lines)
