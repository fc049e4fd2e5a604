"""Scores of several runs beside each other, beside chance, and beside what is got without looking at the image."""

from __future__ import annotations

from collections.abc import Sequence

from lift_trainer.evaluators.compare import Difference, differences
from lift_trainer.evaluators.result import Score
from lift_trainer.report.markup import Child, Markup, tag
from lift_trainer.report.tables import Table, column
from lift_trainer.report.words import points, share, shown, signed, words

PICTURES = frozenset({"pairs", "gallery"})
LONGEST = 600
"""Characters of a count, or of what was left out, that stand on the page."""

TITLES = {
    "retrieval": "Retrieval",
    "shapes": "Hard negatives: shapes",
    "sugarcrepe": "Hard negatives: SugarCrepe",
    "zeroshot": "Zero-shot classification",
    "probe": "Probes of the states before the head",
}


def title(task: str) -> str:
    return TITLES.get(task, words(task).capitalize())


def label(table: Table, score: str) -> str:
    """What a score of a table is called away from it."""
    group, kind = column(score)
    return f"{group.capitalize()}, {kind}" if group else f"{title(table.first.task)}, {table.first.name}"


def score_sections(found: Sequence[Table]) -> list[Markup]:
    return [_section(table, _apart(table, found)) for table in found]


def _apart(table: Table, found: Sequence[Table]) -> bool:
    """Whether data of the same name, or under another protocol, stand in another table too."""
    named = table.first.task, table.first.name
    return sum((other.first.task, other.first.name) == named for other in found) > 1


def _section(table: Table, apart: bool) -> Markup:
    first = table.first
    scores = [score for row in table.rows for score in row.result.scores.values()]
    said = [f"“{first.name}”, protocol {first.protocol}."]
    if apart:
        said.append(
            f"Only runs with equal items and protocol stand in a table; these are data {first.data[:12]}."
        )
    if any(score.chance is not None for score in scores):
        said.append("The upright mark in each bar is chance.")
    if any(score.low is not None for score in scores):
        said.append("Thin lines are 95 % intervals, images resampled.")
    if any(score.blind is not None for score in scores):
        said.append("Blind: the same choices for the mean training image instead of each image.")
    if first.left_out:
        said.append(f"{len(first.left_out):,} images or rows could not be used and were left out.")
    groups = [(group, names) for group, names in table.groups.items()]
    several = len(groups) > 1 and all(len(names) <= 4 for _, names in groups)
    body = [_table(table, group, names) for group, names in groups]
    return tag(
        "section",
        tag("h2", title(first.task)),
        tag("p", " ".join(said), class_="note"),
        tag("div", body, class_="pair body" if several else "body"),
        _differences(table),
        _counts(table),
    )


def _counts(table: Table) -> Markup | None:
    """What results tell beside scores: ties, classes without images, distances; and what was left out, by name."""
    told = [
        {name: shown(value) for name, value in row.result.details.items() if name not in PICTURES}
        | {"left out": "; ".join(f"{where}: {why}" for where, why in row.result.left_out.items())}
        for row in table.rows
    ]
    names = [
        name
        for name in dict.fromkeys(name for one in told for name in one)
        if any(one.get(name) for one in told)
    ]
    if not names:
        return None
    body = [
        tag("tr", tag("td", words(name)), [tag("td", _cut(one.get(name) or "–")) for one in told])
        for name in names
    ]
    head = tag("tr", tag("th"), [tag("th", row.run.name) for row in table.rows])
    counts = tag("table", tag("thead", head), tag("tbody", body), class_="differ")
    return tag("details", tag("summary", "Counts beside the scores"), tag("div", counts, class_="scroll"))


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= LONGEST
        else f"{text[:LONGEST]} … ({len(text):,} characters in the result's file)"
    )


