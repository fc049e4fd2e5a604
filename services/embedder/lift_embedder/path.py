"""The way of a caption: key → cache → coalesce → queue → engine → put → acknowledge.

    embed      answers hits from the cache; misses join the computation that is under way, or the queue
    _workers   take batches: engine, then one durable commit per batch, then the answers

A vector is read back from the cache after it was committed, so a miss and every later hit are the same bits.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lift_cache.errors import BadCaption, EngineUnavailable, LiftError, VectorRejected
from lift_cache.keys import keyed
from lift_cache.writer import CacheWriter, Hits, Rows
from lift_embedder.metrics import Metrics
from lift_embedder.queue import Computed, Queue, Wanted
from lift_embedder.supervisor import Supervisor
from lift_embedder.tokens import NO_TOKEN, CaptionTokenizer, Tokens

log = logging.getLogger(__name__)

WORKERS = 2
"""Batches under way: the engine need not wait while the one before is committed."""


FEW = 8
"""Rows that are looked up on the event loop: handing one hit to a thread and back takes longer than reading it."""


class BadRow(LiftError):
    """One row of a request that cannot be answered; `index` says which."""

    def __init__(self, index: int, cause: LiftError) -> None:
        super().__init__(f"input[{index}]: {cause}")
        self.index, self.cause = index, cause


@dataclass(frozen=True)
class Answer:
    """vectors float32 [n, d] as stored · cached bool [n] · tokens int32 [n] · truncated bool [n].

    `errors` has what is wrong with single rows, by position; these hold zeros.
    """

    vectors: np.ndarray
    cached: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    errors: dict[int, LiftError] = field(default_factory=dict)


class EmbeddingPath:
    """All of its state belongs to the event loop; tokenising and disk work run in threads."""

    def __init__(
        self,
        cache: CacheWriter,
        tokenizer: CaptionTokenizer,
        engine: Supervisor,
        metrics: Metrics,
        queue: Queue,
    ) -> None:
        self.cache, self.tokenizer, self.engine, self.queue = cache, tokenizer, engine, queue
        self._metrics = metrics
        metrics.queue_tokens.set_function(lambda: queue.tokens)
        metrics.queue_rows.set_function(lambda: queue.rows)
        metrics.queue_bytes.set_function(lambda: queue.bytes)
        self._in_flight: dict[bytes, Wanted] = {}
        self._numbers = itertools.count()
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
        _fail(self.queue.drain(), EngineUnavailable("the server is stopping"))
        await self.engine.aclose()

    async def embed(self, captions: Sequence[object], *, bulk: bool = False, each: bool = False) -> Answer:
        """Vectors of n captions, durable when this returns. Cancelled, it gives its place in the queue back.

        Args:
            bulk: others may go first.
            each: a row that cannot be embedded gets its own error, in `Answer.errors`; otherwise all or nothing.

        Raises:
            BadRow: a caption that cannot be embedded, or whose vector cannot be stored.
            QueueFull, EngineUnavailable: misses cannot be computed now; hits alone still can.
            CacheFull, StorageFailed, CacheDamaged.
        """
        texts, keys, unusable = keyed(captions)
        errors: dict[int, LiftError] = {i: BadCaption(reason) for i, reason in unusable.items()}
        _require_good(errors, each)
        hits = await self._hits(keys)
        found = int(np.count_nonzero(hits.found))
        self._metrics.captions.labels("hit").inc(found)
        answer = Answer(hits.vectors, hits.found, hits.tokens, hits.truncated, errors)
        if found == len(texts):
            return answer
        missing = [i for i in np.flatnonzero(~hits.found).tolist() if i not in errors]
        if not missing:
            return answer
        names = {i: keys[i].tobytes() for i in missing}
        rows: dict[bytes, Wanted] = {}
        try:
            wordless = await self._join({names[i]: texts[i] for i in missing}, rows, bulk=bulk)
            errors |= {i: BadCaption(NO_TOKEN) for i in missing if names[i] in wordless}
            _require_good(errors, each)
            if rows:
                # Unlike gather, this leaves the futures alone when the caller goes away.
                await asyncio.wait([row.done for row in rows.values()])
        finally:
            for row in rows.values():
                self._leave(row)
        for i in missing:
            if i not in errors:
                _enter(answer, i, rows[names[i]])
        _require_good(errors, each)
        return answer

    async def embed_tokens(self, inputs: Sequence[list[int]], *, bulk: bool = False) -> Answer:
        """Vectors of n token sequences as they stand: computed, checked, never cached.

        Raises:
            BadRow: a sequence that the model does not take, or a vector that cannot be vouched for.
            QueueFull, EngineUnavailable.
        """
        most = self.tokenizer.recipe.max_tokens
        for i, ids in enumerate(inputs):
            if not 1 <= len(ids) <= most:
                raise BadRow(i, BadCaption(f"{len(ids)} tokens; this model takes 1 to {most}"))
            if not all(0 <= token < self.tokenizer.vocabulary for token in ids):
                raise BadRow(i, BadCaption(f"token ids go from 0 to {self.tokenizer.vocabulary - 1}"))
        self.engine.require()
        rows = [
            self._wanted(b"ids-%d" % next(self._numbers), None, Tokens(ids, False), bulk) for ids in inputs
        ]
        self._add(rows, rows)
        try:
            await asyncio.wait([row.done for row in rows])
        finally:
            for row in rows:
                self._leave(row)
        n = len(rows)
        vectors = np.zeros((n, self.cache.recipe.dimensions), np.float32)
        answer = Answer(vectors, np.zeros(n, bool), np.zeros(n, np.int32), np.zeros(n, bool))
        for i, row in enumerate(rows):
            _enter(answer, i, row)
        _require_good(answer.errors, each=False)
        return answer

    async def _hits(self, keys: np.ndarray) -> Hits:
        if len(keys) <= FEW and self.cache.sound:
            return self.cache.get(keys)
        return await asyncio.to_thread(self.cache.get, keys)

    async def _join(
        self, wanted: dict[bytes, str], rows: dict[bytes, Wanted], *, bulk: bool
    ) -> frozenset[bytes]:
        """Have distinct missing captions (key → text) computed; `rows` gets what is to be waited for, and left.

        Returns:
            The keys of captions without a token.
        """
        self.engine.require()
        for key in wanted:
            if key in self._in_flight:
                rows[key] = self._take_part(self._in_flight[key], bulk)
        new = [key for key in wanted if key not in rows]
        self._metrics.captions.labels("coalesced").inc(len(rows))
        if not new:
            return frozenset()
        self.queue.require_room(len(new), 0, bulk=bulk)  # before work is spent on what will be refused
        tokens = await asyncio.to_thread(self.tokenizer.each, [wanted[key] for key in new])
        # Nothing else runs from here to the end. What another request queued meanwhile is joined; what one
        # finished meanwhile is found in the cache by the worker.
        here, queued = [], []
        wordless = set()
        for key, found in zip(new, tokens, strict=True):
            if key in self._in_flight:
                here.append(self._in_flight[key])
            elif found is None:
                wordless.add(key)
            else:
                queued.append(self._wanted(key, wanted[key], found, bulk))
        self._add(queued, [*here, *queued])
        rows |= {row.key: row for row in (*here, *queued)}
        self._metrics.captions.labels("miss").inc(len(queued))
        self._metrics.captions.labels("coalesced").inc(len(here))
        return frozenset(wordless)

    def _wanted(self, key: bytes, caption: str | None, tokens: Tokens, bulk: bool) -> Wanted:
        return Wanted(key, caption, tokens, asyncio.get_running_loop().create_future(), bulk)

    def _add(self, queued: Sequence[Wanted], wanted: Sequence[Wanted]) -> None:
        """Queue some rows, and take part in all that are wanted; all or, with QueueFull, none."""
        self.queue.add(queued)
        self._in_flight.update({row.key: row for row in queued})
        for row in wanted:
            self._take_part(row, row.bulk)

    def _take_part(self, row: Wanted, bulk: bool) -> Wanted:
        row.waiters += 1
        if not bulk:
            self.queue.hurry(row)
        return row

    def _leave(self, row: Wanted) -> None:
        row.waiters -= 1
        if not row.waiters and not row.done.done() and self.queue.leave(row):
            del self._in_flight[row.key]

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
            batch = await self.queue.batch()
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
                self.queue.finish(batch)

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
        tokens = sum(len(row.tokens.ids) for row in batch)
        self._metrics.embedded_tokens.inc(tokens)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_rows.observe(len(batch))
        self._metrics.engine_seconds.observe(embedded - began)
        bare = [i for i, row in enumerate(batch) if row.caption is None]
        for i in bare:
            _answer_bare(batch[i], vectors[i])
        if len(bare) == len(batch):
            return
        if bare:
            kept = [i for i, row in enumerate(batch) if row.caption is not None]
            batch, vectors = [batch[i] for i in kept], vectors[kept]
        await self._store(batch, vectors)
        self._metrics.commit_seconds.observe(time.perf_counter() - embedded)

    async def _store(self, batch: list[Wanted], vectors: np.ndarray) -> None:
        rows = Rows(
            [row.caption or "" for row in batch],
            vectors,
            np.array([len(row.tokens.ids) for row in batch], np.int32),
            np.array([row.tokens.truncated for row in batch], bool),
        )
        result = await asyncio.to_thread(self.cache.put, rows)
        for i, reason in result.rejected.items():
            _fail([batch[i]], VectorRejected(f"the model gives this caption no usable vector: {reason}"))
        await self._answer_stored([row for i, row in enumerate(batch) if i not in result.rejected])
        self._metrics.truncated.inc(int(rows.truncated.sum()))
        self._metrics.rejected.inc(len(result.rejected))

    async def _answer_stored(self, batch: list[Wanted]) -> list[Wanted]:
        """Answer the rows that are in the cache, from the cache; returns the others."""
        stored = [row for row in batch if row.caption is not None]
        if not stored:
            return batch
        keys = np.frombuffer(b"".join(row.key for row in stored), np.uint8).reshape(len(stored), -1)
        hits = await asyncio.to_thread(self.cache.get, keys)
        for i in np.flatnonzero(hits.found).tolist():
            if not stored[i].done.done():
                computed = Computed(hits.vectors[i], int(hits.tokens[i]), bool(hits.truncated[i]))
                stored[i].done.set_result(computed)
        return [row for row in batch if not row.done.done()]


def _answer_bare(row: Wanted, vector: np.ndarray) -> None:
    """Answer token ids with what the engine made of them, if that is a vector."""
    if not np.isfinite(vector).all() or not vector.any():
        _fail([row], VectorRejected("the model gives these tokens no usable vector"))
    elif not row.done.done():
        row.done.set_result(Computed(vector, len(row.tokens.ids), False))


def _require_good(errors: dict[int, LiftError], each: bool) -> None:
    if errors and not each:
        first = min(errors)
        raise BadRow(first, errors[first])


def _enter(answer: Answer, i: int, row: Wanted) -> None:
    """Copy the outcome of a row into an answer. Raises what concerns more than this row."""
    try:
        found = row.done.result()
    except VectorRejected as error:
        answer.errors[i] = error
        return
    answer.vectors[i], answer.tokens[i], answer.truncated[i] = found.vector, found.tokens, found.truncated


def _fail(batch: Iterable[Wanted], error: LiftError) -> None:
    for row in batch:
        if not row.done.done():
            row.done.set_exception(error)
            row.done.exception()  # every caller may have gone away; that is no reason for a warning
