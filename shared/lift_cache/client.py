"""Talking to an embedding server: captions in, vectors out, patient with a server that is busy or restarting.

Two clients, for threads and for asyncio, that only send and wait; `exchange` has what is said and what it means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx

from lift_cache.exchange import (
    EMBED,
    INFO,
    LOOKUP,
    LOOKUP_ONLY_FOUND,
    LOOPBACK,
    RETRY_STATUS,
    SNAPSHOT,
    Call,
    Captions,
    Embedded,
    OnError,
    OnWait,
    Priority,
    Server,
    ServerInfo,
    TooLarge,
)
from lift_cache.wire import Found, RowError

__all__ = [
    "LOOPBACK",
    "RETRY_STATUS",
    "AsyncEmbeddingClient",
    "Embedded",
    "EmbeddingClient",
    "Found",
    "RowError",
    "ServerInfo",
]

BATCH = 256
"""Captions per request, unless said."""

CONCURRENCY = 4
"""Requests of an asynchronous client that are under way at a time, unless said."""


class EmbeddingClient:
    """A synchronous client, one request at a time per thread; safe to use from several threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 300.0,
        patience: float = 120.0,
        api_key: str | None = None,
        batch: int = BATCH,
        priority: Priority = "interactive",
        on_wait: OnWait | None = None,
    ) -> None:
        """
        Args:
            url: `http://host:port` of the server.
            timeout: seconds one answer may take.
            patience: seconds to go on trying while the server is away or busy, from when it first was.
            api_key: the server's key; when not given, that of the environment variable LIFT_API_KEY, or in the file
                that LIFT_API_KEY_FILE names.
            batch: captions per request; what the server finds too large is halved.
            priority: "bulk" lets the requests of others go first.
            on_wait: told why, and for how many seconds, whenever the client waits; what it raises ends the call.

        Raises:
            BadConfig: the address or the key cannot be used.
        """
        self._server = Server(
            url, api_key=api_key, batch=batch, patience=patience, priority=priority, on_wait=on_wait
        )
        self.url = self._server.url
        self._http = httpx.Client(**self._server.http_settings(timeout))

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def info(self) -> ServerInfo:
        """The server's recipe, encoding and counts; later answers must be of this recipe.

        Raises:
            ServerUnavailable: away, or refusing, for longer than `patience`; or no embedding server.
            BadConfig: the server wants another key.
        """
        return self._server.info(self._ask(INFO))

    def embed(self, captions: Sequence[str], *, on_error: OnError = "raise") -> Embedded:
        """Embed any number of captions through the server's cache; every answered vector is durable there.

        Args:
            on_error: what a caption without a vector does: "raise" ends the call (what was answered before
                stays in the server's cache), "return" puts it into `Embedded.errors`.

        Raises:
            BadCaption: a caption that has no vector, by its position; never with "return".
            ServerUnavailable: as `info`; or no longer of the recipe that `info`, or the first answer, had.
            BadConfig: as `info`.
        """
        work = Captions(self._server, captions, EMBED, on_error)
        self._work(work)
        return work.embedded()

    def lookup(self, captions: Sequence[str], *, vectors: bool = True, on_error: OnError = "raise") -> Found:
        """What the server's cache holds of some captions; nothing is computed. Vectors are float32.

        Args:
            vectors: False leaves them out (`Found.vectors` is None).
            on_error: as `embed`, for captions that cannot be in a cache.

        Raises:
            As `embed`.
        """
        work = Captions(self._server, captions, LOOKUP if vectors else LOOKUP_ONLY_FOUND, on_error)
        self._work(work)
        return work.found()

    def snapshot(self) -> dict[str, Any]:
        """Ask the server for a snapshot: {"id", "path", "rows"}. Raises as `info`."""
        return self._server.json(self._ask(SNAPSHOT))

    def _work(self, work: Captions) -> None:
        while (part := work.next()) is not None:
            try:
                answer = self._ask(part.call)
            except TooLarge as refusal:
                work.too_large(part, refusal)
            else:
                work.put(part, answer)
        if work.lack_dimensions():
            self.info()

    def _ask(self, call: Call) -> httpx.Response:
        tries = self._server.tries()
        while True:
            wait: float | None
            try:
                answer = self._http.request(call.method, call.path, content=call.body, headers=call.headers)
            except httpx.HTTPError as error:
                wait = tries.no_answer(error)
            else:
                wait = tries.answer(answer)
                if wait is None:
                    return answer
            time.sleep(wait)


class AsyncEmbeddingClient:
    """An asynchronous client; `concurrency` of its requests are under way at a time, whoever made them."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 300.0,
        patience: float = 120.0,
        api_key: str | None = None,
        batch: int = BATCH,
        concurrency: int = CONCURRENCY,
        priority: Priority = "interactive",
        on_wait: OnWait | None = None,
    ) -> None:
        """As `EmbeddingClient`; a request that waits for the server keeps its place among the `concurrency`."""
        self._server = Server(
            url, api_key=api_key, batch=batch, patience=patience, priority=priority, on_wait=on_wait
        )
        self.url = self._server.url
        self._http = httpx.AsyncClient(**self._server.http_settings(timeout))
        self._concurrency = concurrency
        self._places = asyncio.Semaphore(concurrency)

    async def __aenter__(self) -> AsyncEmbeddingClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def info(self) -> ServerInfo:
        """As `EmbeddingClient.info`."""
        return self._server.info(await self._ask(INFO))

    async def embed(self, captions: Sequence[str], *, on_error: OnError = "raise") -> Embedded:
        """As `EmbeddingClient.embed`, with several requests under way."""
        work = Captions(self._server, captions, EMBED, on_error)
        await self._work(work)
        return work.embedded()

    async def lookup(
        self, captions: Sequence[str], *, vectors: bool = True, on_error: OnError = "raise"
    ) -> Found:
        """As `EmbeddingClient.lookup`, with several requests under way."""
        work = Captions(self._server, captions, LOOKUP if vectors else LOOKUP_ONLY_FOUND, on_error)
        await self._work(work)
        return work.found()

    async def snapshot(self) -> dict[str, Any]:
        """As `EmbeddingClient.snapshot`."""
        return self._server.json(await self._ask(SNAPSHOT))

    async def _work(self, work: Captions) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, work.requests)):
                    group.create_task(self._take_parts(work))
        except BaseExceptionGroup as failed:  # the others were cancelled; the first says why
            raise failed.exceptions[0] from None
        if work.lack_dimensions():
            await self.info()

    async def _take_parts(self, work: Captions) -> None:
        while (part := work.next()) is not None:
            try:
                answer = await self._ask(part.call)
            except TooLarge as refusal:
                work.too_large(part, refusal)
            else:
                work.put(part, answer)

    async def _ask(self, call: Call) -> httpx.Response:
        tries = self._server.tries()
        async with self._places:
            while True:
                wait: float | None
                try:
                    answer = await self._http.request(
                        call.method, call.path, content=call.body, headers=call.headers
                    )
                except httpx.HTTPError as error:
                    wait = tries.no_answer(error)
                else:
                    wait = tries.answer(answer)
                    if wait is None:
                        return answer
                await asyncio.sleep(wait)
