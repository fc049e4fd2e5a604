"""The Grafana dashboard shows what the server measures: every metric, and none that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lift_embedder.metrics import Metrics

DASHBOARD = Path(__file__).parents[3] / "docker" / "grafana" / "lift-embedder.json"

FUNCTIONS = frozenset({"rate", "increase", "changes", "deriv", "histogram_quantile", "time"})
AGGREGATIONS = frozenset({"sum", "min", "max", "avg", "count"})
ADDED_BY_PROMETHEUS = frozenset({"instance", "job"})
HOW = frozenset({"hit", "miss", "coalesced"})


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


@pytest.fixture(scope="module")
def exposed() -> dict[str, frozenset[str]]:
    """Labels of every sample that a server in use exposes."""
    metrics = Metrics()
    metrics.describe(version="1", engine="vllm", model="m", recipe="0")
    metrics.errors.labels("503", "busy")
    metrics.request_seconds.labels("/v1/embeddings")
    families = list(text_string_to_metric_families(metrics.render().decode()))
    unused = [family.name for family in families if not family.samples]
    assert not unused, f"give these labels above: {unused}"
    return {sample.name: frozenset(sample.labels) for family in families for sample in family.samples}


@dataclass(frozen=True)
class Selector:
    """What an expression takes from Prometheus."""

    metric: str
    matchers: dict[str, str]


def selectors(expression: str) -> tuple[list[Selector], set[str]]:
    """Of a PromQL expression, its selectors and the labels that it groups by. Knows what is used here."""
    grouped: set[str] = set()

    def group(found: re.Match[str]) -> str:
        grouped.update(label.strip() for label in found[1].split(","))
        return " "

    rest = re.sub(r"\bby\s*\(([^)]*)\)", group, expression)
    rest = re.sub(r"\[[^\]]*\]", " ", rest)
    selected = []

    def select(found: re.Match[str]) -> str:
        matchers = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', found[2])
        selected.append(Selector(found[1], dict(matchers)))
        return " "

    rest = re.sub(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", select, rest)
    for name, opens in re.findall(r"([a-zA-Z_:][\w:]*)\s*(\(?)", rest):
        if opens:
            assert name in FUNCTIONS | AGGREGATIONS, name
        else:
            selected.append(Selector(name, {}))
    return selected, grouped


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Title, expression and legend of everything that is asked."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"], annotation["textFormat"]


def test_every_expression_names_only_metrics_and_labels_that_there_are(
    dashboard: dict[str, Any], exposed: dict[str, frozenset[str]]
) -> None:
    for title, expression, legend in queries(dashboard):
        selected, grouped = selectors(expression)
        assert selected, title
        labels: set[str] = set()
        for one in selected:
            assert one.metric in exposed, f"{title}: {one.metric}"
            known = exposed[one.metric] | ADDED_BY_PROMETHEUS
            assert one.matchers.keys() <= known, f"{title}: {one.matchers}"
            assert one.matchers.get("instance") == "$instance", f"{title}: shows servers that were not chosen"
            assert one.matchers.get("how", "hit") in HOW
            labels |= known
        assert grouped <= labels, f"{title}: {grouped}"
        shown = set(re.findall(r"{{(\w+)}}", legend))
        assert shown <= (grouped or labels), f"{title}: {legend}"
        if "histogram_quantile" in expression:
            assert "le" in grouped and all(one.metric.endswith("_bucket") for one in selected), title


def test_every_metric_is_shown_somewhere(
    dashboard: dict[str, Any], exposed: dict[str, frozenset[str]]
) -> None:
    asked = {one.metric for _, expression, _ in queries(dashboard) for one in selectors(expression)[0]}
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in exposed}
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked}
    assert {name for name in families - shown if name.startswith("lift_")} == set()


def test_counters_are_asked_for_their_rate_and_histograms_for_their_parts(dashboard: dict[str, Any]) -> None:
    for title, expression, _ in queries(dashboard):
        for name in re.findall(r"\w+_(?:total|bucket|sum|count)\b(?=\{)", expression):
            assert re.search(rf"(?:rate|increase|changes)\({name}\{{", expression), f"{title}: {name}"


def test_every_panel_says_what_it_shows_and_in_which_unit(dashboard: dict[str, Any]) -> None:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_it_can_be_imported_anywhere(dashboard: dict[str, Any]) -> None:
    """Nothing of the Grafana that it was made with: the data source is chosen, ids are given on import."""
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert names == {"datasource", "instance"} and "id" not in dashboard
    sources = set(re.findall(r'"uid": "([^"]*)"', DASHBOARD.read_text()))
    assert sources == {"${datasource}", dashboard["uid"]}


def test_the_reader_of_expressions_finds_what_they_name() -> None:
    found, grouped = selectors(
        'histogram_quantile(0.9, sum by (le, route) (rate(a_bucket{x="y", z=~"$w"}[5m]))) / time() - b'
    )
    assert found == [Selector("a_bucket", {"x": "y", "z": "$w"}), Selector("b", {})]
    assert grouped == {"le", "route"}
    with pytest.raises(AssertionError):
        selectors("nosuchfunction(a)")
