"""What users of a running server rely on. One vLLM server for the whole file."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lift_cache.client import EmbeddingClient
from lift_cache.keys import caption_keys
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter


def test_the_openai_client_works_unchanged(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        captions = ["a dog chasing a cat", "a cat chasing a dog"]
        in_base64 = client.embeddings.create(model="minilm", input=captions)
        in_floats = client.embeddings.create(model="minilm", input=captions, encoding_format="float")
        assert [row.index for row in in_base64.data] == [0, 1]
        same = (np.float32([row.embedding for row in answer.data]) for answer in (in_base64, in_floats))
        assert np.array_equal(*same)
        assert len(in_base64.data[0].embedding) == 384 and in_base64.usage.total_tokens > 0
        assert client.models.list().data[0].id == "minilm"
        with pytest.raises(openai.BadRequestError, match=r"input\[1\]"):
            client.embeddings.create(model="minilm", input=["a dog", ""])
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="another", input="a dog")


def test_a_hit_is_the_same_bits_as_the_miss_before_it(server: Any) -> None:
    captions = [f"boat number {i}" for i in range(40)]
    with EmbeddingClient(server.url) as client:
        missed, hit = client.embed(captions), client.embed(captions[::-1])
    assert not missed.cached.any() and hit.cached.all()
    assert np.array_equal(missed.vectors, hit.vectors[::-1])
    assert np.array_equal(missed.tokens, hit.tokens[::-1])


def test_an_over_long_caption_is_cut_and_marked(server: Any) -> None:
    with EmbeddingClient(server.url) as client:
        answer = client.embed(["word " * 1000, "a short one"])
    assert answer.truncated.tolist() == [True, False] and answer.tokens[0] == 256


def test_a_port_in_use_is_one_line_and_status_2(tmp_path: Path, embed_command: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = embed_command("serve", "--cache", tmp_path / "c", "--model", "minilm", "--port", port)
    assert done.returncode == 2 and not (tmp_path / "c").exists()
    assert one_error_line(done.stderr).startswith(f"error: --host 127.0.0.1 --port {port}:")


def test_a_second_writer_is_refused_before_its_engine_is_loaded(server: Any, embed_command: Any) -> None:
    done = embed_command(
        "serve", "--cache", server.cache, "--model", "minilm", "--store", "float32", "--port", 0
    )
    assert done.returncode == 2
    assert str(server.cache) in one_error_line(done.stderr)


def test_another_recipe_is_refused_by_field_and_both_values(
    tmp_path: Path, embed_command: Any, prepared: Callable[[str], Path], recipe: Recipe
) -> None:
    prepared("minilm")
    CacheWriter.open(tmp_path / "cache", recipe.model_copy(update={"model": "minilm"})).close()
    done = embed_command("serve", "--cache", tmp_path / "cache", "--model", "minilm", "--port", 0)
    line = one_error_line(done.stderr)
    assert done.returncode == 2
    assert "pooling" in line and "'last'" in line and "'mean'" in line


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, embed_command: Any) -> None:
    for name in ("nonesuch", str(tmp_path)):
        done = embed_command("serve", "--cache", tmp_path / "c", "--model", name, "--port", 0)
        assert done.returncode == 2 and name in one_error_line(done.stderr)
    unprepared = embed_command(
        "serve",
        "--cache",
        tmp_path / "c",
        "--model",
        "minilm",
        env={**os.environ, "LIFT_HOME": str(tmp_path)},
    )
    assert "lift-embed model minilm" in one_error_line(unprepared.stderr)


def test_a_killed_engine_leaves_hits_served_and_comes_back(server: Any, wait_until: Any) -> None:
    with EmbeddingClient(server.url, patience=0) as client:
        before = client.embed(["known before"])
        os.kill(server.engine_core(), signal.SIGKILL)
        assert wait_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, 10)
        refused = server.embed(["never seen before"])
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        hit = client.embed(["known before"])
        assert hit.cached.all() and np.array_equal(hit.vectors, before.vectors)
    server.wait_ready()
    assert server.embed(["never seen before"]).status_code == 200
    assert server.metric("lift_engine_restarts_total") == 1


def test_sigterm_ends_a_busy_server_cleanly_and_keeps_what_it_answered(
    serve: Callable[..., Any], tmp_path: Path, alive: Any, wait_until: Any
) -> None:
    running = serve("--engine", "transformers").wait_ready()
    answered = [f"boat number {i}" for i in range(50)]
    assert running.embed(answered).status_code == 200
    children = running.children()
    assert running.stop(signal.SIGTERM) == 0
    assert wait_until(lambda: not any(alive(pid) for pid in children), 10)
    with CacheWriter.open(tmp_path / "cache") as cache:
        assert cache.contains(caption_keys(answered)).all()


def one_error_line(stderr: str) -> str:
    """The single `error:` line; fails on a traceback."""
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


def test_sigterm_while_the_engine_loads_ends_the_server_at_once_with_all_it_started(
    serve: Callable[..., Any], alive: Any, wait_until: Any
) -> None:
    running = serve("--engine", "vllm")
    time.sleep(2)
    assert httpx.get(f"{running.url}/readyz").status_code == 503
    began, children = time.monotonic(), running.children()
    assert running.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 15
    assert wait_until(lambda: not any(alive(pid) for pid in children), 5)
