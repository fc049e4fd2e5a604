"""Two encoders on equal items: differences of their scores, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lift_cache.errors import BadSource
from lift_trainer.evaluators.intervals import intervals
from lift_trainer.evaluators.items import Items, mean
from lift_trainer.evaluators.result import Result


@dataclass(frozen=True)
class Difference:
    """Of one score: what the second encoder has more than the first."""

    score: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    """95 % interval, images resampled; None over fewer than two images."""

    @property
    def marked(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def differences(first: Result, second: Result) -> list[Difference]:
    """Of every score that has items in both.

    Raises:
        BadSource: another task, protocol or data; says which.
    """
    for what in ("task", "protocol"):
        ours, theirs = getattr(first, what), getattr(second, what)
        if ours != theirs:
            raise _refusal(first, second, what, ours, theirs)
    if first.data != second.data:
        left_out = len(first.left_out), len(second.left_out)
        also = f"; {left_out[0]} and {left_out[1]} images were left out" if any(left_out) else ""
        raise _refusal(first, second, "data", first.data[:12], f"{second.data[:12]}{also}")
    pairs = {
        name: _subtracted(second.items[name], own, name)
        for name, own in first.items.items()
        if name in second.items
    }
    between = intervals(pairs)
    return [
        Difference(
            name,
            first.scores[name].value,
            second.scores[name].value,
            mean(pair),
            *between.get(name, (None, None)),
        )
        for name, pair in pairs.items()
        if pair.value
    ]


def _subtracted(items: Items, less: Items, name: str) -> Items:
    if (items.image, items.group) != (less.image, less.group):
        raise BadSource(f"the items of {name} differ; evaluate both again with the same version")
    value = tuple(own - other for own, other in zip(items.value, less.value, strict=True))
    return items.model_copy(update={"value": value})


def _refusal(first: Result, second: Result, what: str, ours: str, theirs: str) -> BadSource:
    return BadSource(
        f"{first.subject.name} and {second.subject.name} cannot be compared on {first.task} {first.name}: "
        f"their {what} differ: {ours} and {theirs}"
    )


def results_of(place: Path) -> list[Result]:
    """What is in a result file, in RUN/eval, or in a folder of results. Raises BadSource: nothing is."""
    if not place.exists():
        raise BadSource(f"{place}: no such run or result; name runs, their eval folders, or files in these")
    if not place.is_dir():
        return [Result.read(place)]
    folder = place / "eval" if (place / "checkpoints").is_dir() else place
    found = sorted(folder.glob("*.json"))
    if not found:
        raise BadSource(f"{place} has no evaluation; first: lift-eval TASK --run {place} …")
    return [Result.read(path) for path in found]


def paired(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Results of two encoders on the same task and data.

    Raises:
        BadSource: they have nothing in common, or the same task under another protocol only.
    """
    of_second = {(result.task, result.name, result.protocol): result for result in second}
    pairs = []
    for result in first:
        other = of_second.get((result.task, result.name, result.protocol))
        other = other or next((r for r in second if (r.task, r.name) == (result.task, result.name)), None)
        if other and other.protocol != result.protocol:
            has_theirs = any(
                (r.task, r.name, r.protocol) == (other.task, other.name, other.protocol) for r in first
            )
            if not has_theirs:
                raise _refusal(result, other, "protocol", result.protocol, other.protocol)
        elif other:
            pairs.append((result, other))
    if not pairs:
        raise BadSource(
            f"{first[0].subject.name} and {second[0].subject.name} have no task on the same data in common"
        )
    return pairs
