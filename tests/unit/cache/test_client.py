"""The clients are patient with a busy server, clear about one that cannot be used, and never mix up rows."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest

from lift_cache import wire
from lift_cache.client import AsyncEmbeddingClient, Embedded, EmbeddingClient, Found, RowError
from lift_cache.errors import BadCaption, BadConfig, LiftError, ServerUnavailable
from lift_cache.exchange import LONGEST_PAUSE, Server
from lift_cache.keys import keyed
from lift_cache.recipe import Recipe

pytestmark = pytest.mark.slow

RECIPE = "f" * 64
DIMENSIONS = 24
REJECTED = "reject me"

Reply = tuple[int, dict[str, str], bytes]
Fault = Callable[[BaseHTTPRequestHandler], Reply | None]
"""What goes wrong with one request: the reply, or None where the connection is spoilt instead."""


class FaultyServer(ThreadingHTTPServer):
    """Answers as the embedding server does, in Arrow, after the faults that a test has put before it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, dict[str, str], list[str | None]]] = []
        self.recipe, self.known, self.dtype = RECIPE, set[str | None](), np.float16
        self.most_bytes, self.most_rows, self.key = 2**20, 2048, ""
        self.seconds, self.under_way, self.most_under_way, self.refused = 0.0, 0, 0, 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # headers and body in one packet
    server: FaultyServer

    def do_GET(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            fault = server.faults.pop(0) if server.faults else None
        try:
            time.sleep(server.seconds)
            reply = fault(self) if fault else self.right(body)
        finally:
            with server.lock:
                server.under_way -= 1
        if reply is None:
            self.close_connection = True
            return
        status, headers, content = reply
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def right(self, body: bytes) -> Reply:
        server = self.server
        if server.key and self.headers.get("authorization") != f"Bearer {server.key}":
            return refusal(401, f"unknown key {self.headers.get('authorization')}", "unauthorized")
        if len(body) > server.most_bytes:
            server.refused += 1
            return refusal(413, f"a body may have {server.most_bytes} bytes", "body_too_large")
        if self.path == "/v1/snapshots":
            return as_json({"id": "000001-ab", "path": "/cache", "rows": 3})
        if self.path == "/v1/cache":
            return as_json(card(server.recipe))
        try:
            captions = wire.decode_request(body, most_rows=server.most_rows).captions
        except wire.TooManyRows as error:
            return refusal(413, str(error), "too_many_inputs")
        with server.lock:
            server.asked.append((self.path, dict(self.headers.items()), captions))
        return 200, {"content-type": wire.MIME}, self.rows(captions)

    def rows(self, captions: list[str | None]) -> bytes:
        server = self.server
        texts, _, bad = keyed(captions)
        errors = {i: RowError("invalid_caption", reason) for i, reason in bad.items()}
        errors |= {i: RowError("vector_rejected", "zero") for i, text in enumerate(texts) if text == REJECTED}
        vectors = np.stack([vector_of(text) for text in texts]).astype(server.dtype)
        known = np.array([text in server.known for text in texts])
        tokens, truncated = np.array([len(text) for text in texts]), np.array([len(t) > 20 for t in texts])
        answer: wire.Answered | wire.Found = wire.Answered(vectors, known, tokens, truncated, errors)
        if self.path.startswith("/v1/lookup"):
            none = self.path.endswith("vectors=false")
            answer = wire.Found(None if none else vectors, known, tokens, truncated, errors)
        return wire.encode_answer(answer, recipe=server.recipe, model="tests/tiny")

    def log_message(self, *_: object) -> None:
        pass


def vector_of(text: str) -> np.ndarray:
    """float32 [24], another one for every text, exact in float16."""
    return np.frombuffer(blake2b(text.encode(), digest_size=DIMENSIONS).digest(), np.uint8).astype(np.float32)


def as_json(content: object, status: int = 200, **headers: str) -> Reply:
    return status, {"content-type": "application/json", **headers}, json.dumps(content).encode()


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    return as_json({"error": {"message": message, "code": code}}, status, **headers)


def card(fingerprint: str) -> dict[str, Any]:
    recipe = Recipe(
        model="tests/tiny",
        revision="0" * 40,
        dtype="float32",
        tokenizer_revision="0" * 40,
        end_token=True,
        pooling="last",
        max_tokens=77,
        normalize=True,
        dimensions=DIMENSIONS,
    )
    encoding = {"dimensions": DIMENSIONS}
    return {
        "recipe": recipe.model_dump(),
        "fingerprint": fingerprint,
        "encoding": encoding,
        "rows": 3,
        "more": 1,
    }


def always(reply: Reply) -> Fault:
    return lambda _: reply


def busy(status: int = 503, after: str | None = "0.1") -> Fault:
    headers = {} if after is None else {"Retry-After": after}
    return always(refusal(status, "the engine is starting", "engine_unavailable", **headers))


def cut_before_the_answer(_: BaseHTTPRequestHandler) -> None:
    """The connection closes without a word."""


def cut_within_the_answer(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-type", wire.MIME)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b"\xff\xff\xff\xff")


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    running = FaultyServer()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIFT_API_KEY", raising=False)


Ask = Callable[..., Any]
RETURN = {"on_error": "return"}


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Call a method of either client: `ask(url, "embed", captions, how={of the method}, **of the client)`."""

    def sync(url: str, method: str, *arguments: object, how: Any = None, **settings: Any) -> object:
        with EmbeddingClient(url, **settings) as client:
            return getattr(client, method)(*arguments, **(how or {}))

    async def other(url: str, method: str, *arguments: object, how: Any = None, **settings: Any) -> object:
        async with AsyncEmbeddingClient(url, **settings) as client:
            return await getattr(client, method)(*arguments, **(how or {}))

    if request.param == "sync":
        return sync
    return lambda *arguments, **settings: asyncio.run(other(*arguments, **settings))


def assert_rows(answer: Embedded, captions: Sequence[str]) -> None:
    assert answer.vectors.dtype == np.float32
    np.testing.assert_array_equal(answer.vectors, np.stack([vector_of(text) for text in captions]))
    assert answer.tokens.tolist() == [len(text) for text in captions]
    assert answer.truncated.tolist() == [len(text) > 20 for text in captions]


def test_any_number_of_captions_comes_back_in_their_order(server: FaultyServer, ask: Ask) -> None:
    captions = [f"caption {i}" * (1 + i % 3) for i in range(53)]
    server.known, server.seconds = {captions[7]}, 0.003
    answer = ask(server.url, "embed", captions, batch=5)
    assert_rows(answer, captions)
    assert np.flatnonzero(answer.cached).tolist() == [7]
    assert answer.errors == {}
    assert sorted(len(sent) for _, _, sent in server.asked) == [3] + [5] * 10


def test_float32_arrives_as_it_is(server: FaultyServer, ask: Ask) -> None:
    server.dtype = np.float32
    assert_rows(ask(server.url, "embed", ["one", "two"]), ["one", "two"])


def test_no_captions_are_no_rows_of_the_right_width(server: FaultyServer, ask: Ask) -> None:
    answer = ask(server.url, "embed", [])
    assert answer.vectors.shape == (0, DIMENSIONS)
    assert server.asked == []


def test_a_busy_server_is_asked_again_not_before_the_time_it_names(server: FaultyServer, ask: Ask) -> None:
    waits: list[tuple[str, float]] = []
    server.faults = [busy(503), busy(429)]
    began = time.monotonic()
    answer = ask(server.url, "embed", ["one"], on_wait=lambda why, seconds: waits.append((why, seconds)))
    assert time.monotonic() - began >= 0.2
    assert_rows(answer, ["one"])
    assert all(0.1 <= seconds <= 0.12 for _, seconds in waits)
    assert [why.partition("answered ")[2] for why, _ in waits] == [
        "503: the engine is starting",
        "429: the engine is starting",
    ]


@pytest.mark.parametrize("fault", [cut_before_the_answer, cut_within_the_answer])
def test_a_request_whose_connection_drops_is_made_again(server: FaultyServer, ask: Ask, fault: Fault) -> None:
    server.faults = [fault]
    assert_rows(ask(server.url, "embed", ["one", "two"]), ["one", "two"])


def test_patience_ends_with_one_line_that_says_why(server: FaultyServer, ask: Ask) -> None:
    server.faults = [busy()] * 50
    with pytest.raises(ServerUnavailable, match=r"503: the engine is starting; gave up after 0 s") as refused:
        ask(server.url, "embed", ["one"], patience=0.3)
    assert "\n" not in str(refused.value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens there
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerUnavailable, match=r"does not answer \(ConnectError"):
            ask(nowhere, "info", patience=0.3)


def test_a_wait_that_is_longer_than_the_patience_is_not_begun(server: FaultyServer, ask: Ask) -> None:
    server.faults = [busy(after="3600")]
    began = time.monotonic()
    with pytest.raises(ServerUnavailable, match="asks for 3600 s and 5 s are allowed"):
        ask(server.url, "embed", ["one"], patience=5)
    assert time.monotonic() - began < 2


def test_what_is_raised_while_waiting_ends_the_call(server: FaultyServer, ask: Ask) -> None:
    server.faults = [busy()] * 9

    def stop(why: str, seconds: float) -> None:
        raise BadConfig("enough")

    with pytest.raises(BadConfig, match="enough"):
        ask(server.url, "embed", ["one"], on_wait=stop)


def test_a_bad_caption_is_named_by_its_place_in_the_callers_list(server: FaultyServer, ask: Ask) -> None:
    captions = ["a", "b", "c", "d", " ", "e"]
    with pytest.raises(BadCaption, match=r"^input\[4\]: the caption is empty$"):
        ask(server.url, "embed", captions, batch=2)
    captions[4] = REJECTED
    with pytest.raises(BadCaption, match=r"^input\[4\]: zero$"):
        ask(server.url, "embed", captions, batch=2)


def test_bad_captions_may_be_returned_beside_the_good_ones(server: FaultyServer, ask: Ask) -> None:
    captions: list[Any] = ["a", "", "b", 7, "x\ud800", "c", REJECTED]
    answer = ask(server.url, "embed", captions, batch=3, how=RETURN)
    assert list(answer.errors) == [1, 3, 4, 6]
    assert {error.code for error in answer.errors.values()} == {"invalid_caption", "vector_rejected"}
    assert answer.errors[3].message == "a caption must be text, not int"
    assert "not valid UTF-8" in answer.errors[4].message
    good = [0, 2, 5]
    np.testing.assert_array_equal(answer.vectors[good], np.stack([vector_of(captions[i]) for i in good]))
    assert not answer.vectors[list(answer.errors)].any()


def test_one_text_where_a_list_belongs_is_refused(server: FaultyServer, ask: Ask) -> None:
    with pytest.raises(BadCaption, match="list"):
        ask(server.url, "embed", "a dog")
    assert server.asked == []


def test_a_request_that_is_too_large_is_halved_and_none_as_large_is_sent_again(
    server: FaultyServer, ask: Ask
) -> None:
    server.most_bytes = 4000
    captions = [f"{i:0200}" for i in range(64)]
    assert_rows(ask(server.url, "embed", captions, batch=32), captions)
    assert {len(texts) for _, _, texts in server.asked} == {16}
    assert server.refused <= 2  # those that were under way at once

    server.most_rows, server.most_bytes = 4, 2**20
    server.asked.clear()
    assert_rows(ask(server.url, "embed", captions, batch=32), captions)
    assert max(len(texts) for _, _, texts in server.asked) <= 4


def test_one_caption_that_is_too_large_is_that_captions_error(server: FaultyServer, ask: Ask) -> None:
    server.most_bytes = 4000
    captions = ["a", "b", "c" * 5000, "d"]
    with pytest.raises(BadCaption, match=r"input\[2\]: a body may have 4000 bytes"):
        ask(server.url, "embed", captions)
    answer = ask(server.url, "embed", captions, how=RETURN)
    assert answer.errors == {2: RowError("body_too_large", "a body may have 4000 bytes")}
    np.testing.assert_array_equal(answer.vectors[3], vector_of("d"))


def test_a_lookup_says_what_is_there_and_asks_for_vectors_only_when_wanted(
    server: FaultyServer, ask: Ask
) -> None:
    server.known = {"one"}
    whole: Found = ask(server.url, "lookup", ["one", "two"])
    assert whole.found.tolist() == [True, False]
    assert whole.vectors is not None
    np.testing.assert_array_equal(whole.vectors, [vector_of("one"), np.zeros(DIMENSIONS)])
    bare: Found = ask(server.url, "lookup", ["two", "one"], how={"vectors": False})
    assert (bare.vectors, bare.found.tolist()) == (None, [False, True])
    assert [path for path, _, _ in server.asked] == ["/v1/lookup", "/v1/lookup?vectors=false"]


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"content-type": "text/html"}, b"<html>please log in</html>"),
        as_json({"data": [{"index": 0, "embedding": "AAA="}]}),
        (200, {}, b""),
        (200, {"content-type": wire.MIME}, b"<html>"),
        (200, {"content-type": wire.MIME}, b""),
        (200, {"content-type": wire.MIME}, wire.encode_request(["a"])),
        (404, {}, b"not here"),
        (307, {"location": "http://127.0.0.1:1/"}, b""),
        (500, {}, b'{"error": "odd"}'),
        refusal(400, "body: not a dictionary", "invalid_request"),
        refusal(415, "send JSON"),
        refusal(507, "no space left"),
    ],
)
def test_another_kind_of_server_is_said_to_be_one(server: FaultyServer, ask: Ask, reply: Reply) -> None:
    server.faults = [always(reply)]
    with pytest.raises(ServerUnavailable, match=f"{server.url} .*answer") as refused:
        ask(server.url, "embed", ["one"])
    assert "\n" not in str(refused.value)
    assert server.faults == []


def test_an_answer_of_other_rows_than_were_asked_for_is_refused(server: FaultyServer, ask: Ask) -> None:
    server.faults = [lambda handler: (200, {"content-type": wire.MIME}, handler.rows(["one"]))]  # type: ignore[attr-defined]
    with pytest.raises(ServerUnavailable, match="1 rows for 2 captions"):
        ask(server.url, "embed", ["one", "two"])


def test_vectors_of_another_recipe_are_never_mixed_in(server: FaultyServer) -> None:
    with EmbeddingClient(server.url) as client:
        assert client.info().fingerprint == RECIPE
        client.embed(["one"])
        server.recipe = "e" * 64
        with pytest.raises(ServerUnavailable, match="another recipe"):
            client.embed(["two"])
        client.info()
        client.embed(["two"])


def test_a_server_that_changes_its_recipe_within_a_call_ends_the_call(server: FaultyServer) -> None:
    def restarted(why: str, seconds: float) -> None:
        server.recipe = "e" * 64

    with EmbeddingClient(server.url, batch=1, on_wait=restarted) as client:
        client.embed(["one"])
        server.faults = [busy()]
        with pytest.raises(ServerUnavailable, match="another recipe"):
            client.embed(["two", "three"])


def test_info_and_snapshot_are_what_the_server_says(server: FaultyServer, ask: Ask) -> None:
    assert ask(server.url, "info").rows == 3
    assert ask(server.url, "snapshot") == {"id": "000001-ab", "path": "/cache", "rows": 3}
    server.faults = [always(as_json({"rows": 3}))]
    with pytest.raises(ServerUnavailable, match=r"LIFT embedding server \(recipe: "):
        ask(server.url, "info")


def test_the_key_comes_from_the_argument_or_the_environment(
    server: FaultyServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sesame-42"
    with pytest.raises(BadConfig, match="401: unknown key None; set LIFT_API_KEY"):
        ask(server.url, "embed", ["one"])
    monkeypatch.setenv("LIFT_API_KEY", "sesame-42\n")
    assert_rows(ask(server.url, "embed", ["one"]), ["one"])
    server.key = "sesame-43"
    assert_rows(ask(server.url, "embed", ["one"], api_key="sesame-43"), ["one"])
    server.faults = [always(refusal(403, "this key may read, not embed", "forbidden"))]
    with pytest.raises(BadConfig, match="403: this key may read, not embed; set LIFT_API_KEY"):
        ask(server.url, "embed", ["one"], api_key="sesame-43")


def test_the_key_is_in_no_message_and_no_log(
    server: FaultyServer, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.key = "another"
    with pytest.raises(BadConfig) as refused:
        ask(server.url, "embed", ["one"], api_key="sesame-42")
    assert "Bearer …" in str(refused.value)
    client = EmbeddingClient(server.url, api_key="sesame-42")
    said = [str(refused.value), repr(client), repr(client._http), caplog.text]
    client.close()
    with pytest.raises(BadConfig, match=r"^api_key: ") as refused:
        EmbeddingClient(server.url, api_key="sesame 42\x00")
    said.append(str(refused.value))
    with pytest.raises(BadConfig) as refused:
        EmbeddingClient("http://me:sesame-42@host:port")
    said.append(str(refused.value))
    assert "127.0.0.1" in caplog.text
    assert not [text for text in said if "sesame" in text]


def test_a_password_in_the_address_is_sent_and_not_shown(server: FaultyServer, ask: Ask) -> None:
    server.faults = [lambda handler: refusal(503, handler.headers["authorization"], **{"Retry-After": "99"})]
    with pytest.raises(ServerUnavailable) as refused:
        ask(server.url.replace("//", "//me:sesame@"), "info", patience=1)
    assert "Basic bWU6c2VzYW1l" in str(refused.value)
    assert "sesame" not in str(refused.value)


def test_bulk_work_says_that_it_is(server: FaultyServer, ask: Ask) -> None:
    ask(server.url, "embed", ["one"])
    ask(server.url, "embed", ["one"], priority="bulk")
    said = [{name.lower(): value for name, value in headers.items()} for _, headers, _ in server.asked]
    assert [headers["x-lift-priority"] for headers in said] == ["interactive", "bulk"]
    assert (
        {headers["accept"] for headers in said}
        == {headers["content-type"] for headers in said}
        == {wire.MIME}
    )
    assert {headers["accept-encoding"] for headers in said} == {"identity"}


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://", "http://host:port", ""])
def test_an_address_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(BadConfig, match="http://host:port"):
        EmbeddingClient(url)
    with pytest.raises(BadConfig, match="http://host:port"):
        AsyncEmbeddingClient(url)


def test_a_client_may_be_used_from_several_threads(server: FaultyServer) -> None:
    server.seconds = 0.01
    captions = [[f"thread {t} caption {i}" for i in range(20)] for t in range(6)]
    answers: dict[int, Embedded] = {}
    with EmbeddingClient(server.url, batch=4) as client:

        def work(number: int) -> None:
            answers[number] = client.embed(captions[number])

        threads = [threading.Thread(target=work, args=(t,)) for t in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, answer in answers.items():
        assert_rows(answer, captions[number])
    assert len(answers) == 6


def test_so_many_requests_are_under_way_and_no_more(server: FaultyServer) -> None:
    server.seconds = 0.03
    captions = [f"caption {i}" for i in range(60)]

    async def run() -> list[Embedded]:
        async with AsyncEmbeddingClient(server.url, batch=5, concurrency=3) as client:
            return list(await asyncio.gather(client.embed(captions[:30]), client.embed(captions[30:])))

    first, second = asyncio.run(run())
    assert_rows(first, captions[:30])
    assert_rows(second, captions[30:])
    assert 2 <= server.most_under_way <= 3


def test_a_failure_ends_the_requests_beside_it(server: FaultyServer) -> None:
    def late(handler: BaseHTTPRequestHandler) -> Reply:
        time.sleep(1.5)
        return refusal(500, "late")

    server.faults = [late, always(refusal(507, "no space left", "cache_full")), late]

    async def run() -> float:
        async with AsyncEmbeddingClient(server.url, batch=1, concurrency=3) as client:
            began = time.monotonic()
            with pytest.raises(ServerUnavailable, match="507: no space left"):
                await client.embed([f"caption {i}" for i in range(9)])
            return time.monotonic() - began

    assert asyncio.run(run()) < 1.2
    assert server.asked == []


def test_a_cancelled_call_sends_no_more(server: FaultyServer) -> None:
    server.seconds = 0.02

    async def run() -> None:
        async with AsyncEmbeddingClient(server.url, batch=1, concurrency=2) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.embed([f"caption {i}" for i in range(500)]), 0.1)
            await asyncio.sleep(0.3)  # what the server had then, it has answered
            sent = len(server.asked)
            await asyncio.sleep(0.1)
            assert len(server.asked) == sent

    asyncio.run(run())


def quiet(**settings: Any) -> Server:
    """What a client knows, and nobody to talk to."""
    given = {"api_key": None, "batch": 8, "patience": 1e6, "priority": "bulk", "on_wait": None, **settings}
    return Server("http://127.0.0.1:9", **given)


def test_pauses_are_drawn_from_bounds_that_double_and_end() -> None:
    error = httpx.ReadError("reset")
    runs = []
    for _ in range(200):
        tries = quiet().tries()
        runs.append([tries.no_answer(error) for _ in range(8)])
    bounds = np.minimum(0.5 * 2.0 ** np.arange(8), LONGEST_PAUSE)
    pauses = np.array(runs)
    assert (pauses <= bounds).all() and (pauses >= 0.1).all()
    assert (pauses.max(0) > 0.8 * bounds).all() and (pauses.min(0) < 0.3 * bounds + 0.1).all()


NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7.7),
        ("2.5", 2.5, 2.75),
        ("0", 0.1, 0.1),
        (format_datetime(NOW + timedelta(seconds=40), usegmt=True), 40, 44),
        (format_datetime(NOW - timedelta(seconds=40), usegmt=True), 0.1, 0.1),
        ("Wed, 04 Mar 2026 05:06:17 -0000", 10, 11),
        *(
            (odd, 0.1, 0.5)
            for odd in ("-3", "nan", "inf", "soon", "", "1e9", "Wed, 99 Mar 2026 05:06:17 GMT")
        ),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_servers_clock(said: str, least: float, most: float) -> None:
    headers = {"Retry-After": said, "Date": format_datetime(NOW, usegmt=True)}
    wait = quiet().tries().answer(httpx.Response(503, headers=headers))
    assert wait is not None
    assert least <= wait <= most


def test_a_date_counts_from_now_when_the_server_does_not_tell_its_own() -> None:
    headers = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)}
    wait = quiet().tries().answer(httpx.Response(429, headers=headers))
    assert wait is not None
    assert 28 <= wait <= 33


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 409, 413, 415, 422, 500, 501, 507])
def test_what_another_try_would_not_change_is_not_tried_again(status: int) -> None:
    with pytest.raises(LiftError):
        quiet().tries().answer(httpx.Response(status, text="no\nnot \x1b[31m this"))
    assert quiet().tries().answer(httpx.Response(200)) is None


@pytest.mark.parametrize("code", ["invalid_caption", "vector_rejected"])
def test_a_request_refused_for_a_caption_is_the_captions_error(code: str) -> None:
    reply = {"error": {"message": "input[1]: the caption is empty", "code": code}}
    with pytest.raises(BadCaption, match=r"input\[1\]"):
        quiet().tries().answer(httpx.Response(400, json=reply))
