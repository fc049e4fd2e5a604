"""The way of a caption: key → cache → coalesce → queue → engine → put → acknowledge.

    embed      answers hits from the cache; misses join the queue, or the computation already under way
    _workers   take batches by tokens: engine, then one durable commit per batch, then the answers

A vector is read back from the cache after it was committed, so a miss and every later hit are the same bits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lift_cache.errors import BadCaption, EngineUnavailable, LiftError, VectorRejected
from lift_cache.keys import caption_keys, normalise
from lift_cache.writer import CacheWriter, Rows
from lift_embedder.metrics import Metrics
from lift_embedder.supervisor import Supervisor
from lift_embedder.tokens import CaptionTokenizer, Tokens

log = logging.getLogger(__name__)

WORKERS = 2
"""Batches under way: the engine need not wait while the one before is committed."""

BATCH_ROWS = 512


class QueueFull(LiftError):
    """More tokens wait for the engine than the server accepts."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BadRow(LiftError):
    """One row of a request that cannot be answered; `index` says which."""

    def __init__(self, index: int, cause: LiftError) -> None:
        super().__init__(f"input[{index}]: {cause}")
        self.index, self.cause = index, cause


@dataclass(frozen=True)
class Answer:
    """vectors float32 [n, d] as stored · cached bool [n] · tokens int32 [n] · truncated bool [n]."""

    vectors: np.ndarray
    cached: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class Computed:
    """One row, durable and as it will be read from now on."""

    vector: np.ndarray
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Wanted:
    """A caption on its way through the engine."""

    key: bytes
    caption: str
    tokens: Tokens
    done: asyncio.Future[Computed]


