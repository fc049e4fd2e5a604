"""Results and differences as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from lift_trainer.evaluators.compare import Difference
from lift_trainer.evaluators.result import Result, Score


def table(results: Sequence[Result]) -> str:
    """One table for all that have the same task, data, protocol and items: rows are scores, columns encoders."""
    by_data = sorted(results, key=_data)
    return "\n\n".join("\n".join(_one(list(some))) for _, some in groupby(by_data, _data))


def _data(result: Result) -> tuple[str, str, str, str]:
    return result.task, result.name, result.protocol, result.data


def _one(results: Sequence[Result]) -> list[str]:
    first = results[0]
    rows = [["", *(result.subject.name for result in results), "chance", "items"]]
    for name, score in first.scores.items():
        own = [result.scores.get(name) for result in results]
        chance = "" if score.chance is None else _percent(score.chance)
        rows.append([name, *map(_score, own), chance, f"{score.items:,}"])
        if any(one and one.blind is not None for one in own):
            rows.append(["  over blind", *map(_over_blind, own), "", ""])
    head = f"{first.task} · {first.name} · {first.protocol}"
    left_out = f" · {len(first.left_out):,} left out" if first.left_out else ""
    return [head + left_out, *aligned(rows)]


def _score(score: Score | None) -> str:
    if score is None:
        return ""
    between = (
        "" if score.low is None or score.high is None else f" [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    )
    return _percent(score.value) + between


def _over_blind(score: Score | None) -> str:
    if score is None or score.blind is None:
        return ""
    return f"{100 * (score.value - score.blind):+.1f} over {100 * score.blind:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def difference_table(first: Result, second: Result, differences: Sequence[Difference]) -> str:
    """In points; * where the interval excludes 0."""
    rows = [["", first.subject.name, second.subject.name, "difference", ""]]
    for one in differences:
        between = (
            "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
        )
        rows.append(
            [
                one.score,
                _percent(one.first),
                _percent(one.second),
                f"{100 * one.difference:+.1f}{between}",
                "*" if one.marked else "",
            ]
        )
    head = f"{first.task} · {first.name} · {first.protocol}, item by item"
    return "\n".join([head, *aligned(rows)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def distinct_names(names: Sequence[str], places: Sequence[str]) -> list[str]:
    """Names, where two are equal the places instead."""
    times = Counter(names)
    return [place if times[name] > 1 else name for name, place in zip(names, places, strict=True)]
