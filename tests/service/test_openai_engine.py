"""vLLM's own server as upstream: the same vectors as from the engine in process, or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lift_cache.client import EmbeddingClient
from lift_cache.keys import caption_keys
from lift_cache.recipe import MOST_DRIFT, Recipe
from lift_cache.writer import CacheWriter

CAPTIONS = [
    "a red circle above a blue square",
    "🍎 émoji and ünïcode, 猫",
    "names of special tokens are text: [SEP] [CLS] [UNK]",
    "word " * 300,
    *(f"photo number {i} of a {'very ' * (i % 7)}old house by the sea" for i in range(60)),
]
NEW = [f"a boat that nobody saw before, number {i}" for i in range(20)]


@pytest.fixture(scope="module")
def upstream(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of vLLM's server, which serves MiniLM as the recipe has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(prepared("minilm"))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "all-MiniLM-L6-v2"]
    command += ["--runner", "pooling", "--dtype", "float32", "--max-model-len", "257", "--enforce-eager"]
    command += ["--pooler-config", '{"seq_pooling_type": "MEAN"}', "--api-key", "sk-upstream"]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    log = tmp_path_factory.mktemp("upstream") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **settings})
    url = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def verified(
    start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    """A cache that the engine in process has filled, and what it holds."""
    folder = tmp_path_factory.mktemp("verified")
    running = start_server(folder, "--engine", "vllm", "--store", "float32").wait_ready()
    with EmbeddingClient(running.url) as client:
        answer = client.embed(CAPTIONS)
    assert running.stop() == 0
    return folder / "cache", dict(zip(CAPTIONS, answer.vectors, strict=True))


@pytest.fixture(scope="module")
def start_server(prepared: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """As `serve`, for fixtures that several tests share."""
    from tests.service.conftest import RunningServer

    prepared("minilm")
    started: list[Any] = []

    def start(folder: Path, *flags: object) -> Any:
        started.append(RunningServer(folder / "cache", folder / "server.log", "--model", "minilm", *flags))
        return started[-1]

    yield start
    for server in started:
        server.stop(9)


class Door:
    """A second address of the upstream server, which can be shut and opened again."""

    def __init__(self, url: str) -> None:
        self._to = (httpx.URL(url).host, httpx.URL(url).port)
        self._open: list[socket.socket] = []
        self.bytes = 0
        self._listen(0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                inside, _ = listener.accept()
                outside = socket.create_connection(self._to)
                self._open += [inside, outside]
                for one, other in ((inside, outside), (outside, inside)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.bytes += len(data)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def shut(self) -> None:
        """Refuse new connections and drop those that are open."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def open(self) -> None:
        self._listen(self.port)


@pytest.fixture
def door(upstream: str) -> Iterator[Door]:
    door = Door(upstream)
    yield door
    door.shut()


