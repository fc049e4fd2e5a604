"""The page's routes without an engine: what they say, what they refuse, and what a browser may do with them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lift_cache.errors import BadCaption, EngineUnavailable
from lift_cache.keys import caption_key
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter
from lift_embedder import history, neighbours
from lift_embedder.access import Scope
from lift_embedder.api.page import PAGE, page_router
from lift_embedder.history import History
from lift_embedder.metrics import Metrics
from lift_embedder.path import BadRow, EmbeddingPath
from lift_embedder.queue import Queue, QueueFull
from lift_embedder.service import Service
from lift_embedder.supervisor import Supervisor
from lift_embedder.tokens import CaptionTokenizer

CAPTIONS = [f"{a} {b} {c}" for a in ("a", "the") for b in ("red", "blue") for c in ("dog", "cat", "circle")]


class Keyed:
    """What the access layer does: says how far the request's API key reaches."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.scope: Scope | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.scope is not None:
            scope["state"] = {**scope.get("state", {}), "scope": self.scope}
        await self.app(scope, receive, send)


class Running:
    """A service whose routes are those of the page."""

    def __init__(self, service: Service, keyed: Keyed, http: TestClient) -> None:
        self.service, self.keyed, self.http = service, keyed, http

    def embed(self, *captions: str) -> None:
        assert self.http.portal is not None
        self.http.portal.call(self.service.path.embed, captions)

    def stats(self, **params: Any) -> dict[str, Any]:
        answer = self.http.get("/v1/stats", params=params)
        assert answer.status_code == 200
        return dict(answer.json())

    def neighbours(self, caption: str, **options: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/neighbours", json={"input": caption, **options})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture
def running(
    tmp_path: Path,
    recipe: Recipe,
    faulty_engine: Any,
    tiny_tokenizer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Running]:
    monkeypatch.setattr(history, "INTERVAL", 0.05)
    tokenizer = CaptionTokenizer(recipe, tiny_tokenizer(eos="</s>"))
    metrics = Metrics()
    with CacheWriter.open(tmp_path / "cache", recipe) as cache:
        engine = Supervisor(lambda: faulty_engine, tokenizer, cache, metrics)
        queue = Queue(most_tokens=10_000, most_bytes=1 << 24, batch_tokens=1_000)
        path = EmbeddingPath(cache, tokenizer, engine, metrics, queue)
        service = Service(path, metrics, History(), frozenset({"tiny"}))

        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            path.start()
            sampling = asyncio.create_task(service.history.run(service))
            yield
            sampling.cancel()
            await path.aclose()

        app = FastAPI(lifespan=lifespan)
        app.include_router(page_router(service))
        keyed = Keyed(app)
        with TestClient(keyed) as http:
            while not engine.ready:
                time.sleep(0.01)
            yield Running(service, keyed, http)


# ------------------------------------------------------------------------------------------ the page itself


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_a_browser_is_told_to_run_this_script_and_this_style_and_nothing_else(running: Running) -> None:
    answer = running.http.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for kind in ("script", "style"):
        [inline] = re.findall(rf"<{kind}>(.*?)</{kind}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[name] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_the_page_is_one_file_that_names_no_other_address_and_puts_nothing_in_as_markup() -> None:
    page = PAGE.read_text(encoding="utf-8")
    elements = Reader(page).elements
    links = [
        value for _, attributes in elements for name in ("href", "src") if (value := attributes.get(name))
    ]
    assert [link for link in links if not link.startswith(("#", "data:image/svg+xml,"))] == [
        "v1/stats",
        "docs",
        "v1/stats",
        "metrics",
    ]
    for _, attributes in elements:  # the policy would refuse them
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert word not in script[1]
    namespaces = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"'\s)]+", page)) <= namespaces
    assert "url(" not in page and "@import" not in page


def test_every_element_that_the_script_asks_for_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    there = {attributes["id"] for _, attributes in Reader(page).elements if "id" in attributes}
    wanted = set(re.findall(r'(?:byId|say|figure|facts|new Chart)\("([a-z-]+)"', page))
    assert wanted and wanted <= there
    for _, attributes in Reader(page).elements:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in there


# ------------------------------------------------------------------------------------------ GET /v1/stats


