"""What is known of the cache without computing anything, and its maintenance while it is served."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from lift_cache import wire
from lift_cache.errors import BadCaption
from lift_cache.keys import keyed
from lift_cache.snapshot import snapshots_of
from lift_embedder.answers import documented
from lift_embedder.api.embeddings import (
    ARROW,
    JSON_TYPE,
    for_wire,
    is_arrow,
    parse,
    require_inputs,
    require_model,
    shown,
    wants_arrow,
)
from lift_embedder.path import BadRow
from lift_embedder.service import Service


class LookupRequest(BaseModel):
    """Captions that may be in the cache."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | list[str]
    model: str | None = None
    vectors: bool = Field(False, description="Answer vectors too, of those that are there.")


class LookupRow(BaseModel):
    """What is known of one caption; `embedding` where it is there and was asked for."""

    index: int
    key: str = Field(description="32 hex digits.")
    found: bool
    tokens: int | None
    truncated: bool | None
    embedding: list[float] | None = None


class LookupAnswer(BaseModel):
    """One row for every caption."""

    object: Literal["list"]
    data: list[LookupRow]
    recipe: str


class ModelCard(BaseModel):
    """OpenAI's description of a model, with the recipe's fingerprint."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    recipe: str


class Models(BaseModel):
    """The one model that this server embeds with."""

    object: Literal["list"]
    data: list[ModelCard]


class CacheCard(BaseModel):
    """What made the vectors, how they are stored, and how many there are."""

    recipe: dict[str, Any]
    fingerprint: str
    encoding: dict[str, Any]
    rows: int
    fresh_rows: int = Field(description="Rows that are durable and not in a sealed segment yet.")
    segments: int
    size: int = Field(description="Bytes of the sealed files.")
    tokens: int
    truncated: int
    snapshot: str | None
    provenance: list[dict[str, Any]]
    engine: dict[str, str]
    read_only: str | None = Field(description="Why nothing is added, where that is so.")


class SnapshotMade(BaseModel):
    """An immutable view for trainers."""

    id: str
    path: str
    rows: int


class Sealed(BaseModel):
    """Rows that were moved into sealed segments."""

    sealed: int


class CompactRequest(BaseModel):
    """How far to go."""

    model_config = ConfigDict(extra="forbid")

    everything: bool = Field(False, description="Merge all segments into as few as may be.")


class Compacted(BaseModel):
    """New segments, and those whose place they took."""

    segments: list[str]
    replaced: list[str]


class GcRequest(BaseModel):
    """Whether to remove."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False


class Collected(BaseModel):
    """Files that were removed, or would be."""

    removed: list[str]
    bytes: int
    dry_run: bool


class KeepRequest(BaseModel):
    """How many snapshots stay."""

    model_config = ConfigDict(extra="forbid")

    newest: int = Field(ge=1)


class RemovedSnapshots(BaseModel):
    """Ids of snapshots that are gone; `gc` then removes what they alone named."""

    removed: list[str]


