"""The page: scores, loss, gallery, and how it was made."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lift_trainer.evaluators.result import Score
from lift_trainer.report.cost import Cost, cost_of
from lift_trainer.report.curves import curves
from lift_trainer.report.gallery import galleries
from lift_trainer.report.geometry import geometries
from lift_trainer.report.made import differences, lies, made_of
from lift_trainer.report.markup import Child, Markup, tag
from lift_trainer.report.runs import CacheCard, Evaluated, FillSummary, Run, cache_of
from lift_trainer.report.scores import label, score_sections
from lift_trainer.report.tables import Table, tables
from lift_trainer.report.words import duration, share, short

STYLES = 6
FIGURES = 4
"""Scores at the top of the page, at most."""


@dataclass(frozen=True)
class Report:
    runs: Sequence[Evaluated]
    baselines: Sequence[Evaluated]
    cache: CacheCard | None
    """Of the first run."""
    fill: FillSummary | None
    """Of that cache."""
    seed: int = 0
    """Of what the galleries show."""

    @property
    def all(self) -> list[tuple[Evaluated, str]]:
        """Runs, then baselines, each with the CSS class of its line."""
        return [
            *((run, f"run{index % STYLES}") for index, run in enumerate(self.runs)),
            *((run, f"base{index % STYLES}") for index, run in enumerate(self.baselines)),
        ]

    @property
    def trained(self) -> list[tuple[Run, str]]:
        """Those of which more is known than their results."""
        return [(run, style) for run, style in self.all if isinstance(run, Run)]


def render(report: Report) -> str:
    """The whole page. Raises `BadSource` for gallery images that are gone, or results of another shape."""
    found = tables(report.all)
    runs = [run for run, _ in report.trained]
    cards = {run.name: _card(report, run) for run in runs}
    costs = {run.name: _cost(report, run, cards[run.name]) for run in runs}
    return document(
        f"{', '.join(run.name for run in report.runs)} – LIFT report",
        _header(report, found),
        score_sections(found),
        _costs(report, found, costs),
        curves(report.trained, costs),
        galleries(found, report.seed),
        lies(geometries(runs, {name: card.path for name, card in cards.items() if card})),
        differences(runs),
        made_of(runs[0], report.cache, report.fill) if runs else None,
        _footer(report.runs[0]),
    )


def _card(report: Report, run: Run) -> CacheCard | None:
    """Of the run's cache; where that is not at hand, the report's may be a copy of it."""
    if run is report.runs[0]:
        return report.cache
    found = cache_of(run)
    copy = report.cache if report.cache and report.cache.snapshot == run.state.snapshot else None
    return found or copy


def _cost(report: Report, run: Run, card: CacheCard | None) -> Cost:
    same = report.cache is not None and card is not None and card.snapshot == report.cache.snapshot
    return cost_of(run, card, report.fill if same else None)


def document(named: str, *parts: Child, images: str = "data:", forms: str = "'none'") -> str:
    """A page whose style is inside.

    Args:
        images, forms: sources of the content policy, which lets nothing else in.
    """
    style = Markup("\n" + Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    sources = f"default-src 'none'; img-src {images}; style-src 'sha256-{digest}'; base-uri 'none'; form-action {forms}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=sources),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", named),
        tag("style", style),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', parts)), lang='en')}\n"


# ---------------------------------------------------------------------------------------------- header


def _header(report: Report, found: Sequence[Table]) -> Markup:
    first, several = report.runs[0], len(report.runs) > 1
    best = [_figure(table, name) for table in found if table.rows[0].run is first for name in table.headlines]
    ledes = [
        tag("p", (tag("span", class_=f"key {style}"), f"{run.name}: ") if several else None, _lede(run))
        for run, style in report.all[: len(report.runs)]
    ]
    return tag(
        "header",
        tag("p", "LIFT report", class_="eyebrow"),
        tag("h1", ", ".join(run.name for run in report.runs)),
        tag("div", ledes, class_="lede"),
        tag("dl", best[:FIGURES], class_="figures"),
    )


def _lede(run: Evaluated) -> Child:
    if not isinstance(run, Run):
        return f"Released: {run.results[0].subject.checkpoint}."
    steps, batch = run.state.step, run.config.batch_size
    unfinished = f" of {run.state.total_steps:,}" if steps < run.state.total_steps else ""
    return (
        "An image encoder (",
        tag("b", _tower(run.config.tower)),
        f", {run.config.image_size} px) trained for {steps:,}{unfinished} steps of {batch:,} images against ",
        tag("b", _texts(run)),
        ".",
    )


def _tower(name: str) -> str:
    """`vit:width=128,depth=4` as words; names of timm stay as they are."""
    kind, colon, shape = name.partition(":")
    return f"ViT of {shape.replace('=', ' ').replace(',', ', ')}" if colon and kind == "vit" else name


def _texts(run: Run) -> str:
    if run.config.text_tower == "clip":
        return "a text transformer that is trained with it"
    control = {
        "permuted": " dealt to the wrong captions",
        "ngram-hash": "hashed word n-grams, without a language model",
        "word-hash": "hashed words, without a language model",
    }.get(run.config.text_control, "")
    if run.state.recipe is None:
        return control or "text vectors"
    return f"the frozen text embeddings of {run.state.recipe.model}{control}"


def _figure(table: Table, name: str) -> Markup:
    """A score, of the first run large; of further ones and of controls below it."""
    score = table.first.scores[name]
    below = [f"{score.items:,} items"]
    if score.low is not None and score.high is not None:
        below.append(f"{score.low * 100:.1f} to {score.high * 100:.1f}")
    if score.chance is not None:
        below.append(f"chance {score.chance * 100:.1f}")
    others = [row for row in table.rows[1:] if name in row.result.scores]
    return tag(
        "div",
        tag("dt", label(table, name)),
        tag(
            "dd",
            _big(score),
            tag("small", tag("span", class_=f"key {table.rows[0].style}")) if others else None,
        ),
        tag("p", "; ".join(below)),
        [
            tag(
                "dd",
                tag("span", class_=f"key {row.style}"),
                share(row.result.scores[name].value),
                tag("small", f" {row.run.name}"),
                class_="other",
            )
            for row in others
        ],
    )


def _big(score: Score) -> Child:
    number, _, unit = share(score.value).partition(" ")
    return number, tag("small", f" {unit}") if unit else None


# ---------------------------------------------------------------------------------------------- cost


def _costs(report: Report, found: Sequence[Table], costs: dict[str, Cost]) -> Markup | None:
    if not costs:
        return None
    heads = [(table, name) for table in found for name in table.headlines][:FIGURES]

    def scored(run: Evaluated, table: Table, name: str) -> str:
        results = (row.result for row in table.rows if row.run is run)
        return next((share(result.scores[name].value) for result in results if name in result.scores), "–")

    body = [
        tag(
            "tr",
            tag("td", tag("span", class_=f"key {style}"), run.name),
            [tag("td", scored(run, table, name)) for table, name in heads],
            _cost_cells(costs[run.name]) if run.name in costs else tag("td", "not known", colspan=4),
        )
        for run, style in report.all
    ]
    names = [tag("th", label(table, name)) for table, name in heads]
    head = (
        names,
        tag("th", "Images seen"),
        tag("th", "Training"),
        tag("th", "Time"),
        tag("th", "Texts, once"),
    )
    return tag(
        "section",
        tag("h2", "What it cost"),
        tag(
            "p",
            "Training: operations forward and backward, counted. Time: of the clock, with the devices it was spent on. "
            "Texts, once: the pass through the frozen encoder, which every further run on the same captions shares.",
            class_="note",
        ),
        tag(
            "div",
            tag("table", tag("thead", tag("tr", tag("th", "Run"), head)), tag("tbody", body), class_="costs"),
            class_="scroll body",
        ),
    )


def _cost_cells(cost: Cost) -> list[Markup]:
    training = short(cost.flops, "FLOP") if cost.flops else "not known"
    each = f"{short(cost.per_image, 'FLOP')} an image" if cost.per_image else None
    device = cost.device
    if cost.devices > 1:
        device = f"{cost.devices} × {cost.device}, {cost.device_seconds:,.0f} s in all"
    texts, beside = ("not known", "its cache is not at hand") if cost.encoder else ("none", None)
    if one := cost.embedding:
        texts = short(one.flops, "FLOP") if one.flops else f"{short(one.tokens)} tokens"
        beside = f"{one.captions:,} captions" + (f", {duration(one.seconds)}" if one.seconds else "")
    return [
        tag("td", short(cost.samples)),
        tag("td", training, tag("small", each)),
        tag("td", duration(cost.seconds), tag("small", device)),
        tag("td", texts, tag("small", beside)),
    ]


# ---------------------------------------------------------------------------------------------- footer


def _footer(run: Evaluated) -> Markup:
    subject = run.results[0].subject
    snapshot = f", snapshot {subject.snapshot}" if subject.snapshot else ""
    return tag("footer", f"Evaluated: {subject.checkpoint}{snapshot}. Made by lift-report.")