def _table(table: Table, group: str, names: Sequence[str]) -> Markup:
    head = [
        tag("th", column(name)[1], tag("small", _items(table, name)) if not group else None, title=name)
        for name in names
    ]
    body = [
        tag(
            "tr",
            tag("td", tag("span", class_=f"key {row.style}"), row.run.name),
            [_cell(row.result.scores.get(name)) for name in names],
            class_=f"first {row.style}" if place == 0 else row.style,
        )
        for place, row in enumerate(table.rows)
    ]
    chances = [table.first.scores[name].chance if name in table.first.scores else None for name in names]
    chance = None
    if any(value is not None for value in chances):
        cells = [tag("td", "–" if value is None else share(value)) for value in chances]
        chance = tag("tr", tag("td", "chance"), cells, class_="chance")
    corner = [group.capitalize() or "Run", tag("small", _items(table, names[0])) if group else None]
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", tag("th", corner), head)),
            tag("tbody", body, chance),
            class_="scores" if len(names) <= 4 else "scores many",
        ),
        class_="scroll",
    )


def _items(table: Table, name: str) -> str:
    """How many items a score stands on; runs of one table may have left out none or all say the same."""
    counts = sorted({row.result.scores[name].items for row in table.rows if name in row.result.scores})
    return f"{' or '.join(f'{count:,}' for count in counts)} items"


def _cell(score: Score | None) -> Markup:
    if score is None:
        return tag("td", "–")
    below: list[Child] = []
    if score.low is not None and score.high is not None:
        below.append(tag("span", f"{score.low * 100:.1f} to {score.high * 100:.1f}", class_="interval"))
    if score.blind is not None:
        gain = score.value - score.blind
        below.append(tag("span", f"blind {score.blind * 100:.1f}, {signed(gain)}", class_="blind"))
    return tag("td", share(score.value), _bar(score), below)


def _bar(score: Score) -> Markup | None:
    if not 0 <= score.value <= 1:
        return None

    def percent(value: float) -> str:
        return f"{min(max(value, 0), 1) * 100:.2f}%"

    interval = chance = None
    if score.low is not None and score.high is not None:
        interval = tag(
            "line", x1=percent(score.low), x2=percent(score.high), y1=3.5, y2=3.5, class_="whisker"
        )
    if score.chance is not None:
        chance = tag("line", x1=percent(score.chance), x2=percent(score.chance), y1=-2, y2=9, class_="tick")
    return tag(
        "svg",
        tag("rect", width="100%", height=7, rx=2, class_="track"),
        tag("rect", width=percent(score.value), height=7, rx=2, class_="fill"),
        interval,
        chance,
        class_="bar",
        aria_hidden="true",
    )


# ---------------------------------------------------------------------------------------------- differences


def _differences(table: Table) -> Markup | None:
    """Every run's items paired with those of the first."""
    reference, others = table.rows[0], table.rows[1:]
    found = {id(row): {one.score: one for one in differences(reference.result, row.result)} for row in others}
    names = [
        name
        for some in table.groups.values()
        for name in some
        if any(name in of_row for of_row in found.values())
    ]
    if not names:
        return None
    heads = [" ".join(part for part in column(name) if part) for name in names]
    body = [
        tag(
            "tr",
            tag("td", tag("span", class_=f"key {row.style}"), row.run.name),
            [_difference(found[id(row)].get(name)) for name in names],
        )
        for row in others
    ]
    return tag(
        "div",
        tag("h3", f"Difference from {reference.run.name}, in points"),
        tag(
            "p",
            "Paired item by item, images resampled; marked only where the 95 % interval excludes 0.",
            class_="note",
        ),
        tag(
            "div",
            tag(
                "table",
                tag("thead", tag("tr", tag("th"), [tag("th", head) for head in heads])),
                tag("tbody", body),
                class_="differences",
            ),
            class_="scroll",
        ),
        class_="body compared",
    )


def _difference(found: Difference | None) -> Markup:
    if found is None:
        return tag("td", "–")
    value = signed(found.difference)
    if found.low is None or found.high is None:
        return tag("td", value, class_="level")
    interval = tag("span", points(found.low, found.high), class_="interval")
    if not found.marked:
        return tag("td", value, interval, class_="level")
    mark, kind = ("▲", "better") if found.difference > 0 else ("▼", "worse")
    return tag("td", tag("b", f"{mark} {value}"), interval, class_=kind)
