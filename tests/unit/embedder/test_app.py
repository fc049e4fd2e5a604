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

from lift_cache import errors, wire
from lift_cache.keys import caption_keys
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter
from lift_embedder.access import has_entry
from lift_embedder.answers import STATUS, status_of
from lift_embedder.app import MOST_BODY_BYTES, create_app
from lift_embedder.history import History
from lift_embedder.metrics import Metrics
from lift_embedder.path import EmbeddingPath
from lift_embedder.queue import Queue, QueueFull
from lift_embedder.service import MOST_INPUTS, Service
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
        queue = Queue(most_tokens=10_000, most_bytes=1 << 24, batch_tokens=1_000)
        path = EmbeddingPath(cache, tokenizer, supervisor, metrics, queue)
        service = Service(path, metrics, History(), frozenset({"tiny"}))
        address = "http://127.0.0.1:8080"
        with TestClient(create_app(service), address, raise_server_exceptions=False) as client:
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
        ({"input": ["a dog"] * (MOST_INPUTS + 1)}, 413, None),
        ({"input": [[3], [10**6]]}, 400, "input[1]"),
        ({"input": [3, "a dog"]}, 400, "input[0]"),
        ({"input": [[]]}, 400, "input[0]"),
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

    headers = {"content-type": "application/json"}
    for content in (b" " * (MOST_BODY_BYTES + 1), chunks()):
        assert http.post("/v1/embeddings", content=content, headers=headers).status_code == 413


def test_every_route_has_its_scope(http: TestClient) -> None:
    assert not [route.path for route in http.app.routes if not has_entry(route.path)]  # type: ignore[attr-defined]


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
    assert 'lift_errors_total{code="invalid_caption",status="400"} 1.0' in text


def test_logs_hold_no_caption(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    http.post("/v1/embeddings", json={"input": ["a secret dog", ""]})
    assert caplog.records and not any("secret" in str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize("ids", [[3, 4, 5], [[3, 4, 5]], [[3, 4, 5], [6]]])
def test_token_ids_are_computed_marked_and_never_cached(ids: Any, http: TestClient) -> None:
    for _ in range(2):
        rows = http.post("/v1/embeddings", json={"input": ids}).json()["data"]
        assert [row["index"] for row in rows] == list(range(len(rows)))
        assert not any(row["cached"] or row["stored"] for row in rows) and rows[0]["tokens"] == 3
    assert http.get("/v1/cache").json()["rows"] == 0
    assert http.post("/v1/embeddings", json={"input": "a dog"}).json()["data"][0]["stored"]


ARROW = {"content-type": wire.MIME}


def test_arrow_in_and_out_says_of_every_row_what_became_of_it(http: TestClient) -> None:
    body = wire.encode_request(["a dog", None, "", "a cat", "a dog " * 200])
    answer = http.post("/v1/embeddings", content=body, headers=ARROW)
    assert (answer.status_code, answer.headers["content-type"]) == (200, wire.MIME)
    got, recipe = wire.decode_answer(answer.content)
    assert sorted(got.errors) == [1, 2] and {e.code for e in got.errors.values()} == {"invalid_caption"}
    assert got.vectors.dtype == np.float16 and got.truncated.tolist() == [False, False, False, False, True]
    as_json = http.post("/v1/embeddings", json={"input": ["a dog", "a cat"]}).json()
    assert recipe == as_json["recipe"] and all(row["cached"] for row in as_json["data"])
    assert np.array_equal(
        np.float32([row["embedding"] for row in as_json["data"]]), got.vectors[[0, 3]].astype(np.float32)
    )


def test_json_may_ask_for_arrow_and_arrow_for_json(http: TestClient) -> None:
    asked = {"input": ["a dog", ""]}
    answer = http.post("/v1/embeddings", json=asked, headers={"accept": wire.MIME})
    assert sorted(wire.decode_answer(answer.content)[0].errors) == [1]
    body = wire.encode_request(["a dog", ""])
    answer = http.post("/v1/embeddings", content=body, headers=ARROW | {"accept": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")


@pytest.mark.parametrize("body", [b"", b"nonsense", wire.encode_request(["a dog"] * (MOST_INPUTS + 1))])
def test_an_arrow_body_that_cannot_be_read_is_refused(body: bytes, http: TestClient) -> None:
    answer = http.post("/v1/embeddings", content=body, headers=ARROW)
    assert answer.status_code in {400, 413} and answer.json()["error"]["message"]


def test_a_lookup_says_what_is_there_and_computes_nothing(http: TestClient, faulty_engine: Any) -> None:
    http.post("/v1/embeddings", json={"input": "a dog"})
    faulty_engine.embedded.clear()
    asked = {"input": ["a dog", "a cat"], "vectors": True}
    rows = http.post("/v1/lookup", json=asked).json()["data"]
    assert [row["found"] for row in rows] == [True, False]
    assert rows[0]["tokens"] == 3 and rows[1]["tokens"] is None
    assert rows[0]["embedding"] and rows[1]["embedding"] is None
    assert rows[0]["key"] == caption_keys(["a dog"])[0].tobytes().hex()
    answer = http.post("/v1/lookup", content=wire.encode_request(["a cat", "", "a dog"]), headers=ARROW)
    found, _ = wire.decode_found(answer.content)
    assert found.found.tolist() == [False, False, True] and sorted(found.errors) == [1]
    bare = http.post("/v1/lookup?vectors=false", content=wire.encode_request(["a dog"]), headers=ARROW)
    assert wire.decode_found(bare.content)[0].vectors is None
    assert http.post("/v1/lookup", json={"input": ["a dog", ""]}).status_code == 400
    assert not faulty_engine.embedded


def test_fewer_dimensions_only_of_a_model_that_was_trained_so(http: TestClient) -> None:
    kept = len(http.post("/v1/embeddings", json={"input": "a dog"}).json()["data"][0]["embedding"])
    whole = http.post("/v1/embeddings", json={"input": "a dog", "dimensions": kept})
    assert whole.status_code == 200
    refused = http.post("/v1/embeddings", json={"input": "a dog", "dimensions": kept - 1})
    assert refused.status_code == 400 and "not trained" in refused.json()["error"]["message"]


def test_a_cache_is_maintained_while_it_is_served(http: TestClient) -> None:
    ids = []
    for i in range(3):
        http.post("/v1/embeddings", json={"input": f"a dog{' the' * i}"})
        assert http.post("/v1/admin/seal").json() == {"sealed": 1}
        ids.append(http.post("/v1/snapshots").json()["id"])
    assert http.post("/v1/admin/snapshots/keep", json={"newest": 2}).json() == {"removed": ids[:1]}
    assert http.delete(f"/v1/admin/snapshots/{ids[1]}").json() == {"removed": [ids[1]]}
    assert http.delete(f"/v1/admin/snapshots/{ids[1]}").status_code == 404
    done = http.post("/v1/admin/compact", json={"everything": True}).json()
    assert len(done["segments"]) == 1 and len(done["replaced"]) == 3
    http.post("/v1/snapshots")
    http.post("/v1/admin/snapshots/keep", json={"newest": 1})
    would = http.post("/v1/admin/gc", json={"dry_run": True}).json()
    did = http.post("/v1/admin/gc", json={}).json()
    assert did == would | {"dry_run": False} and len(did["removed"]) == 6
    assert http.post("/v1/embeddings", json={"input": "a dog"}).json()["data"][0]["cached"]
