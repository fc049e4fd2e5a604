"""Talking to an embedding server: captions in, vectors out, patient with a server that is busy or restarting."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache.encoding import Encoding
from lift_cache.errors import BadCaption, BadConfig, ServerUnavailable
from lift_cache.recipe import Recipe

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
RETRY_STATUS = frozenset({429, 502, 503, 504})


@dataclass(frozen=True)
class Embedded:
    """vectors float32 [n, d] · cached bool [n] · tokens int32 [n] · truncated bool [n]."""

    vectors: np.ndarray
    cached: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


class ServerInfo(BaseModel):
    """What a server says of its cache (`GET /v1/cache`)."""

    model_config = ConfigDict(extra="ignore")

    recipe: Recipe
    fingerprint: str
    encoding: Encoding
    rows: int
    snapshot: str | None = None
    read_only: str | None = None


class EmbeddingClient:
    """A synchronous client; safe to use from several threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 300.0,
        patience: float = 120.0,
        api_key: str | None = None,
        on_wait: Callable[[str, float], None] | None = None,
    ) -> None:
        """
        Args:
            url: `http://host:port` of the server.
            timeout: seconds one answer may take.
            patience: seconds to go on trying while the server is away or busy.
            api_key: sent as a bearer token.
            on_wait: told why, and for how many seconds, whenever the client waits.
        """
        if not url.startswith(("http://", "https://")):
            raise BadConfig(f"--server: {url!r} is not a URL; write it as http://host:port")
        self.url = url.rstrip("/")
        self._patience = patience
        self._on_wait = on_wait
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._fingerprint: str | None = None
        try:
            host = httpx.URL(self.url).host
            self._http = httpx.Client(
                base_url=self.url,
                timeout=httpx.Timeout(timeout, connect=10),
                headers=headers,
                trust_env=host not in LOOPBACK,  # a proxy would look for the server on itself
            )
        except httpx.InvalidURL as error:
            raise BadConfig(
                f"--server: {url!r} is not a URL ({error}); write it as http://host:port"
            ) from None

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def info(self) -> ServerInfo:
        """The server's recipe, encoding and counts; later answers must be of this recipe.

        Raises:
            ServerUnavailable
        """
        body = self._request("GET", "/v1/cache")
        try:
            info = ServerInfo.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            raise ServerUnavailable(
                f"{self.url} does not answer like a LIFT embedding server ({first['loc'][0]}: {first['msg']})"
            ) from None
        self._fingerprint = info.fingerprint
        return info

    def embed(self, captions: Sequence[str]) -> Embedded:
        """Embed captions through the server's cache; every answered vector is durable there.

        Raises:
            BadCaption: the server refused a caption; names its position.
            ServerUnavailable: away, or refusing, for longer than the client's patience; or no longer of the
                recipe that `info` gave.
        """
        body = self._request("POST", "/v1/embeddings", {"input": list(captions), "encoding_format": "base64"})
        if self._fingerprint is not None and body.get("recipe") != self._fingerprint:
            raise ServerUnavailable(f"{self.url} answers with another recipe than it did before; run again")
        try:
            rows = sorted(body["data"], key=lambda row: row["index"])
            vectors = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]
            if len(rows) != len(captions):
                raise ValueError(f"{len(rows)} rows for {len(captions)} captions")
            return Embedded(
                np.stack(vectors).astype(np.float32),
                np.array([row["cached"] for row in rows], bool),
                np.array([row["tokens"] for row in rows], np.int32),
                np.array([row["truncated"] for row in rows], bool),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServerUnavailable(f"{self.url} gave an answer that cannot be used ({error})") from None

    def snapshot(self) -> dict[str, Any]:
        """Ask the server for a snapshot: {"id", "path", "rows"}. Raises ServerUnavailable."""
        return self._request("POST", "/v1/snapshots")

    def _request(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        give_up = time.monotonic() + self._patience
        pause = 0.5
        while True:
            try:
                answer = self._http.request(method, path, json=body)
            except httpx.RequestError as error:
                trouble = f"{self.url} does not answer ({type(error).__name__})"
                wait = pause
            else:
                if answer.status_code not in RETRY_STATUS:
                    return self._checked(answer)
                trouble = f"{self.url} answered {answer.status_code}: {_message(answer)}"
                wait = _retry_after(answer, pause)
            if time.monotonic() + wait > give_up:
                raise ServerUnavailable(
                    f"{trouble}; gave up after {self._patience:.0f} s: check the server, then run again"
                )
            if self._on_wait is not None:
                self._on_wait(trouble, wait)
            time.sleep(wait)
            pause = min(pause * 2, 10.0)

    def _checked(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code in {400, 413, 422}:
            raise BadCaption(_message(answer))
        if answer.status_code != httpx.codes.OK:
            raise ServerUnavailable(f"{self.url} answered {answer.status_code}: {_message(answer)}")
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ServerUnavailable(
                f"{self.url} does not answer like a LIFT embedding server (no JSON object)"
            )
        return body


def _message(answer: httpx.Response) -> str:
    """The server's own words, one line."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = answer.text[:200]
    return " ".join(str(said).split())


def _retry_after(answer: httpx.Response, otherwise: float) -> float:
    try:
        return max(0.1, float(answer.headers["Retry-After"]))
    except (KeyError, ValueError):
        return otherwise
