"""Logs that a machine reads: the id of the request in each of its lines, and never a caption."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from lift_embedder import http, logs
from lift_embedder.http import Body, Observe
from lift_embedder.metrics import Metrics

CAPTION = "a secret dog"


class Written:
    """What a server would have written."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def written() -> Iterator[Written]:
    kept = Written()
    handler = logging.StreamHandler(kept.stream)
    handler.setFormatter(logs.JsonFormatter())
    ours = logging.getLogger("lift_embedder")
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel("DEBUG")
    yield kept
    ours.removeHandler(handler)
    ours.setLevel(before)


log = logging.getLogger("lift_embedder.somewhere")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr(http, "MOST_LINES", 1)
    app = FastAPI()

    @app.post("/embed")
    async def embed(request: Request) -> None:
        log.info("reading")
        captions = (await request.json())["input"]
        await asyncio.to_thread(log.info, "in a thread")
        await asyncio.create_task(later())
        if captions == [CAPTION]:
            try:
                {}[captions[0]]  # the error says what it did not find
            except KeyError as error:
                raise ExceptionGroup(f"for {captions}", [ValueError(captions)]) from error

    async def later() -> None:
        log.info("in a task")

    metrics = Metrics()
    app.add_middleware(Body, metrics=metrics, most_bytes=1000, buffer_bytes=1000)
    app.add_middleware(Observe, metrics=metrics)
    return app


def post(app: FastAPI, *ids: str, captions: list[str]) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = [{"x-request-id": one} for one in ids]
            await asyncio.gather(
                *(client.post("/embed", headers=one, json={"input": captions}) for one in headers)
            )
            await client.get("/nowhere", headers={"x-request-id": "last"})
            log.info("after")  # in the task that asked

    asyncio.run(main())


def test_every_line_of_a_request_has_its_id_and_no_other_line_has(app: FastAPI, written: Written) -> None:
    log.info("before")
    post(app, "one", "two", captions=["a dog"])
    lines = [(entry["message"], entry.get("request")) for entry in written.entries]
    messages = ("reading", "in a thread", "in a task", "request")
    assert sorted(lines[1:-2]) == sorted((message, one) for message in messages for one in ("one", "two"))
    assert [lines[0], *lines[-2:]] == [("before", None), ("request", "last"), ("after", None)]


def test_no_caption_is_logged_even_when_an_exception_quotes_it(app: FastAPI, written: Written) -> None:
    post(app, "one", captions=[CAPTION])
    assert "secret" not in written.text
    failed = next(entry for entry in written.entries if entry["level"] == "error")
    trace = failed["exception"].splitlines()
    assert failed["request"] == "one"
    assert [line for line in trace if not line.startswith(" ")] == [
        "builtins.KeyError",
        "builtins.ExceptionGroup",
        "builtins.ValueError",
    ]
    assert any(str(Path(__file__).name) in line for line in trace)


def test_outside_of_requests_exceptions_say_what_was_wrong(written: Written) -> None:
    try:
        raise RuntimeError("CUDA out of memory")
    except RuntimeError:
        log.exception("starting the engine failed")
    (entry,) = written.entries
    assert entry["exception"].endswith("RuntimeError: CUDA out of memory")


def test_an_entry_is_one_line_of_json_whatever_is_in_it(written: Written) -> None:
    log.warning("two\nlines and \ud800 %s", "words", extra={"path": Path("/a"), "rows": 3})
    (entry,) = written.entries
    assert entry["message"] == "two\nlines and \ud800 words"
    assert (entry["level"], entry["logger"], entry["path"], entry["rows"]) == ("warning", log.name, "/a", 3)
    assert entry["time"].endswith("+00:00")


def test_lines_that_are_written_together_each_have_their_own_time(written: Written) -> None:
    lines = [(1_700_000_000.5, {"status": 200}), (1_700_000_001.0625, {"status": 404})]
    logs.info_lines(log, "request", lines)
    first, second = written.entries
    assert (first["time"], first["status"]) == ("2023-11-14T22:13:20.500+00:00", 200)
    assert (second["time"], second["status"]) == ("2023-11-14T22:13:21.062+00:00", 404)
    assert {first["message"], second["message"]} == {"request"} and first["level"] == "info"
