"""Embedding servers that somebody else runs, each behind a URL: asking one, and leaving one alone that fails.

OpenAI's `/v1/embeddings` as vLLM's own server, text-embeddings-inference and others speak it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache.client import LOOPBACK
from lift_cache.errors import BadConfig, EngineUnavailable, LiftError

log = logging.getLogger(__name__)

AT_A_TIME = 16
"""Requests under way at one server; what waits beyond them goes to whichever server is free first."""

CONNECT_SECONDS = 5.0

FIRST_REST, LONGEST_REST = 0.5, 30.0
"""Seconds for which a server that failed is left alone; they double with every failure in a row."""

FAILURES = 3
"""Failures in a row after which a server counts as down."""

HINTS = {
    401: "; check --upstream-key-file",
    403: "; check --upstream-key-file",
    404: "; check --upstream-model",
}


class Failing(EngineUnavailable):
    """A server that does not answer, or whose answer cannot be used. Another one may do better."""

    def __init__(self, message: str, *, for_long: bool = False) -> None:
        """`for_long`: a moment's rest will not mend it."""
        super().__init__(message)
        self.for_long = for_long


class Busy(LiftError):
    """A server that has too much to do; `seconds` is when to come back."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Refused(LiftError):
    """A server does not embed this input as it is. Another one of the same fleet would not either."""


@dataclass(frozen=True, slots=True)
class Input:
    """One text: what is sent (token ids, or text that a server's tokenizer turns into them), and its length."""

    sent: list[int] | str
    tokens: int


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")

    index: int
    embedding: str | list[float | None]


class _Usage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    prompt_tokens: int = 0


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: list[_Row]
    usage: _Usage | None = None


class ModelCard(BaseModel):
    """An entry of `/v1/models`; vLLM also says who serves it and the longest input."""

    model_config = ConfigDict(extra="ignore")

    id: str
    owned_by: str = ""
    max_model_len: int | None = None


class _Models(BaseModel):
    model_config = ConfigDict(extra="ignore")

    data: list[ModelCard]


class Server:
    """One URL of the fleet, and what is known of it: which model to ask for, how busy it is, when to leave it alone."""

    def __init__(self, url: str, *, key: str | None, seconds: float) -> None:
        """
        Args:
            url: as `address` takes it.
            seconds: that an answer may take.
        """
        parsed = address(url)
        self.name = parsed.netloc.decode()  # without user and password
        self._key, self._seconds = key, seconds
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        path = parsed.path.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            # Without user and password, which every log line and error of the library would show.
            base_url=parsed.copy_with(username=None, password=None, path=path, query=None, fragment=None),
            auth=(parsed.username, parsed.password) if parsed.userinfo else None,
            headers=headers,
            timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(
                max_connections=AT_A_TIME + 1,
                max_keepalive_connections=AT_A_TIME + 1,
                keepalive_expiry=2.0,  # below uvicorn's 5 s, or a request meets a connection that just closed
            ),
            trust_env=parsed.host not in LOOPBACK,  # a proxy would look for the server on itself
        )
        self.meeting = asyncio.Lock()
        self.model: str | None = None
        self.known = False
        "Whether its model and its vectors were checked since it last failed."
        self.under_way = 0
        self.failures = 0
        self.trouble = ""
        self.rests_until = 0.0
        self.answered_at = 0.0

    @property
    def down(self) -> bool:
        return self.failures >= FAILURES

    def answered(self) -> None:
        """Note a good answer."""
        if self.failures:
            log.info("an upstream server is back", extra={"upstream": self.name})
        self.failures, self.trouble, self.answered_at = 0, "", time.monotonic()

    def failed(self, error: Failing) -> None:
        """Note a failure; those of requests that were under way beside the first one count as one."""
        now = time.monotonic()
        self.known, self.trouble = False, str(error)
        if now < self.rests_until and not error.for_long:
            return
        if not self.failures:
            log.warning("an upstream server is left alone: %s", error, extra={"upstream": self.name})
        self.failures = FAILURES if error.for_long else self.failures + 1
        rest = LONGEST_REST if error.for_long else FIRST_REST * 2 ** min(self.failures - 1, 10)
        self.rests_until = now + min(rest, LONGEST_REST)

    def busy(self, error: Busy) -> None:
        """Note when it wants to be asked again."""
        self.trouble = str(error)
        self.rests_until = max(self.rests_until, time.monotonic() + min(error.seconds, LONGEST_REST))

    async def models(self) -> list[ModelCard]:
        """What it says it serves; empty where it does not say. Raises Failing, Busy."""
        answer = await self._request("GET", "/v1/models")
        if answer.status_code in (401, 403):
            raise self._trouble(answer)
        try:
            return _Models.model_validate_json(answer.content).data if answer.status_code == 200 else []
        except ValidationError:
            return []

    async def embed(self, inputs: Sequence[Input], dimensions: int) -> np.ndarray:
        """Vectors as the server gives them: float32 [n, dimensions], in the order of the inputs.

        Raises:
            Failing, Busy, Refused.
        """
        body: dict[str, Any] = {"input": [one.sent for one in inputs], "encoding_format": "base64"}
        if self.model is not None:
            body["model"] = self.model
        answer = await self._request("POST", "/v1/embeddings", body)
        if answer.status_code in (400, 413, 422):
            raise Refused(f"{self.name} answered {answer.status_code}: {self._said(answer)}")
        if answer.status_code != 200:
            raise self._trouble(answer)
        try:
            parsed = _Answer.model_validate_json(answer.content)
        except ValidationError:
            raise Failing(f"{self.name} does not answer like /v1/embeddings") from None
        counted, sent = parsed.usage.prompt_tokens if parsed.usage else 0, sum(one.tokens for one in inputs)
        if counted not in (0, sent):
            raise Refused(
                f"{self.name} counts {counted} tokens where {sent} were sent: it cuts inputs, adds tokens, or has "
                "another tokenizer"
            )
        if sorted(row.index for row in parsed.data) != list(range(len(inputs))):
            raise Failing(
                f"{self.name} gave {len(parsed.data)} vectors for {len(inputs)} inputs, or numbered wrongly"
            )
        vectors = np.empty((len(inputs), dimensions), np.float32)
        for row in parsed.data:
            vector = _vector(row.embedding)
            if vector.shape != (dimensions,):
                raise Failing(
                    f"{self.name} gives vectors of {vector.size} values; the recipe says {dimensions}: it serves "
                    "another model",
                    for_long=True,
                )
            vectors[row.index] = vector
        return vectors

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _request(self, method: str, path: str, body: object = None) -> httpx.Response:
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._http.request(method, path, content=content, headers=headers)
        except TimeoutError:
            raise Failing(f"{self.name} did not answer within {self._seconds:.3g} s") from None
        except httpx.HTTPError as error:
            said = " ".join(str(error).split())
            raise Failing(f"{self.name}: {type(error).__name__}{': ' if said else ''}{said}") from None
        wait = _seconds_of(answer.headers.get("Retry-After"))
        if answer.status_code == 429 or (answer.status_code == 503 and wait is not None):
            raise Busy(f"{self.name} answered {answer.status_code}", 1.0 if wait is None else wait)
        return answer

    def _trouble(self, answer: httpx.Response) -> Failing:
        status = answer.status_code
        # A message about a key or a model is worth reading; one about a failure might quote the input.
        said = f": {self._said(answer)}" if status in HINTS else ""
        return Failing(f"{self.name} answered {status}{said}{HINTS.get(status, '')}")

    def _said(self, answer: httpx.Response) -> str:
        """The server's own words: one short line, without the key."""
        said: Any = answer.text
        try:
            said = answer.json()
            said = said["error"]["message"] if isinstance(said["error"], dict) else said["error"]
        except (ValueError, KeyError, TypeError):
            pass
        line = " ".join(str(said).split())[:200] or "no message"
        return line.replace(self._key, "…") if self._key else line


def address(url: str) -> httpx.URL:
    """`http://host:port`, with or without a path that ends in /v1. Raises BadConfig."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        # Without the URL itself: it may hold a password.
        raise BadConfig("--upstream: not a URL; write it as http://host:port")
    return parsed


def _vector(embedding: str | list[float | None]) -> np.ndarray:
    """Values of a vector in either of OpenAI's two forms: float32 [d]; what cannot be read has none."""
    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4")
        except (binascii.Error, ValueError):
            return np.empty(0, np.float32)
    return np.array(embedding, np.float32)  # null, which stands for NaN in JSON, becomes NaN


def _seconds_of(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header; one that holds a date is as good as none."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return max(seconds, 0.1) if np.isfinite(seconds) else None
