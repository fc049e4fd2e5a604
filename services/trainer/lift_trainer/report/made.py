"""How runs were made: what differs first, then settings, captions, text recipe, and on what they ran."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lift_trainer.report.geometry import LEADING, Geometry, Lie
from lift_trainer.report.markup import Child, Markup, join, tag
from lift_trainer.report.runs import CacheCard, FillSummary, Run
from lift_trainer.report.words import facts, settings, share, shown, size, words

HIGHLIGHTS = (
    "tower image_size pos_embed head loss mask text_tower text_transform text_control batch_size epochs steps lr "
    "lr_scaling warmup weight_decay precision seed data cache"
).split()

PLACES = frozenset({"run"})
"""Settings that differ in any two runs."""


def differences(runs: Sequence[Run]) -> Markup | None:
    made = [_everything(run) for run in runs]
    fields = [
        field
        for field in dict.fromkeys(field for one in made for field in one)
        if len({shown(one.get(field)) for one in made if field in one or not field.startswith("recipe: ")})
        > 1
    ]
    if len({run.state.recipe is None for run in runs}) > 1 and "recipe: model" not in fields:
        fields.append("recipe: model")
    if not fields:
        return None
    head = tag("tr", tag("th"), [tag("th", run.name) for run in runs])
    body = [
        tag("tr", tag("td", words(field)), [tag("td", _digest(shown(one.get(field)))) for one in made])
        for field in fields
    ]
    table = tag("table", tag("thead", head), tag("tbody", body), class_="differ")
    return tag("section", tag("h2", "What differs"), tag("div", table, class_="scroll body"))


def _digest(value: str) -> str:
    """The beginning of a long one, which is enough to see that two differ."""
    return f"{value[:20]}…" if re.fullmatch(r"\w+:[0-9a-f]{32,}|[0-9a-f]{32,}", value) else value


def _everything(run: Run) -> dict[str, Any]:
    recipe = run.state.recipe
    return {
        **{field: value for field, value in run.settings.items() if field not in PLACES},
        **({f"recipe: {field}": value for field, value in recipe.model_dump().items()} if recipe else {}),
        **{f"environment: {name}": value for name, value in run.state.libraries.items()},
    }


def made_of(run: Run, cache: CacheCard | None, fill: FillSummary | None) -> Markup:
    """Of one run in full; what other runs have in another way stands in `differences`."""
    highlights = {
        field: run.settings[field] for field in HIGHLIGHTS if run.settings.get(field) not in (None, "", [])
    }
    others = {field: value for field, value in run.settings.items() if field not in highlights}
    training = tag(
        "div",
        tag("h3", f"Training, {run.name}"),
        settings(highlights),
        tag("details", tag("summary", "All other settings"), settings(others)),
    )
    texts = tag("div", _captions(cache, fill), _recipe(run))
    return tag(
        "section",
        tag("h2", "How it was made"),
        tag("div", texts, tag("div", training, _environment(run, cache)), class_="pair body"),
    )


def _captions(card: CacheCard | None, fill: FillSummary | None) -> Markup | None:
    known: dict[str, Child] = {}
    if fill:
        already = f", {fill.cached:,} were there already" if fill.cached else ""
        known |= {
            "captions read": f"{fill.captions:,}",
            "unique": f"{fill.unique:,}",
            "embedded": f"{fill.embedded:,}{already}",
            "rejected": f"{fill.rejected:,}",
        }
    if card:
        manifest, encoding = card.manifest, card.manifest.encoding
        mean = f" ({manifest.tokens / manifest.rows:.1f} each)" if manifest.rows else ""
        known |= {
            "in the cache": f"{manifest.rows:,} captions",
            "tokens": f"{manifest.tokens:,}{mean}",
            "truncated": f"{manifest.truncated:,}",
            "vectors": f"{encoding.dimensions:,} × {encoding.dtype}, {size(card.bytes)}",
            "snapshot": tag("span", card.snapshot, class_="mono"),
        }
    elif fill:
        known |= {"tokens": f"{fill.tokens:,}", "truncated": f"{fill.truncated:,}"}
    return join(tag("h3", "Captions"), facts(known)) if known else None


def _recipe(run: Run) -> Markup | None:
    recipe = run.state.recipe
    if recipe is None:
        return None
    fields = {name: value for name, value in recipe.model_dump().items() if value not in (None, {}, "")}
    known: dict[str, Child] = {words(name): shown(value) for name, value in fields.items()}
    known["fingerprint"] = tag("span", recipe.fingerprint, class_="mono")
    return join(tag("h3", "Text recipe", class_="next"), facts(known))


def _environment(run: Run, card: CacheCard | None) -> Markup | None:
    known: dict[str, Any] = dict(run.state.libraries)
    for entry in card.manifest.provenance if card else ():
        known |= entry
    return join(tag("h3", "Environment", class_="next"), settings(known)) if known else None


# ---------------------------------------------------------------------------------------------- geometry


def lies(found: Sequence[Geometry]) -> Markup | None:
    if not found:
        return None
    body = [
        (
            _lie_row(f"{one.encoder}, as stored", one.stored),
            [_lie_row(f"after {transform}", lie, names) for transform, names, lie in one.transformed],
        )
        for one in found
    ]
    kinds = {True: "training captions", False: "captions of the cache"}
    counts = " and ".join(sorted({f"{one.captions:,} {kinds[one.of_training]}" for one in found}))
    head = [
        tag("th", "Vectors"),
        tag("th", "mean cosine"),
        [
            tag("th", f"variance in the first {k}" if k > 1 else "variance in the first direction")
            for k in LEADING
        ],
        tag("th", "effective rank"),
    ]
    return tag(
        "section",
        tag("h2", "How the texts lie"),
        tag(
            "p",
            f"Of any two of {counts}, a fixed sample: near 1, all texts point the same way. The effective rank is the "
            "number of equally strong directions with the same entropy of variance.",
            class_="note",
        ),
        tag(
            "div",
            tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="lies"),
            class_="scroll body",
        ),
    )


def _lie_row(what: str, lie: Lie, names: Sequence[str] = ()) -> Markup:
    return tag(
        "tr",
        tag("td", what, tag("small", ", ".join(names)) if names else None),
        tag("td", f"{lie.cosine:.3f}"),
        [tag("td", share(part)) for part in lie.leading],
        tag("td", f"{lie.effective_rank:,.0f}", tag("small", f"of {lie.dimensions:,}")),
        class_="after" if names else None,
    )
