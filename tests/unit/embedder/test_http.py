"""What every request passes through: ids, logs and metrics; limits on bodies; clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import itertools
import json
import logging
import re
import socket
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lift_embedder import http
from lift_embedder.http import Body, Observe
from lift_embedder.metrics import Metrics

pytestmark = pytest.mark.slow

LOG = "lift_embedder.http"
IDLE = 0.2


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


# An application, and ways to reach it


class Application:
    """Echoes, waits, streams and fails; notes what became of its requests."""

    def __init__(self) -> None:
        self.waiting = 0
        self.cancelled = 0
        self.background = 0
        self.app = app = FastAPI()

        @app.post("/echo")
        async def echo(request: Request) -> PlainTextResponse:
            body = await request.body()
            request.state.rows = 3
            return PlainTextResponse(body)

        @app.post("/wait/{name}")
        async def wait(name: str, request: Request) -> PlainTextResponse:
            await request.body()
            with self.noted():
                await asyncio.sleep(30)
            return PlainTextResponse("waited")

        @app.post("/long")
        async def long(request: Request) -> PlainTextResponse:
            return PlainTextResponse(b"x" * int(await request.body()))

        @app.post("/stream")
        async def stream(request: Request) -> StreamingResponse:
            await request.body()

            async def parts() -> AsyncIterator[bytes]:
                yield b"first"
                with self.noted():
                    for _ in range(200):
                        await asyncio.sleep(0.01)
                        yield b"x" * 1000

            return StreamingResponse(parts())

        @app.post("/afterwards")
        async def afterwards(request: Request) -> PlainTextResponse:
            await request.body()

            async def work() -> None:
                await asyncio.sleep(3 * http.LOOK_SECONDS)
                self.background += 1

            return PlainTextResponse("done", background=BackgroundTask(work))

        @app.get("/fail")
        async def fail() -> None:
            raise RuntimeError("a secret dog")

        @app.get("/items/{name}")
        async def item(name: str) -> str:
            return name

        @app.get("/livez")
        async def livez() -> str:
            return "alive"

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1


@pytest.fixture
def application() -> Application:
    return Application()


Stack = Callable[..., ASGIApp]


@pytest.fixture
def stack(application: Application, metrics: Metrics) -> Stack:
    """The application with both layers, as the server has them."""

    def build(**limits: Any) -> FastAPI:
        settings = {"most_bytes": 100_000, "buffer_bytes": 1_000_000, "idle_seconds": IDLE, **limits}
        application.app.add_middleware(Body, metrics=metrics, **settings)
        application.app.add_middleware(Observe, metrics=metrics)
        return application.app

    return build


def in_process(app: ASGIApp, use: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await use(client)

    asyncio.run(main())


class Server(uvicorn.Server):
    """uvicorn's, without its signals, and quicker to see that it should stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, **settings: Any) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    """The port of a real server in this loop. Anything that the loop has to complain about fails the test."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    settings = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none", **settings}
    # Named TCP: asyncio sends answers without delay only where the listening socket says so.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = Server(uvicorn.Config(app, **settings))
        serve = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        yield port, server
        server.should_exit = True
        await serve
    gc.collect()
    await asyncio.sleep(0)
    assert not complaints


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class Connection:
    """One connection of a client that may stop wherever it likes."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    async def ask(self, path: str, body: bytes = b"", length: int | None = None, more: str = "") -> None:
        """Send headers and a body, or the beginning of one that is `length` bytes long."""
        length = len(body) if length is None else length
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{more}\r\n"
        await self.send(head.encode() + body)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(5):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)
            }
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(lines[0].split()[1]), headers, body


def error_code(body: bytes) -> str:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["code"])


def ends(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The log's lines about ends of requests, at INFO."""
    return [line for record in caplog.records for _, line in getattr(record, "lines", ())]


@pytest.fixture(autouse=True)
def _lines_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_LINES", 1)


# Observe


