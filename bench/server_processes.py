"""The processes that bench/server.py measures: what fills them, and what that costs each of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import orjson

from lift_cache.client import AsyncEmbeddingClient
from lift_cache.errors import BadConfig
from lift_cache.recipe import Recipe
from lift_embedder import models

PEERS = Path(__file__).with_name("server_peers.py")
START_SECONDS = 240.0

REQUEST, UNDER_WAY = 256, 8
"""Captions per request of a fill, and requests under way."""


@dataclass(frozen=True)
class Filled:
    """What embedding some captions took: seconds by the clock, and processor seconds of the two sides.

    cpu: of the server's process, whose engine is a process of its own · client: of this process.
    """

    seconds: float
    cpu: float
    client: float = 0.0
    tokens: int = 0

    @property
    def speed(self) -> float:
        return 1 / self.seconds


class Child:
    """A process of ours, ended with all that it started; its output is in `log`."""

    def __init__(self, command: Sequence[object], log: Path, **options: Any) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(map(str, command)),
                **{"stdout": file, "stderr": file, "start_new_session": True, **options},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def cpu(self) -> float:
        """Processor seconds of this process, its threads included and its children not."""
        # The clock that clock_getcpuclockid(3) names; /proc/PID/stat counts in hundredths of a second.
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises BadConfig: it ended, or was not ready in time."""
        give_up = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < give_up:
            with contextlib.suppress(httpx.TransportError):
                if ready():
                    return
            time.sleep(0.1)
        self.give_up()

    def give_up(self) -> None:
        """Raises BadConfig with the end of the log."""
        tail = "\n".join(self.log.read_text().splitlines()[-20:])
        self.__exit__()
        raise BadConfig(f"{type(self).__name__} did not start:\n{tail}")


class HTTPServer(Child):
    """A child that answers `/v1/embeddings` at `url`."""

    url: str
    model: str

    def fill_json(self, texts: Sequence[str]) -> Filled:
        """Embed captions with OpenAI's requests, vectors as base64."""
        return self._filled(self._ask_json(texts))

    def _filled(self, work: Coroutine[Any, Any, tuple[np.ndarray, int]]) -> Filled:
        cpu, own, began = self.cpu, time.process_time(), time.perf_counter()
        vectors, tokens = asyncio.run(work)
        seconds = time.perf_counter() - began
        filled = Filled(seconds, self.cpu - cpu, time.process_time() - own, tokens)
        assert vectors.any(1).all()
        return filled

    async def _ask_json(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        places = asyncio.Semaphore(UNDER_WAY)

        async def one(client: httpx.AsyncClient, some: Sequence[str]) -> Any:
            body = orjson.dumps({"model": self.model, "input": some, "encoding_format": "base64"})
            async with places:
                answer = await client.post("/v1/embeddings", content=body)
            assert answer.status_code == 200, answer.text
            return orjson.loads(answer.content)

        settings: dict[str, Any] = {"headers": {"Content-Type": "application/json"}, "trust_env": False}
        async with httpx.AsyncClient(base_url=self.url, timeout=600, **settings) as client:
            parts = [texts[start : start + REQUEST] for start in range(0, len(texts), REQUEST)]
            answers = await asyncio.gather(*(one(client, part) for part in parts))
        rows = [row["embedding"] for answer in answers for row in answer["data"]]
        assert len(rows) == len(texts)
        vectors = np.stack([np.frombuffer(base64.b64decode(row), np.float32) for row in rows])
        return vectors, sum(answer["usage"]["prompt_tokens"] for answer in answers)


class OurServer(HTTPServer):
    """`lift-embed serve` over a cache."""

    def __init__(self, cache: Path, model: str, log: Path) -> None:
        self.model, self.port = model, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        flags = ["--cache", cache, "--model", model, "--engine", "vllm", "--port", self.port]
        super().__init__([sys.executable, "-m", "lift_embedder.cli", "serve", *flags], log)
        self.wait_until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200)

    def fill(self, texts: Sequence[str]) -> Filled:
        """Embed captions as `lift-embed fill` asks for them: in bulk, as Arrow."""
        return self._filled(self._ask(texts))

    async def _ask(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        settings: dict[str, Any] = {"batch": REQUEST, "concurrency": UNDER_WAY, "priority": "bulk"}
        async with AsyncEmbeddingClient(self.url, **settings) as client:
            answer = await client.embed(texts)
        return answer.vectors, int(answer.tokens.sum())

    def seal(self) -> None:
        """Have it seal what is fresh."""
        httpx.post(f"{self.url}/v1/admin/seal", json={}, timeout=60).raise_for_status()


class TheirServer(HTTPServer):
    """vLLM's own server, with the arguments and the environment that ours gives to vLLM on a CPU."""

    def __init__(self, model: models.Model, recipe: Recipe, log: Path) -> None:
        self.model, port = str(model.folder), free_port()
        self.url = f"http://127.0.0.1:{port}"
        pooler = {"seq_pooling_type": recipe.pooling.upper(), "use_activation": recipe.normalize}
        flags = {
            "--model": model.folder,
            "--runner": "pooling",
            "--dtype": recipe.dtype,
            "--max-model-len": recipe.max_tokens + 1,
            "--max-num-batched-tokens": 8192,
            "--pooler-config": json.dumps(pooler),
            "--host": "127.0.0.1",
            "--port": port,
        }
        switches = ["--no-enable-prefix-caching", "--no-enable-chunked-prefill", "--enforce-eager"]
        switches += ["--disable-log-stats", "--disable-uvicorn-access-log"]
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command = [*module, *itertools.chain(*flags.items()), *switches]
        super().__init__(command, log, env=engine_environment())
        self.wait_until(lambda: httpx.get(f"{self.url}/health").status_code == 200)


class Direct(Child):
    """AsyncLLM in a process of its own; see server_peers.py."""

    def __init__(self, model: str, log: Path) -> None:
        command = [sys.executable, PEERS, "direct", model]
        super().__init__(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != {"ready": True}:
            self.give_up()

    def fill(self, texts: Sequence[str]) -> Filled:
        assert self.process.stdin is not None
        print(json.dumps(texts), file=self.process.stdin, flush=True)
        return Filled(**self._line())

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or "{}")


class Echo(Child):
    """A bare FastAPI route that answers these bytes; see server_peers.py."""

    def __init__(self, answer: bytes, folder: Path) -> None:
        self.port = free_port()
        (folder / "answer").write_bytes(answer)
        super().__init__([sys.executable, PEERS, "echo", self.port, folder / "answer"], folder / "echo.log")
        self.wait_until(lambda: httpx.get(f"http://127.0.0.1:{self.port}/echo").status_code == 405)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def engine_environment() -> dict[str, str]:
    """The variables with which our server starts vLLM, without those that are about our server."""
    code = (
        "import json, os; from lift_embedder.runtime import prepare_for_engine; prepare_for_engine();"
        "print(json.dumps(dict(os.environ)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return {name: value for name, value in found.items() if not name.startswith("LIFT_")}
