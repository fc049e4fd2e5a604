"""Faults under a real server that is busy: what was acknowledged stays, what cannot be answered is said so.

A killed fill, a full disk under a fill and a canary's arithmetic are in test_fill.py and test_path.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lift_cache.client import EmbeddingClient
from lift_cache.keys import caption_keys
from lift_cache.writer import CacheWriter
from tests.service.conftest import RunningServer
from tests.service.load import AWAY, Load, require_kept

KNOWN = [f"boat number {i} known from before" for i in range(20)]

BATCH_SECONDS = 8
"""Deadline of a batch of 512 tokens, which takes a quarter of a second on an idle core."""


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[str], Path]
) -> Iterator[RunningServer]:
    """The real vLLM with a short deadline; every test leaves it well."""
    prepared("minilm")
    folder = tmp_path_factory.mktemp("shared")
    running = RunningServer(
        folder / "cache",
        folder / "server.log",
        *("--model", "minilm", "--engine", "vllm", "--store", "float32"),
        *("--batch-tokens", 512, "--batch-seconds", BATCH_SECONDS),
    )
    yield running.wait_ready()
    assert running.stop() == 0, running.log.read_text()


def ready(running: RunningServer) -> bool:
    return httpx.get(f"{running.url}/readyz").status_code == 200


def require_hits(running: RunningServer) -> None:
    """What is known is answered, with the bits it has had since it was first answered."""
    with EmbeddingClient(running.url, patience=0) as client:
        assert client.embed(KNOWN).cached.all()


def test_an_engine_killed_under_load_costs_its_batches_and_nothing_that_was_acknowledged(
    shared: RunningServer, wait_until: Any
) -> None:
    assert shared.embed(KNOWN).status_code == 200
    restarts = shared.metric("lift_engine_restarts_total")
    with Load(shared.url, words="of the killed engine") as load:
        assert wait_until(lambda: len(load.acknowledged) > 100, 60)
        os.kill(shared.engine_core(), signal.SIGKILL)
        assert wait_until(lambda: load.statuses[503] > 0, 10)
        require_hits(shared)
        assert wait_until(lambda: ready(shared), 90)
        before = len(load.acknowledged)
        assert wait_until(lambda: len(load.acknowledged) > before + 100, 60)
    assert set(load.statuses) <= {200, 503}
    assert {error["code"] for error in load.errors} == {"engine_unavailable"}
    assert shared.metric("lift_engine_restarts_total") == restarts + 1
    with EmbeddingClient(shared.url) as client:
        assert client.embed(list(load.acknowledged)[-1000:]).cached.all()


def test_an_engine_that_hangs_is_replaced_after_its_deadline_while_hits_are_answered(
    shared: RunningServer, wait_until: Any, alive: Any
) -> None:
    assert shared.embed(KNOWN).status_code == 200
    hung = shared.engine_core()
    os.kill(hung, signal.SIGSTOP)
    try:
        with Load(shared.url, threads=2, words="of the hung engine") as load:
            began = time.monotonic()
            while not load.statuses[503]:
                require_hits(shared)
                assert time.monotonic() - began < 3 * BATCH_SECONDS
                time.sleep(0.2)
            assert time.monotonic() - began > BATCH_SECONDS - 1
            require_hits(shared)
            assert wait_until(lambda: not alive(hung), 30), "the hung engine was left running"
            assert wait_until(lambda: ready(shared), 90)
            assert wait_until(lambda: len(load.acknowledged) > 50, 60)
    finally:
        if alive(hung):
            os.kill(hung, signal.SIGCONT)
    assert set(load.statuses) <= {200, 503}
    with EmbeddingClient(shared.url) as client:
        assert client.embed(list(load.acknowledged)).cached.all()


def test_captions_of_a_client_that_is_gone_are_not_computed(
    shared: RunningServer, wait_until: Any, alive: Any
) -> None:
    core = shared.engine_core()
    computed = shared.metric("lift_embedded_tokens_total")
    with EmbeddingClient(shared.url) as other:
        assert other.embed(KNOWN).vectors.any()
    os.kill(core, signal.SIGSTOP)
    try:
        captions = [f"tree number {i} that nobody waits for" for i in range(1000)]
        body = json.dumps({"input": captions}).encode()
        host, port = httpx.URL(shared.url).host, httpx.URL(shared.url).port
        with socket.create_connection((host, port or 80)) as client:
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert wait_until(lambda: shared.metric("lift_queue_tokens") > 8000, 5)
        assert wait_until(lambda: shared.metric("lift_queue_tokens") <= 2 * 512, 5)
    finally:
        os.kill(core, signal.SIGCONT)
    assert wait_until(lambda: shared.metric("lift_queue_tokens") == 0, 30)
    assert shared.metric("lift_embedded_tokens_total") - computed <= 2 * 512 + 20 * 12
    assert shared.metric("lift_clients_left_total") >= 1
    assert shared.embed(KNOWN).status_code == 200


def test_sigterm_under_load_answers_what_is_under_way_and_every_answer_is_in_the_cache(
    serve: Callable[..., Any], tmp_path: Path, alive: Any, wait_until: Any
) -> None:
    drain = 20
    running = serve("--engine", "vllm", "--batch-tokens", 512, "--drain-seconds", drain).wait_ready()
    children = running.children()
    with Load(running.url, words="of the server that stops") as load:
        assert wait_until(lambda: len(load.acknowledged) > 200, 60)
        began = time.monotonic()
        assert running.stop(signal.SIGTERM) == 0
        seconds = time.monotonic() - began
    assert seconds < drain + 15
    assert set(load.statuses) <= {200, 503, AWAY}
    assert wait_until(lambda: not any(alive(pid) for pid in children), 5), "a process was left over"
    with CacheWriter.open(tmp_path / "cache") as cache:
        require_kept(cache, load)
    print(f"stopped after {seconds:.1f} s; {dict(load.statuses)}")


IMMUNE = """\
import os, sys
if "--multiprocessing-fork" in sys.orig_argv:  # the engine's child: what it must not survive, it survives
    os.environ.pop("LIFT_ENGINE_CHILD", None)
