"""POST /v1/embeddings: captions → vectors, durable before they are answered.

OpenAI's request and answer, or Arrow in either direction. JSON is all or nothing, as that API is; an answer in
Arrow has an error of its own for every row that cannot be embedded.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lift_cache import wire
from lift_cache.errors import BadConfig, ModelNotFound
from lift_embedder.answers import documented, status_of
from lift_embedder.path import Answer
from lift_embedder.service import Service

Model = TypeVar("Model", bound=BaseModel)

JSON_TYPE = "application/json"

VALUES_AT_A_TIME = 1 << 17
"""Numbers that are written as JSON before other requests have their turn."""

TokenIds = Annotated[list[int], Field(min_length=1)]
Input = str | list[str] | TokenIds | list[TokenIds]


class EmbeddingRequest(BaseModel):
    """OpenAI's request. Fields that this API does not know are ignored, as clients send more over time."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: Annotated[Input, Field(description="A caption, captions, or token ids, which are never cached.")]
    model: str | None = Field(None, description="The model that the server embeds with; may be left out.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, ge=1, description="Fewer than the cache keeps, for models that were trained so (Matryoshka)."
    )

    @field_validator("input")
    @classmethod
    def _some(cls, value: Input) -> Input:
        if isinstance(value, list) and not value:
            raise ValueError("an empty list; send at least one caption")
        return value


class EmbeddingRow(BaseModel):
    """One vector: a list of numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    cached: bool = Field(description="It was in the cache before this request.")
    stored: bool = Field(description="It is in the cache now; token ids never are.")
    tokens: int
    truncated: bool


class Usage(BaseModel):
    """Tokens of all rows, cached ones among them."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """OpenAI's answer, with what the cache knows of each row."""

    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: Usage
    recipe: str = Field(description="Fingerprint of what made the vectors.")


ARROW = {"schema": {"type": "string", "format": "binary", "description": "See docs/server.md."}}
PRIORITY = "X-Lift-Priority"
# Read from the request and described here: as parameters of the route they would double what a hit costs.
DESCRIBED: dict[str, Any] = {
    "parameters": [
        {
            "name": PRIORITY,
            "in": "header",
            "required": False,
            "description": "Bulk work lets others go first.",
            "schema": {"type": "string", "enum": ["interactive", "bulk"], "default": "interactive"},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            JSON_TYPE: {"schema": EmbeddingRequest.model_json_schema()},
            wire.MIME: ARROW,
        },
    },
}


class Plain(APIRoute):
    """A route whose function takes the request and gives the response.

    FastAPI would look for parameters and dependencies in every request, a tenth of what a hit costs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def embeddings_router(service: Service) -> APIRouter:
    """See the head of the module."""
    router = APIRouter(tags=["embeddings"], route_class=Plain)
    empty = EmbeddingRequest(input="-")

    @router.post(
        "/v1/embeddings",
        response_model=EmbeddingAnswer,
        responses={
            200: {"content": {wire.MIME: ARROW}},
            **documented(400, 404, 408, 413, 415, 422, 429, 507),
        },
        openapi_extra=DESCRIBED,
    )
    async def embeddings(request: Request) -> Response:
        """Vectors of captions; each is computed once, and durable in the cache before it is answered."""
        bulk = _is_bulk(request)
        captions: Sequence[object]
        ids: list[list[int]] | None = None
        asked = empty
        if is_arrow(request.headers.get("content-type")):
            arrived = wire.decode_request(await request.body(), most_rows=service.most_inputs)
            captions, model = arrived.captions, arrived.model
        else:
            asked = parse(EmbeddingRequest, await request.body())
            captions, ids = _split(asked.input)
            model = asked.model
        require_model(service, model)
        require_inputs(service, ids or captions)
        require_dimensions(service, asked.dimensions)
        as_arrow = wants_arrow(request)
        request.scope.setdefault("state", {})["rows"] = len(ids or captions)
        if ids is not None:
            answer = await service.path.embed_tokens(ids, bulk=bulk)
        else:
            answer = await service.path.embed(captions, bulk=bulk, each=as_arrow)
        vectors = shown(service, answer.vectors, asked.dimensions)
        if as_arrow:
            return Response(_in_arrow(service, answer, vectors, stored=ids is None), media_type=wire.MIME)
        body = await _in_json(service, answer, vectors, asked.encoding_format, stored=ids is None)
        return Response(body, media_type=JSON_TYPE)

    return router


def _is_bulk(request: Request) -> bool:
    said = request.headers.get(PRIORITY, "interactive")
    if said not in ("interactive", "bulk"):
        raise BadConfig(f"{PRIORITY}: interactive or bulk, not {said[:40]!r}")
    return said == "bulk"


def parse(kind: type[Model], body: bytes) -> Model:
    """A JSON body as a model. Raises RequestValidationError."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


