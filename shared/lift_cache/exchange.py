"""What is said to an embedding server, what its answers mean, and how long to wait: all of a client but the I/O.

Server     one server: its address, the key, the recipe that its answers must keep
Captions   captions of one call, cut into requests, and their answers put together again
Tries      one request, until it is answered or patience ends
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache import wire
from lift_cache.encoding import Encoding
from lift_cache.errors import BadCaption, BadConfig, ServerUnavailable
from lift_cache.keys import keyed
from lift_cache.recipe import Recipe

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
RETRY_STATUS = frozenset({429, 502, 503, 504})
KEY_VARIABLE = "LIFT_API_KEY"
KEY_FILE_VARIABLE = "LIFT_API_KEY_FILE"

CONNECT_SECONDS = 10.0
KEEP_SECONDS = 3.0
"""How long an idle connection is kept: less than the 5 s after which uvicorn closes it, perhaps under a request."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
"""Seconds; a pause is drawn from nought to a bound that doubles from one to the other (full jitter, Brooker 2015)."""

LEAST_WAIT = 0.1

MOST_WORDS = 500
"""Characters of a server's message that are repeated."""

REFUSED_CAPTION = frozenset({"invalid_caption", "vector_rejected"})
"""Codes of the server's error table that concern a caption."""

Priority = Literal["interactive", "bulk"]
OnError = Literal["raise", "return"]
OnWait = Callable[[str, float], None]


class ServerInfo(BaseModel):
    """What a server says of its cache (`GET /v1/cache`)."""

    model_config = ConfigDict(extra="ignore")

    recipe: Recipe
    fingerprint: str
    encoding: Encoding
    rows: int
    snapshot: str | None = None
    read_only: str | None = None


