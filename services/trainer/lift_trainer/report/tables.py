"""Results side by side: one table for each set of items under one protocol, so that unlike scores never meet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lift_trainer.evaluators.result import Result
from lift_trainer.report.runs import Evaluated

RECALL = re.compile(r"(?:(?P<before>.*?)[/_. ])?(?P<cutoff>r@\d+)(?:[/_. ](?P<after>.*))?")


@dataclass(frozen=True)
class Row:
    run: Evaluated
    style: str
    """CSS class of the run, the same all over the page."""
    result: Result

    @property
    def baseline(self) -> bool:
        """Whether it is a control that was asked for as one."""
        return self.style.startswith("base")


@dataclass(frozen=True)
class Table:
    """Results of one task on equal items under one protocol."""

    rows: Sequence[Row]

    @property
    def first(self) -> Result:
        return self.rows[0].result

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of scores that belong side by side, by what they have in common: a direction, or nothing."""
        groups: dict[str, list[str]] = {}
        for row in self.rows:
            for name in row.result.scores:
                names = groups.setdefault(column(name)[0], [])
                if name not in names:
                    names.append(name)
        return groups

    @property
    def headlines(self) -> list[str]:
        """The one or two scores that stand for all."""
        names = [name for some in self.groups.values() for name in some]
        if "mean" in names:
            return ["mean"]
        recalls = [some[-1] for group, some in self.groups.items() if group and group != "mean"]
        return recalls or names[:1]


def tables(runs: Sequence[tuple[Evaluated, str]]) -> list[Table]:
    """All results of some runs (each with its CSS class), grouped; those of the first run first."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for run, style in runs:
        for result in run.results:
            key = result.task, result.protocol, result.data
            found.setdefault(key, []).append(Row(run, style, result))
    return [Table(rows) for rows in found.values()]


def column(score: str) -> tuple[str, str]:
    """`text to image` and `R@5` of a score's name; a name of another kind is a column by itself."""
    if match := RECALL.fullmatch(score):
        group = match["before"] or match["after"] or ""
        return group.replace("_", " "), match["cutoff"].upper()
    return "", score.replace("_", " ")
