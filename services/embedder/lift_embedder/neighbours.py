"""The cached captions whose vectors are nearest to one, among all rows that a serving cache has now.

Exact over what is read, and bounded in what it reads: beyond `MOST_BYTES` of vectors or `MOST_SECONDS` it reads
an even share of the cache and says which. Keys are hashes and segments are sorted by them, so the first rows of
every segment are a random sample that lies in one piece.

Vectors of language models lie in a narrow cone, where any two captions have a cosine near one; so the mean of
the cache is taken off first, unless it is asked not to (`lift-cache lookup` does the same to a snapshot).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lift_cache.segment import Segment, StoredRows
from lift_cache.tools.lookup import MEAN_ROWS
from lift_cache.writer import CacheWriter
from lift_embedder.queue import QueueFull

MOST_BYTES = 1 << 30
"""Stored vectors that one search reads: 1.4 million of MiniLM in float16, 130,000 of a 4,096-dimensional model."""

MOST_SECONDS = 2.0

FRESH_BYTES = 1 << 26
"""Of these, vectors of rows that are not sealed yet, which are copied out of the live tier."""

BLOCK_VALUES = 1 << 18
"""Values that are decoded at a time, 1 MiB of float32: what fits the processor's cache takes a third of the time
(0.9 µs for a row of 384 instead of 3), and is multiplied in this thread alone."""

SLICES = 32
"""A search takes a share of every segment in turn, so that what it has read when time is up is an even sample."""

LEAST_ROWS = 32
"""Rows from which on their mean says more of the model than of these captions."""


@dataclass(frozen=True)
class Near:
    """A cached caption near another; its text is None in a copy of a cache without captions."""

    key: bytes
    caption: str | None
    tokens: int
    cosine: float
    centred: float | None


@dataclass(frozen=True)
class Found:
    """The nearest first. `scanned` of `rows` captions were compared; `centred` says which cosine ranks them."""

    near: list[Near]
    scanned: int
    rows: int
    centred: bool
    seconds: float


Part = Segment | StoredRows
"""A sealed segment, or the fresh rows: each holds distinct captions."""


@dataclass(frozen=True)
class _Candidate:
    score: float
    part: Part
    row: int


class _Ranking:
    """The best candidates so far; of a caption that is in two places, one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._best: dict[bytes, _Candidate] = {}

    def add(self, scores: np.ndarray, start: int, part: Part) -> None:
        """Consecutive rows of a part, from `start`, with their scores: float32 [n]."""
        most = min(self._most, len(scores))
        best = np.argpartition(-scores, most - 1)[:most]
        keys = part.keys(best + start) if isinstance(part, Segment) else part.keys[best + start]
        for key, i in zip(keys, best.tolist(), strict=True):
            self._best[key.tobytes()] = _Candidate(float(scores[i]), part, start + i)
        if len(self._best) > 4 * self._most:
            self._best = dict(self.ordered())

    def ordered(self) -> list[tuple[bytes, _Candidate]]:
        return sorted(self._best.items(), key=lambda item: -item[1].score)[: self._most]


def search(
    cache: CacheWriter,
    vector: np.ndarray,
    k: int,
    *,
    leave_out: bytes = b"",
    centre: bool = True,
    most_bytes: int = MOST_BYTES,
    seconds: float = MOST_SECONDS,
    stop: threading.Event | None = None,
) -> Found:
    """The k cached captions nearest to a vector.

    Args:
        vector: float32 [d], as the cache keeps it, of any length but zero.
        leave_out: the vector's own key.
        centre: rank by the cosine after the mean was taken off; a cache below `LEAST_ROWS` does not.
        most_bytes, seconds: what is not read within these is left out.
        stop: ends the search early when it is set.

    Raises:
        CacheDamaged: an answered row's bytes are not those that were written.
    """
    began = time.perf_counter()
    stop = stop or threading.Event()

    def over(share: float = 1.0) -> bool:
        return stop.is_set() or time.perf_counter() - began > share * seconds

    # Fresh rows first: what is sealed while they are read is in a segment by the time those are listed.
    batches: list[StoredRows] = []
    room = min(FRESH_BYTES, most_bytes)
    for batch in cache.fresh_rows():
        batches.append(batch)
        room -= batch.vectors.nbytes
        if room <= 0 or over(0.5):
            break
    fresh = [StoredRows.concatenate(batches)] if batches else []
    segments = cache.segments()
    fresh_rows, sealed_rows = sum(map(_rows, fresh)), sum(map(_rows, segments))
    row_bytes = cache.encoding.dimensions * cache.encoding.numpy_dtype.itemsize
    share = min(1.0, max(0.0, most_bytes / row_bytes - fresh_rows) / max(sealed_rows, 1))

    unit_d = _unit(vector[None])[0]
    mean_d = None
    if centre and fresh_rows + sealed_rows >= LEAST_ROWS:
        mean_d = _mean(cache, [*fresh, *segments])
    score = _Score(unit_d, mean_d)
    ranking = _Ranking(k + 1)  # one of them may be left out
    scanned = 0
    for part, start, end in chain(_blocks(cache, fresh, 1.0), _blocks(cache, segments, share)):
        if over():
            break
        ranking.add(score(_vectors(cache, part, start, end)), start, part)
        scanned += end - start
    best = [found for key, found in ranking.ordered() if key != leave_out][:k]
    near = [_named(cache, found, unit_d, mean_d) for found in best]
    near.sort(key=lambda one: -(one.cosine if one.centred is None else one.centred))
    rows = cache.rows
    # A caption that two segments hold was compared twice.
    return Found(near, min(scanned, rows), rows, mean_d is not None, time.perf_counter() - began)


