"""What runs choose, in pictures: drawn at random with a seed, never chosen.

Two-way choices: an image, its two captions, which one each run picks; pairs where the first two runs differ and pairs
where all fail. Retrieval: a caption and the images that a run ranks first. What is drawn from stands in the details
of results; pictures are read from their shards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lift_cache.errors import BadSource
from lift_trainer.evaluators.result import Result
from lift_trainer.report.markup import Markup, join, tag
from lift_trainer.report.tables import Row, Table
from lift_trainer.report.thumbnails import ImageRef, data_uris
from lift_trainer.report.words import words

DRAWN = 6
"""Pairs of each kind."""


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Placed(_Lenient):
    sample: str
    shard: Path

    @property
    def ref(self) -> ImageRef:
        return ImageRef(self.shard, self.sample)


class Ranked(_Placed):
    right: bool
    score: float


class Shown(_Lenient):
    """A caption and its best images, best first."""

    caption: str
    images: tuple[Ranked, ...]


class Pair(_Lenient):
    """An item of a two-way choice."""

    score: str
    """Which one it is an item of,"""
    item: int
    """and its place there."""
    image: _Placed
    captions: tuple[str, str]
    """The true one, the false one."""


@dataclass(frozen=True)
class Judged:
    """A pair and whether each row of its table is right."""

    pair: Pair
    right: tuple[bool, ...]


def galleries(found: Sequence[Table], seed: int) -> list[Markup]:
    """Raises BadSource: pictures are gone, or details of another shape."""
    return [
        part for table in found for part in (_choices(table, seed), _retrieval(table)) if part is not None
    ]


# ---------------------------------------------------------------------------------------------- two-way choices


def judged(table: Table) -> list[Judged]:
    """The pairs that the results of a table have in common, in the order of the first."""
    by_row = [
        {(pair.score, pair.item): pair for pair in _parse(_PAIRS, row.result, "pairs")} for row in table.rows
    ]
    shared = [key for key in by_row[0] if all(key in pairs for pairs in by_row)]
    return [
        Judged(by_row[0][key], tuple(row.result.items[key[0]].value[key[1]] > 0 for row in table.rows))
        for key in shared
    ]


def _choices(table: Table, seed: int) -> Markup | None:
    pairs = judged(table)
    if not pairs:
        return None
    rows = table.rows
    kinds: list[tuple[str, Callable[[Judged], bool]]]
    if len(rows) == 1:
        name = rows[0].run.name
        kinds = [
            (f"{name} is right", lambda judged: judged.right[0]),
            (f"{name} is wrong", lambda judged: not judged.right[0]),
        ]
    else:
        first, second = rows[0].run.name, rows[1].run.name
        kinds = [
            (f"{first} and {second} differ", lambda judged: judged.right[0] != judged.right[1]),
            (
                "Both fail" if len(rows) == 2 else f"All {len(rows)} fail",
                lambda judged: not any(judged.right),
            ),
        ]
    shown = [(title, [pair for pair in pairs if wanted(pair)]) for title, wanted in kinds]
    drawn = [
        (title, len(of), _draw(of, f"{seed} {place} {table.first.data}"))
        for place, (title, of) in enumerate(shown)
    ]
    uris = data_uris(pair.pair.image.ref for _, _, some in drawn for pair in some)
    parts = [
        tag(
            "div",
            tag("h3", title, tag("span", f"{count:,} of {len(pairs):,} pairs", class_="count")),
            tag("ul", (_pair(one, rows, uris) for one in some), class_="pairs")
            if some
            else tag("p", "There is none.", class_="note"),
        )
        for title, count, some in drawn
    ]
    return tag(
        "section",
        tag("h2", "Which caption they pick"),
        tag(
            "p",
            f"“{table.first.name}”, {words(table.first.task)}: an image and two captions, the true one above. "
            f"{len(pairs):,} pairs were drawn at random when the runs were evaluated, {DRAWN} at most of each kind "
            f"are drawn from them with seed {seed}; none was chosen.",
            class_="note",
        ),
        tag("div", parts, class_="body kinds"),
    )


def _draw(pairs: Sequence[Judged], seed: str) -> list[Judged]:
    places = sorted(random.Random(seed).sample(range(len(pairs)), min(DRAWN, len(pairs))))
    return [pairs[place] for place in places]


def _pair(judged: Judged, rows: Sequence[Row], uris: Mapping[ImageRef, str]) -> Markup:
    pair = judged.pair
    captions = []
    for kind, caption, true in (("true", pair.captions[0], True), ("false", pair.captions[1], False)):
        picked = [
            tag("span", row.run.name, class_=f"chip {row.style}")
            for row, right in zip(rows, judged.right, strict=True)
            if right == true
        ]
        captions.append(
            tag(
                "div",
                tag(
                    "p",
                    tag("span", "✓" if true else "✗", class_="sign", title=kind),
                    caption,
                    class_="caption",
                ),
                tag("p", tag("span", "picked by ", class_="by"), picked, class_="picked") if picked else None,
                class_=f"option {kind}",
            )
        )
    return tag(
        "li",
        tag("span", tag("img", src=uris[pair.image.ref], alt=pair.image.sample), class_="frame"),
        tag("div", tag("p", words(pair.score), class_="task"), captions),
    )


# ---------------------------------------------------------------------------------------------- retrieval


def _retrieval(table: Table) -> Markup | None:
    """Of the runs of a table, without the controls; the first two that show the same captions."""
    rows = [row for row in table.rows if not row.baseline] or table.rows[:1]
    shown = [(row, _parse(_SHOWN, row.result, "gallery")) for row in rows]
    row, gallery = shown[0]
    if not gallery:
        return None
    captions = [one.caption for one in gallery]
    beside = [(row, some) for row, some in shown if [one.caption for one in some] == captions][:2]
    uris = data_uris(image.ref for _, some in beside for one in some for image in one.images)
    among = max(len(one.images) for one in gallery)
    hits = ", ".join(
        f"{row.run.name} finds {sum(any(image.right for image in one.images) for one in some)}"
        for row, some in beside
    )
    cards = [
        tag(
            "li",
            tag("p", caption, class_="caption"),
            ((_named(row) if len(beside) > 1 else None, _ranking(some[place], uris)) for row, some in beside),
        )
        for place, caption in enumerate(captions)
    ]
    return tag(
        "section",
        tag("h2", "What they find" if len(beside) > 1 else "What it finds"),
        tag(
            "p",
            f"{len(cards)} captions of “{row.result.name}”, drawn at random, and the images that come first. {hits} of "
            f"{len(cards)} among the first {among}.",
            class_="note",
        ),
        tag("ul", cards, class_="gallery body"),
    )


def _named(row: Row) -> Markup:
    return tag("p", tag("span", row.run.name, class_=f"chip {row.style}"), class_="whose")


def _ranking(one: Shown, uris: Mapping[ImageRef, str]) -> Markup:
    images = [
        tag(
            "li",
            tag(
                "figure",
                tag(
                    "span",
                    tag("img", src=uris[image.ref], alt=f"{image.sample}{', right' if image.right else ''}"),
                    class_="frame",
                    title=f"{image.sample}, cosine {image.score:.3f}",
                ),
                tag("figcaption", "✓ right" if image.right else str(rank)),
            ),
            class_="right" if image.right else None,
        )
        for rank, image in enumerate(one.images, 1)
    ]
    missed = None
    if not any(image.right for image in one.images):
        missed = tag("p", f"Its picture is not among the first {len(one.images)}.", class_="missed")
    return join(tag("ol", images), missed)


# ---------------------------------------------------------------------------------------------- details

T = TypeVar("T")

_PAIRS: TypeAdapter[tuple[Pair, ...]] = TypeAdapter(tuple[Pair, ...])
_SHOWN: TypeAdapter[tuple[Shown, ...]] = TypeAdapter(tuple[Shown, ...])


def _parse(kind: TypeAdapter[tuple[T, ...]], result: Result, field: str) -> tuple[T, ...]:
    try:
        return kind.validate_python(result.details.get(field, ()))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise BadSource(
            f"{result.task}-{result.name} of {result.subject.name}: details.{field}.{where}: "
            f"{error.errors()[0]['msg']}; evaluate again with this version"
        ) from None
