"""What /openapi.json says is what the server does: made-up requests, good and bad, get documented answers only."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from lift_cache import wire
from tests.service.conftest import RunningServer

EXAMPLES = 60
"""Per route and kind of data."""


CHECKS = [
    not_a_server_error,  # nothing is wrong with this server, so no 5xx is right, documented or not
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]


@schemathesis.serializer(wire.MIME)
def _arrow(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


schemathesis.openapi.media_type(
    wire.MIME,
    st.lists(st.text(), max_size=5).map(wire.encode_request) | st.binary(max_size=200),
)


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[str], Path]
) -> Iterator[RunningServer]:
    prepared("minilm")
    folder = tmp_path_factory.mktemp("openapi")
    flags = ("--model", "minilm", "--engine", "transformers")
    server = RunningServer(folder / "cache", folder / "server.log", *flags)
    yield server.wait_ready()
    assert server.stop() == 0, server.log.read_text()


@pytest.fixture(scope="module")
def api(running: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


def explore(operation: Any, mode: schemathesis.GenerationMode, url: str) -> Counter[int]:
    """Answers by status. Raises what hypothesis and the checks raise, with a request to reproduce it."""
    statuses: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=url)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing about it can be wrong
        ask()
    return statuses


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_every_route_answers_made_up_requests_as_its_documentation_says(
    mode: schemathesis.GenerationMode, api: Any, running: RunningServer
) -> None:
    failures: list[str] = []
    asked: dict[str, Counter[int]] = {}
    for result in api.get_all_operations():
        operation = result.ok()
        try:
            asked[operation.label] = explore(operation, mode, running.url)
        except (Exception, BaseExceptionGroup) as error:
            failures.append(f"{operation.label}: {error}")
    for route, statuses in asked.items():
        print(f"{mode.value} {route}: {dict(statuses)}")
    assert not failures, "\n\n".join(failures)
    assert {"POST /v1/embeddings", "POST /v1/lookup", "GET /v1/cache"} <= asked.keys()
    assert httpx.get(f"{running.url}/readyz").status_code == 200


GOOD: dict[str, tuple[dict[str, Any] | bytes, str, str]] = {
    "a caption": ({"input": "a dog"}, "application/json", "application/json"),
    "captions": ({"input": ["a dog", "a cat"], "model": "minilm"}, "application/json", "application/json"),
    "base64": ({"input": "a dog", "encoding_format": "base64"}, "application/json", "application/json"),
    "all dimensions": ({"input": "a dog", "dimensions": 384}, "application/json", "application/json"),
    "token ids": ({"input": [101, 1037, 3899, 102]}, "application/json", "application/json"),
    "lists of token ids": ({"input": [[101, 102], [101, 3899, 102]]}, "application/json", "application/json"),
    "JSON to Arrow": ({"input": ["a dog", ""]}, "application/json", wire.MIME),
    "Arrow": (wire.encode_request(["a dog", ""]), wire.MIME, wire.MIME),
    "Arrow to JSON": (wire.encode_request(["a dog"]), wire.MIME, "application/json"),
}


@pytest.mark.parametrize("form", GOOD)
def test_every_form_of_a_good_request_is_answered_as_documented(
    form: str, api: Any, running: RunningServer
) -> None:
    body, sent, wanted = GOOD[form]
    headers = {"Content-Type": sent, "Accept": wanted, "X-Lift-Priority": "bulk"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{running.url}/v1/embeddings", content=content, headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"] == wanted
    api["/v1/embeddings"]["POST"].validate_response(answer)


def test_no_answer_is_documented_that_is_never_given(api: Any) -> None:
    assert "HTTPValidationError" not in json.dumps(api.raw_schema)
