"""The HTTP interface, whole: who may come in, which routes there are, what an error looks like.

    request → Observe (id, log, metrics) → Access (host, origin, key) → Body (limits, leaving clients) → route

POST /v1/embeddings   captions → vectors, durable before they are answered        api/embeddings.py
POST /v1/lookup       what is in the cache; GET /v1/cache, /v1/models;             api/cache.py
                      POST /v1/snapshots, /v1/admin/*
GET  /                the page; GET /v1/stats, POST /v1/neighbours                 api/page.py
GET  /livez /readyz /metrics /version                                              here
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lift_cache import errors
from lift_embedder import __version__
from lift_embedder.access import Access, Keys
from lift_embedder.answers import documented, error_answer, status_of
from lift_embedder.api.cache import cache_router
from lift_embedder.api.embeddings import embeddings_router
from lift_embedder.api.page import page_router
from lift_embedder.http import Body, Observe
from lift_embedder.path import BadRow
from lift_embedder.queue import QueueFull
from lift_embedder.service import Service

MOST_BODY_BYTES = 32 << 20
BUFFER_BYTES = 512 << 20


class Status(BaseModel):
    """A word."""

    status: str


class Version(BaseModel):
    """Of this software, and of what computes."""

    lift_embedder: str
    engine: dict[str, str]


class App(FastAPI):
    """FastAPI documents a 422 for whatever it parses; here that is a 400, which every route documents itself."""

    def openapi(self) -> dict[str, Any]:
        fresh = self.openapi_schema is None
        document = super().openapi()
        if fresh:
            for operations in document["paths"].values():
                for operation in operations.values():
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
        return document


def create_app(
    service: Service,
    *,
    keys: Keys | None = None,
    loopback: bool = True,
    allowed_hosts: tuple[str, ...] = (),
    most_body_bytes: int = MOST_BODY_BYTES,
    buffer_bytes: int = BUFFER_BYTES,
) -> FastAPI:
    """The application around a service whose path is not started yet.

    Args:
        keys: who may do what; None lets everybody in.
        loopback: the server listens on this machine only, and checks by which name it is addressed.
        allowed_hosts: further such names.
        most_body_bytes: of one request.
        buffer_bytes: of all requests together.
    """
    engine = service.path.engine

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.path.start()
        history = asyncio.create_task(service.history.run(service), name="history")
        yield
        history.cancel()
        await service.path.aclose()

    app = App(title="LIFT embedder", version=__version__, lifespan=lifespan, redoc_url=None)
    for router in (embeddings_router, cache_router, page_router):
        app.include_router(router(service))
    app.add_middleware(Body, metrics=service.metrics, most_bytes=most_body_bytes, buffer_bytes=buffer_bytes)
    app.add_middleware(Access, keys=keys, loopback=loopback, allowed_hosts=allowed_hosts)
    app.add_middleware(Observe, metrics=service.metrics, on_error=service.history.error)

    @app.get("/livez", tags=["operations"])
    async def livez() -> Status:
        """The process answers. Says nothing of the engine: restarting a server does not mend a model."""
        return Status(status="alive")

    @app.get("/readyz", tags=["operations"], responses=documented())
    async def readyz() -> Status:
        """A caption that is not in the cache can be embedded."""
        engine.require()
        return Status(status="ready")

    @app.get("/metrics", tags=["operations"], response_class=Response, responses=documented())
    async def prometheus() -> Response:
        """For Prometheus."""
        text = await asyncio.to_thread(service.metrics.render)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/version", tags=["operations"])
    async def version() -> Version:
        """Of this software, and of what computes."""
        return Version(lift_embedder=__version__, engine=engine.state)

    @app.exception_handler(errors.LiftError)
    async def expected(request: Request, error: errors.LiftError) -> Response:
        param = f"input[{error.index}]" if isinstance(error, BadRow) else None
        cause = error.cause if isinstance(error, BadRow) else error
        status, code = status_of(cause)
        retry = None
        if isinstance(cause, QueueFull):
            retry = cause.retry_after
        elif status == 503:
            retry = engine.retry_after
        return error_answer(status, str(error), code, param, retry)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # Of the alternatives for `input`, the error that reaches deepest is about what the client sent.
        deepest = max(error.errors(), key=lambda found: len(_path(found["loc"])))
        # Where JSON breaks, the location is a place in the text and no field.
        path = [] if deepest["type"] == "json_invalid" else _path(deepest["loc"])
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        message = str(deepest["msg"]).removeprefix("Value error, ")
        return error_answer(400, f"{param or 'body'}: {message}", "invalid_request", param or None)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return error_answer(error.status_code, str(error.detail), "http_error", headers=error.headers)

    return app


def _path(location: tuple[int | str, ...]) -> list[int | str]:
    """Where in the body, without the names that pydantic gives to alternatives."""
    return [
        part
        for part in location
        if isinstance(part, int)
        or (part.isidentifier() and part not in {"body", "header", "query", "str", "path"})
    ]
