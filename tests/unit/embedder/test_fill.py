"""Filling from sources: each caption once, nothing forgotten, and the next run knows what this one did."""

from __future__ import annotations

import io
import json
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lift_cache import wire
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, BadSource, CacheLocked, ServerUnavailable
from lift_cache.keys import caption_keys
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter, Rows
from lift_embedder.config import FillConfig, ServeConfig
from lift_embedder.fill import Summary, fill, servers, targets
from lift_embedder.fill.books import Answer, Books, Item
from lift_embedder.fill.ledger import FailedRow, Ledger, read_ledger
from lift_embedder.fill.marks import END, SPREAD, STORED, Samples
from lift_embedder.fill.progress import position_of
from lift_embedder.fill.reading import lane_of
from lift_embedder.fill.servers import OwnServer
from lift_embedder.fill.summary import duration
from lift_embedder.fill.targets import adopt_parts
from lift_embedder.keyset import KeySet

pytestmark = pytest.mark.slow

BAD_VECTOR = "no vector for this"


class Server(ThreadingHTTPServer):
    """An embedding server as far as a fill sees one; its cache is a dictionary. Faults are set by the test."""

    daemon_threads = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.recipe, self.encoding = recipe, Encoding(dimensions=recipe.dimensions)
        self.lock = threading.Lock()
        self.known: set[str] = set()
        self.embedded: Counter[str] = Counter()
        self.looked_up = 0
        self.rejects: set[str] = set()
        self.priorities: set[str | None] = set()
        self.refuse_after: int | None = None
        self.seconds: Callable[[], float] = lambda: 0.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        server = self.server
        card = {
            "recipe": server.recipe.model_dump(mode="json"),
            "fingerprint": server.recipe.fingerprint,
            "encoding": server.encoding.model_dump(mode="json"),
            "rows": len(server.known),
        }
        self.answer(200, json.dumps(card).encode(), "application/json")

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/snapshots":
            self.answer(200, b'{"id": "000001-abc", "path": "there", "rows": 1}', "application/json")
            return
        captions = [str(caption) for caption in wire.decode_request(body, most_rows=2048).captions]
        n = len(captions)
        vectors, tokens = np.ones((n, server.recipe.dimensions), np.float16), np.full(n, 3, np.int32)
        answer: wire.Answered | wire.Found
        if self.path.startswith("/v1/lookup"):
            with server.lock:
                server.looked_up += n
                found = np.array([caption in server.known for caption in captions])
            answer = wire.Found(None, found, tokens, np.zeros(n, bool))
        else:
            time.sleep(server.seconds())
            with server.lock:
                server.priorities.add(self.headers.get("X-Lift-Priority"))
                if server.refuse_after is not None and sum(server.embedded.values()) >= server.refuse_after:
                    self.answer(503, b'{"error": {"message": "away"}}', "application/json")
                    return
                errors = {
                    i: wire.RowError("vector_rejected", "the vector is zero")
                    for i, caption in enumerate(captions)
                    if caption in server.rejects
                }
                cached = np.array([caption in server.known for caption in captions])
                new = [c for i, c in enumerate(captions) if i not in errors and c not in server.known]
                server.embedded.update(new)
                server.known.update(new)
            answer = wire.Answered(vectors, cached, tokens, np.zeros(n, bool), errors)
        recipe = server.recipe.fingerprint
        self.answer(200, wire.encode_answer(answer, recipe=recipe, model="tiny"), wire.MIME)

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(recipe: Recipe) -> Iterator[Server]:
    serving = Server(recipe)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()
    thread.join()


