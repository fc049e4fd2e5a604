"""Ten times what a server can do: it answers what it can, says so to the rest, and is well right afterwards.

LIFT_OVERLOAD_SECONDS (30) is how long the overload lasts.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import RunningServer

SECONDS = float(os.environ.get("LIFT_OVERLOAD_SECONDS", "30"))
TIMES = 10
CAPTIONS = 16
"""Per request."""

QUEUE_TOKENS = 8192
BUSY = 24
"""Requests that fit into the queue together, those in bulk into their share of it."""

CONNECTIONS = 400
"""At a time."""

PATIENCE = 60.0
"""Seconds after which a client calls it a hang. What may wait is done in a fraction of that."""

MOST_GROWTH_MIB = 64
"""Private memory that the overload may add: a full queue (16 MiB), bodies and answers under way, what the
allocator keeps, and the index of rows that are added meanwhile."""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[str], Path]
) -> Iterator[RunningServer]:
    """The real vLLM behind a short queue."""
    prepared("minilm")
    folder = tmp_path_factory.mktemp("overload")
    running = RunningServer(
        folder / "cache",
        folder / "server.log",
        *("--model", "minilm", "--engine", "vllm", "--batch-tokens", 1024),
        *("--queue-tokens", QUEUE_TOKENS, "--queue-mib", 16, "--buffer-mib", 64),
    )
    yield running.wait_ready()
    assert running.stop() == 0, running.log.read_text()


def private_mib(pid: int) -> float:
    """Memory that is a process's own, without pages of files, which the kernel takes back."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


@dataclass
class Outcome:
    """Answers by status; what clients did not get; seconds that answers took."""

    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    without_retry_after: int = 0

    def slowest(self, status: int) -> float:
        return max(self.seconds.get(status, [0.0]))


class Clients:
    """Requests with captions that nobody has sent before, every other one as bulk, each on its own connection.

    Written by hand, since on a small machine a client library would be what is overloaded.
    """

    def __init__(self, url: str) -> None:
        self._host, self._port = httpx.URL(url).host, httpx.URL(url).port
        self._numbers = itertools.count()
        self._places = asyncio.Semaphore(CONNECTIONS)
        self.outcome = Outcome()

    async def request(self) -> None:
        number = next(self._numbers)
        captions = [f"garden number {number} {i} behind a house by the sea" for i in range(CAPTIONS)]
        body = json.dumps({"input": captions, "encoding_format": "base64"}).encode()
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"X-Lift-Priority: {'bulk' if number % 2 else 'interactive'}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        async with self._places:
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    status, headers = await self._exchange(head.encode() + body)
            except (OSError, EOFError, TimeoutError) as error:
                self.outcome.failures[type(error).__name__] += 1
                return
        self.outcome.statuses[status] += 1
        self.outcome.seconds.setdefault(status, []).append(time.monotonic() - began)
        if status in (429, 503) and b"\r\nretry-after:" not in headers:
            self.outcome.without_retry_after += 1

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
            json.loads(await reader.readexactly(length))
            return int(head.split()[1]), head
        finally:
            writer.close()


async def capacity(url: str) -> float:
    """Requests per second that the server finishes when it always has enough to do."""
    clients = Clients(url)
    end = time.monotonic() + max(6.0, SECONDS / 5)

    async def one_after_another() -> None:
        while time.monotonic() < end:
            await clients.request()

    began = time.monotonic()
    # As many as the queue holds, so that batches are full and none is refused.
    await asyncio.gather(*(one_after_another() for _ in range(BUSY)))
    seconds = time.monotonic() - began
    assert set(clients.outcome.statuses) == {200} and not clients.outcome.failures, clients.outcome
    return clients.outcome.statuses[200] / seconds


async def overload(
    url: str, per_second: float, watch: Callable[[], object], then: Callable[[], object]
) -> tuple[Outcome, int]:
    """Requests at a steady rate, whatever becomes of them. Returns what became, and how many there were.

    Args:
        watch: done again and again meanwhile.
        then: done when no more are sent, while those that were accepted are still under way.
    """
    clients = Clients(url)
    began = time.monotonic()
    running: set[asyncio.Task[None]] = set()
    sent = 0
    looked = asyncio.create_task(asyncio.to_thread(watch))
    while (now := time.monotonic() - began) < SECONDS:
        while sent < now * per_second:
            task = asyncio.create_task(clients.request())
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        if looked.done():
            await looked
            looked = asyncio.create_task(asyncio.to_thread(watch))
        await asyncio.sleep(0.005)
    await looked
    await asyncio.to_thread(then)
    await asyncio.gather(*running)
    return clients.outcome, sent


def test_ten_times_what_it_can_do_is_answered_or_refused_in_flat_memory_and_forgotten_at_once(
    server: RunningServer,
) -> None:
    able = asyncio.run(capacity(server.url))
    hit = [f"garden number 0 {i} behind a house by the sea" for i in range(CAPTIONS)]
    tokens = server.embed(hit).json()["usage"]["total_tokens"]
    before = private_mib(server.process.pid)
    memory: list[float] = []
    hits: list[float] = []

    def watch() -> None:
        time.sleep(0.5)
        memory.append(private_mib(server.process.pid))
        began = time.monotonic()
        answer = server.embed(hit)
        hits.append(time.monotonic() - began)
        assert answer.status_code == 200 and all(row["cached"] for row in answer.json()["data"])

    recovered = 0.0

    def then() -> None:
        nonlocal recovered
        began = time.monotonic()
        assert server.embed(["right after the storm"]).status_code == 200
        recovered = time.monotonic() - began

    outcome, sent = asyncio.run(overload(server.url, TIMES * able, watch, then))
    memory.append(private_mib(server.process.pid))
    goodput = outcome.statuses[200] / SECONDS
    print(
        f"\nable {able * CAPTIONS:.0f} captions/s; offered {sent / SECONDS * CAPTIONS:.0f}/s for {SECONDS:.0f} s: "
        f"{dict(outcome.statuses)}, {goodput * CAPTIONS:.0f} captions/s; slowest 200 {outcome.slowest(200):.1f} s, "
        f"429 {outcome.slowest(429):.1f} s; hits meanwhile at most {max(hits):.2f} s; memory {before:.0f} MiB, then "
        f"at most {max(memory):.0f}; a miss right afterwards {recovered:.2f} s"
    )
    assert not outcome.failures, f"clients without an answer: {dict(outcome.failures)}"
    assert sum(outcome.statuses.values()) == sent
    assert set(outcome.statuses) <= {200, 429, 503} and outcome.statuses[429] > 0
    assert not outcome.without_retry_after
    assert goodput > able / 4, "overloaded, it does far less than it can"
    assert max(memory) - before < MOST_GROWTH_MIB
    # What was accepted goes first, and that is little.
    assert recovered < 5 + 2 * QUEUE_TOKENS / (able * tokens)
