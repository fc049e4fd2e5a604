"""Keeps an engine running: starts it, checks it against the canaries, replaces it when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from lift_cache.errors import EngineUnavailable, LiftError
from lift_cache.writer import CacheWriter
from lift_embedder import canaries
from lift_embedder.engines import Engine
from lift_embedder.metrics import Metrics
from lift_embedder.tokens import CaptionTokenizer

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between a failure and the next start; doubles with every failure in a row."""

LOOK_EVERY = 1.0
"""Seconds between looks at an idle engine: one that dies unused is back before it is needed."""

BATCH_SECONDS = 300.0
"""A batch that takes longer hangs: upstream is known to lose requests."""

LOOK_AGAIN = 5.0
"""Longest Retry-After, in seconds: asking is cheap, and an engine that is back should not wait for its work."""


class Supervisor:
    """An engine that callers can treat as always there: it answers, or raises EngineUnavailable at once."""

    def __init__(
        self,
        create: Callable[[], Engine],
        tokenizer: CaptionTokenizer,
        cache: CacheWriter,
        metrics: Metrics,
        *,
        batch_seconds: float = BATCH_SECONDS,
    ) -> None:
        """
        Args:
            batch_seconds: an engine that takes longer for a batch hangs, and is replaced.
        """
        self._batch_seconds = batch_seconds
        self._create, self._tokenizer, self._cache, self._metrics = create, tokenizer, cache, metrics
        self._engine: Engine | None = None
        self._failed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._trouble = "the engine is starting"
        self._start_seconds = LOOK_AGAIN
        self._ready_at = 0.0
        self.read_only: str | None = None
        self.description: dict[str, str] = {}

    def start(self) -> None:
        """Begin loading; returns at once."""
        self._ready_at = time.monotonic() + self._start_seconds
        self._task = asyncio.create_task(self._run(), name="engine-supervisor")

    @property
    def ready(self) -> bool:
        return self._engine is not None

    @property
    def state(self) -> dict[str, str]:
        return {**self.description, "state": "ready" if self.ready else self._trouble}

    @property
    def retry_after(self) -> float:
        """Seconds until the engine is likely to be back."""
        return min(max(1.0, self._ready_at - time.monotonic()), LOOK_AGAIN)

    def require(self) -> None:
        """Raises EngineUnavailable when an `embed` would."""
        if self.read_only is not None:
            raise EngineUnavailable(f"the cache is read-only: {self.read_only}")
        if self._engine is None:
            raise EngineUnavailable(f"{self._trouble}; captions in the cache are answered meanwhile")

    async def embed(self, inputs: Sequence[list[int]]) -> np.ndarray:
        """As `Engine.embed`; a failure starts the replacement."""
        self.require()
        engine = self._engine
        assert engine is not None
        try:
            async with asyncio.timeout(self._batch_seconds):
                return await engine.embed(inputs)
        except TimeoutError:
            self._failed.set()
            raise EngineUnavailable(f"the engine did not answer within {self._batch_seconds:g} s") from None
        except EngineUnavailable:
            self._failed.set()
            raise

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            engine: Engine | None = None
            try:
                engine = self._create()
                await self._bring_up(engine)
                pause = FIRST_PAUSE
                await self._until_failure(engine)
                self._down("the engine died and is being restarted", pause)
            except LiftError as error:
                self._down(f"the engine did not start ({error}); trying again", pause)
            except TimeoutError:
                said = f"it did not embed the canaries within {self._batch_seconds:g} s"
                self._down(f"the engine did not start ({said}); trying again", pause)
            except Exception as error:
                log.exception("starting the engine failed")
                said = " ".join(f"{type(error).__name__}: {error}".split())
                self._down(f"the engine did not start ({said}); trying again", pause)
            finally:
                self._engine = None
                self._metrics.engine_up.set(0)
                if engine is not None:
                    await engine.aclose()
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            self._metrics.restarts.inc()

    async def _bring_up(self, engine: Engine) -> None:
        began = time.monotonic()
        await engine.start()
        self.description = engine.describe()
        async with asyncio.timeout(self._batch_seconds):  # one that hangs here would keep its place for ever
            self.read_only = await canaries.check(self._cache, engine, self._tokenizer)
        if self.read_only is None:
            self._cache.note_provenance(self.description)
        self._start_seconds = time.monotonic() - began
        self._failed.clear()
        self._engine = engine
        self._metrics.engine_up.set(self.read_only is None)
        log.info("engine ready", extra={"seconds": round(self._start_seconds, 1), **self.description})
        if self.read_only is not None:
            log.error("serving read-only: %s", self.read_only)

    async def _until_failure(self, engine: Engine) -> None:
        while engine.healthy() and not self._failed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), LOOK_EVERY)

    def _down(self, trouble: str, pause: float) -> None:
        self._trouble = trouble
        self._ready_at = time.monotonic() + pause + self._start_seconds
        log.error("%s", trouble)
