"""From an error to an answer: one table for statuses and codes, one shape (OpenAI's) for bodies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from lift_cache import errors, wire
from lift_embedder.queue import QueueFull

STATUS: dict[type[errors.LiftError], tuple[int, str]] = {
    errors.BadCaption: (400, "invalid_caption"),
    errors.BadConfig: (400, "invalid_request"),
    wire.TooManyRows: (413, "too_many_inputs"),
    errors.ModelNotFound: (404, "model_not_found"),
    errors.CacheNotFound: (404, "not_found"),
    errors.VectorRejected: (422, "vector_rejected"),
    QueueFull: (429, "queue_full"),
    errors.EngineUnavailable: (503, "engine_unavailable"),
    errors.StorageFailed: (503, "storage_failed"),
    errors.CacheFull: (507, "cache_full"),
    errors.CacheDamaged: (500, "cache_damaged"),
    errors.LiftError: (500, "internal_error"),
}
"""The nearest base class of an error counts."""


class ErrorDetail(BaseModel):
    """What was wrong, where, and what to do."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """OpenAI's error shape."""

    error: ErrorDetail


def status_of(error: errors.LiftError) -> tuple[int, str]:
    """HTTP status and code of an error, by `STATUS`."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def error_answer(
    status: int,
    message: str,
    code: str,
    param: str | None = None,
    retry_after: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error in OpenAI's shape.

    Args:
        retry_after: seconds.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    sent = dict(headers or {})
    if retry_after is not None:
        sent["Retry-After"] = str(math.ceil(retry_after))
    return Response(json.dumps(body).encode(), status, sent, "application/json")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for its OpenAPI document; those that any route may give are added."""
    words = {
        400: "A caption, parameter or body that cannot be used; `param` says which.",
        401: "No key, or not one of this server's.",
        403: "A key without the scope that this needs, or a page of another origin.",
        404: "No such model or snapshot.",
        408: "The body did not arrive.",
        413: "A body, or a list, beyond the limit.",
        415: "A content type or encoding that is not taken here.",
        422: "The model gives a caption no vector that may be stored.",
        429: "More waits than the server accepts; `Retry-After` says when to come back.",
        500: "The server failed; its log says more.",
        503: "The engine is away, the storage failed, or the server is busy; `Retry-After` says when to come back.",
        507: "The disk under the cache is full.",
    }
    always = {401, 403, 500, 503}
    return {
        status: {"model": ErrorBody, "description": words[status]} for status in sorted({*statuses, *always})
    }
