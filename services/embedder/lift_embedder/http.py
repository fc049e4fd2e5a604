"""What every request passes through, as plain ASGI: a hit in the cache takes less time than a wrapped response.

Observe   outermost: gives the request an id, and counts and logs how it ended
Body      reads the body within its limits, then runs the application until the client leaves
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lift_embedder import logs
from lift_embedder.answers import error_answer
from lift_embedder.metrics import Metrics

log = logging.getLogger(__name__)

QUIET = frozenset({"/livez", "/readyz", "/metrics"})
"""Paths that are asked every few seconds; their requests are logged at DEBUG."""

LEFT = 499
"""Counted and logged, never sent: the client went away before it had its answer."""

UNROUTED = "none"
"""Route of a request that was refused before it had one; a raw path would be a label that clients choose."""

LONGEST_PATH = 256
"""Characters of a path in the log."""

MOST_LINES, LINE_SECONDS = 16, 0.1
"""Log lines about ended requests that wait for each other, and for how long."""

LOOK_SECONDS = 0.05
"""From here on a request is watched for its client leaving; most have been answered by then."""

PIECE_BYTES = 256 * 1024
"""A longer answer is sent in pieces, each when the client has taken the one before."""

DECODED_PIECE_BYTES = 1024 * 1024
"""Decoded at a time; other requests run in between."""

MOST_MEMBERS = 4096
"""Members of one gzip body. bgzip makes one every 64 KiB; millions of empty ones only cost time."""

_PREFIX = secrets.token_hex(6)
_NUMBER = itertools.count(1)
_usable_id = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch


class Observe:
    """Outermost: request id, one log line, metrics; an exception becomes a 500 in OpenAI's shape.

    A client's X-Request-Id is kept when it is 1 to 64 of `A-Z a-z 0-9 . _ -`. It is sent back, is in
    `scope["state"]["request_id"]`, and in every log line that is written while the request runs. Of the state
    that layers inside leave behind, the log takes `rows` and `key` (a key's name).

    Args:
        on_error: told of every error answer: status, code, message, request id.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, on_error: Callable[[int, str, str, str], None] | None = None
    ) -> None:
        self.app, self._metrics, self._on_error = app, metrics, on_error
        self._seconds: dict[str, Any] = {}
        self._lines = _Lines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            try:
                return await self.app(scope, receive, send)
            finally:
                self._lines.write()  # the lifespan ends with the server
        began = time.perf_counter()
        request_id = _request_id(scope)
        header = (b"x-request-id", request_id.encode())
        scope.setdefault("state", {})["request_id"] = request_id
        bound = logs.request_id.set(request_id)
        status, body = 0, b""

        async def observed(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), header]}
            elif status >= 400 and not body:
                body = message.get("body", b"")
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except asyncio.CancelledError:
            if status:
                raise
            # Only a server that stops cancels a request from outside, and uvicorn would answer with plain text.
            status = 503
            await error_answer(503, "the server is stopping", "stopping", None, 1)(scope, receive, observed)
        except Exception:
            log.exception("request failed", extra={"path": scope["path"][:LONGEST_PATH]})
            if not status:
                text = "the server failed; its log says more"
                await error_answer(500, text, "internal_error")(scope, receive, observed)
        finally:
            self._report(scope, status, body, time.perf_counter() - began)
            logs.request_id.reset(bound)

    def _report(self, scope: Scope, status: int, body: bytes, seconds: float) -> None:
        state, path = scope["state"], scope["path"]
        code = None
        if state.get("left"):
            status, code = LEFT, "client_left"
            self._metrics.clients_left.inc()
        elif status >= 400:
            code, message = _error_in(body)
            if self._on_error is not None:
                self._on_error(status, code, message, state["request_id"])
        if code is not None:
            self._metrics.errors.labels(str(status), code).inc()
        route = getattr(scope.get("route"), "path", UNROUTED)
        histogram = self._seconds.get(route)
        if histogram is None:
            histogram = self._seconds[route] = self._metrics.request_seconds.labels(route)
        histogram.observe(seconds)
        level = logging.DEBUG if path in QUIET else logging.INFO
        if not log.isEnabledFor(level):
            return
        entry = {
            "request": state["request_id"],
            "method": scope["method"],
            "path": path[:LONGEST_PATH],
            "status": status,
            "seconds": round(seconds, 5),
        }
        if code is not None:
            entry["code"] = code
        for name in ("rows", "key"):
            if name in state:
                entry[name] = state[name]
        if level == logging.DEBUG:
            log.debug("request", extra=entry)
        else:
            self._lines.add(entry, at_once=code is not None)


