"""The page of a server, and what it asks for.

GET  /               one HTML file with its style and script, which asks for nothing from anywhere else
GET  /v1/stats       what the server is doing
POST /v1/neighbours  the cached captions nearest to one
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from lift_cache.keys import caption_keys, normalise
from lift_cache.recipe import Recipe
from lift_embedder import __version__
from lift_embedder.access import Scope
from lift_embedder.answers import documented
from lift_embedder.history import INTERVAL, RATE_SECONDS, RECENT_SECONDS, Point, total
from lift_embedder.neighbours import LEAST_ROWS, MOST_BYTES, MOST_SECONDS, Found, Search
from lift_embedder.service import Service

PAGE = Path(__file__).parents[1] / "page" / "index.html"

HISTOGRAM_BINS = 40

COMMON_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


# ------------------------------------------------------------------------------------------ GET /v1/stats


class EngineStats(BaseModel):
    ready: bool = Field(description="Captions that are not in the cache can be embedded.")
    state: str = Field(description="`ready`, or why it is not.")
    read_only: str | None = Field(description="Why nothing is added to the cache, if so.")
    restarts: int = Field(description="Since the server started.")
    description: dict[str, str] = Field(description="The engine and its versions.")


class CacheCounts(BaseModel):
    """`rows` is of now; the rest as of `at`, at most a few seconds ago."""

    at: float = Field(description="Unix seconds.")
    rows: int = Field(description="Distinct captions.")
    fresh_rows: int = Field(description="Those that are durable and not sealed into a segment yet.")
    segments: int
    tokens: int = Field(description="Tokens of all captions in the cache.")
    truncated: int = Field(description="Captions that were cut.")
    sealed_bytes: int = Field(description="Segments on disk.")
    live_bytes: int = Field(description="The live tier on disk: fresh rows, and the index.")
    snapshot: str | None = Field(description="The newest snapshot; POST /v1/snapshots makes one.")


class CaptionCounts(BaseModel):
    """Captions that were asked for since the server started. A share is of all three; None where there were none."""

    hits: int = Field(description="Answered from the cache.")
    misses: int = Field(description="Sent to the engine.")
    coalesced: int = Field(description="Joined a computation under way.")
    hit_share: float | None
    recent_hit_share: float | None = Field(description=f"Of the last {RECENT_SECONDS:.0f} s.")


class QueueStats(BaseModel):
    rows: int = Field(description="Captions that wait for the engine or are in it.")
    tokens: int
    most_tokens: int = Field(description="Beyond this, requests are refused.")


class Rates(BaseModel):
    """Per second, over the last `seconds`."""

    seconds: float
    captions: float = Field(description="Captions that were asked for.")
    embedded_tokens: float = Field(description="Tokens that the engine embedded.")


class Series(BaseModel):
    """One value for each point, oldest first; `hits`, `misses`, `coalesced` and `embedded_tokens` are totals."""

    interval: float = Field(description="Seconds between two points.")
    at: list[float] = Field(description="Unix seconds.")
    rows: list[int]
    bytes: list[int]
    hits: list[int]
    misses: list[int]
    coalesced: list[int]
    embedded_tokens: list[int]
    queue_tokens: list[int]


class ErrorStats(BaseModel):
    """Error answers that differ in nothing but numbers. Holds no caption."""

    first: float = Field(description="Unix seconds.")
    last: float = Field(description="Unix seconds.")
    count: int
    status: int
    code: str
    message: str = Field(description="Of the last one.")
    request_id: str = Field(description="Of the last one.")


class Stats(BaseModel):
    """What a server is doing."""

    now: float = Field(description="Unix seconds, by the server's clock.")
    started: float = Field(description="Unix seconds.")
    version: str
    engine: EngineStats
    cache: CacheCounts
    captions: CaptionCounts
    queue: QueueStats
    rates: Rates
    recipe: Recipe
    fingerprint: str
    encoding: dict[str, Any]
    history: Series = Field(description="The last hour, or what of it is later than `since`.")
    errors: list[ErrorStats] = Field(description="The newest first.")


async def collect(service: Service, since: float) -> Stats:
    """Everything but the last look at the disk is of now. Raises LiftError: the cache cannot be read."""
    cache, engine, metrics, history = service.cache, service.path.engine, service.metrics, service.history
    if history.look is None:
        await history.sample(cache, metrics)
    look = history.look
    assert look is not None
    now = history.point(cache, metrics)
    before, recently = history.before(now, RATE_SECONDS), history.before(now, RECENT_SECONDS)
    seconds = now.at - before.at
    state = dict(engine.state)
    points = history.points(since)
    queue = service.path.queue
    return Stats(
        now=now.at,
        started=history.started,
        version=__version__,
        engine=EngineStats(
            ready=engine.ready and engine.read_only is None,
            state=state.pop("state"),
            read_only=engine.read_only,
            restarts=total(metrics.restarts),
            description=state,
        ),
        cache=CacheCounts(
            at=look.at,
            rows=now.rows,
            fresh_rows=look.stats.fresh_rows,
            segments=look.stats.segments,
            tokens=look.stats.tokens,
            truncated=look.stats.truncated,
            sealed_bytes=look.stats.size,
            live_bytes=look.live_size,
            snapshot=look.snapshot,
        ),
        captions=CaptionCounts(
            hits=now.hits,
            misses=now.misses,
            coalesced=now.coalesced,
            hit_share=_share(now.hits, now.captions),
            recent_hit_share=_share(now.hits - recently.hits, now.captions - recently.captions),
        ),
        queue=QueueStats(rows=queue.rows, tokens=queue.tokens, most_tokens=queue.most_tokens),
        rates=Rates(
            seconds=seconds,
            captions=_per_second(now.captions - before.captions, seconds),
            embedded_tokens=_per_second(now.embedded_tokens - before.embedded_tokens, seconds),
        ),
        recipe=cache.recipe,
        fingerprint=cache.recipe.fingerprint,
        encoding=cache.encoding.card(),
        history=_series(points),
        errors=[
            ErrorStats(
                first=line.first,
                last=line.last,
                count=line.count,
                status=line.status,
                code=line.code,
                message=line.message,
                request_id=line.request_id,
            )
            for line in history.errors()
        ],
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole > 0 else None


def _per_second(count: int, seconds: float) -> float:
    return count / seconds if seconds >= 1 else 0.0  # of less than a second, a rate says nothing


def _series(points: list[Point]) -> Series:
    return Series(
        interval=INTERVAL,
        at=[point.at for point in points],
        rows=[point.rows for point in points],
        bytes=[point.size for point in points],
        hits=[point.hits for point in points],
        misses=[point.misses for point in points],
        coalesced=[point.coalesced for point in points],
        embedded_tokens=[point.embedded_tokens for point in points],
        queue_tokens=[point.queue_tokens for point in points],
    )


# -------------------------------------------------------------------------------------- POST /v1/neighbours


class NeighbourRequest(BaseModel):
    input: str = Field(description="A caption.")
    k: int = Field(10, ge=1, le=100, description="Neighbours wanted.")
    center: bool = Field(
        True, description="Rank by the cosine after the cache's mean was taken off, not by the plain one."
    )


class VectorSummary(BaseModel):
    """Of the vector as the cache keeps it."""

    dimensions: int
    norm: float
    least: float
    greatest: float
    first: list[float] = Field(description="Its first eight values.")
    histogram: list[int] = Field(description="Values by size, from `least` to `greatest` in equal steps.")


class Neighbour(BaseModel):
    caption: str | None = Field(description="None in a copy of a cache without captions.")
    key: str
    tokens: int
    cosine: float
    centered_cosine: float | None


class Neighbours(BaseModel):
    caption: str = Field(description="As it is embedded: normalised.")
    key: str
    found: bool = Field(
        description="False: it is not in the cache, and the API key may only read; the rest is empty then."
    )
    cached: bool = Field(description="It was in the cache before this request.")
    tokens: int
    truncated: bool
    vector: VectorSummary | None
    centered: bool = Field(description="Which cosine ranks the neighbours.")
    neighbours: list[Neighbour] = Field(description="The nearest first, the caption itself left out.")
    scanned: int = Field(description="Captions that were compared.")
    rows: int = Field(description="Captions in the cache. More than `scanned`: those were an even sample.")
    seconds: float = Field(description="What the search took.")
    note: str | None


async def _neighbours(service: Service, search: Search, asked: NeighbourRequest, embed: bool) -> Neighbours:
    """Raises BadRow, BadCaption, QueueFull, EngineUnavailable, and what the cache raises."""
    if embed:
        answer = await service.path.embed([asked.input])
        vector, cached = answer.vectors[0], bool(answer.cached[0])
        tokens, truncated = int(answer.tokens[0]), bool(answer.truncated[0])
        text = normalise(asked.input)
        key = caption_keys([text])[0].tobytes()
    else:
        text = normalise(asked.input)
        keys = caption_keys([text])
        hits = await asyncio.to_thread(service.cache.get, keys)
        key, cached = keys[0].tobytes(), bool(hits.found[0])
        if not cached:
            return _not_found(text, key, service.cache.rows)
        vector, tokens, truncated = hits.vectors[0], int(hits.tokens[0]), bool(hits.truncated[0])
    found = await search(vector, asked.k, leave_out=key, centre=asked.center)
    return Neighbours(
        caption=text,
        key=key.hex(),
        found=True,
        cached=cached,
        tokens=tokens,
        truncated=truncated,
        vector=_summary(vector),
        centered=found.centred,
        neighbours=[
            Neighbour(
                caption=one.caption,
                key=one.key.hex(),
                tokens=one.tokens,
                cosine=one.cosine,
                centered_cosine=one.centred,
            )
            for one in found.near
        ],
        scanned=found.scanned,
        rows=found.rows,
        seconds=found.seconds,
        note=_note(asked, found),
    )


def _not_found(text: str, key: bytes, rows: int) -> Neighbours:
    return Neighbours(
        caption=text,
        key=key.hex(),
        found=False,
        cached=False,
        tokens=0,
        truncated=False,
        vector=None,
        centered=False,
        neighbours=[],
        scanned=0,
        rows=rows,
        seconds=0.0,
        note="this caption is not in the cache, and this API key may read but not embed",
    )


def _summary(vector: np.ndarray) -> VectorSummary:
    counts, _ = np.histogram(vector, bins=HISTOGRAM_BINS)
    return VectorSummary(
        dimensions=len(vector),
        norm=float(np.linalg.norm(vector)),
        least=float(vector.min()),
        greatest=float(vector.max()),
        first=vector[:8].tolist(),
        histogram=counts.tolist(),
    )


def _note(asked: NeighbourRequest, found: Found) -> str | None:
    if asked.center and not found.centred:
        return f"ranked by the plain cosine: the mean is taken off from {LEAST_ROWS} captions on"
    if found.scanned < found.rows:
        return f"an even sample: a search reads at most {MOST_BYTES >> 20:,} MiB of vectors, for {MOST_SECONDS:.0f} s"
    return None


def may_embed(request: Request) -> bool:
    """Whether the request's API key reaches further than reading; without keys, everything is allowed."""
    return request.scope.get("state", {}).get("scope", Scope.ADMIN) >= Scope.EMBED


