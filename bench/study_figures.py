"""The study in pictures: all its curves, and two panels for a README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arms import Interval
from study_report import ASKED, TERA, Made, at, spent
from study_rules import Study, composition, last

from lift_trainer.report.chart import Level, Line, line_chart, number, ticks
from lift_trainer.report.markup import Markup, tag

STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; }
text { fill: #444; }
.head { font-size: 14px; font-weight: 600; fill: #111; }
.note { fill: #a40000; font-weight: 600; font-size: 14px; }
.grid { stroke: #e4e4e4; }
.level { stroke: #888; stroke-dasharray: 3 3; }
.line { fill: none; stroke-width: 2; }
.dot { fill: transparent; stroke: none !important; }
"""
COLOURS = ("#0b6e4f", "#c44900", "#5bb98c", "#2b59c3", "#7a7a7a", "#b8b8b8", "#b07bac", "#f0a202")
PANEL = 330, 240
HEAD = 84


def figure(study: Study, made: Made, *, note: str | None = None) -> str:
    """Curves of all arms that were trained in short captions, as one SVG file without anything outside it."""
    shown = _shown(study, made)
    axes: list[tuple[str, str, int | None]] = [("images seen, thousands", "images", None)]
    axes.append(("training, TFLOPs", "flops", None))
    axes += [
        (f"and embedding, shared by {runs} run{'s' * (runs > 1)}, TFLOPs", "flops", runs)
        for runs in sorted(study.amortised_over, reverse=True)
    ]
    width, height = len(axes) * PANEL[0] + 20, HEAD + 2 * (PANEL[1] + 30)

    def x(result: Mapping[str, Any], step: int, kind: str, runs: int | None) -> float:
        batch = int(study.training["batch_size"])
        return step * batch / 1000 if kind == "images" else spent(result, step, runs) / TERA

    def points(arm: str, variant: str, kind: str, runs: int | None) -> list[tuple[float, float]]:
        first = made[arm][0]
        return [(x(first, step, kind, runs), 100 * score) for step, score in _scores(made[arm], variant)]

    panels = []
    for row, variant in enumerate(("seen", "new")):
        for column, (name, kind, runs) in enumerate(axes):
            lines = [Line(arm, points(arm, variant, kind, runs), f"c{n}") for n, arm in enumerate(shown)]
            chart = line_chart(
                lines,
                x_name=name,
                named=False,
                y_name="accuracy",
                width=PANEL[0],
                height=PANEL[1],
                level=Level("chance", 50),
            )
            left, top = 10 + column * PANEL[0], HEAD + row * (PANEL[1] + 30)
            panels.append(tag("svg", chart, x=left, y=top, width=PANEL[0], height=PANEL[1]))
            panels.append(tag("text", name, x=left + PANEL[0] - 14, y=top + PANEL[1] + 4, text_anchor="end"))
            if column == 0:
                panels.append(
                    tag("text", f"asked {ASKED[variant]}, %", x=left + 44, y=top + 4, class_="head")
                )
    legend = [
        (
            tag("line", x1=14 + 290 * (n % 4), x2=38 + 290 * (n % 4), y1=y, y2=y, class_=f"line c{n}"),
            tag("text", arm, x=44 + 290 * (n % 4), y=y + 4),
        )
        for n, arm in enumerate(shown)
        for y in [24 + 20 * (n // 4)]
    ]
    told = f"mean of {_seeds(made, shown)}, five tasks and two splits"
    below = tag("text", note or told, x=14, y=66, class_="note" if note else None)
    sheet = tag("style", Markup(STYLE + _colours(len(shown))))
    return _file(sheet, legend, below, panels, width=width, height=height)


def _shown(study: Study, made: Made) -> list[str]:
    return [arm for arm in made if arm in [*study.arms][: study.first]]


def _scores(results: Sequence[Mapping[str, Any]], variant: str) -> list[tuple[int, float]]:
    """(step, mean over seeds), in order."""
    return [(point["step"], at(results, point["step"], variant)) for point in results[0]["curve"]]


def _seeds(made: Made, arms: Sequence[str]) -> str:
    counts = sorted({len(made[arm]) for arm in arms})
    return f"{' or '.join(map(str, counts))} seed{'s' * (counts != [1])}"


def _colours(arms: int) -> str:
    return "".join(f".c{n} {{ stroke: {COLOURS[n % len(COLOURS)]}; }}\n" for n in range(arms))


def _file(*content: Any, width: int, height: int) -> str:
    drawing = tag(
        "svg", *content, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width
    )
    return f"{drawing}\n"


# ------------------------------------------------------------------------------------------- for a README

WIDE, HIGH = 290, 300
"""Of a panel's plot; its names stand to the right of it."""
NAMES, LEFT, TOP, BELOW = 205, 40, 40, 48
APART = 15


def picture(study: Study, made: Made, *, note: str | None = None) -> str:
    """How far each arm came in known and in new wordings, by its operations; named at its end, with its interval."""
    arms, runs = _shown(study, made), max(study.amortised_over)
    panels = [Panel.of(made, arms, variant, runs) for variant in ("seen", "new")]
    drawn_at = [score for panel in panels for score in panel.scores]
    low, high = math.floor(20 * min(0.5, *drawn_at)) / 20, math.ceil(20 * max(drawn_at)) / 20
    width = LEFT + WIDE + NAMES
    drawn = [
        tag("svg", panel.draw(low, high), x=n * width, y=0, width=width, height=TOP + HIGH + 24)
        for n, panel in enumerate(panels)
    ]
    told = (
        f"Two-way accuracy in % (chance: 50) by TFLOPs of training and 1/{runs} of the embedding; at the end, "
        f"mean and 95 % interval of {_seeds(made, arms)}."
    )
    foot = tag("text", note or told, x=LEFT, y=TOP + HIGH + BELOW - 8, class_="note" if note else None)
    named = "".join(
        f"text.c{n} {{ fill: {COLOURS[n % len(COLOURS)]}; stroke: none; font-weight: 600; }}\n"
        for n in range(len(arms))
    )
    sheet = tag("style", Markup(STYLE + _colours(len(arms)) + named))
    return _file(sheet, drawn, foot, width=len(panels) * width, height=TOP + HIGH + BELOW)


@dataclass(frozen=True)
class Panel:
    """One variant."""

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Arm → (TFLOPs, mean accuracy)."""
    ends: Mapping[str, Interval]
    """Arm → its last accuracy over seeds."""

    @classmethod
    def of(cls, made: Made, arms: Sequence[str], variant: str, runs: int) -> Panel:
        curves = {
            arm: [
                (spent(made[arm][0], step, runs) / TERA, score) for step, score in _scores(made[arm], variant)
            ]
            for arm in arms
        }
        ends = {arm: Interval.of([composition(last(one), variant) for one in made[arm]]) for arm in arms}
        return cls(f"asked {ASKED[variant]}", curves, ends)

    @property
    def scores(self) -> list[float]:
        """All that is drawn; of one seed there is no interval."""
        bounds = [bound for end in self.ends.values() for bound in (end.low, end.high)]
        curves = [score for curve in self.curves.values() for _, score in curve]
        return curves + [bound for bound in bounds if not math.isnan(bound)]

    def draw(self, low: float, high: float) -> list[Markup]:
        most = max(x for curve in self.curves.values() for x, _ in curve)

        def at_x(x: float) -> float:
            return LEFT + WIDE * x / most

        def at_y(y: float) -> float:
            return TOP + HIGH * (high - y) / (high - low)

        drawn = [tag("text", self.title, x=LEFT, y=20, class_="head")]
        for y in ticks(low, high, 5):
            kind = "level" if y == 0.5 else "grid"
            drawn.append(tag("line", x1=LEFT, x2=LEFT + WIDE, y1=at_y(y), y2=at_y(y), class_=kind))
            drawn.append(tag("text", number(100 * y), x=LEFT - 8, y=at_y(y) + 4, text_anchor="end"))
        for x in ticks(0, most, 4):
            drawn.append(tag("text", number(x), x=at_x(x), y=TOP + HIGH + 18, text_anchor="middle"))
        named = spread({arm: at_y(end.mean) for arm, end in self.ends.items()}, APART)
        for n, (arm, curve) in enumerate(self.curves.items()):
            points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in curve)
            drawn.append(tag("polyline", points=points, class_=f"line c{n}"))
            end, x = self.ends[arm], at_x(curve[-1][0])
            beside = sum(abs(at_x(other[-1][0]) - x) < 6 for other in [*self.curves.values()][:n])
            bar = x + 4 * beside  # intervals that end at about the same place stand beside each other
            if not math.isnan(end.low):
                drawn.append(
                    tag("line", x1=bar, x2=bar, y1=at_y(end.low), y2=at_y(end.high), class_=f"line c{n}")
                )
            name = f"{arm} {end.mean:.0%}".removesuffix("%")
            drawn.append(tag("text", name, x=LEFT + WIDE + 12, y=named[arm] + 4, class_=f"c{n}"))
            drawn.append(
                tag("line", x1=bar + 3, x2=LEFT + WIDE + 9, y1=at_y(end.mean), y2=named[arm], class_="grid")
            )
        return drawn


def spread(places: Mapping[str, float], apart: float) -> dict[str, float]:
    """Places of names, moved as little as it takes that no two are nearer than `apart`, in the same order."""
    order = sorted(places, key=places.__getitem__)
    groups: list[list[str]] = []
    for name in order:
        groups.append([name])
        while len(groups) > 1 and _top(groups[-1], places, apart) < _top(
            groups[-2], places, apart
        ) + apart * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return {name: _top(group, places, apart) + apart * n for group in groups for n, name in enumerate(group)}


def _top(group: Sequence[str], places: Mapping[str, float], apart: float) -> float:
    """Of a group's first name, when the group lies around the mean of its places."""
    return sum(places[name] for name in group) / len(group) - apart * (len(group) - 1) / 2