def test_stats_say_what_is_cached_and_how_it_was_made(running: Running) -> None:
    running.embed(*CAPTIONS)
    running.embed(*CAPTIONS[:6])
    while (stats := running.stats())["cache"]["fresh_rows"] < 12:  # as of the last look
        time.sleep(0.01)
    cache, captions, recipe = stats["cache"], stats["captions"], running.service.cache.recipe
    assert (cache["rows"], cache["fresh_rows"], cache["segments"], cache["snapshot"]) == (12, 12, 0, None)
    assert cache["tokens"] == 12 * 4 and cache["live_bytes"] > 0 and cache["sealed_bytes"] == 0
    assert (captions["hits"], captions["misses"], captions["coalesced"]) == (6, 12, 0)
    assert captions["hit_share"] == pytest.approx(1 / 3)
    assert stats["queue"] == {"rows": 0, "tokens": 0, "most_tokens": 10_000}
    assert stats["engine"]["ready"] and stats["engine"]["description"] == {"engine": "faulty", "version": "1"}
    assert Recipe.model_validate(stats["recipe"]) == recipe and stats["fingerprint"] == recipe.fingerprint
    assert stats["encoding"] == {"version": 1, "dtype": "float16", "dimensions": recipe.dimensions}
    assert stats["started"] <= stats["now"] <= time.time() + 1


def test_a_page_asks_only_for_the_points_that_it_has_not_seen(running: Running) -> None:
    while len(running.stats()["history"]["at"]) < 3:
        time.sleep(0.02)
    seen = running.stats()["history"]
    lengths = {len(values) for name, values in seen.items() if name != "interval"}
    assert len(lengths) == 1 and seen["at"] == sorted(seen["at"])
    later = running.stats(since=seen["at"][-1])["history"]
    assert set(later["at"]).isdisjoint(seen["at"]) and min(later["at"], default=9e9) > seen["at"][-1]
    assert running.stats(since=4e9)["history"]["at"] == []


def test_before_anything_was_asked_there_is_no_share_and_no_rate(running: Running) -> None:
    stats = running.stats()
    assert stats["captions"]["hit_share"] is None and stats["captions"]["recent_hit_share"] is None
    assert stats["rates"]["captions"] == stats["rates"]["embedded_tokens"] == 0
    assert stats["errors"] == []


def test_an_engine_that_is_away_or_not_trusted_is_said_with_its_reason(
    running: Running, faulty_engine: Any
) -> None:
    engine = running.service.path.engine
    engine.read_only = "the engine no longer agrees"
    said = running.stats()["engine"]
    assert (said["ready"], said["read_only"]) == (False, "the engine no longer agrees")
    engine.read_only = None
    faulty_engine.alive = False
    with pytest.raises(EngineUnavailable):
        running.http.post("/v1/neighbours", json={"input": "a dog"})
    while running.stats()["engine"]["state"] == "ready":
        time.sleep(0.01)
    said = running.stats()["engine"]
    assert not said["ready"] and "restarted" in said["state"]


def test_errors_are_shown_newest_first(running: Running) -> None:
    for status, code in ((400, "invalid_caption"), (429, "queue_full"), (429, "queue_full")):
        running.service.history.error(status, code, "words", "an-id")
    newest, oldest = running.stats()["errors"]
    assert (newest["status"], newest["code"], newest["count"], newest["request_id"]) == (
        429,
        "queue_full",
        2,
        "an-id",
    )
    assert (oldest["status"], oldest["count"]) == (400, 1)


# -------------------------------------------------------------------------------------- POST /v1/neighbours


def test_a_caption_is_embedded_kept_and_compared(running: Running) -> None:
    running.embed(*CAPTIONS)
    first = running.neighbours("a  circle", k=3)
    assert (first["caption"], first["key"]) == ("a circle", caption_key("a circle").hex())
    assert (first["found"], first["cached"], first["tokens"], first["truncated"]) == (True, False, 3, False)
    assert len(first["neighbours"]) == 3 and {n["caption"] for n in first["neighbours"]} <= set(CAPTIONS)
    cosines = [neighbour["cosine"] for neighbour in first["neighbours"]]
    assert cosines == sorted(cosines, reverse=True) and all(-1.001 <= c <= 1.001 for c in cosines)
    assert (first["scanned"], first["rows"]) == (13, 13)
    again = running.neighbours("a circle", k=3)
    assert again["cached"] and again["neighbours"] == first["neighbours"]