@pytest.fixture
def serve_fleet(
    serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Start a server whose engine is upstream."""
    monkeypatch.setenv("LIFT_UPSTREAM_KEY", "sk-upstream")

    def start(*urls: str, cache: Path | None = None, flags: tuple[object, ...] = ()) -> Any:
        named = [part for url in urls for part in ("--upstream", url)]
        return serve("--engine", "openai", *named, *flags, cache=cache)

    return start


def copy_of(cache: Path, to: Path) -> Path:
    return Path(shutil.copytree(cache, to / "cache"))


def card(running: Any) -> dict[str, Any]:
    body = httpx.get(f"{running.url}/v1/cache").json()
    assert isinstance(body, dict)
    return body


def until_engine(running: Any, wait_until: Any) -> dict[str, Any]:
    """The cache's card once the engine has started, or is found not to agree."""
    assert wait_until(
        lambda: card(running)["read_only"] or card(running)["engine"]["state"] == "ready", 60
    ), running.log.read_text()
    return card(running)


def drift(a: np.ndarray, b: np.ndarray) -> float:
    """Largest 1 − cosine of rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).max())


@pytest.mark.parametrize("form", ["ids", "text"])
def test_a_fleet_gives_the_vectors_that_the_engine_in_process_gives(
    form: str,
    upstream: str,
    verified: tuple[Path, dict[str, np.ndarray]],
    serve_fleet: Callable[..., Any],
    tmp_path: Path,
) -> None:
    running = serve_fleet(upstream, flags=("--store", "float32", "--upstream-input", form)).wait_ready()
    with EmbeddingClient(running.url) as client:
        answer = client.embed(CAPTIONS)
    assert not answer.cached.any() and answer.truncated.sum() == 1
    expected = np.stack([verified[1][caption] for caption in CAPTIONS])
    found = drift(answer.vectors, expected)
    print(f"largest drift, {form}: {found:.2g}")
    assert found <= MOST_DRIFT["float32"] / 10
    assert np.linalg.norm(answer.vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert running.stop() == 0
    recipe = Recipe.load(tmp_path / "cache" / "recipe.json")
    known = Recipe.load(verified[0] / "recipe.json")
    assert [difference[0] for difference in recipe.differences(known)] == ["declared"] and recipe.declared
    (made,) = json.loads((tmp_path / "cache" / "provenance.json").read_text())
    assert made["engine"] == "openai" and made["upstream_model"] == "all-MiniLM-L6-v2"
    assert made["upstream"] in upstream and made["upstream_software"] == "vllm"
    assert "sk-upstream" not in running.log.read_text()


def test_a_fleet_adds_to_a_verified_cache_once_the_canaries_agree(
    upstream: str,
    verified: tuple[Path, dict[str, np.ndarray]],
    serve_fleet: Callable[..., Any],
    tmp_path: Path,
) -> None:
    cache = copy_of(verified[0], tmp_path)
    running = serve_fleet(upstream, cache=cache).wait_ready()
    with EmbeddingClient(running.url) as client:
        assert not client.info().recipe.declared
        held = client.embed(CAPTIONS)
        assert held.cached.all() and np.array_equal(held.vectors, np.stack(list(verified[1].values())))
        assert not client.embed(NEW).cached.any()
    assert running.stop() == 0
    with CacheWriter.open(cache) as writer:
        assert writer.contains(caption_keys([*CAPTIONS, *NEW])).all() and not writer.recipe.declared


def test_a_fleet_that_pools_otherwise_is_found_out_by_the_canaries(
    upstream: str,
    serve: Callable[..., Any],
    serve_fleet: Callable[..., Any],
    tmp_path: Path,
    wait_until: Any,
) -> None:
    cache = tmp_path / "cls"
    other = serve("--engine", "transformers", "--pooling", "cls", cache=cache).wait_ready()
    assert other.embed(CAPTIONS).status_code == 200
    assert other.stop() == 0
    running = serve_fleet(upstream, cache=cache, flags=("--pooling", "cls"))
    assert "no longer agrees with the cache" in until_engine(running, wait_until)["read_only"]
    assert all(row["cached"] for row in running.embed(CAPTIONS).json()["data"])
    refused = running.embed(NEW)
    assert refused.status_code == 503 and "read-only" in refused.json()["error"]["message"]
    assert card(running)["rows"] == len(CAPTIONS)


def test_another_model_behind_the_url_is_no_engine(
    upstream: str, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setenv("LIFT_UPSTREAM_KEY", "sk-upstream")
    running = serve("--engine", "openai", "--upstream", upstream, "--max-tokens", 256, model="smollm2")
    assert wait_until(lambda: "did not start" in card(running)["engine"]["state"], 60), (
        running.log.read_text()
    )
    trouble = card(running)["engine"]["state"]
    # Its tokens are others, and so would its vectors' dimensions be.
    assert str(httpx.URL(upstream).port) in trouble and "out of vocabulary" in trouble
    assert running.embed(NEW).status_code == 503 and card(running)["rows"] == 0


def test_a_verified_cache_without_canaries_takes_nothing_from_a_fleet(
    upstream: str,
    verified: tuple[Path, dict[str, np.ndarray]],
    serve_fleet: Callable[..., Any],
    tmp_path: Path,
    wait_until: Any,
) -> None:
    CacheWriter.open(tmp_path / "new", Recipe.load(verified[0] / "recipe.json")).close()
    running = serve_fleet(upstream, cache=tmp_path / "new")
    assert "no canaries" in until_engine(running, wait_until)["read_only"]
    assert running.embed(NEW).status_code == 503


def test_one_of_two_upstream_servers_dying_under_load_loses_nothing(
    upstream: str, door: Door, serve_fleet: Callable[..., Any], tmp_path: Path, wait_until: Any
) -> None:
    running = serve_fleet(upstream, door.url, flags=("--batch-tokens", 1024)).wait_ready()
    captions = [f"house number {i} of a long street by the sea" for i in range(1500)]
    before = door.bytes
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(running.embed, captions[i : i + 50]) for i in range(0, len(captions), 50)]
        assert wait_until(lambda: running.metric("lift_batch_rows_sum") > 300, 60)
        assert door.bytes > before + 100_000  # it had its share
        door.shut()
        statuses = {answer.result().status_code for answer in answers}
    assert statuses == {200}
    assert running.metric("lift_engine_restarts_total") == 0
    door.open()
    before = door.bytes
    more = [f"garden number {i} behind a house" for i in range(200)]
    assert wait_until(
        lambda: running.embed([more.pop()]).status_code == 200 and door.bytes > before + 5_000, 30
    )
    assert running.stop() == 0
    with CacheWriter.open(tmp_path / "cache") as cache:
        assert cache.contains(caption_keys(captions)).all()


def test_while_all_upstream_servers_are_away_hits_are_answered_and_misses_wait_for_them(
    door: Door, serve_fleet: Callable[..., Any], wait_until: Any
) -> None:
    running = serve_fleet(door.url).wait_ready()
    assert running.embed(CAPTIONS).status_code == 200
    door.shut()
    refused = running.embed(NEW)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert all(row["cached"] for row in running.embed(CAPTIONS).json()["data"])
    door.open()
    running.wait_ready()
    assert running.embed(NEW).status_code == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "openai"], "--upstream URL"),
        (["--engine", "vllm", "--upstream", "http://127.0.0.1:9"], "--engine openai"),
        (["--engine", "openai", "--upstream", "127.0.0.1:9"], "http://host:port"),
        (["--engine", "openai", "--upstream", "http://h:9", "--upstream-key-file", "/none"], "--upstream-key-file"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_one_line(
    flags: list[str], said: str, tmp_path: Path, embed_command: Any, prepared: Callable[[str], Path]
) -> None:
    prepared("minilm")
    done = embed_command("serve", "--cache", tmp_path / "c", "--model", "minilm", "--port", 0, *flags)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and said in line and "Traceback" not in done.stderr
