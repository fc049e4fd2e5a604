"""The HTTP interface: OpenAI's embeddings API through the cache, and what operators need.

POST /v1/embeddings   captions → vectors, durable before they are answered
GET  /v1/models       the one model that this server embeds with
GET  /v1/cache        recipe, encoding, counts, engine
POST /v1/snapshots    an immutable view for trainers
GET  /livez /readyz /metrics /version
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException

from lift_cache import errors
from lift_embedder import __version__
from lift_embedder.metrics import Metrics
from lift_embedder.path import Answer, BadRow, EmbeddingPath, QueueFull

log = logging.getLogger(__name__)

MOST_INPUTS = 2048
"""Captions per request; OpenAI's limit."""

MOST_BODY_BYTES = 32 * 2**20

STATUS: dict[type[errors.LiftError], tuple[int, str]] = {
    errors.BadCaption: (400, "invalid_caption"),
    errors.BadConfig: (400, "invalid_request"),
    errors.ModelNotFound: (404, "model_not_found"),
    errors.VectorRejected: (422, "vector_rejected"),
    QueueFull: (503, "queue_full"),
    errors.EngineUnavailable: (503, "engine_unavailable"),
    errors.CacheFull: (507, "cache_full"),
    errors.StorageFailed: (503, "storage_failed"),
    errors.CacheDamaged: (500, "cache_damaged"),
    errors.LiftError: (500, "internal_error"),
}
"""The one table from error to HTTP status and code; the nearest base class counts."""


class EmbeddingRequest(BaseModel):
    """OpenAI's request. Fields that this API does not know are ignored, as clients send more over time."""

    model_config = ConfigDict(extra="ignore")

    input: Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS)] | str
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        if isinstance(value, list) and value and all(isinstance(item, int | list) for item in value):
            raise ValueError(
                "these are token ids; send captions as text "
                "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
            )
        return value


def create_app(path: EmbeddingPath, metrics: Metrics, *, names: frozenset[str]) -> FastAPI:
    """The application around a path that is not started yet.

    Args:
        names: what a request may call the model; a request without a name is taken to mean it.
    """
    cache, recipe, engine = path.cache, path.cache.recipe, path.engine
    fingerprint = recipe.fingerprint

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        path.start()
        yield
        await path.aclose()

    app = FastAPI(title="LIFT embedder", version=__version__, lifespan=lifespan, redoc_url=None)
    app.add_middleware(BodyLimit, most_bytes=MOST_BODY_BYTES)
    app.middleware("http")(_observe(metrics))

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingRequest) -> Response:
        if request.model and request.model not in names:
            raise errors.ModelNotFound(f"this server embeds with {recipe.model!r}, not {request.model!r}")
        kept = cache.encoding.dimensions
        if request.dimensions not in (None, kept):
            raise errors.BadConfig(f"dimensions: this cache keeps {kept}, not {request.dimensions}")
        captions = [request.input] if isinstance(request.input, str) else request.input
        answer = await path.embed(captions)
        vectors = answer.vectors
        if recipe.normalize and kept < recipe.dimensions:  # what is kept of a unit vector is shorter than one
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        body = _embeddings_json(answer, vectors, request.encoding_format, recipe.model, fingerprint)
        return Response(body, 200, None, JSON)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {
            "id": recipe.model,
            "object": "model",
            "created": 0,
            "owned_by": "lift",
            "recipe": fingerprint,
        }
        return {"object": "list", "data": [card]}

    @app.get("/v1/cache")
    async def card() -> dict[str, Any]:
        stats = await asyncio.to_thread(cache.stats)
        return {
            "recipe": recipe.model_dump(mode="json"),
            "fingerprint": fingerprint,
            "encoding": cache.encoding.model_dump(mode="json"),
            "rows": stats.rows,
            "fresh_rows": stats.fresh_rows,
            "segments": stats.segments,
            "tokens": stats.tokens,
            "truncated": stats.truncated,
            "snapshot": await asyncio.to_thread(_newest_snapshot, path),
            "engine": engine.state,
            "read_only": engine.read_only,
        }

    @app.post("/v1/snapshots")
    async def snapshots() -> dict[str, Any]:
        made = await asyncio.to_thread(cache.snapshot)
        return {"id": made.id, "path": str(made.path), "rows": made.rows}

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process answers. Says nothing of the engine: restarting a server does not mend a model."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """A caption that is not in the cache can be embedded."""
        engine.require()
        return {"status": "ready"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"lift_embedder": __version__, "engine": engine.state}

    @app.exception_handler(errors.LiftError)
    async def expected(_: Request, error: errors.LiftError) -> JSONResponse:
        param = f"input[{error.index}]" if isinstance(error, BadRow) else None
        cause = error.cause if isinstance(error, BadRow) else error
        status, code = status_of(cause)
        retry = None
        if isinstance(cause, QueueFull):
            retry = cause.retry_after
        elif isinstance(cause, errors.EngineUnavailable):
            retry = engine.retry_after
        return _error(status, str(error), code, param, retry)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of the alternatives for `input`, the error that reaches deepest is about what the client sent.
        deepest = max(error.errors(), key=lambda found: len(found["loc"]))
        parts = [
            part for part in deepest["loc"] if part != "body" and not str(part).startswith(("list[", "str"))
        ]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        message = deepest["msg"].removeprefix("Value error, ")
        return _error(400, f"{param or 'body'}: {message}", "invalid_request", param or None)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), "http_error", None)

    return app


JSON = "application/json"


def status_of(error: errors.LiftError) -> tuple[int, str]:
    """HTTP status and code of an error, by `STATUS`."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def _error(
    status: int, message: str, code: str, param: str | None, retry_after: float | None = None
) -> JSONResponse:
    """OpenAI's error shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": str(math.ceil(retry_after))} if retry_after is not None else None
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def _embeddings_json(answer: Answer, vectors: np.ndarray, form: str, model: str, fingerprint: str) -> bytes:
    """OpenAI's response, with `cached`, `tokens` and `truncated` per row and the recipe that made it."""
    little_nd = vectors.astype("<f4", copy=False)
    embeddings: list[Any]
    if form == "base64":
        embeddings = [base64.b64encode(row.tobytes()).decode() for row in little_nd]
    else:
        embeddings = little_nd.tolist()
    flags = zip(
        embeddings, answer.cached.tolist(), answer.tokens.tolist(), answer.truncated.tolist(), strict=True
    )
    data = [
        {"object": "embedding", "index": i, "embedding": e, "cached": c, "tokens": n, "truncated": t}
        for i, (e, c, n, t) in enumerate(flags)
    ]
    tokens = int(np.sum(answer.tokens))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps(
        {"object": "list", "data": data, "model": model, "usage": usage, "recipe": fingerprint},
        separators=(",", ":"),
    ).encode()