"""


def test_a_server_killed_under_load_with_its_engine_left_alive_is_followed_by_the_next_within_10_s(
    serve: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alive: Any,
    wait_until: Any,
) -> None:
    (tmp_path / "immune").mkdir()
    (tmp_path / "immune" / "sitecustomize.py").write_text(IMMUNE)
    with monkeypatch.context() as patch:
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "immune"), *([before] if before else [])]))
        running = serve("--engine", "vllm", "--batch-tokens", 512).wait_ready()
    core = running.engine_core()
    try:
        with Load(running.url, words="of the killed server") as load:
            assert wait_until(lambda: len(load.acknowledged) > 200, 60)
            running.stop(signal.SIGKILL)
        time.sleep(1)
        assert alive(core)
        began = time.monotonic()
        CacheWriter.open(tmp_path / "cache").close()
        seconds = time.monotonic() - began
        assert seconds < 10
        following = serve("--engine", "transformers")
        captions = list(load.acknowledged)
        answer = httpx.post(f"{following.url}/v1/lookup", json={"input": captions[-2000:]}).json()
        assert all(row["found"] for row in answer["data"])
        assert following.wait_ready().embed(["a caption for the next server"]).status_code == 200
        assert alive(core)
        assert following.stop() == 0
    finally:
        os.kill(core, signal.SIGKILL)
    with CacheWriter.open(tmp_path / "cache") as cache:
        require_kept(cache, load)
    print(f"opened after {seconds:.2f} s")


def test_a_server_whose_engine_no_longer_gives_the_canaries_serves_what_it_knows_and_says_why(
    serve: Callable[..., Any], tmp_path: Path, wait_until: Any
) -> None:
    first = serve("--engine", "transformers").wait_ready()
    assert first.embed(KNOWN).status_code == 200
    assert first.stop() == 0
    file = tmp_path / "cache" / "canaries.json"
    good = file.read_bytes()
    canaries = json.loads(good)
    canaries["vectors"][1] = canaries["vectors"][1][::-1]
    file.write_text(json.dumps(canaries))

    running = serve("--engine", "transformers")

    def card() -> Any:
        return httpx.get(f"{running.url}/v1/cache").json()

    assert wait_until(lambda: card()["read_only"], 60)
    assert "no longer agrees" in card()["read_only"] and canaries["captions"][1] in card()["read_only"]
    require_hits(running)
    for refused in (running.embed(["a caption that is new"]), httpx.get(f"{running.url}/readyz")):
        assert refused.status_code == 503 and "read-only" in refused.json()["error"]["message"]
    assert card()["rows"] == len(KNOWN)
    assert running.stop() == 0

    file.write_bytes(good)
    again = serve("--engine", "transformers").wait_ready()
    assert again.embed(["a caption that is new"]).status_code == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_said_hits_go_on_and_with_room_so_does_everything(
    serve: Callable[..., Any], small_disk: Path, wait_until: Any
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    running = serve(
        "--engine", "transformers", "--batch-tokens", 1024, cache=small_disk / "cache"
    ).wait_ready()
    assert running.embed(KNOWN).status_code == 200
    with Load(running.url, threads=2, captions=50, words="of the full disk") as load:
        assert wait_until(lambda: load.statuses[507] > 0, 120), load.statuses
        require_hits(running)
        ballast.unlink()
        before = len(load.acknowledged)
        assert wait_until(lambda: len(load.acknowledged) > before + 100, 30), "room did not help"
    assert set(load.statuses) == {200, 507}
    assert {error["code"] for error in load.errors} == {"cache_full"}
    assert running.stop() == 0
    with CacheWriter.open(small_disk / "cache") as cache:
        require_kept(cache, load)
        assert np.isfinite(cache.get(caption_keys(KNOWN)).vectors).all()
