"""The client is patient with a busy server and clear about one that cannot be used."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from lift_cache.client import EmbeddingClient
from lift_cache.errors import BadCaption, BadConfig, ServerUnavailable
from lift_cache.recipe import Recipe

Answer = tuple[int, dict[str, str], bytes]
Start = Callable[[list[Answer]], str]


@pytest.fixture
def start() -> Iterator[Start]:
    """A server on loopback that gives prepared answers in turn (faults that a real one would give at random)."""
    servers: list[ThreadingHTTPServer] = []

    def begin(answers: list[Answer]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                status, headers, body = answers.pop(0)
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def embedded(*vectors: list[float]) -> Answer:
    rows = [
        {
            "index": i,
            "embedding": base64.b64encode(np.array(vector, "<f4").tobytes()).decode(),
            "cached": i > 0,
            "tokens": 5 + i,
            "truncated": False,
        }
        for i, vector in enumerate(vectors)
    ]
    return 200, {}, json.dumps({"data": rows[::-1]}).encode()


BUSY: Answer = (503, {"Retry-After": "0.1"}, b'{"error": {"message": "the engine is starting"}}')


def test_rows_come_back_in_the_order_of_the_captions(start: Start) -> None:
    with EmbeddingClient(start([embedded([1, 2], [3, 4])])) as client:
        answer = client.embed(["one", "two"])
    assert answer.vectors.tolist() == [[1, 2], [3, 4]]
    assert answer.cached.tolist() == [False, True]
    assert answer.tokens.tolist() == [5, 6]


def test_a_busy_server_is_asked_again_after_the_time_it_names(start: Start) -> None:
    waits: list[tuple[str, float]] = []
    url = start([BUSY, BUSY, embedded([1, 2])])
    with EmbeddingClient(url, on_wait=lambda why, seconds: waits.append((why, seconds))) as client:
        assert client.embed(["one"]).vectors.tolist() == [[1, 2]]
    assert [seconds for _, seconds in waits] == [0.1, 0.1]
    assert "the engine is starting" in waits[0][0]


def test_patience_ends_with_one_line_that_says_why(start: Start) -> None:
    with (
        EmbeddingClient(start([BUSY] * 50), patience=0.3) as client,
        pytest.raises(ServerUnavailable, match=r"503: the engine is starting; gave up after 0 s") as refused,
    ):
        client.embed(["one"])
    assert "\n" not in str(refused.value)
    with (
        EmbeddingClient("http://127.0.0.1:1", patience=0.3) as client,
        pytest.raises(ServerUnavailable, match="does not answer"),
    ):
        client.info()


def test_a_refused_caption_is_the_users_error_and_not_tried_again(start: Start) -> None:
    refusal = json.dumps({"error": {"message": "input[1]: the caption is empty"}}).encode()
    with (
        EmbeddingClient(start([(400, {}, refusal)])) as client,
        pytest.raises(BadCaption, match=r"input\[1\]"),
    ):
        client.embed(["one", ""])


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>"),
        (200, {}, b"[]"),
        (200, {}, b'{"data": []}'),
        (200, {}, b'{"data": [{"index": 0}]}'),
        (404, {}, b"not here"),
        (500, {}, b'{"error": "odd"}'),
    ],
)
def test_another_kind_of_server_is_said_to_be_one(start: Start, answer: Answer) -> None:
    with EmbeddingClient(start([answer])) as client, pytest.raises(ServerUnavailable, match="answer"):
        client.embed(["one"])


def test_an_address_that_is_no_url_is_refused() -> None:
    with pytest.raises(BadConfig, match="http://host:port"):
        EmbeddingClient("localhost:8080")


def test_info_checks_the_recipe_it_is_given(start: Start, recipe: Recipe) -> None:
    card = {
        "recipe": recipe.model_dump(),
        "fingerprint": recipe.fingerprint,
        "encoding": {"dimensions": 24},
        "rows": 3,
        "more": 1,
    }
    url = start([(200, {}, json.dumps(card).encode()), (200, {}, b'{"rows": 3}')])
    with EmbeddingClient(url) as client:
        assert client.info().recipe == recipe
        with pytest.raises(ServerUnavailable, match="LIFT embedding server"):
            client.info()
