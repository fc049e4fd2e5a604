"""The HTTP interface's shapes and refusals, without an engine."""

from __future__ import annotations

import base64
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from lift_cache import errors
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter
from lift_embedder.app import MOST_BODY_BYTES, MOST_INPUTS, STATUS, create_app, status_of
from lift_embedder.metrics import Metrics
from lift_embedder.path import EmbeddingPath, QueueFull
from lift_embedder.supervisor import Supervisor
from lift_embedder.tokens import CaptionTokenizer


@pytest.fixture
def http(
    tmp_path: Path, recipe: Recipe, faulty_engine: Any, tiny_tokenizer: Callable[..., Any]
) -> Iterator[TestClient]:
    tokenizer = CaptionTokenizer(recipe, tiny_tokenizer(eos="</s>"))
    metrics = Metrics()
    with CacheWriter.open(tmp_path / "cache", recipe) as cache:
        supervisor = Supervisor(lambda: faulty_engine, tokenizer, cache, metrics)
        path = EmbeddingPath(cache, tokenizer, supervisor, metrics, queue_tokens=10_000, batch_tokens=1_000)
        app = create_app(path, metrics, names=frozenset({"tiny"}))
        with TestClient(app, raise_server_exceptions=False) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.01)
            yield client


def test_base64_and_float_say_the_same_numbers(http: TestClient) -> None:
    as_float = http.post("/v1/embeddings", json={"input": "a dog"}).json()
    as_base64 = http.post("/v1/embeddings", json={"input": ["a dog"], "encoding_format": "base64"}).json()
    row, again = as_float["data"][0], as_base64["data"][0]
    assert np.array_equal(
        np.float32(row["embedding"]), np.frombuffer(base64.b64decode(again["embedding"]), "<f4")
    )
    assert (row["cached"], again["cached"]) == (False, True)
    assert row["tokens"] == again["tokens"] == as_float["usage"]["total_tokens"] == 3
    assert len(as_float["recipe"]) == 64


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": ["a dog", ""]}, 400, "input[1]"),
        ({"input": ["a dog", 7]}, 400, "input[1]"),
        ({"input": []}, 400, "input"),
        ({"input": ["a dog"] * (MOST_INPUTS + 1)}, 400, "input"),
        ({}, 400, "input"),
        ({"input": "a dog", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a dog", "model": "another"}, 404, None),
        ({"input": "a dog", "dimensions": 7}, 400, None),
    ],
)
def test_a_bad_request_is_refused_in_openais_shape_and_says_where(
    body: dict[str, Any], status: int, param: str | None, http: TestClient, faulty_engine: Any
) -> None:
    faulty_engine.embedded.clear()
    answer = http.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["message"] and error["type"] == "invalid_request_error" and error["code"]
    assert not faulty_engine.embedded


def test_bytes_that_are_not_json_are_refused(http: TestClient) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"{", b"\xff\xfe", b'{"input": "\\ud800"}'):
        answer = http.post("/v1/embeddings", content=content, headers=headers)
        assert answer.status_code == 400 and "error" in answer.json()


def test_a_body_beyond_the_limit_is_refused_even_when_it_does_not_say_its_length(http: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MOST_BODY_BYTES // 2**20 + 2):
            yield b" " * 2**20

    assert http.post("/v1/embeddings", content=b" " * (MOST_BODY_BYTES + 1)).status_code == 413
    assert http.post("/v1/embeddings", content=chunks()).status_code == 413


def test_every_expected_error_has_a_status_and_the_table_names_only_errors_that_exist() -> None:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.LiftError) and kind is not errors.RecipeMismatch:
            status, code = status_of(kind("words"))
            assert 400 <= status < 600 and code
    assert status_of(QueueFull("words", 1.0)) == STATUS[QueueFull]


def test_without_an_engine_misses_get_503_with_retry_after_and_liveness_stays(
    http: TestClient, faulty_engine: Any
) -> None:
    http.post("/v1/embeddings", json={"input": "a dog"})
    faulty_engine.alive = False
    answer = http.post("/v1/embeddings", json={"input": "a cat"})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert http.post("/v1/embeddings", json={"input": "a dog"}).status_code == 200
    assert http.get("/livez").status_code == 200


def test_the_card_names_recipe_counts_and_the_newest_snapshot(http: TestClient) -> None:
    http.post("/v1/embeddings", json={"input": ["a dog", "a cat"]})
    assert http.get("/v1/cache").json()["snapshot"] is None
    made = http.post("/v1/snapshots").json()
    card = http.get("/v1/cache").json()
    assert made["rows"] == card["rows"] == 2 and card["snapshot"] == made["id"]
    assert Recipe.model_validate(card["recipe"]).fingerprint == card["fingerprint"]
    assert http.get("/v1/models").json()["data"][0]["id"] == card["recipe"]["model"]


def test_metrics_count_hits_misses_and_errors_by_code(http: TestClient) -> None:
    http.post("/v1/embeddings", json={"input": ["a dog", "a dog", "a cat"]})
    http.post("/v1/embeddings", json={"input": "a dog"})
    http.post("/v1/embeddings", json={"input": ""})
    text = http.get("/metrics").text
    for line in ('lift_captions_total{how="hit"} 1.0', 'lift_captions_total{how="miss"} 2.0'):
        assert line in text
    assert 'lift_errors_total{code="400"} 1.0' in text


def test_logs_hold_no_caption(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    http.post("/v1/embeddings", json={"input": ["a secret dog", ""]})
    assert caplog.records and not any("secret" in str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2, 3]]])
def test_token_ids_are_refused_with_what_to_change(tokens: Any, http: TestClient) -> None:
    answer = http.post("/v1/embeddings", json={"input": tokens})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "input"
    assert "send captions as text" in error["message"] and "check_embedding_ctx_length" in error["message"]
