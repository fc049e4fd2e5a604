"""Training curves of all runs in one chart: by images seen, and by operations where these are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lift_trainer.report.chart import Level, Line, line_chart
from lift_trainer.report.cost import Cost
from lift_trainer.report.markup import Markup, tag
from lift_trainer.report.runs import HeldOutPoint, Run
from lift_trainer.report.words import duration, short

Styled = Sequence[tuple[Run, str]]
"""Runs, each with the CSS class of its lines."""


def curves(runs: Styled, costs: Mapping[str, Cost]) -> Markup | None:
    """
    Args:
        costs: by name of the run.
    """
    drawn = [(run, style) for run, style in runs if run.points or run.held_out]
    if not drawn:
        return None
    level = _guessing([run for run, _ in runs])
    loss = _lines(drawn, lambda run: run.config.batch_size, lambda point: point.held_out.loss)
    charts = [_chart("Loss by images seen", loss, "images", "loss", level)]
    per_image = {run.name: costs[run.name].per_image for run, _ in drawn}
    counted = [(run, style) for run, style in drawn if per_image[run.name]]
    note = None
    if len(set(per_image.values())) == 1 and counted:
        each = short(per_image[counted[0][0].name] or 0, "FLOP")
        note = f"By training operations the curves look the same: every run takes {each} an image."
    elif counted:
        lines = _lines(
            counted,
            lambda run: run.config.batch_size * (per_image[run.name] or 0),
            lambda point: point.held_out.loss,
        )
        charts.append(_chart("Loss by training operations", lines, "FLOP", "loss", level))
    recalls = _lines(drawn, lambda run: run.config.batch_size, _recall, training=False)
    if recalls:
        charts.append(_chart("Held-out recall at 1, mean of both directions", recalls, "images", "R@1", None))
    losses = {(run.config.loss, run.config.batch_size, run.config.mask) for run, _ in drawn}
    unlike = " Losses of different kinds or batch sizes cannot be compared." if len(losses) > 1 else ""
    spent = "; ".join(
        f"{run.name}: {run.points[-1].samples:,} images in {duration(run.seconds)}"
        for run, _ in drawn
        if run.points
    )
    held_out = any(run.held_out for run, _ in drawn)
    return tag(
        "section",
        tag("h2", "In training and on held-out data" if held_out else "In training"),
        tag("p", f"{spent}.{unlike}" if spent else None, class_="note"),
        tag("div", charts, tag("p", note, class_="note") if note else None, class_="body charts"),
    )


def _lines(
    runs: Styled,
    per_step: Callable[[Run], float],
    held_out: Callable[[HeldOutPoint], float | None],
    *,
    training: bool = True,
) -> list[Line]:
    """
    Args:
        per_step: how far a step goes along x.
        held_out: y of a point.
        training: also the losses in training.
    """
    lines = []
    for run, style in runs:
        if training:
            lines.append(
                Line(run.name, [(point.step * per_step(run), point.loss) for point in run.points], style)
            )
        scored = [
            (point.step * per_step(run), y) for point in run.held_out if (y := held_out(point)) is not None
        ]
        lines.append(Line(f"{run.name}, held out", scored, f"{style} held-out"))
    return [line for line in lines if line.points]


def _recall(point: HeldOutPoint) -> float | None:
    directions = point.held_out.image_to_text, point.held_out.text_to_image
    return None if None in directions else sum(y for y in directions if y is not None) / 2


def _chart(title: str, lines: Sequence[Line], x_name: str, y_name: str, level: Level | None) -> Markup:
    legend = [
        tag(
            "span",
            tag("svg", tag("line", x1=1, x2=21, y1=4, y2=4, class_=f"line {line.style}"), class_="swatch"),
            line.name,
        )
        for line in lines
    ]
    sizes = (("wide", 976, 300), ("narrow", 360, 260))
    return tag(
        "div",
        tag("h3", title),
        tag("div", legend, class_="legend"),
        [
            tag(
                "div",
                line_chart(lines, x_name=x_name, y_name=y_name, width=width, height=height, level=level),
                class_=kind,
            )
            for kind, width, height in sizes
        ],
        class_="chart",
    )


def _guessing(runs: Sequence[Run]) -> Level | None:
    """InfoNCE of a model that cannot tell the pairs of a batch apart: ln(batch), a little less under a mask."""
    kinds = {(run.config.loss, run.config.batch_size, run.config.mask) for run in runs}
    if len(kinds) > 1 or runs[0].config.loss != "infonce":
        return None
    batch, mask = runs[0].config.batch_size, runs[0].config.mask
    return Level(f"guessing:{'' if mask == 'none' else ' about'} ln {batch:,}", math.log(batch))
