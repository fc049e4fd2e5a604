"""An existing fleet as engine: whatever its servers do, a vector is right or is not given."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache.errors import BadConfig, EngineUnavailable
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter
from lift_embedder import canaries
from lift_embedder.engines import create_engine, resolve_kind
from lift_embedder.engines.openai_engine import Fleet, OpenAIEngine, read_key, text_for
from lift_embedder.tokens import CaptionTokenizer

pytestmark = pytest.mark.slow

CANARIES = [[1, 2, 3, 4], [1, 4, 3, 2], [5, 6, 7]]
INPUTS = [[1, number, 2 + number % 5, *range(number % 7)] for number in range(100)]


def vector_of(ids: list[int], dimensions: int = 24) -> np.ndarray:
    """What the model gives: float32 [d], not of unit length."""
    seed = sum(token * 31**place for place, token in enumerate(ids)) % 2**32
    return np.random.default_rng(seed).normal(size=dimensions).astype(np.float32)


def unit(inputs: list[list[int]]) -> np.ndarray:
    vectors = np.stack([vector_of(ids) for ids in inputs]).astype(np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Upstream:
    """A `/v1/embeddings` server, and the faults that a test sets."""

    def __init__(self, port: int = 0) -> None:
        self.connections: list[socket.socket] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: list[dict[str, Any]] | None = [{"id": "tiny", "owned_by": "tests", "max_model_len": 512}]
        self.vector: Callable[[list[int]], np.ndarray] = vector_of
        self.form = "base64"
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.count: Callable[[list[Any]], int] = lambda inputs: sum(map(len, inputs))
        self.refuse: Callable[[list[list[int]]], tuple[int, dict[str, str]] | None] = lambda inputs: None
        self.wait: Callable[[], object] = lambda: None
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                upstream.connections.append(self.connection)

            def do_GET(self) -> None:
                status = 404 if upstream.models is None else 200
                self.reply(status, {"object": "list", "data": upstream.models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                upstream.asked.append(body)
                upstream.headers.append(dict(self.headers))
                upstream.wait()
                refused = upstream.refuse(body["input"])
                if refused is not None:
                    self.reply(refused[0], {"error": {"message": "refused as told"}}, refused[1])
                else:
                    self.reply(200, upstream.spoil(upstream.answer(body)))

            def reply(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hung up
        self.port = int(self.http.server_address[1])
        self.name = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.name}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        data = []
        for index, ids in enumerate(body["input"]):
            vector = self.vector(ids).astype("<f4")
            coded = base64.b64encode(vector.tobytes()).decode() if self.form == "base64" else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": coded})
        tokens = self.count(body["input"])
        return {"object": "list", "data": data, "usage": {"prompt_tokens": tokens}}

    def captions(self) -> int:
        """Texts that it was asked for, beside canaries."""
        return sum(ids not in CANARIES for body in self.asked for ids in body["input"])

    def close(self) -> None:
        """Die: refuse new connections and drop those that are open."""
        self.http.shutdown()
        self.http.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.close()


@pytest.fixture
def another() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.close()


Scenario = Callable[[OpenAIEngine], Awaitable[None]]


@pytest.fixture
def play(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a scenario on an engine that was started."""
    monkeypatch.setattr("lift_embedder.engines.fleet.FIRST_REST", 0.05)
    monkeypatch.setattr("lift_embedder.engines.openai_engine.LOOK_EVERY", 0.1)

    def run(*urls: str, scenario: Scenario, changed: dict[str, Any] | None = None, **fleet: Any) -> None:
        fleet = {"witnesses": CANARIES, "seconds": 5.0, **fleet}

        async def main() -> None:
            engine = OpenAIEngine(recipe.model_copy(update=changed or {}), Fleet(urls, **fleet))
            try:
                async with asyncio.timeout(20):
                    await engine.start()
                    await scenario(engine)
            finally:
                await engine.aclose()

        asyncio.run(main())

    return run


async def nothing(_: OpenAIEngine) -> None:
    """The start is all that matters."""