def is_arrow(content_type: str | None) -> bool:
    return (content_type or "").partition(";")[0].strip().lower() == wire.MIME


def wants_arrow(request: Request) -> bool:
    """Whether to answer in Arrow: asked for, or asked in Arrow without asking for JSON."""
    accept = request.headers.get("accept", "")
    if wire.MIME in accept:
        return True
    return is_arrow(request.headers.get("content-type")) and JSON_TYPE not in accept


def require_model(service: Service, model: str | None) -> None:
    """Raises ModelNotFound."""
    if model and model not in service.names:
        raise ModelNotFound(f"this server embeds with {service.cache.recipe.model!r}, not {model!r}")


def require_inputs(service: Service, inputs: Sequence[object]) -> None:
    """Raises TooManyRows."""
    if len(inputs) > service.most_inputs:
        raise wire.TooManyRows(
            f"input: {len(inputs):,} captions; a request may have {service.most_inputs:,}, send several"
        )


def require_dimensions(service: Service, dimensions: int | None) -> None:
    """Raises BadConfig."""
    kept = service.cache.encoding.dimensions
    if dimensions is None or dimensions == kept:
        return
    if dimensions > kept:
        raise BadConfig(f"dimensions: this cache keeps {kept}, not {dimensions}")
    if not service.shorter:
        raise BadConfig(
            f"dimensions: {service.cache.recipe.model} was not trained so that a vector can be cut; "
            f"ask for {kept}, or leave it out"
        )


def shown(service: Service, vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Vectors as they are answered: cut, and of unit length again where the recipe says so."""
    recipe = service.cache.recipe
    kept = vectors[:, : dimensions or service.cache.encoding.dimensions]
    if (
        recipe.normalize and kept.shape[1] < recipe.dimensions
    ):  # what is kept of a unit vector is shorter than one
        kept = kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-30)
    return kept


def _split(asked: Input) -> tuple[Sequence[object], list[list[int]] | None]:
    """Captions, or token ids, out of the four forms that OpenAI's `input` has."""
    if isinstance(asked, str):
        return [asked], None
    first = asked[0]
    if isinstance(first, int):
        return [], [asked]  # type: ignore[list-item]
    if isinstance(first, list):
        return [], asked  # type: ignore[return-value]
    return asked, None


def for_wire(service: Service, vectors: np.ndarray) -> np.ndarray:
    """In half the bytes where nothing is lost by it: values that the cache keeps as float16."""
    cache = service.cache
    exact = cache.encoding.dtype == "float16" and vectors.shape[1] == cache.recipe.dimensions
    return vectors.astype(np.float16) if exact else vectors


def _in_arrow(service: Service, answer: Answer, vectors: np.ndarray, *, stored: bool) -> bytes:
    cache = service.cache
    answered = wire.Answered(
        for_wire(service, vectors) if stored else vectors,
        answer.cached,
        answer.tokens,
        answer.truncated,
        {i: wire.RowError(status_of(error)[1], str(error)) for i, error in answer.errors.items()},
    )
    return wire.encode_answer(answered, recipe=service.fingerprint, model=cache.recipe.model)


async def _in_json(
    service: Service, answer: Answer, vectors: np.ndarray, form: str, *, stored: bool
) -> bytes:
    little_nd = np.ascontiguousarray(vectors, "<f4")
    cached, tokens, truncated = answer.cached.tolist(), answer.tokens.tolist(), answer.truncated.tolist()
    step = max(1, VALUES_AT_A_TIME // little_nd.shape[1])
    parts = []
    for start in range(0, len(little_nd), step):
        if start:
            await asyncio.sleep(0)
        rows = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(little_nd[i]).decode() if form == "base64" else little_nd[i],
                "cached": cached[i],
                "stored": stored,
                "tokens": tokens[i],
                "truncated": truncated[i],
            }
            for i in range(start, min(start + step, len(little_nd)))
        ]
        parts.append(orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
    total = sum(tokens)
    rest = {
        "model": service.cache.recipe.model,
        "usage": {"prompt_tokens": total, "total_tokens": total},
        "recipe": service.fingerprint,
    }
    return b'{"object":"list","data":[' + b",".join(parts) + b"]," + orjson.dumps(rest)[1:]