# ------------------------------------------------------------------------------------------------- GET /


def page_headers(page: str) -> dict[str, str]:
    """What a browser is told with the page: run this style and this script, ask this server, nothing else."""
    hashes = {}
    for kind in ("style", "script"):
        parts = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        hashes[kind] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = [
        "default-src 'none'",
        f"style-src {hashes['style']}",
        f"script-src {hashes['script']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return {
        **COMMON_HEADERS,
        "Content-Security-Policy": "; ".join(policy),
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def page_router(service: Service) -> APIRouter:
    """The routes of the page."""
    router = APIRouter()
    search = Search(service.cache)
    page = PAGE.read_text(encoding="utf-8")
    headers = page_headers(page)

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    @router.get("/v1/stats", tags=["page"], responses=documented(400))
    async def stats(
        response: Response,
        since: Annotated[
            float, Query(description="Leaves points out that are not later (unix seconds).")
        ] = 0.0,
    ) -> Stats:
        """What the server is doing: cache, engine, queue, rates, the last hour, the last errors."""
        response.headers.update(COMMON_HEADERS)
        return await collect(service, since)

    @router.post("/v1/neighbours", tags=["page"], responses=documented(400, 408, 413, 415, 422, 429, 507))
    async def neighbours(asked: NeighbourRequest, request: Request, response: Response) -> Neighbours:
        """Embed a caption, store it, and compare it with all that is cached; one search at a time.

        With an API key that may only read, the caption must be in the cache.
        """
        response.headers.update(COMMON_HEADERS)
        return await _neighbours(service, search, asked, may_embed(request))

    return router