@pytest.mark.parametrize("usable", ["a", "0f.3-B_z", "x" * 64])
def test_a_clients_request_id_is_kept(usable: str, stack: Stack) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.get("/livez", headers={"X-Request-Id": usable})
        assert answer.headers.get_list("x-request-id") == [usable]

    in_process(stack(), use)


@pytest.mark.parametrize("unusable", ["", "x" * 65, "a b", "a;b", 'a"b', "ä"])
def test_a_request_id_that_could_forge_a_log_or_a_header_is_replaced(unusable: str, stack: Stack) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        headers = [(b"X-Request-Id", unusable.encode("latin-1"))]
        fresh = [(await client.get("/livez", headers=headers)).headers["x-request-id"] for _ in range(2)]
        assert len(set(fresh)) == 2
        assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", one) for one in fresh)

    in_process(stack(), use)


def test_one_line_tells_how_a_request_ended_and_nothing_of_what_was_asked(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", LOG)

    async def use(client: httpx.AsyncClient) -> None:
        await client.post("/echo?q=secret", content=b"a secret dog")

    in_process(stack(), use)
    (end,) = ends(caplog)
    assert (end["method"], end["path"], end["status"], end["rows"]) == ("POST", "/echo", 200, 3)
    assert 0 < end["seconds"] < 5
    assert not any("secret" in str(vars(record)) for record in caplog.records)


def test_an_exception_becomes_a_500_that_says_nothing_and_a_log_that_says_where(
    stack: Stack, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.get("/fail")
        assert answer.status_code == 500 and error_code(answer.content) == "internal_error"
        assert "secret" not in answer.text and answer.headers["x-request-id"]

    in_process(stack(), use)
    failed = next(record for record in caplog.records if record.levelname == "ERROR")
    assert failed.name == LOG and failed.exc_info is not None
    assert value(metrics, "lift_errors_total", status="500", code="internal_error") == 1


def test_an_exception_in_a_stream_ends_the_connection_since_the_status_is_sent(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        raise RuntimeError

    async def main() -> None:
        async with serving(Observe(app, metrics)) as (port, _), Connection(port) as client:
            await client.ask("/")
            with pytest.raises(asyncio.IncompleteReadError):
                await client.answer()

    asyncio.run(main())
    assert "request failed" in caplog.messages


def test_latency_is_by_route_and_no_client_can_add_a_label(stack: Stack, metrics: Metrics) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for path in ("/items/a", "/items/b", "/no/such/path", "/nor/this"):
            await client.get(path)

    in_process(stack(), use)
    assert value(metrics, "lift_request_seconds_count", route="/items/{name}") == 2
    assert value(metrics, "lift_request_seconds_count", route=http.UNROUTED) == 2


def test_errors_are_counted_by_status_and_code_and_told(application: Application, metrics: Metrics) -> None:
    told: list[tuple[int, str, str, str]] = []
    body = Body(application.app, metrics, most_bytes=10, buffer_bytes=100)
    app = Observe(body, metrics, on_error=lambda *error: told.append(error))

    async def use(client: httpx.AsyncClient) -> None:
        await client.post("/echo", content=b"x" * 11, headers={"x-request-id": "one"})
        await client.get("/nowhere", headers={"x-request-id": "two"})  # not in this server's shape

    in_process(app, use)
    assert value(metrics, "lift_errors_total", status="413", code="body_too_large") == 1
    assert value(metrics, "lift_errors_total", status="404", code="none") == 1
    assert [(status, code, request) for status, code, _, request in told] == [
        (413, "body_too_large", "one"),
        (404, "none", "two"),
    ]
    assert "10 bytes" in told[0][2]


def test_probes_do_not_fill_the_log(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOG)

    async def use(client: httpx.AsyncClient) -> None:
        await client.get("/livez")
        await client.get("/items/a")

    app = stack()
    in_process(app, use)
    assert [end["path"] for end in ends(caplog)] == ["/items/a"]
    caplog.set_level("DEBUG", LOG)
    in_process(app, use)
    assert [vars(record)["path"] for record in caplog.records if record.levelname == "DEBUG"] == ["/livez"]


def test_log_lines_wait_for_each_other_and_for_nothing_else(
    application: Application,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", LOG)
    monkeypatch.setattr(http, "MOST_LINES", 4)
    monkeypatch.setattr(http, "LINE_SECONDS", 0.05)
    app = Observe(application.app, metrics)

    async def use(client: httpx.AsyncClient) -> None:
        async def written_after(paths: list[str]) -> int:
            for path in paths:
                await client.get(path)
            return len(ends(caplog))

        assert await written_after(["/items/a"] * 3) == 0
        assert await written_after(["/items/b"]) == 4
        assert await written_after(["/items/c", "/nowhere"]) == 6  # an error, behind what came before it
        assert await written_after(["/items/d"]) == 6
        await until(lambda: len(ends(caplog)) == 7)  # nothing more comes: time is up
        assert await written_after(["/items/e"]) == 7

        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Message:
            return next(messages)

        await app({"type": "lifespan", "state": {}}, receive, _ignore)
        assert len(ends(caplog)) == 8  # the server ends

    in_process(app, use)
    assert "".join(end["path"][-1] for end in ends(caplog)) == "aaabcede"


def test_a_server_that_must_stop_says_so_to_those_it_keeps_waiting(
    stack: Stack, application: Application
) -> None:
    async def main() -> None:
        settings = {"timeout_graceful_shutdown": 0.1}
        async with serving(stack(), **settings) as (port, server), Connection(port) as client:
            await client.ask("/wait/a", b"{}")
            await until(lambda: application.waiting)
            server.should_exit = True
            status, _, body = await client.answer()
            assert (status, error_code(body)) == (503, "stopping")

    asyncio.run(main())
    assert application.cancelled == 1


# Body: limits


def test_a_body_of_just_the_limit_is_taken_and_one_byte_more_is_not(stack: Stack) -> None:
    async def chunks(total: int) -> AsyncIterator[bytes]:
        for start in range(0, total, 300):
            yield b"x" * min(300, total - start)

    async def use(client: httpx.AsyncClient) -> None:
        for size, status in ((1000, 200), (1001, 413)):
            for content in (b"x" * size, chunks(size)):  # the second does not declare its length
                answer = await client.post("/echo", content=content)
                assert answer.status_code == status
                assert status == 413 or len(answer.content) == size
            packed = gzip.compress(b"x" * size)
            answer = await client.post("/echo", content=packed, headers={"Content-Encoding": "gzip"})
            assert answer.status_code == status

    in_process(stack(most_bytes=1000), use)


def test_a_body_that_declares_too_much_is_refused_before_it_is_sent(stack: Stack) -> None:
    async def main() -> None:
        async with serving(stack()) as (port, _):
            for length in ("100001", "9" * 18):
                async with Connection(port) as client:
                    await client.ask("/echo", b"", length=int(length), more="Expect: 100-continue\r\n")
                    status, _, body = await client.answer()
                    assert (status, error_code(body)) == (413, "body_too_large")

    asyncio.run(main())


@given(
    members=st.lists(st.binary(max_size=3000), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 12_000), max_size=6),
)
def test_gzip_in_any_number_of_members_and_chunks_is_what_was_packed(
    members: list[bytes], cuts: list[int]
) -> None:
    packed = b"".join(gzip.compress(member) for member in members)
    edges = [0, *sorted(min(cut, len(packed)) for cut in cuts), len(packed)]
    gunzip = http._Gunzip(1 << 20)
    pieces = [piece for start, end in itertools.pairwise(edges) for piece in gunzip(packed[start:end])]
    gunzip.finish()
    assert b"".join(pieces) == b"".join(members)


@pytest.mark.parametrize(
    "body",
    [
        b"not gzip at all",
        gzip.compress(b"a dog")[:-1],
        gzip.compress(b"a dog") + b"garbage",
        gzip.compress(b"a dog")[:-8] + bytes(8),
        gzip.compress(b"") * (http.MOST_MEMBERS + 1),
    ],
)
def test_broken_gzip_is_the_clients_mistake(body: bytes, stack: Stack) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post("/echo", content=body, headers={"Content-Encoding": "gzip"})
        assert (answer.status_code, error_code(answer.content)) == (400, "invalid_request")

    in_process(stack(), use)


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "chunked"])
def test_another_encoding_is_refused_with_the_one_that_is_taken(encoding: str, stack: Stack) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post("/echo", content=b"x", headers={"Content-Encoding": encoding})
        assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip")

    in_process(stack(), use)


def test_a_gzip_bomb_costs_no_more_memory_than_the_limit(stack: Stack) -> None:
    limit = 1 << 20
    bomb = gzip.compress(bytes(64 * limit), 9)
    assert len(bomb) < limit
    app = stack(most_bytes=limit, buffer_bytes=64 * limit)

    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post("/echo", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 413

    tracemalloc.start()
    in_process(app, use)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * limit


def test_bodies_beyond_the_buffers_get_busy_and_the_room_comes_back(
    stack: Stack, application: Application, metrics: Metrics
) -> None:
    async def main() -> None:
        async with serving(stack(buffer_bytes=100_000)) as (port, _):
            async with Connection(port) as first, Connection(port) as second:
                await first.ask("/wait/a", b"x" * 60_000)
                await until(lambda: application.waiting)
                assert value(metrics, "lift_buffer_bytes") == 60_000
                await second.ask("/echo", b"x" * 60_000)
                status, headers, body = await second.answer()
                assert (status, error_code(body), headers["retry-after"]) == (503, "busy", "1")
                assert value(metrics, "lift_buffer_bytes") == 60_000
                await second.ask("/echo", b"x" * 30_000)  # on the same connection: it is still in step
                assert (await second.answer())[0] == 200
            await until(lambda: value(metrics, "lift_buffer_bytes") == 0)

    asyncio.run(main())


def test_a_body_that_stops_arriving_is_ended_and_a_slow_one_is_not(stack: Stack, metrics: Metrics) -> None:
    async def main() -> None:
        async with serving(stack()) as (port, _):
            for sent in (b"", b"x" * 500):  # from the start, and in the middle
                async with Connection(port) as client:
                    await client.ask("/echo", sent, length=1000)
                    began = time.monotonic()
                    status, headers, body = await client.answer()
                    assert (status, error_code(body)) == (408, "body_too_slow")
                    assert headers["connection"] == "close" and time.monotonic() - began < IDLE + 1
            async with Connection(port) as client:
                await client.ask("/echo", b"", length=8)
                for _ in range(8):
                    await asyncio.sleep(IDLE / 3)
                    await client.send(b"x")
                assert (await client.answer())[::2] == (200, b"x" * 8)
            assert value(metrics, "lift_buffer_bytes") == 0

    asyncio.run(main())


def test_a_body_in_many_small_chunks_takes_no_more_than_its_bytes(metrics: Metrics) -> None:
    received: list[bytes] = []
    total = 50_000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.append((await receive())["body"])

    async def main() -> None:
        left = total

        async def receive() -> Message:
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": b"x", "more_body": left > 0}

        scope = {"type": "http", "method": "POST", "headers": [(b"transfer-encoding", b"chunked")]}
        tracemalloc.start()
        await Body(app, metrics, most_bytes=total, buffer_bytes=total)(scope, receive, _ignore)

    asyncio.run(main())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert received == [b"x" * total] and peak < 5 * total


async def _ignore(_: Message) -> None:
    pass


def test_requests_without_a_body_are_handed_on_untouched(metrics: Metrics) -> None:
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(receive)

    async def receive() -> Message:
        raise AssertionError

    async def main() -> None:
        for headers in ([], [(b"content-length", b"0")]):
            scope = {"type": "http", "method": "POST", "headers": headers}
            await Body(app, metrics, most_bytes=1, buffer_bytes=1)(scope, receive, _ignore)

    asyncio.run(main())
    assert seen == [receive, receive]


# Body: clients that leave


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
@pytest.mark.parametrize("path", ["/wait/a", "/stream"])
def test_a_client_that_leaves_frees_its_place(
    path: str,
    protocol: str,
    stack: Stack,
    application: Application,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", LOG)

    async def main() -> None:
        async with serving(stack(), http=protocol) as (port, _):
            async with Connection(port) as client:
                await client.ask(path, b"{}")
                await until(lambda: application.waiting)
            await until(lambda: not application.waiting)
            await until(lambda: ends(caplog))

    asyncio.run(main())
    (end,) = ends(caplog)
    assert application.cancelled == 1 and end["status"] == http.LEFT
    assert value(metrics, "lift_clients_left_total") == 1
    assert value(metrics, "lift_errors_total", status="499", code="client_left") == 1
    assert value(metrics, "lift_buffer_bytes") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_leaves_before_its_body_has_arrived_is_no_error(
    stack: Stack, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(stack()) as (port, _):
            async with Connection(port) as client:
                await client.ask("/echo", b"x", length=1000)
            await until(lambda: value(metrics, "lift_clients_left_total"))

    asyncio.run(main())
    assert value(metrics, "lift_buffer_bytes") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_whose_body_came_slowly_also_frees_its_place(stack: Stack, application: Application) -> None:
    async def main() -> None:
        async with serving(stack(idle_seconds=30)) as (port, _):
            async with Connection(port) as client:
                await client.ask("/wait/a", b"x", length=2)
                await asyncio.sleep(2 * http.LOOK_SECONDS)
                await client.send(b"x")
                await until(lambda: application.waiting)
            await until(lambda: application.cancelled)

    asyncio.run(main())


def test_work_after_the_answer_goes_on_although_the_client_is_gone(
    stack: Stack, application: Application, metrics: Metrics
) -> None:
    async def main() -> None:
        async with serving(stack()) as (port, _):
            async with Connection(port) as client:
                await client.ask("/afterwards", b"{}")
                assert (await client.answer())[0] == 200
            await until(lambda: application.background)

    asyncio.run(main())
    assert value(metrics, "lift_clients_left_total") == 0


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
def test_one_connection_serves_many_requests_also_those_that_are_watched(
    protocol: str, stack: Stack, application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "LOOK_SECONDS", 0.0)

    async def main() -> None:
        async with serving(stack(), http=protocol) as (port, _), Connection(port) as client:
            for i in range(20):
                await client.ask("/echo", str(i).encode())
                assert (await client.answer())[::2] == (200, str(i).encode())
            for i in range(3):  # pipelined
                await client.ask("/echo", str(i).encode())
            for i in range(3):
                assert (await client.answer())[::2] == (200, str(i).encode())

    asyncio.run(main())
    assert not application.cancelled


def test_a_long_answer_arrives_whole_and_one_that_nobody_reads_is_given_up(
    stack: Stack, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", LOG)
    size = 40 << 20

    async def main() -> None:
        async with serving(stack()) as (port, _):
            async with Connection(port) as client:
                for length in (size, http.PIECE_BYTES, http.PIECE_BYTES + 1, 3 * http.PIECE_BYTES):
                    await client.ask("/long", str(length).encode())
                    assert len((await client.answer())[2]) == length
                assert value(metrics, "lift_buffer_bytes") == 0
            async with Connection(port) as client:
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await client.ask("/long", str(size).encode())
                await until(lambda: (value(metrics, "lift_buffer_bytes") or 0) >= size)
                await until(lambda: value(metrics, "lift_buffer_bytes") == 0)

    asyncio.run(main())
    assert ends(caplog)[-1]["status"] == http.LEFT


def test_an_application_that_swallows_its_cancellation_leaves_the_task_as_it_was(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(30)

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"1")], "state": {}}
        messages: list[Message] = [{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}]

        async def receive() -> Message:
            return messages.pop(0)

        await Body(app, metrics, most_bytes=1, buffer_bytes=1)(scope, receive, _ignore)
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0 and scope["state"] == {"left": True}

    asyncio.run(main())


def test_an_application_may_wait_for_its_client_after_the_answer(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"x"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        assert (await receive())["type"] == "http.disconnect"

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"1")], "state": {}}
        messages: list[Message] = [{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}]

        async def receive() -> Message:
            return messages.pop(0)

        await Body(app, metrics, most_bytes=1, buffer_bytes=1)(scope, receive, _ignore)
        assert scope["state"] == {} and not messages

    asyncio.run(main())


def test_of_a_stream_only_the_part_that_is_being_sent_is_held(metrics: Metrics) -> None:
    part = http.PIECE_BYTES + 1
    held: set[int] = set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"x" * part, "more_body": more})

    async def send(_: Message) -> None:
        held.add(body.held)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"x"}

    body = Body(app, metrics, most_bytes=1, buffer_bytes=1)
    scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"1")]}
    asyncio.run(body(scope, receive, send))
    assert held == {1, 1 + part} and body.held == 0


