"""The page: scores, loss, gallery, and how it was made."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lift_cache.errors import BadConfig
from lift_trainer.report.chart import Level, Line, line_chart
from lift_trainer.report.gallery import data_uris
from lift_trainer.report.markup import Child, Markup, join, tag
from lift_trainer.report.runs import CacheCard, FillSummary, Recall, Retrieval, Run

CUTOFFS = (1, 5, 10)
STYLES = 4
HIGHLIGHTS = (
    "tower image_size pos_embed loss mask text_transform text_control batch_size epochs steps lr lr_scaling warmup "
    "weight_decay precision seed data cache"
).split()


@dataclass(frozen=True)
class Report:
    runs: Sequence[Run]
    baselines: Sequence[Run]
    cache: CacheCard | None
    fill: FillSummary | None

    @property
    def all(self) -> list[tuple[Run, str]]:
        """Runs, then baselines, each with the CSS class of its line."""
        return [
            *((run, f"run{index % STYLES}") for index, run in enumerate(self.runs)),
            *((run, f"base{index % STYLES}") for index, run in enumerate(self.baselines)),
        ]


def render(report: Report) -> str:
    """The whole page. Raises `BadSource` for gallery images that are gone, `BadConfig` for unlike evaluations."""
    first = report.runs[0]
    style = Markup("\n" + Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    title = f"{', '.join(run.name for run in report.runs)} – LIFT report"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "main",
        _header(report),
        [_scores(report, name) for name in first.evaluations],
        _loss(report),
        [_gallery(first, name, result) for name, result in first.evaluations.items()],
        _differences(report),
        _made_of(report),
        _footer(first),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


# ---------------------------------------------------------------------------------------------- header


def _header(report: Report) -> Markup:
    run = report.runs[0]
    result = next(iter(run.evaluations.values()))
    steps, batch = run.state.step, run.config.batch_size
    unfinished = f" of {run.state.total_steps:,}" if steps < run.state.total_steps else ""
    lede = tag(
        "p",
        "An image encoder (",
        tag("b", _tower(run.config.tower)),
        f", {run.config.image_size} px) trained from scratch for {steps:,}{unfinished} steps of {batch:,} images "
        "against ",
        tag("b", _texts(run)),
        ".",
        class_="lede",
    )
    best = [
        _figure(
            "Text to image, R@10", result.text_to_image.r_10, _between(result.text_to_image.r_10, result)
        ),
        _figure(
            "Image to text, R@10", result.image_to_text.r_10, _between(result.image_to_text.r_10, result)
        ),
        _figure("Chance, R@10", result.chance.r_10, f"{result.items:,} images, {result.captions:,} captions"),
        tag(
            "div",
            tag("dt", "Better than chance"),
            tag("dd", _ratio(result), tag("small", " ×")),
            tag("p", "mean of both directions"),
        ),
    ]
    return tag(
        "header",
        tag("p", "LIFT training report", class_="eyebrow"),
        tag("h1", ", ".join(each.name for each in report.runs)),
        lede,
        tag("dl", best, class_="figures"),
    )


def _tower(name: str) -> str:
    """`vit:width=128,depth=4` as words; names of timm stay as they are."""
    kind, colon, shape = name.partition(":")
    return f"ViT of {shape.replace('=', ' ').replace(',', ', ')}" if colon and kind == "vit" else name


def _texts(run: Run) -> str:
    control = {
        "permuted": " dealt to the wrong captions",
        "ngram-hash": "hashed word n-grams, without a language model",
    }.get(run.config.text_control, "")
    if run.state.recipe is None:
        return control or "text vectors"
    return f"the frozen text embeddings of {run.state.recipe.model}{control}"


def _figure(name: str, value: float, below: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", f"{value * 100:.1f}", tag("small", " %")), tag("p", below))


def _between(share: float, result: Retrieval) -> str:
    low, high = wilson(share, result.items)
    return f"{low * 100:.0f} to {high * 100:.0f} % (95 % interval)" if result.captions == result.items else ""


def _ratio(result: Retrieval) -> str:
    mean = (result.text_to_image.r_10 + result.image_to_text.r_10) / 2
    return f"{mean / result.chance.r_10:.1f}" if result.chance.r_10 else "–"


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent queries (Wilson 1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


# ---------------------------------------------------------------------------------------------- scores


def _scores(report: Report, name: str) -> Markup:
    result = report.runs[0].evaluations[name]
    rows = [(run, run.evaluations[name]) for run, _ in report.all if name in run.evaluations]
    for run, other in rows:
        for field in ("protocol", "items", "captions"):
            ours, theirs = getattr(result, field), getattr(other, field)
            if ours != theirs:
                raise BadConfig(
                    f"retrieval-{name}: {report.runs[0].path} has {field}={ours}, {run.path} {field}={theirs}; "
                    "evaluate them on the same data"
                )
    left_out = f" {len(result.left_out):,} broken samples were left out." if result.left_out else ""
    intervals = " Thin lines are 95 % intervals over the queries." if result.captions == result.items else ""
    return tag(
        "section",
        tag("h2", "Retrieval on held-out data"),
        tag(
            "p",
            f"“{name}”: {result.items:,} images, {result.captions:,} captions, protocol {result.protocol}. "
            f"The upright mark in each bar is chance.{intervals}{left_out}",
            class_="note",
        ),
        tag(
            "div",
            _score_table("Text to image", "text_to_image", rows, result.chance),
            _score_table("Image to text", "image_to_text", rows, result.chance),
            class_="pair body",
        ),
    )


def _score_table(title: str, direction: str, rows: Sequence[tuple[Run, Retrieval]], chance: Recall) -> Markup:
    def row(name: str, recall: Recall, kind: str | None, n: int | None) -> Markup:
        cells = [
            tag("td", f"{value * 100:.1f} %", _bar(value, by_chance, n))
            for value, by_chance in zip(recall.values(), chance.values(), strict=True)
        ]
        return tag("tr", tag("td", name), cells, class_=kind)

    body = [
        row(
            run.name,
            getattr(result, direction),
            "first" if index == 0 else None,
            result.items if result.items == result.captions else None,
        )
        for index, (run, result) in enumerate(rows)
    ]
    return tag(
        "table",
        tag("thead", tag("tr", tag("th", title), [tag("th", f"R@{cutoff}") for cutoff in CUTOFFS])),
        tag("tbody", body, row("chance", chance, "chance", None)),
        class_="scores",
    )


def _bar(value: float, chance: float, n: int | None) -> Markup:
    def percent(share: float) -> str:
        return f"{share * 100:.2f}%"

    low, high = wilson(value, n) if n else (value, value)
    return tag(
        "svg",
        tag("rect", width="100%", height=7, rx=2, class_="track"),
        tag("rect", width=percent(value), height=7, rx=2, class_="fill"),
        tag("line", x1=percent(low), x2=percent(high), y1=3.5, y2=3.5, class_="whisker") if n else None,
        tag("line", x1=percent(chance), x2=percent(chance), y1=-2, y2=9, class_="tick"),
        class_="bar",
        aria_hidden="true",
    )


# ---------------------------------------------------------------------------------------------- loss


def _loss(report: Report) -> Markup | None:
    lines = [
        line
        for run, style in report.all
        for line in (
            Line(run.name, [(point.step, point.loss) for point in run.points], style),
            Line(
                f"{run.name}, held out",
                [(point.step, point.held_out.loss) for point in run.held_out],
                f"{style} held-out",
            ),
        )
        if line.points
    ]
    if not lines:
        return None
    legend = [
        tag(
            "span",
            tag("svg", tag("line", x1=1, x2=21, y1=4, y2=4, class_=f"line {line.style}"), class_="swatch"),
            line.name,
        )
        for line in lines
    ]
    level = _guessing([run for run, _ in report.all])
    charts = [
        tag(
            "div",
            line_chart(lines, x_name="step", y_name="loss", width=w, height=h, level=level),
            class_=kind,
        )
        for kind, w, h in (("wide", 976, 320), ("narrow", 360, 260))
    ]
    held_out = any(run.held_out for run, _ in report.all)
    run = report.runs[0]
    spent = (
        f"{run.name}: {run.points[-1].samples:,} images in {_duration(run.seconds)}." if run.points else ""
    )
    return tag(
        "section",
        tag("h2", "Loss in training and on held-out data" if held_out else "Training loss"),
        tag("p", spent, class_="note"),
        tag("div", tag("div", legend, class_="legend"), charts, class_="chart body"),
    )


def _guessing(runs: Sequence[Run]) -> Level | None:
    """InfoNCE of a model that cannot tell the pairs of a batch apart: ln(batch), a little less under a mask."""
    kinds = {(run.config.loss, run.config.batch_size, run.config.mask) for run in runs}
    if len(kinds) > 1 or runs[0].config.loss != "infonce":
        return None
    batch, mask = runs[0].config.batch_size, runs[0].config.mask
    return Level(f"guessing:{'' if mask == 'none' else ' about'} ln {batch:,}", math.log(batch))


# ---------------------------------------------------------------------------------------------- gallery


def _gallery(run: Run, name: str, result: Retrieval) -> Markup | None:
    if not result.gallery:
        return None
    uris = data_uris(image for shown in result.gallery for image in shown.images)
    hits = sum(any(image.right for image in shown.images) for shown in result.gallery)
    cards = []
    for shown in result.gallery:
        images = [
            tag(
                "li",
                tag(
                    "figure",
                    tag(
                        "span",
                        tag("img", src=uris[image], alt=f"{image.sample}{', right' if image.right else ''}"),
                        class_="frame",
                        title=f"{image.sample}, cosine {image.score:.3f}",
                    ),
                    tag("figcaption", "✓ right" if image.right else str(rank)),
                ),
                class_="right" if image.right else None,
            )
            for rank, image in enumerate(shown.images, 1)
        ]
        missed = None
        if not any(image.right for image in shown.images):
            missed = tag("p", f"Its picture is not among the first {len(shown.images)}.", class_="missed")
        cards.append(tag("li", tag("p", shown.caption, class_="caption"), tag("ol", images), missed))
    return tag(
        "section",
        tag("h2", "What it finds"),
        tag(
            "p",
            f"{len(cards)} captions of “{name}”, drawn at random, and the images that {run.name} ranks first. "
            f"{hits} of {len(cards)} find their own among the first {max(len(s.images) for s in result.gallery)}.",
            class_="note",
        ),
        tag("ul", cards, class_="gallery body"),
    )


# ---------------------------------------------------------------------------------------------- how it was made


def _differences(report: Report) -> Markup | None:
    runs = [run for run, _ in report.all]
    fields = [
        field
        for field in runs[0].settings
        if field != "run" and len({_shown(run.settings.get(field)) for run in runs}) > 1
    ]
    if not fields:
        return None
    head = tag("tr", tag("th"), [tag("th", run.name) for run in runs])
    body = [
        tag("tr", tag("td", _words(field)), [tag("td", _shown(run.settings.get(field))) for run in runs])
        for field in fields
    ]
    table = tag("table", tag("thead", head), tag("tbody", body), class_="differ")
    return tag("section", tag("h2", "What differs"), tag("div", table, class_="scroll body"))


def _made_of(report: Report) -> Markup:
    run = report.runs[0]
    settings = {
        field: run.settings[field] for field in HIGHLIGHTS if run.settings.get(field) not in (None, "")
    }
    others = {field: value for field, value in run.settings.items() if field not in settings}
    training = tag(
        "div",
        tag("h3", f"Training, {run.name}"),
        _facts(settings),
        tag("details", tag("summary", "All other settings"), _facts(others)),
    )
    texts = tag("div", _cache_card(report), _recipe(run))
    environment = _environment(report)
    return tag(
        "section",
        tag("h2", "How it was made"),
        tag("div", texts, tag("div", training, environment), class_="pair body"),
    )


def _cache_card(report: Report) -> Markup | None:
    facts: dict[str, Child] = {}
    if fill := report.fill:
        facts |= {
            "captions read": f"{fill.captions:,}",
            "unique": f"{fill.unique:,}",
            "embedded": f"{fill.embedded:,}"
            + (f", {fill.cached:,} were there already" if fill.cached else ""),
            "rejected": f"{fill.rejected:,}",
        }
    if card := report.cache:
        manifest, encoding = card.manifest, card.manifest.encoding
        mean = f" ({manifest.tokens / manifest.rows:.1f} each)" if manifest.rows else ""
        facts |= {
            "in the cache": f"{manifest.rows:,} captions",
            "tokens": f"{manifest.tokens:,}{mean}",
            "truncated": f"{manifest.truncated:,}",
            "vectors": f"{encoding.dimensions:,} × {encoding.dtype}, {_bytes(card.bytes)}",
            "snapshot": tag("span", card.snapshot, class_="mono"),
        }
    elif fill:
        facts |= {"tokens": f"{fill.tokens:,}", "truncated": f"{fill.truncated:,}"}
    return join(tag("h3", "Captions"), tag("dl", _pairs(facts), class_="facts")) if facts else None


def _recipe(run: Run) -> Markup | None:
    recipe = run.state.recipe
    if recipe is None:
        return None
    fields = {name: value for name, value in recipe.model_dump().items() if value not in (None, {}, "")}
    return join(
        tag("br"),
        tag("h3", "Text recipe"),
        tag(
            "dl",
            _pairs({_words(name): _shown(value) for name, value in fields.items()}),
            _pairs({"fingerprint": tag("span", recipe.fingerprint, class_="mono")}),
            class_="facts",
        ),
    )


def _environment(report: Report) -> Markup:
    run = report.runs[0]
    facts = dict(run.state.libraries)
    for entry in report.cache.manifest.provenance if report.cache else ():
        facts |= {name: _shown(value) for name, value in entry.items()}
    return join(tag("br"), tag("h3", "Environment"), _facts(facts)) if facts else join()


def _footer(run: Run) -> Markup:
    result = next(iter(run.evaluations.values()))
    snapshot = f", snapshot {result.snapshot}" if result.snapshot else ""
    return tag("footer", f"Evaluated: {result.checkpoint}{snapshot}. Made by lift-report.")


def _facts(values: Mapping[str, Any]) -> Markup:
    return tag("dl", _pairs({_words(name): _shown(value) for name, value in values.items()}), class_="facts")


def _pairs(facts: Mapping[str, Child]) -> list[Markup]:
    return [join(tag("dt", name), tag("dd", value)) for name, value in facts.items()]


# ---------------------------------------------------------------------------------------------- words and numbers


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(each)}" for name, each in value.items()) or "–"
    return str(value)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