class Said:
    """What a run prints."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, width=1000)

    @property
    def text(self) -> str:
        return self._file.getvalue()


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def run(server: Server, tmp_path: Path, said: Said) -> Callable[..., Summary]:
    """Fill from files, with one state directory for all runs of a test."""

    def go(*sources: Path, **settings: Any) -> Summary:
        known = {"server": server.url, "state": tmp_path / "state", "wait_server": 0.0}
        return fill([str(source) for source in sources], FillConfig(**(known | settings)), said.console)

    return go


def write(path: Path, captions: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
    return path


def numbered(n: int, of: str = "houses") -> list[str]:
    return [f"photo {i} of {of}" for i in range(n)]


# ---------------------------------------------------------------------------------------------- one run


def test_equal_captions_are_sent_once_wherever_they_stand(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    first = write(tmp_path / "a.jsonl", numbered(500) * 2)
    second = write(tmp_path / "b.jsonl", [f"  {caption} " for caption in numbered(600)])
    summary = run(first, second, batch=32)
    assert (summary.rows, summary.captions, summary.unique) == (1600, 1600, 600)
    assert (summary.embedded, summary.cached, summary.tokens) == (600, 0, 1800)
    assert server.embedded == Counter(numbered(600))
    assert server.priorities == {"bulk"}


def test_a_request_stays_below_what_a_server_takes_however_long_captions_are(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    captions = [f"{i} " + "word " * 200_000 for i in range(12)]
    assert run(write(tmp_path / "a.jsonl", captions), batch=2048).embedded == 12


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_take_each_caption_once_whatever_files_it_is_in(
    server: Server, run: Callable[..., Summary], tmp_path: Path, shards: int
) -> None:
    captions = [*numbered(400), "", None]
    files = [
        write(tmp_path / "a.jsonl", captions),
        write(tmp_path / "b.jsonl", [*reversed(captions), *numbered(50, "boats")]),
    ]
    summaries = [run(*files[:: -1 if i % 2 else 1], shard=f"{i}/{shards}") for i in range(shards)]
    assert server.embedded == Counter(numbered(400) + numbered(50, "boats"))
    assert sum(summary.unique for summary in summaries) == 450
    assert all(summary.unique > 450 / shards / 2 for summary in summaries)
    assert sum(summary.rejected for summary in summaries) == 4, "a bad row is named by one shard"


def test_the_engine_of_a_caption_does_not_depend_on_its_shard() -> None:
    keys = caption_keys(numbered(4000))
    for shard in range(4):
        ours = keys[keys[:, 7] % 4 == shard]
        share = np.bincount(lane_of(ours, 4), minlength=4) / len(ours)
        assert share.min() > 0.15


# ---------------------------------------------------------------------------------------------- done marks


def test_a_file_that_is_done_is_not_read_again_and_a_changed_one_is(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    files = [write(tmp_path / f"{name}.jsonl", numbered(300, name)) for name in ("cats", "dogs")]
    run(*files)
    again = run(*files)
    assert (again.files, again.files_done, again.rows_done, again.rows) == (2, 2, 600, 0)
    assert server.looked_up <= 2 * (SPREAD + END + STORED)
    write(files[1], numbered(310, "dogs"))
    changed = run(*files)
    assert (changed.files_done, changed.rows, changed.embedded, changed.cached) == (1, 310, 10, 300)
    assert run(*files, recheck=True).rows == 610


@pytest.mark.parametrize("lost", [0, 150, 299], ids=["the first", "the middle", "the last"])
def test_a_cache_that_lost_captions_has_the_file_read_again(
    server: Server, run: Callable[..., Summary], tmp_path: Path, said: Said, lost: int
) -> None:
    captions = numbered(300)
    source = write(tmp_path / "a.jsonl", captions)
    run(source)
    server.known = {*captions[:lost], *captions[lost + 100 :], *numbered(1000, "cats")}
    missing = len(set(captions) - server.known)
    assert run(source).embedded == missing
    assert "cache lacks captions" in said.text


def test_a_cache_with_fewer_rows_than_it_had_is_not_believed(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    captions = numbered(2000)
    source = write(tmp_path / "a.jsonl", captions)
    run(source)
    # An older copy, in which by chance all is there that the mark asks for.
    mark = json.loads(next((tmp_path / "state" / "marks").rglob("*.json")).read_text())
    server.known = set(captions[:500]) | set(mark["samples"])
    assert run(source).files_done == 0
    assert server.known == set(captions)


def test_marks_are_of_one_cache_field_and_shard(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"caption": f"a {i}", "title": f"b {i}"}) + "\n" for i in range(50)))
    run(source)
    for settings in ({"field": "title"}, {"shard": "0/2"}):
        assert run(source, **settings).rows == 50
    assert run(source).files_done == 1


def test_files_that_were_acknowledged_before_the_server_went_away_are_done(
    server: Server, run: Callable[..., Summary], tmp_path: Path, said: Said
) -> None:
    files = [write(tmp_path / f"{i}.jsonl", numbered(100, f"kind {i}")) for i in range(6)]
    server.refuse_after = 350
    with pytest.raises(ServerUnavailable, match="captions are in the cache, the same command goes on"):
        run(*files, batch=50, concurrency=1)
    server.refuse_after = None
    summary = run(*files)
    assert summary.files_done == 3
    assert server.embedded == Counter(caption for i in range(6) for caption in numbered(100, f"kind {i}"))


def test_a_file_waits_for_the_captions_that_an_earlier_one_sent(
    tmp_path: Path, server: Server, run: Callable[..., Summary]
) -> None:
    """All captions of the second file are in the first, which is not answered when the second was read."""
    first = write(tmp_path / "a.jsonl", numbered(200))
    second = write(tmp_path / "b.jsonl", numbered(100))
    server.refuse_after = 0
    with pytest.raises(ServerUnavailable):
        run(first, second, batch=50)
    server.refuse_after = None
    assert not list((tmp_path / "state").rglob("marks/**/*.json"))
    assert run(second).embedded == 100


def test_answers_that_come_in_any_order_leave_no_file_marked_too_early(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    files = [write(tmp_path / f"{i:02}.jsonl", numbered(37, f"kind {i}")) for i in range(20)]
    random = np.random.default_rng(0)
    server.seconds = lambda: float(random.uniform(0, 0.02))
    server.refuse_after = 400
    with pytest.raises(ServerUnavailable):
        run(*files, batch=10, concurrency=8)
    marks = [json.loads(path.read_text()) for path in (tmp_path / "state" / "marks").rglob("*.json")]
    for mark in marks:
        captions = {json.loads(line)["caption"] for line in Path(mark["path"]).read_text().splitlines()}
        assert captions <= server.known
    server.refuse_after = None
    assert run(*files).files_done == len(marks)
    assert set(server.embedded.values()) == {1} and len(server.embedded) == 37 * 20


# ---------------------------------------------------------------------------------------------- failed rows


def test_rows_that_fail_are_in_the_ledger_once_however_often_it_is_run(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    server.rejects = {BAD_VECTOR}
    good = write(tmp_path / "good.jsonl", numbered(20))
    bad = write(tmp_path / "bad.jsonl", ["a dog", "", 7, BAD_VECTOR])
    first = run(good, bad)
    assert first.rejected == 3 and first.failed is not None
    rows = list(read_ledger(Path(first.failed)))
    assert [(Path(row.where).name, row.code) for row in rows] == [
        ("bad.jsonl:2", "invalid_caption"),
        ("bad.jsonl:3", "unreadable_row"),
        ("bad.jsonl:4", "vector_rejected"),
    ]
    assert rows[2].caption == BAD_VECTOR and rows[2].file == str(bad) and "zero" in rows[2].reason
    for settings in ({}, {"recheck": True}, {}):
        again = run(good, bad, **settings)
        assert (again.rejected, again.failed) == (3, first.failed)
        assert list(read_ledger(Path(first.failed))) == rows
    with pytest.raises(BadSource, match="--max-bad"):
        run(good, bad, max_bad=2)
    write(bad, ["a dog", "a cat"])
    assert run(good, bad).failed is None
    assert not Path(first.failed).exists()


def test_a_ledger_that_is_gone_is_made_again(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", ["a dog", ""])
    first = run(source)
    assert first.failed is not None
    Path(first.failed).unlink()
    again = run(source)
    assert (again.files_done, again.rejected, again.failed) == (0, 1, first.failed)


def test_failed_rows_alone_are_sent_again_and_those_that_work_leave_the_ledger(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    server.rejects = {"one", "two"}
    source = write(tmp_path / "a.jsonl", ["one", *numbered(50), "", "two"])
    ledger = tmp_path / "failed.jsonl"
    assert run(source, failed=ledger).rejected == 3
    server.rejects = {"two"}
    sent = server.embedded.total()
    summary = run(source, failed=ledger, retry_failed=True)
    assert (summary.embedded, summary.rejected) == (1, 2)
    assert server.embedded.total() == sent + 1
    assert [row.where.rpartition(":")[2] for row in read_ledger(ledger)] == ["52", "53"]
    server.rejects = set()
    assert run(failed=ledger, retry_failed=True).embedded == 1
    assert [row.code for row in read_ledger(ledger)] == ["invalid_caption"]
    # The row that is now there is no failure of the file any more.
    assert run(source, failed=ledger).rejected == 1
    assert len(list(read_ledger(ledger))) == 1


def test_a_retry_that_breaks_off_leaves_the_ledger_as_it_was(
    server: Server, run: Callable[..., Summary], tmp_path: Path
) -> None:
    server.rejects = {"one"}
    ledger = tmp_path / "failed.jsonl"
    run(write(tmp_path / "a.jsonl", ["one", "two"]), failed=ledger)
    before = ledger.read_bytes()
    server.refuse_after = 0
    with pytest.raises(ServerUnavailable):
        run(failed=ledger, retry_failed=True)
    assert ledger.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*failed.jsonl*")] == ["failed.jsonl"]


def test_a_line_that_a_crash_cut_off_does_not_spoil_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    row = FailedRow("/a", "a:1", "invalid_caption", "the caption is empty", "\ud800")
    path.write_text(row.line() + row.line()[:20])
    ledger = Ledger(path, keep=lambda row: True)
    ledger.add(row)
    ledger.close()
    assert list(read_ledger(path)) == [row, row]


# ---------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_says_what_there_is_to_do_and_leaves_no_trace(
    server: Server, run: Callable[..., Summary], tmp_path: Path, said: Said
) -> None:
    server.known = set(numbered(30))
    source = write(tmp_path / "a.jsonl", [*numbered(100), *numbered(10), ""])
    summary = run(source, dry_run=True)
    assert (summary.rows, summary.captions, summary.unique, summary.rejected) == (111, 110, 100, 1)
    assert (summary.cached, summary.to_embed, summary.embedded) == (30, 70, 0)
    assert "on disk: about" in said.text and "lift-cache plan" in said.text
    assert not server.embedded and not (tmp_path / "state").exists()
    run(source)
    assert run(source, dry_run=True).files_done == 1
    write(source, numbered(500))
    run(source, dry_run=True)
    assert "of the last run into this cache" in said.text


def test_a_dry_run_without_a_server_counts_and_says_what_it_does_not_know(
    run: Callable[..., Summary], tmp_path: Path, said: Said
) -> None:
    source = write(tmp_path / "a.jsonl", numbered(10))
    summary = run(source, dry_run=True, server="http://127.0.0.1:9")
    assert (summary.unique, summary.to_embed) == (10, 10)
    assert "what is cached is not known" in said.text


def test_a_dry_run_asks_a_cache_directory(
    recipe: Recipe,
    vectors: Callable[..., np.ndarray],
    run: Callable[..., Summary],
    tmp_path: Path,
    said: Said,
) -> None:
    source = write(tmp_path / "a.jsonl", numbered(10))
    settings = {"dry_run": True, "server": None, "cache": tmp_path / "cache"}
    assert run(source, **settings).to_embed == 10
    assert "is not a cache yet" in said.text and not (tmp_path / "cache").exists()
    with CacheWriter.open(tmp_path / "cache", recipe) as cache:
        put(cache, numbered(4), vectors)
        assert run(source, **settings).to_embed == 10
        assert "has a writer already" in said.text
    assert run(source, **settings).to_embed == 6


# ---------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_source(
    run: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_embedder.fill.KeySet", lambda _: KeySet(1 << 18))

    def peak(n: int) -> int:
        source = tmp_path / f"{n}.txt"
        with source.open("w") as file:
            file.writelines(f"photo {i} of old houses by the sea\n" for i in range(n))
        tracemalloc.start()
        try:
            summary = run(source, dry_run=True, server="http://127.0.0.1:9")
            assert (summary.unique, summary.unique_is_least) == (n, True)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20_000)  # what is imported late
    assert peak(100_000) < peak(20_000) + (1 << 20)


def test_beyond_the_bound_of_memory_repeats_are_answered_by_the_cache(
    server: Server, run: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_embedder.fill.KeySet", lambda _: KeySet(1 << 18))
    source = tmp_path / "a.txt"
    captions = numbered(30_000)
    source.write_text("\n".join([*captions, *captions]) + "\n")
    summary = run(source, batch=2048)
    assert server.embedded == Counter(captions)
    assert summary.embedded == 30_000 and summary.unique_is_least and "at least" in summary.text()
    assert summary.cached > 10_000 and summary.embedded + summary.cached == summary.unique


def test_reading_waits_for_a_slow_server(tmp_path: Path, server: Server, run: Callable[..., Summary]) -> None:
    source = tmp_path / "a.txt"
    source.write_text("".join(f"photo {i}\n" for i in range(30_000)))
    released = threading.Event()
    server.seconds = lambda: 0.0 if released.wait(30) else 1.0
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(run, source, batch=64)
        time.sleep(1.5)
        assert not ran.done()
        read = position_of(source)
        released.set()
        assert ran.result().embedded == 30_000
    assert 0 < read < source.stat().st_size / 2


# ---------------------------------------------------------------------------------------------- parts


def put(cache: CacheWriter, captions: Sequence[str], vectors: Callable[..., np.ndarray]) -> None:
    n = len(captions)
    made = np.concatenate([vectors(1, seed=hash(caption) % 1000) for caption in captions])
    cache.put(Rows(captions, made, np.ones(n, np.int32), np.zeros(n, bool)))


@pytest.fixture
def cache_with_parts(tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]) -> Path:
    """A cache and what a killed run left: two parts with captions, one of which the cache has, and one without."""
    cache = tmp_path / "cache"
    with CacheWriter.open(cache, recipe) as main:
        put(main, ["a", "b"], vectors)
    for number, captions in enumerate((["b", "c"], ["d"], [])):
        (cache / "parts" / str(number)).mkdir(parents=True)
        with CacheWriter.open(cache / "parts" / str(number), recipe) as part:
            if captions:
                put(part, captions, vectors)
    return cache


def has_all(cache: Path, captions: str) -> bool:
    with CacheWriter.open(cache) as main:
        return bool(main.contains(caption_keys(list(captions))).all()) and main.rows == len(captions)


def test_parts_of_an_earlier_run_are_merged_and_then_removed(cache_with_parts: Path) -> None:
    said: list[str] = []
    with CacheWriter.open(cache_with_parts) as main:
        adopt_parts(main, said.append)
    assert not (cache_with_parts / "parts").exists()
    assert has_all(cache_with_parts, "abcd")
    assert len(said) == 2


@pytest.mark.parametrize("at", range(4))
def test_merging_parts_can_be_cut_off_anywhere_and_done_again(
    cache_with_parts: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls = 0

    def cut(real: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise KeyboardInterrupt
            return real(*arguments, **settings)

        return maybe

    def half_removed(path: Path) -> None:
        """A crash while a part is removed: its recipe is gone, its rows are not."""
        nonlocal calls
        calls += 1
        if calls == at + 1:
            (path / "recipe.json").unlink()
            raise KeyboardInterrupt
        rmtree(path)

    rmtree = targets.shutil.rmtree
    with monkeypatch.context() as patch, CacheWriter.open(cache_with_parts) as main:
        patch.setattr(targets.shutil, "rmtree", half_removed)
        patch.setattr(main, "merge", cut(main.merge))
        with pytest.raises(KeyboardInterrupt):
            adopt_parts(main, print)
    with CacheWriter.open(cache_with_parts) as main:
        adopt_parts(main, print)
    assert not (cache_with_parts / "parts").exists()
    assert has_all(cache_with_parts, "abcd")


def test_what_is_no_part_is_left_alone(cache_with_parts: Path) -> None:
    (cache_with_parts / "parts" / "mine").mkdir()
    (cache_with_parts / "parts" / "mine" / "notes.txt").write_text("do not lose this")
    with CacheWriter.open(cache_with_parts) as main, pytest.raises(BadConfig, match=r"notes\.txt"):
        adopt_parts(main, print)
    assert (cache_with_parts / "parts" / "mine" / "notes.txt").exists()


def test_a_cache_that_somebody_writes_to_is_named_and_a_server_suggested(
    tmp_path: Path, recipe: Recipe, run: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "LOCK_SECONDS", 0.1)
    source = write(tmp_path / "a.jsonl", numbered(10))
    with CacheWriter.open(tmp_path / "cache", recipe), pytest.raises(CacheLocked, match="--server"):
        run(source, server=None, cache=tmp_path / "cache", model="minilm")


def own_server(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> OwnServer:
    """A server of ours whose program is a shell script."""
    script = folder / "program"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(servers.sys, "executable", str(script))
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.01)
    config = ServeConfig(cache=folder / "cache", model="minilm")
    server = OwnServer(config, "cpu", 1, folder / "server.log", said.append)
    server.start()
    return server


def test_a_server_that_dies_again_and_again_is_given_up_and_its_log_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    server = own_server(tmp_path, "kill -SEGV $$", monkeypatch, said)
    with pytest.raises(ServerUnavailable, match=r"died 5 times in a row \(signal 11\).*server\.log"):
        server.url(30)
    server.wait_end()
    assert server.restarts == 4 and len(said) == 4


def test_a_mistake_that_the_server_names_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    program = "echo 'error: the model is unknown; choose another' >&2; exit 2"
    server = own_server(tmp_path, program, monkeypatch, said)
    with pytest.raises(BadConfig, match=r"^the model is unknown; choose another$"):
        server.url(30)
    server.wait_end()
    assert not said


def test_a_server_has_the_same_address_after_a_restart_and_stops_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    ran = tmp_path / "ran"
    line = '{"message": "listening", "url": "http://127.0.0.1:4711"}'
    first = f"[ -e {ran}.first ] || {{ touch {ran}.first; sleep 0.5; exit 1; }}"
    server = own_server(
        tmp_path, f"echo \"$4\" >> {ran}; echo '{line}'; {first}; exec sleep 60", monkeypatch, said
    )
    assert server.url(30) == "http://127.0.0.1:4711"
    give_up = time.monotonic() + 10
    while ran.read_text().count("\n") < 2 and time.monotonic() < give_up:
        time.sleep(0.01)
    server.wait_end()
    ports = [json.loads(line)["port"] for line in ran.read_text().splitlines()]
    assert ports == [0, 4711] and server.restarts == 1
    server.check()


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"shard": "4/4"}, "i/n"),
        ({"shard": "a"}, "i/n"),
        ({"cache": "c"}, "--model"),
        ({"cache": "c", "model": "m", "server": "s"}, "leave one out"),
        ({"devices": "0,1"}, "--cache"),
        ({"retry_failed": True, "dry_run": True}, "--retry-failed"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        FillConfig(**settings)


@pytest.mark.parametrize("given", ["0,1", ["0,1"], ["0", "1"], [0, 1], "0, 1,"])
def test_devices_are_given_in_any_way(given: object) -> None:
    assert FillConfig(cache="c", model="m", devices=given).devices == ("0", "1")  # type: ignore[arg-type]


def test_a_state_directory_that_cannot_be_written_is_one_line(
    run: Callable[..., Summary], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="--state"):
        run(write(tmp_path / "a.jsonl", ["a"]), state=tmp_path / "file" / "state")


# ---------------------------------------------------------------------------------------------- pieces


@given(st.lists(st.integers(1, 400), max_size=20))
def test_samples_are_few_and_spread_over_the_file(chunks: list[int]) -> None:
    samples, n = Samples(), 0
    for size in chunks:
        samples.read([f"caption {i}" for i in range(n, n + size)])
        n += size
    kept = sorted(int(text.split()[1]) for text in samples.kept())
    assert len(kept) <= SPREAD + END
    if n:
        assert kept[0] == 0 and kept[-1] == n - 1
        assert max(np.diff([*kept, n])) <= max(1, 2 * n // (SPREAD // 2))
    samples.stored([f"caption {i}" for i in range(n)])
    assert len(samples.kept()) <= SPREAD + END + STORED


def test_what_the_cache_will_not_have_is_no_sample(tmp_path: Path) -> None:
    books = Books(Summary(), marks=None, ledger=None, max_bad=5, cache_rows=0, say=print)
    (tmp_path / "a.txt").write_text("x\n")
    source = books.begin(tmp_path / "a.txt")
    books.usable(source, ["a", "b"])
    books.taken(source, 2)
    answer = Answer(
        np.zeros(2, bool),
        np.ones(2, np.int32),
        np.zeros(2, bool),
        {1: wire.RowError("vector_rejected", "zero")},
    )
    books.answered([Item("a", "a:1", source), Item("b", "a:2", source)], answer)
    assert source.samples.kept() == ("a",)
    assert (source.waiting, source.rejected, books.summary.embedded) == (0, 1, 1)


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (600, "10 min"), (12_000, "3 h 20 min"), (500_000, "6 days")]
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_log_gets_a_line_with_rate_and_time_left(
    server: Server, run: Callable[..., Summary], tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_embedder.fill.progress.LINE_EVERY", 0.3)
    server.seconds = lambda: 0.1
    source = tmp_path / "a.txt"
    source.write_text("".join(f"photo {i} of a house\n" for i in range(100_000)))
    run(source, batch=2048)
    lines = [line for line in said.text.splitlines() if line.startswith("fill: ")]
    assert all("captions/s" in line and "0% cached" in line for line in lines[1:])
    assert any(line.endswith(" left") for line in lines)