@dataclass(frozen=True)
class Embedded:
    """vectors float32 [n, d], zeros where there is an error · cached bool [n] · tokens int32 [n] ·
    truncated bool [n] · position → error."""

    vectors: np.ndarray
    cached: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    errors: dict[int, wire.RowError] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One HTTP request, which may be made again: whatever is asked here, asking twice changes nothing more."""

    method: Literal["GET", "POST"]
    path: str
    body: bytes | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Accept": wire.MIME, "Content-Type": wire.MIME} if self.body is not None else {}


@dataclass(frozen=True)
class Question:
    """What is asked about captions: where, how the answer is read, and whether it should have vectors."""

    path: str
    decode: Callable[[bytes], tuple[wire.Answered | wire.Found, str]]
    vectors: bool = True


EMBED = Question("/v1/embeddings", wire.decode_answer)
LOOKUP = Question("/v1/lookup", wire.decode_found)
LOOKUP_ONLY_FOUND = Question("/v1/lookup?vectors=false", wire.decode_found, vectors=False)
INFO = Call("GET", "/v1/cache")
SNAPSHOT = Call("POST", "/v1/snapshots")


@dataclass(frozen=True)
class Part:
    """Captions `start` to `stop` of a call as one request; those that cannot be sent, with the reason."""

    start: int
    stop: int
    call: Call
    unsendable: dict[int, str]


class TooLarge(ServerUnavailable):
    """413: the server takes smaller requests."""


class Server:
    """One server, as far as a client knows it. Safe to use from several threads."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        batch: int,
        patience: float,
        priority: Priority,
        on_wait: OnWait | None,
    ) -> None:
        """Raises BadConfig."""
        shown = url.rpartition("@")[2]  # a password in the address is nobody else's business
        try:
            address = httpx.URL(url if url.startswith(("http://", "https://")) else "")
        except httpx.InvalidURL as error:
            raise BadConfig(
                f"--server: {shown!r} is not a URL ({error}); write it as http://host:port"
            ) from None
        if not address.host:
            raise BadConfig(f"--server: {shown!r} is not a URL; write it as http://host:port")
        if batch < 1:
            raise BadConfig(f"batch: {batch} captions per request; at least 1")
        self.address = address.copy_with(userinfo=None)
        self.url = str(self.address).rstrip("/")
        self.auth = (address.username, address.password) if address.userinfo else None
        self._key = _checked_key(api_key) if self.auth is None or api_key else None
        self._secrets = [secret for secret in (self._key, address.password) if secret]
        self._priority = priority
        self.batch, self.patience, self.on_wait = batch, patience, on_wait
        self.refused_bytes: int | None = None
        self.dimensions: int | None = None
        self._fingerprint: str | None = None
        self._first = threading.Lock()

    def http_settings(self, timeout: float) -> dict[str, Any]:
        """Arguments of `httpx.Client` and `httpx.AsyncClient`."""
        headers = {"Accept-Encoding": "identity", "X-Lift-Priority": self._priority}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return {
            "base_url": self.url,
            "auth": None if self._key else self.auth,
            "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None),
            "limits": httpx.Limits(keepalive_expiry=KEEP_SECONDS),
            "headers": headers,
            "trust_env": self.address.host not in LOOPBACK,  # a proxy would look for the server on itself
        }

    def tries(self) -> Tries:
        return Tries(self)

    def info(self, answer: httpx.Response) -> ServerInfo:
        """What `GET /v1/cache` answered; later answers must be of this recipe. Raises ServerUnavailable."""
        try:
            info = ServerInfo.model_validate(self.json(answer))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise ServerUnavailable(
                f"{self.url} does not answer like a LIFT embedding server ({where}: {first['msg']})"
            ) from None
        self._fingerprint, self.dimensions = info.fingerprint, info.encoding.dimensions
        return info

    def json(self, answer: httpx.Response) -> dict[str, Any]:
        """The object that was answered. Raises ServerUnavailable."""
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ServerUnavailable(
                f"{self.url} does not answer like a LIFT embedding server (no JSON object)"
            )
        return body

    def rows(self, answer: httpx.Response, question: Question, count: int) -> wire.Answered | wire.Found:
        """The rows of an answer in Arrow, of the recipe and the dimensions that those before had.

        Raises:
            ServerUnavailable
        """
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != wire.MIME:
            raise ServerUnavailable(
                f"{self.url} answered {kind[:60] or 'something'!r} where Arrow was asked for; is it a LIFT embedding "
                "server as new as this client, and no proxy in its place?"
            )
        try:
            rows, fingerprint = question.decode(answer.content)
        except BadConfig as error:
            raise ServerUnavailable(f"{self.url} gave an answer that cannot be used ({error})") from None
        with self._first:
            self._fingerprint = self._fingerprint or fingerprint
        if fingerprint != self._fingerprint:
            raise ServerUnavailable(f"{self.url} answers with another recipe than it did before; run again")
        if len(rows.tokens) != count:
            raise ServerUnavailable(
                f"{self.url} gave an answer that cannot be used ({len(rows.tokens)} rows for {count} captions)"
            )
        if question.vectors:
            if rows.vectors is None:
                raise ServerUnavailable(f"{self.url} gave an answer that cannot be used (no vectors)")
            d = rows.vectors.shape[1]
            if self.dimensions is None:
                self.dimensions = d
            if d != self.dimensions:
                raise ServerUnavailable(
                    f"{self.url} gave an answer that cannot be used ({d} dimensions, and {self.dimensions} before)"
                )
        return rows

    def said(self, answer: httpx.Response) -> str:
        """The server's own words, one line, and never the key."""
        try:
            words = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            words = answer.text
        line = wire.one_line(str(words), MOST_WORDS)
        for secret in self._secrets:
            line = line.replace(secret, "…")
        return line