class _Lines:
    """Log lines about ended requests, written together.

    A line alone takes 50 us, a third of a whole request that is answered from the cache; in company, 10. Those
    of errors do not wait, and no line waits longer than `LINE_SECONDS`.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, dict[str, Any]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, entry: dict[str, Any], *, at_once: bool) -> None:
        self._waiting.append((time.time(), entry))
        if at_once or len(self._waiting) >= MOST_LINES:
            return self.write()
        loop = asyncio.get_running_loop()
        if self._timer is None or self._loop is not loop:
            self._loop, self._timer = loop, loop.call_later(LINE_SECONDS, self.write)

    def write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            logs.info_lines(log, "request", waiting)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _usable_id(value):
            return str(value, "ascii")
    return f"{_PREFIX}-{next(_NUMBER):x}"


def _error_in(body: bytes) -> tuple[str, str]:
    """Code and message of an error answer of this server."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        return str(error["code"]), str(error["message"])
    return "none", ""


class Refused(Exception):
    """A body that is not taken."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Body:
    """Takes the bodies of requests, within limits, and ends requests whose clients are gone.

    413 beyond `most_bytes`, declared, arrived or decoded · 415 for an encoding other than gzip · 400 for
    broken gzip · 408 after `idle_seconds` without a byte · 503 `busy` while the bodies and long answers of all
    requests hold `buffer_bytes`. While the application runs, a client that leaves cancels it; nothing is sent
    then, and `scope["state"]["left"]` says so. Requests without a body pass untouched.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        most_bytes: int,
        buffer_bytes: int,
        idle_seconds: float = 30.0,
    ) -> None:
        self.app = app
        self.most_bytes, self.buffer_bytes, self.idle_seconds = most_bytes, buffer_bytes, idle_seconds
        self.held = 0
        metrics.buffer_bytes.set_function(lambda: self.held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length")
        if (declared is None or declared == b"0") and b"transfer-encoding" not in headers:
            return await self.app(scope, receive, send)
        try:
            decoder = self._admit(declared, headers.get(b"content-encoding"))
            with _Exchange(self, receive, send) as exchange:
                await exchange.read(decoder)
                await self.app(scope, exchange.receive, exchange.send)
        except Refused as refused:
            await refused.answer(scope, receive, send)
        except ClientLeft:
            scope.setdefault("state", {})["left"] = True

    def _admit(self, declared: bytes | None, encoding: bytes | None) -> _Gunzip | None:
        if declared is not None:
            if not declared.isdigit():
                raise Refused(error_answer(400, "Content-Length is not a number", "invalid_request"))
            if len(declared) > 15 or int(declared) > self.most_bytes:
                raise self.too_large()
        encoding = encoding.strip().lower() if encoding else b""
        if encoding in (b"", b"identity"):
            return None
        if encoding not in (b"gzip", b"x-gzip"):
            text = "Content-Encoding: only gzip is decoded here; send the body as it is, or as gzip"
            headers = {"Accept-Encoding": "gzip"}
            raise Refused(error_answer(415, text, "unsupported_content_encoding", headers=headers))
        return _Gunzip(self.most_bytes)

    def too_large(self) -> Refused:
        text = f"a body may have {self.most_bytes:,} bytes, decoded; send the captions in more requests"
        return Refused(error_answer(413, text, "body_too_large"))

    def too_slow(self) -> Refused:
        text = f"no byte of the body arrived for {self.idle_seconds:g} s"
        return Refused(error_answer(408, text, "body_too_slow", headers={"Connection": "close"}))

    def busy(self) -> Refused:
        text = "the bodies of other requests fill the server's buffers; try again later"
        return Refused(error_answer(503, text, "busy", None, 1))


class _Exchange:
    """One request with a body, and who may end it: as with `asyncio.timeout`, by cancelling its own task.

    A single timer costs a microsecond. When it fires, a body that still arrives gets its deadline, and an
    application that still runs gets a task that listens for the client's leaving.
    """

    __slots__ = (
        "_answered",
        "_body",
        "_cancelled",
        "_ended",
        "_held",
        "_late",
        "_listener",
        "_loop",
        "_moved",
        "_receive",
        "_running",
        "_send",
        "_task",
        "_timer",
        "_whole",
    )

    def __init__(self, body: Body, receive: Receive, send: Send) -> None:
        self._body, self._receive, self._send = body, receive, send
        self._whole: bytes | None = None
        self._held = 0
        self._running = self._late = self._answered = self._cancelled = False
        self._ended: Exception | None = None
        self._listener: asyncio.Task[None] | None = None

    def __enter__(self) -> _Exchange:
        self._loop = loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._moved = loop.time()
        self._timer: asyncio.TimerHandle | None = loop.call_later(LOOK_SECONDS, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_watching()
        self._body.held -= self._held
        asked_by_others = self._task.uncancel() if self._cancelled else self._task.cancelling()
        if self._ended is not None and not asked_by_others and kind in (None, asyncio.CancelledError):
            raise self._ended from None

    async def read(self, decoder: _Gunzip | None) -> None:
        """Take the whole body. Raises Refused, ClientLeft."""
        body, most = self._body, self._body.most_bytes
        whole: bytes | bytearray = b""
        arrived, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk, more = message.get("body", b""), message.get("more_body", False)
            if chunk:
                arrived += len(chunk)
                self._moved = self._loop.time()
            if arrived > most:
                raise body.too_large()
            if decoder is None:
                self._hold(len(chunk))
                whole = _joined(whole, chunk)
                continue
            for piece in decoder(chunk):
                if decoder.made > most:
                    raise body.too_large()
                self._hold(len(piece))
                whole = _joined(whole, piece)
                if len(piece) == DECODED_PIECE_BYTES:
                    await asyncio.sleep(0)
        if decoder is not None:
            decoder.finish()
        self._whole = bytes(whole)
        self._running = True
        if self._late:
            self._look()

    async def receive(self) -> Message:
        """What the application receives: the body at once, then what the server has to say."""
        whole, self._whole = self._whole, None
        if whole is not None:
            return {"type": "http.request", "body": whole, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._answered:
            self._ended = ClientLeft()  # a stream listens for itself, and may stop before it is cancelled
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            more = message.get("more_body", False)
            body = message.get("body", b"")
            if len(body) > PIECE_BYTES:
                await self._send_in_pieces(body)
                message = {"type": "http.response.body", "body": b"", "more_body": more}
            if not more:
                self._answered = True
                self._stop_watching()  # from here on servers say that the client left, whoever ended it
        await self._send(message)

    async def _send_in_pieces(self, body: bytes) -> None:
        """Hand a long answer over as the client takes it. Raises ClientLeft when it takes nothing."""
        self._hold(len(body), refuse=False)
        # Servers wait for room before they write, not after: the empty piece waits for the last full one.
        for start in range(0, len(body) + PIECE_BYTES, PIECE_BYTES):
            piece = bytes(body[start : start + PIECE_BYTES])
            try:
                async with asyncio.timeout(self._body.idle_seconds):
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError:
                raise ClientLeft from None
        self._hold(-len(body))

    def _hold(self, size: int, *, refuse: bool = True) -> None:
        if refuse and size > 0 and self._body.held + size > self._body.buffer_bytes:
            raise self._body.busy()
        self._held += size
        self._body.held += size

    def _look(self) -> None:
        if self._running:
            self._stop_watching()
            self._listener = self._loop.create_task(self._listen())
            return
        self._late = True
        deadline = self._moved + self._body.idle_seconds
        if self._loop.time() >= deadline:
            self._end(self._body.too_slow())
        else:
            self._timer = self._loop.call_at(deadline, self._look)

    async def _listen(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except Exception:
            log.exception("listening to a client failed; its request goes on without")
        else:
            self._end(ClientLeft())

    def _end(self, reason: Exception) -> None:
        self._ended, self._cancelled = reason, True
        self._task.cancel()

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None


def _joined(whole: bytes | bytearray, chunk: bytes) -> bytes | bytearray:
    """Bodies of one chunk stay as they are; many small chunks become one buffer, not many objects."""
    if not whole:
        return chunk
    if isinstance(whole, bytes):
        whole = bytearray(whole)
    whole += chunk
    return whole


class _Gunzip:
    """Bytes of one gzip body, of any number of members, decoded in bounded pieces.

    Attributes:
        made: bytes decoded so far; at most one more than `most` when it stops early.
    """

    def __init__(self, most: int) -> None:
        self.made = 0
        self._most = most
        self._members = 0
        self._member: Any = None

    def __call__(self, chunk: bytes) -> Iterator[bytes]:
        """Raises Refused."""
        for start in range(0, len(chunk), 16384):  # what a member leaves over is copied
            yield from self._decode(chunk[start : start + 16384])

    def _decode(self, rest: bytes) -> Iterator[bytes]:
        while rest:
            if self._member is None:
                self._members += 1
                if self._members > MOST_MEMBERS:
                    raise _broken_gzip(f"it has more than {MOST_MEMBERS:,} members")
                self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
            try:
                piece = self._member.decompress(rest, min(DECODED_PIECE_BYTES, self._most + 1 - self.made))
            except zlib.error:
                raise _broken_gzip("its bytes are damaged, or not gzip") from None
            self.made += len(piece)
            if piece:
                yield piece
            if self._member.eof:
                rest, self._member = self._member.unused_data, None
            else:
                rest = self._member.unconsumed_tail

    def finish(self) -> None:
        """Raises Refused when the end is missing."""
        if self._member is not None or not self._members:
            raise _broken_gzip("its end is missing")


def _broken_gzip(why: str) -> Refused:
    return Refused(error_answer(400, f"body: this cannot be decoded as gzip: {why}", "invalid_request"))