class Search:
    """One search at a time, in a thread of its own."""

    def __init__(self, cache: CacheWriter) -> None:
        self._cache = cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="neighbours")
        self._running: Future[Found] | None = None

    async def __call__(self, vector: np.ndarray, k: int, *, leave_out: bytes, centre: bool) -> Found:
        """As `search`; ends it when the caller goes away. Raises QueueFull: another one is under way."""
        if self._running is not None and not self._running.done():
            raise QueueFull("another search for neighbours is under way; try again in a second", 1.0)
        stop = threading.Event()
        self._running = self._thread.submit(
            search, self._cache, vector, k, leave_out=leave_out, centre=centre, stop=stop
        )
        try:
            return await asyncio.wrap_future(self._running)
        finally:
            stop.set()


class _Score:
    """What rows are ranked by: the cosine with one vector, each less the mean where there is one.

    u is a row scaled to length one, w the wanted direction, m the mean: ⟨u − m, w⟩ / |u − m|, from products
    with the row itself, so that no centred copy of the cache is made.
    """

    def __init__(self, unit_d: np.ndarray, mean_d: np.ndarray | None) -> None:
        self._centred = mean_d is not None
        m_d = np.zeros_like(unit_d) if mean_d is None else mean_d
        w_d = _unit((unit_d - m_d)[None])[0]
        self._axes_d2 = np.stack([w_d, m_d], axis=1)
        self._mean_along_w = float(m_d @ w_d)
        self._mean_squared = float(m_d @ m_d)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [n, d] to float32 [n]."""
        length_n = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        along_w_n, along_m_n = (vectors @ self._axes_d2).T / np.where(length_n > 0, length_n, 1)
        if not self._centred:
            return along_w_n
        squared_n = 1 - 2 * along_m_n + self._mean_squared
        return (along_w_n - self._mean_along_w) / np.sqrt(np.maximum(squared_n, 1e-12))


def _blocks(
    cache: CacheWriter, parts: Sequence[Part], share: float, slices: int = SLICES
) -> Iterator[tuple[Part, int, int]]:
    """The first `share` of every part's rows, a slice of each in turn: part, start, stop."""
    most = max(1, BLOCK_VALUES // cache.encoding.dimensions)
    slices = max(1, min(slices, int(share * sum(map(_rows, parts))) // most))
    for n in range(slices):
        for part in parts:
            start, end = (math.ceil(_rows(part) * share * at / slices) for at in (n, n + 1))
            for block in range(start, end, most):
                yield part, block, min(block + most, end)


def _mean(cache: CacheWriter, parts: Sequence[Part]) -> np.ndarray:
    """Mean of the unit vectors of about `MEAN_ROWS` captions, an even share of each part: float32 [d]."""
    total_d, count = np.zeros(cache.encoding.dimensions), 0
    for part, start, end in _blocks(cache, parts, min(1.0, MEAN_ROWS / sum(map(_rows, parts))), 1):
        total_d += _unit(_vectors(cache, part, start, end)).sum(0, dtype=np.float64)
        count += end - start
    return (total_d / count).astype(np.float32)


def _rows(part: Part) -> int:
    return part.rows if isinstance(part, Segment) else len(part)


def _vectors(cache: CacheWriter, part: Part, start: int, end: int) -> np.ndarray:
    """float32 [end - start, d]."""
    stored = part.vectors(np.arange(start, end)) if isinstance(part, Segment) else part.vectors[start:end]
    return cache.encoding.decode(stored)


def _named(cache: CacheWriter, found: _Candidate, unit_d: np.ndarray, mean_d: np.ndarray | None) -> Near:
    """A candidate with its text and exact cosines; its bytes are verified. Raises CacheDamaged."""
    part, row = found.part, np.array([found.row])
    stored = part.take(row, captions=part.has_captions) if isinstance(part, Segment) else part.take(row)
    near_d, centred = _unit(cache.encoding.decode(stored.vectors))[0], None
    if mean_d is not None:
        centred = float(_unit((near_d - mean_d)[None])[0] @ _unit((unit_d - mean_d)[None])[0])
    return Near(
        stored.keys[0].tobytes(),
        None if stored.captions is None else stored.captions[0].as_py(),
        int(stored.tokens[0]),
        float(near_d @ unit_d),
        centred,
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length one; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