class Captions:
    """The captions of one call on their way. Vectors come together as float32, at their places."""

    def __init__(
        self, server: Server, captions: Sequence[str], question: Question, on_error: OnError
    ) -> None:
        """Raises BadCaption: one text where a list of them belongs."""
        if isinstance(captions, str):
            raise BadCaption("give a list of captions, not one text")
        n = len(captions)
        self._server, self._captions, self._question = server, captions, question
        self._raising = on_error == "raise"
        self._again: deque[tuple[int, int]] = deque()
        self._begun = 0
        self.vectors: np.ndarray | None = None
        self.known, self.tokens, self.truncated = np.zeros(n, bool), np.zeros(n, np.int32), np.zeros(n, bool)
        self.errors: dict[int, wire.RowError] = {}

    def next(self) -> Part | None:
        """The next request, None when all are made. Raises BadCaption for one that cannot be sent."""
        while True:
            if self._again:
                start, stop = self._again.popleft()
            elif self._begun < len(self._captions):
                start, stop = self._begun, min(self._begun + self._server.batch, len(self._captions))
                self._begun = stop
            else:
                return None
            part = self._part(start, stop)
            too_large = self._server.refused_bytes
            if too_large is None or stop - start == 1 or len(part.call.body or b"") < too_large:
                return part
            self._halve(part)

    def _part(self, start: int, stop: int) -> Part:
        texts: list[str | None] = list(self._captions[start:stop])
        unsendable: dict[int, str] = {}
        try:
            body = wire.encode_request(texts)
        except BadCaption:
            unsendable = {start + i: reason for i, reason in keyed(texts)[2].items()}
            self._raise_first(unsendable)
            for i in unsendable:
                texts[i - start] = None
            body = wire.encode_request(texts)
        return Part(start, stop, Call("POST", self._question.path, body), unsendable)

    def put(self, part: Part, answer: httpx.Response) -> None:
        """Raises BadCaption naming the position, unless errors are returned; ServerUnavailable."""
        rows = self._server.rows(answer, self._question, part.stop - part.start)
        errors = {part.start + i: error for i, error in rows.errors.items()}
        errors |= {i: wire.RowError("invalid_caption", reason) for i, reason in part.unsendable.items()}
        self._raise_first({i: error.message for i, error in errors.items()})
        self.errors |= errors
        here = slice(part.start, part.stop)
        self.known[here] = rows.cached if isinstance(rows, wire.Answered) else rows.found
        self.tokens[here], self.truncated[here] = rows.tokens, rows.truncated
        if self._question.vectors and rows.vectors is not None:
            if self.vectors is None:
                self.vectors = np.zeros((len(self._captions), rows.vectors.shape[1]), np.float32)
            self.vectors[here] = rows.vectors

    def too_large(self, part: Part, refusal: TooLarge) -> None:
        """Ask for the halves instead, and for nothing as large again. Raises BadCaption for a single caption."""
        size = len(part.call.body or b"")
        self._server.refused_bytes = min(size, self._server.refused_bytes or size)
        if part.stop - part.start > 1:
            self._halve(part)
            return
        self._raise_first({part.start: str(refusal)})
        self.errors[part.start] = wire.RowError("body_too_large", str(refusal))

    @property
    def requests(self) -> int:
        return -(-len(self._captions) // self._server.batch)

    def lack_dimensions(self) -> bool:
        """Whether no answer has told how many dimensions the vectors have, as of no captions at all."""
        return self._question.vectors and self.vectors is None and self._server.dimensions is None

    def embedded(self) -> Embedded:
        vectors = self.vectors
        if vectors is None:
            vectors = np.zeros((len(self._captions), self._server.dimensions or 0), np.float32)
        return Embedded(vectors, self.known, self.tokens, self.truncated, dict(sorted(self.errors.items())))

    def found(self) -> wire.Found:
        same = self.embedded()
        vectors = same.vectors if self._question.vectors else None
        return wire.Found(vectors, same.cached, same.tokens, same.truncated, same.errors)

    def _halve(self, part: Part) -> None:
        middle = (part.start + part.stop) // 2
        self._again.extendleft([(middle, part.stop), (part.start, middle)])

    def _raise_first(self, errors: dict[int, str]) -> None:
        if errors and self._raising:
            first = min(errors)
            raise BadCaption(f"input[{first}]: {errors[first]}")


class Tries:
    """One request that is made until it is answered, or until `patience` has passed since it first was not."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._give_up: float | None = None
        self._pause = FIRST_PAUSE

    def no_answer(self, error: httpx.HTTPError) -> float:
        """Seconds to wait before the next try. Raises ServerUnavailable."""
        what = wire.one_line(f"{type(error).__name__}: {error}").rstrip(": ")
        if not isinstance(error, httpx.TransportError):
            raise ServerUnavailable(f"{self._server.url} gave an answer that cannot be used ({what})")
        return self._wait(f"{self._server.url} does not answer ({what})", None)

    def answer(self, answer: httpx.Response) -> float | None:
        """Seconds to wait before the next try, None for an answer that stands.

        Raises:
            BadCaption, BadConfig, ServerUnavailable, TooLarge: an answer that trying again would not change,
                or the end of patience.
        """
        status, server = answer.status_code, self._server
        if status == httpx.codes.OK:
            return None
        said = server.said(answer)
        trouble = f"{server.url} answered {status}: {said}"
        if status in RETRY_STATUS:
            return self._wait(trouble, _retry_after(answer))
        if status in {401, 403}:
            raise BadConfig(f"{trouble}; set {KEY_VARIABLE} to a key of that server with the scope for this")
        if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            raise TooLarge(said or "the request is larger than the server takes")
        if _code(answer) in REFUSED_CAPTION:
            raise BadCaption(said)
        if status in {400, 404, 405, 406, 415, 422}:
            trouble += "; is this a LIFT embedding server as new as this client?"
        raise ServerUnavailable(trouble)

    def _wait(self, trouble: str, asked: float | None) -> float:
        patience, now = self._server.patience, time.monotonic()
        if self._give_up is None:
            self._give_up = now + patience
        left = self._give_up - now
        if asked is not None and asked > patience:
            raise ServerUnavailable(
                f"{trouble}; gave up: it asks for {asked:.0f} s and {patience:.0f} s are allowed"
            )
        if left <= 0 or (asked or 0) > left:
            raise ServerUnavailable(
                f"{trouble}; gave up after {patience:.0f} s: check the server, then run again"
            )
        if asked is None:
            wait = random.uniform(0, self._pause)
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        else:
            # All that were sent away at once need not come back at once.
            wait = asked * random.uniform(1, 1.1)
        wait = min(max(wait, LEAST_WAIT), left)
        if self._server.on_wait is not None:
            self._server.on_wait(trouble, wait)
        return wait


def _checked_key(given: str | None) -> str | None:
    """The key, of the argument or the environment. Raises BadConfig, which does not repeat it."""
    key = (given if given is not None else os.environ.get(KEY_VARIABLE, "")).strip()
    if given is None and not key and (file := os.environ.get(KEY_FILE_VARIABLE)):
        try:
            key = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise BadConfig(f"{KEY_FILE_VARIABLE} {file}: {why}") from None
    if not all("!" <= c <= "~" for c in key):
        where = KEY_VARIABLE if given is None else "api_key"
        raise BadConfig(f"{where}: a key is printable ASCII without spaces; copy it again")
    return key or None


def _code(answer: httpx.Response) -> str | None:
    try:
        code = answer.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the server asks for: a number, or a date by its own clock (RFC 9110, 10.2.3)."""
    asked = answer.headers.get("Retry-After", "").strip()
    try:
        if asked.replace(".", "", 1).isdecimal():
            return float(asked)
        until = _date(asked)
        since = _date(answer.headers["Date"]) if "Date" in answer.headers else datetime.now(UTC)
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, (until - since).total_seconds())


def _date(text: str) -> datetime:
    date = parsedate_to_datetime(text)
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