def cache_router(service: Service) -> APIRouter:
    """See the head of the module."""
    router = APIRouter()
    cache, recipe = service.cache, service.cache.recipe

    @router.post(
        "/v1/lookup",
        tags=["cache"],
        response_model=LookupAnswer,
        responses={200: {"content": {wire.MIME: ARROW}}, **documented(400, 404, 408, 413, 415)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    JSON_TYPE: {"schema": LookupRequest.model_json_schema()},
                    wire.MIME: ARROW,
                },
            }
        },
    )
    async def lookup(
        request: Request,
        vectors: Annotated[bool, Query(description="For Arrow: answer vectors too.")] = True,
    ) -> Response:
        """Which captions are in the cache, and what is known of them. Never computes."""
        captions: list[Any]
        if is_arrow(request.headers.get("content-type")):
            arrived = wire.decode_request(await request.body(), most_rows=service.most_inputs)
            captions, model = arrived.captions, arrived.model
        else:
            asked = parse(LookupRequest, await request.body())
            captions = [asked.input] if isinstance(asked.input, str) else asked.input
            model, vectors = asked.model, asked.vectors
        require_model(service, model)
        require_inputs(service, captions)
        _, keys, unusable = keyed(captions)
        if unusable and not wants_arrow(request):
            first = min(unusable)
            raise BadRow(first, BadCaption(unusable[first]))
        hits = await asyncio.to_thread(cache.get, keys)
        if wants_arrow(request):
            errors = {i: wire.RowError("invalid_caption", reason) for i, reason in unusable.items()}
            found = wire.Found(
                for_wire(service, shown(service, hits.vectors, None)) if vectors else None,
                hits.found,
                hits.tokens,
                hits.truncated,
                errors,
            )
            body = wire.encode_answer(found, recipe=service.fingerprint, model=recipe.model)
            return Response(body, media_type=wire.MIME)
        return Response(_lookup_json(service, keys, hits, vectors), media_type=JSON_TYPE)

    @router.get("/v1/models", tags=["cache"], responses=documented())
    async def models() -> Models:
        """The one model that this server embeds with."""
        card = ModelCard(
            id=recipe.model, object="model", created=0, owned_by="lift", recipe=service.fingerprint
        )
        return Models(object="list", data=[card])

    @router.get("/v1/cache", tags=["cache"], responses=documented())
    async def card() -> CacheCard:
        """Recipe, encoding, counts, engine."""
        stats = await asyncio.to_thread(cache.stats)
        return CacheCard(
            recipe=recipe.model_dump(mode="json"),
            fingerprint=service.fingerprint,
            encoding=cache.encoding.model_dump(mode="json"),
            rows=stats.rows,
            fresh_rows=stats.fresh_rows,
            segments=stats.segments,
            size=stats.size,
            tokens=stats.tokens,
            truncated=stats.truncated,
            snapshot=next(reversed(await asyncio.to_thread(snapshots_of, cache.path)), None),
            provenance=await asyncio.to_thread(cache.provenance),
            engine=service.path.engine.state,
            read_only=service.path.engine.read_only,
        )

    @router.post("/v1/snapshots", tags=["cache"], responses=documented(507))
    async def snapshots() -> SnapshotMade:
        """An immutable view of all that is in the cache, for trainers."""
        made = await service.maintain(cache.snapshot)
        return SnapshotMade(id=made.id, path=str(made.path), rows=made.rows)

    @router.post("/v1/admin/seal", tags=["admin"], responses=documented(507))
    async def seal() -> Sealed:
        """Move every fresh row into sealed segments."""
        return Sealed(sealed=await service.maintain(cache.seal))

    @router.post("/v1/admin/compact", tags=["admin"], responses=documented(400, 413, 415, 507))
    async def compact(asked: CompactRequest) -> Compacted:
        """Merge small segments into larger ones; the files that they replace stay until `gc`."""
        done = await service.maintain(cache.compact, everything=asked.everything)
        return Compacted(
            segments=[one.info.id for one in done], replaced=[old for one in done for old in one.replaced]
        )

    @router.post("/v1/admin/gc", tags=["admin"], responses=documented(400, 413, 415))
    async def gc(asked: GcRequest) -> Collected:
        """Remove segments whose place others have taken, and that no snapshot names."""
        gone = await service.maintain(cache.gc, dry_run=asked.dry_run)
        return Collected(
            removed=[one.path.name for one in gone],
            bytes=sum(one.size for one in gone),
            dry_run=asked.dry_run,
        )

    @router.post("/v1/admin/snapshots/keep", tags=["admin"], responses=documented(400, 413, 415))
    async def keep(asked: KeepRequest) -> RemovedSnapshots:
        """Remove all snapshots but the newest."""
        return RemovedSnapshots(removed=await service.maintain(cache.keep_snapshots, asked.newest))

    @router.delete("/v1/admin/snapshots/{snapshot_id}", tags=["admin"], responses=documented(400, 404))
    async def remove(
        snapshot_id: Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[0-9a-f-]+$")],
    ) -> RemovedSnapshots:
        """Remove one snapshot, by its id or the beginning of it."""
        return RemovedSnapshots(removed=[await service.maintain(cache.remove_snapshot, snapshot_id)])

    return router


def _lookup_json(service: Service, keys: np.ndarray, hits: Any, vectors: bool) -> bytes:
    names = keys.tobytes().hex()
    shown_nd = np.ascontiguousarray(shown(service, hits.vectors, None), "<f4")
    columns = zip(hits.found.tolist(), hits.tokens.tolist(), hits.truncated.tolist(), strict=True)
    rows = []
    for i, (found, tokens, truncated) in enumerate(columns):
        row = {"index": i, "key": names[32 * i : 32 * i + 32], "found": found}
        row |= {"tokens": tokens, "truncated": truncated} if found else {"tokens": None, "truncated": None}
        if vectors:
            row["embedding"] = shown_nd[i] if found else None
        rows.append(row)
    body = {"object": "list", "data": rows, "recipe": service.fingerprint}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