class EmbeddingPath:
    """All of its state belongs to the event loop; tokenising and disk work run in threads."""

    def __init__(
        self,
        cache: CacheWriter,
        tokenizer: CaptionTokenizer,
        engine: Supervisor,
        metrics: Metrics,
        *,
        queue_tokens: int,
        batch_tokens: int,
    ) -> None:
        self.cache, self._tokenizer, self.engine, self._metrics = cache, tokenizer, engine, metrics
        self._queue_limit, self._batch_tokens = queue_tokens, batch_tokens
        self._queue: deque[Wanted] = deque()
        self._in_flight: dict[bytes, asyncio.Future[Computed]] = {}
        self._waiting_tokens = 0
        self._tokens_per_second = 0.0
        self._work = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        self.engine.start()
        for _ in range(WORKERS):
            self._add_worker()

    async def aclose(self) -> None:
        """Stop. What is acknowledged is durable already; requests still here get EngineUnavailable."""
        self._closing = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        _fail(self._queue, EngineUnavailable("the server is stopping"))
        await self.engine.aclose()

    async def embed(self, captions: Sequence[object]) -> Answer:
        """Vectors of n captions, durable when this returns.

        Raises:
            BadRow: a caption that cannot be embedded, or whose vector cannot be stored.
            QueueFull, EngineUnavailable: misses cannot be computed now; hits alone still can.
            CacheFull, CacheDamaged.
        """
        texts = [_normalised(i, caption) for i, caption in enumerate(captions)]
        keys = caption_keys(texts)
        hits = await asyncio.to_thread(self.cache.get, keys)
        missing = np.flatnonzero(~hits.found).tolist()
        self._metrics.captions.labels("hit").inc(len(texts) - len(missing))
        if missing:
            futures = await self._request({keys[i].tobytes(): (i, texts[i]) for i in reversed(missing)})
            await asyncio.wait(
                futures.values()
            )  # unlike gather, leaves them alone when this caller goes away
            for i in missing:
                row = _result(i, futures[keys[i].tobytes()])
                hits.vectors[i], hits.tokens[i], hits.truncated[i] = row.vector, row.tokens, row.truncated
        return Answer(hits.vectors, hits.found, hits.tokens, hits.truncated)

    async def _request(self, wanted: dict[bytes, tuple[int, str]]) -> dict[bytes, asyncio.Future[Computed]]:
        """Futures of distinct missing captions (key → position, text): joined where under way, queued otherwise."""
        self.engine.require()
        joined = {key: self._in_flight[key] for key in wanted if key in self._in_flight}
        new = [(key, *row) for key, row in wanted.items() if key not in joined]
        tokens = await asyncio.to_thread(self._tokenize, [(i, text) for _, i, text in new])
        # Nothing else runs from here to the end. What another request queued meanwhile is joined; what one
        # finished meanwhile is found in the cache by the worker.
        queue: list[Wanted] = []
        for (key, _, text), ids in zip(new, tokens, strict=True):
            if key not in self._in_flight:
                queue.append(Wanted(key, text, ids, asyncio.get_running_loop().create_future()))
        self._admit(sum(len(row.tokens.ids) for row in queue))
        self._queue.extend(queue)
        self._in_flight.update({row.key: row.done for row in queue})
        joined.update({key: self._in_flight[key] for key, _, _ in new})
        self._metrics.captions.labels("miss").inc(len(queue))
        self._metrics.captions.labels("coalesced").inc(len(wanted) - len(queue))
        self._work.set()
        return joined

    def _tokenize(self, rows: Sequence[tuple[int, str]]) -> list[Tokens]:
        try:
            return self._tokenizer([text for _, text in rows]) if rows else []
        except BadCaption:
            for i, text in rows:
                try:
                    self._tokenizer([text])
                except BadCaption as error:
                    raise BadRow(i, error) from None
            raise

    def _admit(self, tokens: int) -> None:
        """Reserve room in the queue. A request larger than the whole queue is taken when nothing waits."""
        if self._waiting_tokens and self._waiting_tokens + tokens > self._queue_limit:
            seconds = self._waiting_tokens / self._tokens_per_second if self._tokens_per_second else 1.0
            raise QueueFull(
                f"{self._waiting_tokens} tokens are waiting for the engine and {tokens} more would exceed "
                f"{self._queue_limit}; try again later",
                retry_after=min(max(seconds, 1.0), 60.0),
            )
        self._waiting(tokens)

    def _waiting(self, change: int) -> None:
        self._waiting_tokens += change
        self._metrics.queue_tokens.set(self._waiting_tokens)

    def _add_worker(self) -> None:
        worker = asyncio.create_task(self._worker(), name="batches")
        worker.add_done_callback(self._worker_ended)
        self._workers.append(worker)

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        """Replace a worker that a bug has ended: without workers, misses would wait for ever."""
        self._workers.remove(worker)
        if not self._closing:
            error = None if worker.cancelled() else worker.exception()
            log.error("a batch worker ended and is replaced", exc_info=error)
            self._add_worker()

    async def _worker(self) -> None:
        while True:
            while not self._queue:
                self._work.clear()
                await self._work.wait()
            batch = self._next_batch()
            try:
                await self._compute(batch)
            except LiftError as error:
                _fail(batch, error)
            except asyncio.CancelledError:
                if self._closing:
                    raise
                # What the engine was waiting for was cancelled, not this worker.
                _fail(batch, EngineUnavailable("the engine was stopped"))
            except Exception as error:
                log.exception("a batch failed")
                _fail(batch, LiftError(f"the server failed on a batch ({type(error).__name__}); see its log"))
            finally:
                _fail(batch, EngineUnavailable("the server is stopping"))  # those that have no answer yet
                for row in batch:
                    del self._in_flight[row.key]
                self._waiting(-sum(len(row.tokens.ids) for row in batch))

    def _next_batch(self) -> list[Wanted]:
        batch = [self._queue.popleft()]
        tokens = len(batch[0].tokens.ids)
        while self._queue and len(batch) < BATCH_ROWS:
            tokens += len(self._queue[0].tokens.ids)
            if tokens > self._batch_tokens:
                break
            batch.append(self._queue.popleft())
        return batch

    async def _compute(self, batch: list[Wanted]) -> None:
        """Engine, one durable commit, answers."""
        batch = await self._answer_stored(batch)
        if not batch:
            return
        began = time.perf_counter()
        vectors = await self.engine.embed([row.tokens.ids for row in batch])
        embedded = time.perf_counter()
        if vectors.shape != (len(batch), self.cache.recipe.dimensions):
            raise VectorRejected(f"the engine gave vectors of shape {vectors.shape}; nothing was stored")
        rows = Rows(
            [row.caption for row in batch],
            vectors,
            np.array([len(row.tokens.ids) for row in batch], np.int32),
            np.array([row.tokens.truncated for row in batch], bool),
        )
        result = await asyncio.to_thread(self.cache.put, rows)
        committed = time.perf_counter()
        for i, reason in result.rejected.items():
            _fail([batch[i]], VectorRejected(f"the model gives this caption no usable vector: {reason}"))
        await self._answer_stored([row for i, row in enumerate(batch) if i not in result.rejected])
        self._measure(rows, len(result.rejected), embedded - began, committed - embedded)

    async def _answer_stored(self, batch: list[Wanted]) -> list[Wanted]:
        """Answer the rows that are in the cache, from the cache; returns the others."""
        if not batch:
            return []
        keys = np.frombuffer(b"".join(row.key for row in batch), np.uint8).reshape(len(batch), -1)
        hits = await asyncio.to_thread(self.cache.get, keys)
        for i in np.flatnonzero(hits.found).tolist():
            if not batch[i].done.done():
                computed = Computed(hits.vectors[i], int(hits.tokens[i]), bool(hits.truncated[i]))
                batch[i].done.set_result(computed)
        return [row for i, row in enumerate(batch) if not hits.found[i]]

    def _measure(self, rows: Rows, rejected: int, engine_seconds: float, commit_seconds: float) -> None:
        tokens = int(rows.tokens.sum())
        rate = tokens / engine_seconds
        self._tokens_per_second = (
            0.7 * self._tokens_per_second + 0.3 * rate if self._tokens_per_second else rate
        )
        self._metrics.embedded_tokens.inc(tokens)
        self._metrics.truncated.inc(int(rows.truncated.sum()))
        self._metrics.rejected.inc(rejected)
        self._metrics.batch_rows.observe(len(rows.captions))
        self._metrics.engine_seconds.observe(engine_seconds)
        self._metrics.commit_seconds.observe(commit_seconds)


def _normalised(index: int, caption: object) -> str:
    try:
        return normalise(caption)
    except BadCaption as error:
        raise BadRow(index, error) from None


def _result(index: int, future: asyncio.Future[Computed]) -> Computed:
    try:
        return future.result()
    except VectorRejected as error:
        raise BadRow(index, error) from None


def _fail(batch: Iterable[Wanted], error: LiftError) -> None:
    for row in batch:
        if not row.done.done():
            row.done.set_exception(error)
            row.done.exception()  # every caller may have gone away; that is no reason for a warning
