"""Who comes when, and how much may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from lift_embedder.queue import BULK_TURN, Queue, QueueFull, Wanted
from lift_embedder.tokens import Tokens


def playing(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def row(name: str, tokens: int = 10, *, bulk: bool = False) -> Wanted:
    future = asyncio.get_running_loop().create_future()
    return Wanted(name.encode(), name, Tokens([0] * tokens, False), future, bulk)


def queue(**limits: int) -> Queue:
    return Queue(**({"most_tokens": 1000, "most_bytes": 1 << 20, "batch_tokens": 100} | limits))


async def names(batch: Awaitable[list[Wanted]]) -> list[str]:
    return [row.caption or "" for row in await batch]


def test_interactive_rows_go_before_bulk_and_bulk_still_gets_its_turn() -> None:
    async def scenario() -> None:
        waiting = queue(batch_tokens=10, most_tokens=10_000)
        waiting.add([row(f"bulk {i}", bulk=True) for i in range(5)])
        waiting.add([row(f"now {i}") for i in range(20)])
        order = [(await names(waiting.batch()))[0].split()[0] for _ in range(16)]
        assert order.count("bulk") == 2 and order[BULK_TURN - 1] == "bulk" and order[0] == "now"

    playing(scenario)


def test_a_batch_has_the_tokens_that_it_may_have_and_what_is_left_goes_to_bulk() -> None:
    async def scenario() -> None:
        waiting = queue()
        waiting.add([row("bulk", 30, bulk=True)])
        waiting.add([row("a", 40), row("b", 25)])
        assert await names(waiting.batch()) == ["a", "b", "bulk"]
        waiting.add([row("giant", 500)])
        waiting.add([row("small", 1)])
        assert await names(waiting.batch()) == ["giant"]  # more than a batch: alone
        assert await names(waiting.batch()) == ["small"]

    playing(scenario)


def test_the_longest_of_a_window_come_first_and_no_window_is_overtaken() -> None:
    async def scenario() -> None:
        waiting = queue(batch_tokens=10, most_tokens=10_000)
        for i in range(3):
            waiting.add([row(f"{i}-{n}", n) for n in (3, 9, 6, 1, 2, 19)])  # 40 tokens: one window
        order = [name for _ in range(30) if len(waiting) for name in await names(waiting.batch())]
        assert [name.split("-")[0] for name in order] == ["0"] * 6 + ["1"] * 6 + ["2"] * 6
        assert order[:3] == ["0-19", "0-9", "0-6"]

    playing(scenario)


def test_room_is_counted_in_tokens_and_bytes_until_rows_are_answered() -> None:
    async def scenario() -> None:
        waiting = queue(most_tokens=100)
        waiting.add([row("a", 60)])
        with pytest.raises(QueueFull, match="60 tokens are waiting"):
            waiting.add([row("b", 41)])
        batch = await waiting.batch()
        with pytest.raises(QueueFull):  # what is in the engine still takes room
            waiting.add([row("b", 41)])
        waiting.finish(batch)
        waiting.add([row("b", 41)])
        assert waiting.rate.per_second > 0
        tight = queue(most_bytes=2_000)
        tight.add([row("word " * 100)])
        with pytest.raises(QueueFull, match="bytes"):
            tight.add([row("word " * 200)])
        tight.add([row("next", 1)])

    playing(scenario)


def test_more_than_the_whole_queue_is_taken_when_nothing_waits() -> None:
    async def scenario() -> None:
        waiting = queue(most_tokens=10)
        waiting.add([row("huge", 5000)])
        assert await names(waiting.batch()) == ["huge"]

    playing(scenario)


def test_a_row_that_nobody_wants_leaves_and_one_in_the_engine_does_not() -> None:
    async def scenario() -> None:
        waiting = queue(batch_tokens=10)
        rows = [row(f"r{i}") for i in range(6)]
        waiting.add(rows)
        (running,) = await waiting.batch()
        assert not waiting.leave(running)
        assert all(waiting.leave(one) for one in rows if one is not running)
        assert (len(waiting), waiting.rows, waiting.tokens) == (0, 1, 10)
        waiting.finish([running])
        assert (waiting.rows, waiting.tokens, waiting.bytes) == (0, 0, 0)

    playing(scenario)


def test_bulk_rows_that_somebody_waits_for_now_change_lanes() -> None:
    async def scenario() -> None:
        waiting = queue(batch_tokens=10, most_tokens=10_000)
        bulk = [row(f"bulk {i}", bulk=True) for i in range(60)]
        waiting.add(bulk)
        waiting.hurry(bulk[59])
        assert await names(waiting.batch()) == ["bulk 59"]

    playing(scenario)


def test_retry_after_follows_the_measured_rate() -> None:
    async def scenario() -> None:
        waiting = queue(most_tokens=100_000, batch_tokens=500)
        assert waiting.retry_after == 1.0
        waiting.add([row(f"r{i}", 500) for i in range(40)])
        for _ in range(3):
            batch = await waiting.batch()
            await asyncio.sleep(0.05)  # 10,000 tokens a second
            waiting.finish(batch)
        assert 1.0 < waiting.retry_after < 4.0

    playing(scenario)
