"""What a server did lately, kept in memory for its page: a point every few seconds, and the last errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.metrics import MetricWrapperBase

from lift_cache.snapshot import snapshots_of
from lift_cache.tools.printable import printable
from lift_cache.writer import CacheStats, CacheWriter
from lift_embedder.metrics import Metrics

if TYPE_CHECKING:
    from lift_embedder.service import Service

log = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between two points. A look at the cache walks its fresh batches and its segments: 0.2 ms for a
thousand batches of one caption each, and 0.5 ms for 200 segments (measured), so once in 5 s is nothing."""

POINTS = 720
"""An hour of them."""

ERRORS = 50
"""Lines of errors that are kept; one that differs from another in its numbers alone shares its line."""

MESSAGE_CHARACTERS = 300
"""A message may quote a request; no request decides how much memory it takes."""

RATE_SECONDS = 15.0
"""What a rate is taken over: long enough to hold some batches, short enough to follow a change."""

RECENT_SECONDS = 300.0
"""What the recent hit share is taken over."""


@dataclass(frozen=True, slots=True)
class Point:
    """The server at a moment: `at` in unix seconds, `size` in bytes on disk, the others counts.

    hits, misses, coalesced and embedded_tokens are totals since the server started.
    """

    at: float
    rows: int
    size: int
    hits: int
    misses: int
    coalesced: int
    embedded_tokens: int
    queue_tokens: int

    @property
    def captions(self) -> int:
        return self.hits + self.misses + self.coalesced


@dataclass(frozen=True, slots=True)
class Look:
    """What only the disk knows, as of `at` (unix seconds); sizes in bytes."""

    at: float
    stats: CacheStats
    live_size: int
    snapshot: str | None


@dataclass(slots=True)
class ErrorLine:
    """Error answers that differ in nothing but numbers: how many, and the last of them."""

    first: float
    last: float
    count: int
    status: int
    code: str
    message: str
    request_id: str


class History:
    """The last hour. Belongs to the event loop; only the look at the disk runs in a thread.

    Attributes:
        started: unix seconds; tells one server from the next on the same port.
        look: the newest look at the disk; None before the first.
    """

    def __init__(self) -> None:
        self.started = time.time()
        self._began = time.monotonic()
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._errors: OrderedDict[tuple[int, str, str], ErrorLine] = OrderedDict()
        self.look: Look | None = None

    def now(self) -> float:
        """Unix seconds to the millisecond, by a clock that is never set back."""
        return round(self.started + time.monotonic() - self._began, 3)

    # Points

    async def run(self, service: Service) -> None:
        """Take a point every `INTERVAL` seconds until cancelled."""
        failing = False
        while True:
            try:
                await self.sample(service.cache, service.metrics)
                failing = False
            except Exception as error:  # a disk that fails now may answer later, and a page must not end
                if not failing:
                    log.warning("the page's figures stand still: %s", error)
                failing = True
            await asyncio.sleep(INTERVAL)

    async def sample(self, cache: CacheWriter, metrics: Metrics) -> Point:
        """Look at the cache and add a point. Raises LiftError: the cache cannot be read."""
        self.look = await asyncio.to_thread(self._look_at, cache)
        point = self.point(cache, metrics)
        self._points.append(point)
        return point

    def _look_at(self, cache: CacheWriter) -> Look:
        live = cache.path / "live" / "data.mdb"
        # Blocks, not the length: what the file takes from the disk.
        size = live.stat().st_blocks * 512 if live.exists() else 0
        newest = next(reversed(snapshots_of(cache.path)), None)
        return Look(self.now(), cache.stats(), size, newest)

    def size(self) -> int:
        """Bytes on disk, as of the last look."""
        return self.look.stats.size + self.look.live_size if self.look else 0

    def point(self, cache: CacheWriter, metrics: Metrics) -> Point:
        """The server now, but for `size`, which is as of the last look. Needs no disk. Raises LiftError."""
        return Point(
            at=self.now(),
            rows=cache.rows,
            size=self.size(),
            hits=total(metrics.captions, how="hit"),
            misses=total(metrics.captions, how="miss"),
            coalesced=total(metrics.captions, how="coalesced"),
            embedded_tokens=total(metrics.embedded_tokens),
            queue_tokens=total(metrics.queue_tokens),
        )

    def points(self, since: float = 0.0) -> list[Point]:
        """Points taken after `since` (unix seconds), oldest first."""
        newer = []
        for point in reversed(self._points):
            if point.at <= since:
                break
            newer.append(point)
        return newer[::-1]

    def before(self, now: Point, seconds: float) -> Point:
        """The oldest point of the last `seconds`; `now` itself when there is none."""
        return next(iter(self.points(now.at - seconds)), now)

    # Errors

    def error(self, status: int, code: str, message: str, request_id: str) -> None:
        """Remember an error answer. The message must hold no caption; it is cut and made safe to show."""
        message = message[:MESSAGE_CHARACTERS]
        if not message.isprintable():
            message = printable(message)[:MESSAGE_CHARACTERS]
        # A queue that is full refuses thousands, each with other numbers: they must not push out all else.
        kind = (status, code, re.sub(r"\d+", "0", message))
        now = self.now()
        line = self._errors.get(kind)
        if line is None:
            self._errors[kind] = ErrorLine(now, now, 1, status, code, message, request_id)
            if len(self._errors) > ERRORS:
                self._errors.popitem(last=False)
        else:
            line.last, line.count, line.message, line.request_id = now, line.count + 1, message, request_id
            self._errors.move_to_end(kind)

    def errors(self) -> Iterator[ErrorLine]:
        """The newest first."""
        return reversed(self._errors.values())


def total(metric: MetricWrapperBase, **labels: str) -> int:
    """Sum of a counter's or gauge's values under these labels, whatever others it has."""
    return round(
        sum(
            sample.value
            for family in metric.collect()
            for sample in family.samples
            if not sample.name.endswith("_created") and labels.items() <= sample.labels.items()
        )
    )
