"""What the page is told of the last hour: rates, shares, growth, errors; in bounded memory and at no cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter

from lift_cache.errors import StorageFailed
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter, Rows
from lift_embedder import history as module
from lift_embedder.history import ERRORS, MESSAGE_CHARACTERS, POINTS, History, total
from lift_embedder.metrics import Metrics


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe) -> Iterator[CacheWriter]:
    with CacheWriter.open(tmp_path / "cache", recipe) as cache:
        yield cache


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let seconds pass."""
    passed = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: passed[0])

    def advance(seconds: float) -> None:
        passed[0] += seconds

    return advance


def put(cache: CacheWriter, captions: list[str], vectors: Callable[..., np.ndarray]) -> None:
    n = len(captions)
    cache.put(Rows(captions, vectors(n), np.full(n, 5, np.int32), np.zeros(n, bool)))


def test_a_point_holds_what_the_cache_and_the_counters_say(
    cache: CacheWriter, vectors: Callable[..., np.ndarray]
) -> None:
    history, metrics = History(), Metrics()
    put(cache, ["a dog", "a cat"], vectors)
    for how, count in (("hit", 5), ("miss", 2), ("coalesced", 1)):
        metrics.captions.labels(how).inc(count)
    metrics.embedded_tokens.inc(10)
    metrics.queue_tokens.set(7)
    point = asyncio.run(history.sample(cache, metrics))
    assert (point.rows, point.hits, point.misses, point.coalesced, point.captions) == (2, 5, 2, 1, 8)
    assert (point.embedded_tokens, point.queue_tokens) == (10, 7)
    assert point.size > 0 and abs(point.at - time.time()) < 5
    assert history.look is not None and history.look.stats.fresh_rows == 2 and history.look.snapshot is None
    made = cache.snapshot()
    asyncio.run(history.sample(cache, metrics))
    assert history.look.snapshot == made.id and history.look.stats.size > 0


def test_an_hour_is_kept_and_no_more(cache: CacheWriter, clock: Callable[[float], None]) -> None:
    history, metrics = History(), Metrics()

    async def fill() -> None:
        for _ in range(POINTS + 10):
            clock(5)
            await history.sample(cache, metrics)

    asyncio.run(fill())
    points = history.points()
    assert len(points) == POINTS and points[-1].at - points[0].at == pytest.approx(5 * (POINTS - 1))
    assert [point.at for point in history.points(points[-3].at)] == [points[-2].at, points[-1].at]
    assert history.before(points[-1], 15).at == pytest.approx(points[-1].at - 10)


def test_time_set_back_does_not_mix_up_the_points(
    cache: CacheWriter, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, metrics = History(), Metrics()
    first = asyncio.run(history.sample(cache, metrics))
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    clock(5)
    assert asyncio.run(history.sample(cache, metrics)).at == pytest.approx(first.at + 5)


def test_errors_are_kept_newest_first_and_those_that_differ_in_numbers_alone_share_a_line() -> None:
    history = History()
    history.error(400, "invalid_caption", "input[3]: the caption is empty", "one")
    for waiting in range(1000):
        history.error(429, "queue_full", f"{waiting} tokens are waiting", f"r{waiting}")
    newest, oldest = history.errors()
    assert (newest.status, newest.count, newest.message) == (429, 1000, "999 tokens are waiting")
    assert newest.request_id == "r999" and newest.first <= newest.last
    assert (oldest.code, oldest.count) == ("invalid_caption", 1)
    history.error(400, "invalid_caption", "input[8]: the caption is empty", "two")
    assert [(line.code, line.count) for line in history.errors()] == [
        ("invalid_caption", 2),
        ("queue_full", 1000),
    ]


def test_errors_take_bounded_memory_and_cannot_disguise_themselves() -> None:
    history = History()
    for number in range(ERRORS + 5):
        history.error(404, "model_not_found", f"not {chr(0x4E00 + number)}", "r")
    history.error(404, "model_not_found", "x" * 10_000, "r")
    history.error(404, "model_not_found", "\x1b[31m\u202eevil\x00" * 1000, "r")
    lines = list(history.errors())
    assert len(lines) == ERRORS and max(len(line.message) for line in lines) == MESSAGE_CHARACTERS
    assert all(line.message.isprintable() for line in lines)


def test_a_counter_may_get_further_labels() -> None:
    counter = Counter("c", "c", ["how", "priority"], registry=CollectorRegistry())
    counter.labels("hit", "bulk").inc(3)
    counter.labels("hit", "interactive").inc(4)
    counter.labels("miss", "bulk").inc(2)
    assert (total(counter, how="hit"), total(counter, how="none"), total(counter)) == (7, 0, 9)


def test_a_cache_that_cannot_be_read_for_a_while_stops_nothing(
    cache: CacheWriter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.001)
    history = History()
    service: Any = SimpleNamespace(cache=cache, metrics=Metrics())
    stats, looks = cache.stats, []

    def fail_twice() -> Any:
        looks.append(1)
        if len(looks) in (2, 3):
            raise StorageFailed("the disk is away")
        return stats()

    monkeypatch.setattr(cache, "stats", fail_twice)

    async def scene() -> None:
        task = asyncio.create_task(history.run(service))
        while len(history.points()) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    assert [record.getMessage() for record in caplog.records] == [
        "the page's figures stand still: the disk is away"
    ]
