"""Results and differences as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from lift_trainer.evaluators.compare import Difference
from lift_trainer.evaluators.result import Result, Score


def table(results: Sequence[Result]) -> str:
    """One table for every task, data and protocol: rows are scores, columns those who have them."""
    by_data = sorted(results, key=_data)
    return "\n\n".join("\n".join(_one(list(some))) for _, some in groupby(by_data, _data))


def _data(result: Result) -> tuple[str, str, str]:
    return result.task, result.name, result.protocol


def _one(results: Sequence[Result]) -> list[str]:
    first = results[0]
    names = dict.fromkeys(name for result in results for name in result.scores)
    has_chance = any(score.chance is not None for score in first.scores.values())
    rows = [["", *(result.subject.name for result in results), *(["chance"] if has_chance else [])]]
    for name in names:
        own = [result.scores.get(name) for result in results]
        chance = next((score.chance for score in own if score and score.chance is not None), None)
        rows.append(
            [
                name,
                *map(_score, own),
                *([_percent(chance) if chance is not None else ""] if has_chance else []),
            ]
        )
        if any(score and score.blind is not None for score in own):
            rows.append(["  over blind", *map(_over_blind, own), *([""] if has_chance else [])])
    counts = {score.items for result in results for score in result.scores.values()}
    items = f"{min(counts):,}" + (f" to {max(counts):,}" if len(counts) > 1 else "")
    head = f"{first.task} · {first.name} · {first.protocol} · {items} items"
    left_out = max(len(result.left_out) for result in results)
    return [head + (f" · {left_out:,} left out" if left_out else ""), *aligned(rows)]


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