def _newest_snapshot(path: EmbeddingPath) -> str | None:
    from lift_cache.snapshot import snapshots_of

    return next(reversed(snapshots_of(path.cache.path)), None)


Handler = Callable[[Request], Awaitable[Response]]


def _observe(metrics: Metrics) -> Callable[[Request, Handler], Awaitable[Response]]:
    async def observe(request: Request, handle: Handler) -> Response:
        """Give every request an id, and log and count its end."""
        began = time.perf_counter()
        request_id = request.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex
        try:
            response = await handle(request)
        except Exception:
            log.exception("request failed", extra={"request": request_id, "path": request.url.path})
            response = _error(500, "the server failed; its log says more", "internal_error", None)
        seconds = time.perf_counter() - began
        response.headers["x-request-id"] = request_id
        if request.url.path.startswith("/v1/"):
            metrics.request_seconds.observe(seconds)
        if response.status_code >= 400:
            metrics.errors.labels(str(response.status_code)).inc()
        level = logging.DEBUG if request.url.path in QUIET else logging.INFO
        log.log(
            level,
            "request",
            extra={
                "request": request_id,
                "method": request.method,
                "path": request.url.path,
                "status": response.status_code,
                "seconds": round(seconds, 4),
            },
        )
        return response

    return observe


QUIET = frozenset({"/livez", "/readyz", "/metrics"})


class BodyLimit:
    """ASGI middleware: 413 for a body beyond the limit, by what it says of itself or by what arrives."""

    def __init__(self, app: Any, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most_bytes:
            return await self._refuse(scope, receive, send)
        arrived, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            arrived += message.get("body", b"")
            more = message.get("more_body", False)
            if len(arrived) > self.most_bytes:
                return await self._refuse(scope, receive, send)
        whole: dict[str, Any] | None = {"type": "http.request", "body": arrived, "more_body": False}

        async def replay() -> Any:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        return await self.app(scope, replay, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = _error(413, f"a body may have {self.most_bytes} bytes", "body_too_large", None)
        await refusal(scope, receive, send)