def test_a_few_captions_are_ranked_by_the_plain_cosine_and_it_says_so(running: Running) -> None:
    running.embed(*CAPTIONS)
    found = running.neighbours("a circle")
    assert not found["centered"] and "from 32 captions on" in found["note"]
    assert all(neighbour["centered_cosine"] is None for neighbour in found["neighbours"])
    running.embed(*(f"{caption} above the {i}" for i, caption in enumerate(CAPTIONS * 3)))
    found = running.neighbours("a circle")
    assert found["centered"] and found["note"] is None
    centred = [neighbour["centered_cosine"] for neighbour in found["neighbours"]]
    assert centred == sorted(centred, reverse=True)
    plain = running.neighbours("a circle", center=False)
    assert not plain["centered"] and plain["note"] is None


def test_a_vector_is_summed_up(running: Running) -> None:
    running.embed("a circle")
    hits = running.service.cache.get(np.frombuffer(caption_key("a circle"), np.uint8)[None])
    said = running.neighbours("a circle")["vector"]
    vector = hits.vectors[0]
    assert said["dimensions"] == len(vector) and said["norm"] == pytest.approx(float(np.linalg.norm(vector)))
    assert (said["least"], said["greatest"]) == (float(vector.min()), float(vector.max()))
    assert said["first"] == vector[:8].tolist() and sum(said["histogram"]) == len(vector)


def test_the_only_caption_has_no_neighbours(running: Running) -> None:
    found = running.neighbours("a circle")
    assert found["neighbours"] == [] and (found["scanned"], found["rows"]) == (1, 1)


@pytest.mark.parametrize(
    "body", [{}, {"input": 7}, {"input": ["a"]}, {"input": "a", "k": 0}, {"input": "a", "k": 101}]
)
def test_a_request_that_makes_no_sense_is_refused(body: dict[str, Any], running: Running) -> None:
    assert running.http.post("/v1/neighbours", json=body).status_code == 422


def test_a_bad_caption_is_refused_whatever_the_key(running: Running) -> None:
    with pytest.raises(BadRow):
        running.http.post("/v1/neighbours", json={"input": "  "})
    running.keyed.scope = Scope.READ
    with pytest.raises(BadCaption):
        running.http.post("/v1/neighbours", json={"input": "  "})


def test_a_key_that_may_only_read_finds_what_is_cached_and_computes_nothing(
    running: Running, faulty_engine: Any
) -> None:
    running.embed(*CAPTIONS)
    faulty_engine.embedded.clear()
    running.keyed.scope = Scope.READ
    assert running.neighbours(CAPTIONS[0])["cached"]
    missing = running.neighbours("a circle")
    assert (missing["found"], missing["neighbours"], missing["vector"]) == (False, [], None)
    assert "may read but not embed" in missing["note"]
    assert not faulty_engine.embedded and running.service.cache.rows == len(CAPTIONS)
    for scope in (Scope.EMBED, Scope.ADMIN):
        running.keyed.scope = scope
        assert running.neighbours(f"{CAPTIONS[0]} {scope.name}")["found"]


def test_a_search_of_part_of_the_cache_says_how_much_it_compared(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.embed(*CAPTIONS)
    monkeypatch.setattr(
        neighbours.search, "__kwdefaults__", neighbours.search.__kwdefaults__ | {"seconds": 0.0}
    )
    found = running.neighbours("a circle")
    assert found["scanned"] < found["rows"] == 13


def test_a_second_search_is_refused_and_the_server_goes_on_answering(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.embed(*CAPTIONS)
    searching, go_on = threading.Event(), threading.Event()
    listed = running.service.cache.fresh_rows

    def wait() -> Any:
        searching.set()
        go_on.wait(10)
        return listed()

    monkeypatch.setattr(running.service.cache, "fresh_rows", wait)
    answers: list[dict[str, Any]] = []
    first = threading.Thread(target=lambda: answers.append(running.neighbours(CAPTIONS[0])))
    first.start()
    assert searching.wait(10)
    try:
        with pytest.raises(QueueFull):
            running.http.post("/v1/neighbours", json={"input": CAPTIONS[1]})
        assert running.stats()["cache"]["rows"] == len(CAPTIONS)
    finally:
        go_on.set()
        first.join(10)
    assert answers[0]["found"]


def test_the_openapi_document_describes_both_routes(running: Running) -> None:
    document = running.http.get("/openapi.json").json()
    assert set(document["paths"]) == {"/v1/stats", "/v1/neighbours"}
    described = document["components"]["schemas"]
    assert {"Stats", "Neighbours", "NeighbourRequest"} <= set(described)
    assert "sealed_bytes" in described["CacheCounts"]["properties"]