@pytest.mark.parametrize("form", ["base64", "float"])
def test_token_ids_go_out_as_they_are_and_unit_vectors_come_back_in_their_order(
    form: str, upstream: Upstream, play: Callable[..., None]
) -> None:
    upstream.form = form
    upstream.spoil = lambda answer: {**answer, "data": answer["data"][::-1]}

    async def scenario(engine: OpenAIEngine) -> None:
        found = await engine.embed(INPUTS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, unit(INPUTS), atol=1e-6)
        assert upstream.captions() == len(INPUTS)
        assert max(len(body["input"]) for body in upstream.asked) <= 32
        assert {body["model"] for body in upstream.asked} == {"tiny"}
        np.testing.assert_array_equal(found, await engine.embed(INPUTS))

    play(upstream.url + "/v1/", scenario=scenario)


def test_vectors_that_are_of_unit_length_already_stay_what_they_are(
    upstream: Upstream, play: Callable[..., None]
) -> None:
    upstream.vector = lambda ids: unit([ids])[0]

    async def scenario(engine: OpenAIEngine) -> None:
        assert np.abs(await engine.embed(INPUTS) - unit(INPUTS)).max() <= np.float32(2**-24)

    play(upstream.url, scenario=scenario)


def test_a_recipe_without_normalisation_gets_lengths_as_they_are_and_refuses_servers_that_scale(
    upstream: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        assert np.array_equal(await engine.embed(INPUTS), np.stack([vector_of(ids) for ids in INPUTS]))

    play(upstream.url, scenario=scenario, changed={"normalize": False})
    upstream.vector = lambda ids: unit([ids])[0]
    with pytest.raises(EngineUnavailable, match="--normalize"):
        play(upstream.url, scenario=nothing, changed={"normalize": False})


def test_work_is_spread_over_the_servers(
    upstream: Upstream, another: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        np.testing.assert_allclose(await engine.embed(INPUTS), unit(INPUTS), atol=1e-6)
        assert upstream.captions() and another.captions()
        assert upstream.captions() + another.captions() == len(INPUTS)

    play(upstream.url, another.url, scenario=scenario)


def test_a_server_that_dies_loses_nothing_and_is_used_again_when_it_is_back(
    upstream: Upstream, another: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        another.close()
        for _ in range(3):
            np.testing.assert_allclose(await engine.embed(INPUTS), unit(INPUTS), atol=1e-6)
        assert engine.healthy()
        back = Upstream(another.port)
        try:
            while not back.captions():
                await engine.embed(INPUTS)
                await asyncio.sleep(0.05)
        finally:
            back.close()

    play(upstream.url, another.url, scenario=scenario)


def test_a_server_that_is_away_at_the_start_joins_later(
    upstream: Upstream, another: Upstream, play: Callable[..., None]
) -> None:
    upstream.close()

    async def scenario(engine: OpenAIEngine) -> None:
        np.testing.assert_allclose(await engine.embed(INPUTS), unit(INPUTS), atol=1e-6)
        late = Upstream(upstream.port)
        try:
            while not late.captions():
                await engine.embed(INPUTS)
                await asyncio.sleep(0.05)
        finally:
            late.close()

    play(upstream.url, another.url, scenario=scenario)


def test_where_all_servers_are_down_the_engine_says_which_and_why(
    upstream: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        upstream.close()
        with pytest.raises(EngineUnavailable, match=upstream.name):
            await engine.embed(INPUTS)
        assert not engine.healthy()

    play(upstream.url, scenario=scenario)
    with pytest.raises(EngineUnavailable, match=upstream.name):
        play(upstream.url, scenario=nothing)


def test_a_server_that_dies_unused_is_known_to_be_down(upstream: Upstream, play: Callable[..., None]) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        upstream.close()
        while engine.healthy():
            await asyncio.sleep(0.05)

    play(upstream.url, scenario=scenario)


def test_a_server_that_hangs_is_given_up_for_another(
    upstream: Upstream, another: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        going = threading.Event()
        another.wait = lambda: going.wait(20)
        np.testing.assert_allclose(await engine.embed(INPUTS), unit(INPUTS), atol=1e-6)
        began = time.monotonic()
        for _ in range(5):  # and is not waited for again
            await engine.embed(INPUTS)
        assert time.monotonic() - began < 1.0
        going.set()

    play(upstream.url, another.url, scenario=scenario, seconds=0.5)


def test_a_busy_server_is_left_alone_for_as_long_as_it_says(
    upstream: Upstream, play: Callable[..., None]
) -> None:
    times: list[float] = []

    def busy_once(_: object) -> tuple[int, dict[str, str]] | None:
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.5"}) if len(times) == 1 else None

    async def scenario(engine: OpenAIEngine) -> None:
        upstream.refuse = busy_once
        np.testing.assert_allclose(await engine.embed(INPUTS[:9]), unit(INPUTS[:9]), atol=1e-6)
        assert times[1] - times[0] >= 0.5 and engine.healthy()

    play(upstream.url, scenario=scenario)


def test_a_server_that_is_replaced_by_another_model_is_not_believed(
    upstream: Upstream, another: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        await engine.embed(INPUTS)
        another.vector = lambda ids: vector_of(ids[::-1])
        for _ in range(3):
            np.testing.assert_allclose(await engine.embed(INPUTS), unit(INPUTS), atol=1e-6)
        upstream.vector = another.vector
        with pytest.raises(EngineUnavailable, match="gives other vectors"):
            await engine.embed(INPUTS)
        assert not engine.healthy()

    play(upstream.url, another.url, scenario=scenario)


def test_servers_that_do_not_agree_are_not_used_together(
    upstream: Upstream, another: Upstream, play: Callable[..., None]
) -> None:
    another.vector = lambda ids: vector_of(ids[::-1])

    async def scenario(engine: OpenAIEngine) -> None:
        np.testing.assert_allclose(await engine.embed(INPUTS), unit(INPUTS), atol=1e-6)
        assert another.captions() == 0

    play(upstream.url, another.url, scenario=scenario)


UNUSABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "one vector short": lambda answer: {**answer, "data": answer["data"][:-1]},
    "an index twice": lambda answer: {**answer, "data": [{**row, "index": 0} for row in answer["data"]]},
    "another dimension": lambda answer: {
        **answer,
        "data": [{**row, "embedding": base64.b64encode(bytes(64)).decode()} for row in answer["data"]],
    },
    "no base64": lambda answer: {**answer, "data": [{**row, "embedding": "~"} for row in answer["data"]]},
    "no embeddings": lambda _: {"object": "list"},
    "a web page": lambda _: b"<!doctype html><title>welcome</title>",
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_answer_that_cannot_be_used_is_an_error_that_names_the_server(
    what: str, upstream: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        upstream.spoil = UNUSABLE[what]
        with pytest.raises(EngineUnavailable, match=upstream.name):
            await engine.embed(INPUTS)

    play(upstream.url, scenario=scenario)


def test_a_vector_of_nan_is_passed_on_for_the_cache_to_refuse_that_row_alone(
    upstream: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        upstream.vector = lambda ids: vector_of(ids) * (np.nan if ids == INPUTS[3] else 1)
        found = await engine.embed(INPUTS)
        assert np.flatnonzero(~np.isfinite(found).all(1)).tolist() == [3]

    play(upstream.url, scenario=scenario)


@pytest.mark.parametrize("how", ["refused", "counted otherwise"])
def test_an_input_that_a_server_does_not_take_as_it_is_fails_alone(
    how: str, upstream: Upstream, play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    bad = INPUTS[40]

    async def scenario(engine: OpenAIEngine) -> None:
        if how == "refused":
            upstream.refuse = lambda inputs: (400, {}) if bad in inputs else None
        else:
            upstream.count = lambda inputs: sum(map(len, inputs)) + (bad in inputs)
        found = await engine.embed(INPUTS)
        assert np.flatnonzero(~np.isfinite(found).all(1)).tolist() == [40]
        np.testing.assert_allclose(np.delete(found, 40, 0), np.delete(unit(INPUTS), 40, 0), atol=1e-6)
        assert engine.healthy() and "refused a caption" in caplog.text

    play(upstream.url, scenario=scenario)


def test_a_server_that_begins_to_refuse_everything_is_down_and_no_caption_is_blamed(
    upstream: Upstream, play: Callable[..., None]
) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        upstream.refuse = lambda _: (422, {})
        with pytest.raises(EngineUnavailable, match="422"):
            await engine.embed(INPUTS)

    play(upstream.url, scenario=scenario)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"refuse": lambda _: (422, {})}, "answered 422: refused as told"),
        ({"refuse": lambda _: (401, {})}, "401: refused as told; check --upstream-key-file"),
        ({"refuse": lambda _: (404, {})}, "404: refused as told; check --upstream-model"),
        ({"refuse": lambda _: (500, {})}, "answered 500"),
        ({"spoil": lambda answer: {**answer, "usage": {"prompt_tokens": 99}}}, "counts 99 tokens where 11 were"),
        ({"vector": lambda ids: vector_of(ids, 48)}, "vectors of 48 values; the recipe says 24"),
        ({"vector": lambda ids: vector_of(ids) * 0}, "zero or not finite"),
        ({"models": [{"id": "tiny"}, {"id": "other"}]}, "serves tiny, other; name one with --upstream-model"),
        ({"models": [{"id": "tiny", "max_model_len": 77}]}, "start it with --max-model-len 78"),
    ],
)  # fmt: skip
def test_servers_that_cannot_be_used_are_found_out_at_the_start(
    change: dict[str, Any], said: str, upstream: Upstream, play: Callable[..., None]
) -> None:
    for name, value in change.items():
        setattr(upstream, name, value)
    with pytest.raises(EngineUnavailable, match=said):
        play(upstream.url, scenario=nothing)


def test_the_model_is_asked_for_by_the_name_that_was_given_or_by_none_where_none_is_known(
    upstream: Upstream, play: Callable[..., None]
) -> None:
    upstream.models = [{"id": "tiny"}, {"id": "other"}]

    async def named(engine: OpenAIEngine) -> None:
        assert engine.describe() == {"engine": "openai", "upstream": upstream.name, "upstream_model": "other"}

    play(upstream.url, scenario=named, model="other")
    assert {body["model"] for body in upstream.asked} == {"other"}
    with pytest.raises(EngineUnavailable, match="serves tiny, other"):
        play(upstream.url, scenario=nothing, model="third")
    upstream.models = None
    upstream.asked.clear()
    play(upstream.url, scenario=nothing)
    assert all("model" not in body for body in upstream.asked)


def test_keys_and_passwords_are_sent_and_never_said(
    upstream: Upstream, play: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    async def scenario(engine: OpenAIEngine) -> None:
        said.append(json.dumps(engine.describe()) + repr(engine._fleet))
        upstream.close()
        with pytest.raises(EngineUnavailable) as error:
            await engine.embed(INPUTS)
        said.append(str(error.value))

    with caplog.at_level(logging.DEBUG):
        play(upstream.url, scenario=nothing, key="sk-hidden")
        assert {headers["Authorization"] for headers in upstream.headers} == {"Bearer sk-hidden"}
        upstream.headers.clear()
        upstream.refuse = lambda _: None
        play(f"http://reader:s3cret@{upstream.name}", scenario=scenario, key=None)
        basic = f"Basic {base64.b64encode(b'reader:s3cret').decode()}"
        assert {headers["Authorization"] for headers in upstream.headers} == {basic}
    for text in (*said, caplog.text):
        assert "sk-hidden" not in text and "s3cret" not in text


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIFT_UPSTREAM_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("LIFT_UPSTREAM_KEY", "sk-environment")
    assert read_key(None) == "sk-environment"
    file = tmp_path / "key"
    file.write_text("sk-file\n")
    assert read_key(file) == "sk-file"
    for content in (b"", b"two words", b"\xff\xfe", "schlüssel".encode()):
        file.write_bytes(content)
        with pytest.raises(BadConfig, match="--upstream-key-file"):
            read_key(file)
    with pytest.raises(BadConfig, match="No such file"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize(
    "url", ["", "host:8000", "ftp://host", "http://", "http://:80", "http://user:s3cret@"]
)
def test_what_is_no_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(BadConfig, match="--upstream") as refused:
        Fleet((url,))
    assert "s3cret" not in str(refused.value)


def test_a_fleet_needs_no_engine_software_here(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kind = resolve_kind("openai", recipe.model_copy(update={"pooling": "model"}))
    assert kind == "openai"
    assert not create_engine(kind, Path(), recipe, batch_tokens=1, fleet=Fleet(("http://h",))).verified


def test_closing_ends_what_is_under_way(upstream: Upstream, play: Callable[..., None]) -> None:
    async def scenario(engine: OpenAIEngine) -> None:
        going = threading.Event()
        upstream.wait = lambda: going.wait(20)
        embedding = asyncio.create_task(engine.embed(INPUTS))
        await asyncio.sleep(0.2)
        await engine.aclose()
        going.set()
        with pytest.raises(EngineUnavailable, match="stopped"):
            await embedding
        assert not engine.healthy()

    play(upstream.url, scenario=scenario)


def test_only_a_text_that_leads_to_exactly_these_ids_is_sent_for_them(
    upstream: Upstream, play: Callable[..., None], tiny_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = tiny_tokenizer(before="[CLS]", after="[SEP]")
    encode: Callable[..., Any] = tiny_tokenizer(before="[CLS]", after="[SEP]")
    as_text = text_for(tokenizer)
    good = encode("a red circle above a blue square")["input_ids"]
    special = encode("[SEP]", add_special_tokens=False)["input_ids"][0]
    cut = good[:-1]  # no closing token: no text leads there
    assert as_text(good) == "a red circle above a blue square"
    assert as_text(cut) is None

    def ids_of(text: Any) -> list[int]:
        assert isinstance(text, str)
        return encode(text)["input_ids"]

    upstream.vector = lambda text: vector_of(ids_of(text))
    upstream.count = lambda texts: sum(len(ids_of(text)) for text in texts)

    async def scenario(engine: OpenAIEngine) -> None:
        found = await engine.embed([good, cut, [*good[:-1], special, special]])
        np.testing.assert_allclose(found[0], unit([good])[0], atol=1e-6)
        assert np.isnan(found[1]).all()

    play(upstream.url, scenario=scenario, as_text=as_text, witnesses=[good, good[:3] + good[-1:]])


async def _why_read_only(cache: Path, recipe: Recipe, engine: Any, tokenizer: Any) -> str | None:
    with CacheWriter.open(cache, recipe) as writer:
        return await canaries.check(writer, engine, CaptionTokenizer(recipe, tokenizer))


def test_a_fleet_never_sets_the_standard_of_a_cache_whose_recipe_is_verified(
    recipe: Recipe, tmp_path: Path, faulty_engine: Any, tiny_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = tiny_tokenizer(eos="</s>")
    declared = recipe.model_copy(update={"declared": True})
    faulty_engine.verified = False
    for cache, own, why in (
        (tmp_path / "verified", recipe, "no canaries"),
        (tmp_path / "new", declared, None),
    ):
        said = asyncio.run(_why_read_only(cache, own, faulty_engine, tokenizer))
        assert (said is None) if why is None else (why in str(said))
        assert (cache / "canaries.json").exists() == (why is None)
    faulty_engine.verified = True
    assert asyncio.run(_why_read_only(tmp_path / "verified", recipe, faulty_engine, tokenizer)) is None
    faulty_engine.verified = False
    assert asyncio.run(_why_read_only(tmp_path / "verified", recipe, faulty_engine, tokenizer)) is None


@pytest.mark.parametrize("normalize", [True, False])
def test_an_engine_that_scales_vectors_is_found_out_where_their_length_matters(
    normalize: bool, recipe: Recipe, tmp_path: Path, faulty_engine: Any, tiny_tokenizer: Callable[..., Any]
) -> None:
    tokenizer, own = tiny_tokenizer(eos="</s>"), recipe.model_copy(update={"normalize": normalize})
    assert asyncio.run(_why_read_only(tmp_path / "cache", own, faulty_engine, tokenizer)) is None
    faulty_engine.spoil = lambda vectors: vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    said = asyncio.run(_why_read_only(tmp_path / "cache", own, faulty_engine, tokenizer))
    assert said is None if normalize else "no longer agrees" in str(said)