def test_a_cancellation_from_elsewhere_passes_through(metrics: Metrics) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(30)

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"1")]}
        messages: list[Message] = [{"type": "http.request", "body": b"x"}]

        async def receive() -> Message:
            if messages:
                return messages.pop(0)
            await asyncio.sleep(30)
            raise AssertionError

        body = Body(app, metrics, most_bytes=1, buffer_bytes=1)
        request = asyncio.create_task(body(scope, receive, _ignore))
        await asyncio.sleep(2 * http.LOOK_SECONDS)
        assert body.held == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await asyncio.sleep(0.01)
        assert body.held == 0 and len(asyncio.all_tasks()) == 1  # nobody listens any more

    asyncio.run(main())


# Memory

FLOODED = """
import asyncio, sys, uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from lift_embedder.http import Body, Observe
from lift_embedder.metrics import Metrics

async def app(scope, receive, send):
    body = await Request(scope, receive).body()
    await asyncio.sleep(0.3)
    await PlainTextResponse(str(len(body)))(scope, receive, send)

metrics = Metrics()
app = Observe(Body(app, metrics, most_bytes=8 << 20, buffer_bytes=32 << 20), metrics)
uvicorn.run(app, port=int(sys.argv[1]), log_config=None, access_log=False, lifespan="off", http="httptools")
"""


def test_memory_stays_flat_under_many_big_bodies_at_once(tmp_path: Path) -> None:
    """50 clients send 8 MiB each, all at once, to a server that holds 32 MiB: 400 MiB without the limit."""
    size, clients = 8 << 20, 50
    program = tmp_path / "flooded.py"
    program.write_text(textwrap.dedent(FLOODED))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(program), str(port)])

    def memory(name: str) -> int:
        status = Path(f"/proc/{server.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    statuses: list[int] = []
    body = b"x" * size

    async def flood() -> None:
        async with Connection(port) as client:
            await client.ask("/", body)
            async with asyncio.timeout(30):
                head = await client.reader.readuntil(b"\r\n\r\n")
            statuses.append(int(head.split()[1]))

    async def main() -> None:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    async with Connection(port):
                        break
                await asyncio.sleep(0.05)
        before = memory("VmRSS")
        await asyncio.gather(*(flood() for _ in range(clients)))
        grown = memory("VmHWM") - before
        assert set(statuses) == {200, 503}, statuses
        assert grown < 4 * (32 << 20), f"{grown >> 20} MiB"

    try:
        asyncio.run(main())
    finally:
        server.kill()
        server.wait()
