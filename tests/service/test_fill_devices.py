"""Filling a directory with engines of its own: one, several, on several hosts; and every way to die on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache.keys import caption_keys
from lift_cache.reader import CacheReader
from lift_cache.writer import CacheWriter
from tests.service.conftest import COMMAND, alive, descendants, lift_embed, wait_until

SECONDS = 300.0


@pytest.fixture(autouse=True)
def _state_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_STATE", str(tmp_path / "state"))


class Filling:
    """A fill that runs, and the servers that it started."""

    def __init__(self, out: Path, *arguments: object) -> None:
        self.out, self._log = out, out.with_suffix(".log")
        command = [*COMMAND, "fill", *map(str, arguments), "--summary", str(out)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def servers(self) -> dict[str, int]:
        """Process ids of the servers, by the cache that each has."""
        found = {}
        for pid in descendants(self.process.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if "lift_embedder.fill.child" in words:
                found[str(json.loads(words[4])["cache"])] = pid
        return found

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit status and what was said."""
        return self.process.wait(SECONDS), self._log.read_text()

    def summary(self) -> dict[str, Any]:
        return json.loads(self.out.read_text())

    def kill(self) -> list[int]:
        """kill -9 of the fill alone; returns the processes that it had started."""
        started = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        return started


@pytest.fixture
def start(tmp_path: Path, prepared: Callable[[str], Path]) -> Iterator[Callable[..., Filling]]:
    """Start fills that are gone, with all they started, when the test ends."""
    prepared("minilm")
    running: list[Filling] = []

    def begin(*arguments: object) -> Filling:
        running.append(Filling(tmp_path / f"summary-{len(running)}.json", *arguments))
        return running[-1]

    yield begin
    for filling in running:
        started = descendants(filling.process.pid)
        filling.process.kill()
        filling.process.wait()
        assert wait_until(lambda started=started: not any(map(alive, started)), 20)


def write(path: Path, n: int, of: str = "houses") -> list[str]:
    """A source in which every second caption comes twice."""
    captions = [f"photo number {i} of {i % 13} old {of} by the sea" for i in range(n)]
    path.write_text("\n".join([*captions, *captions[::2]]) + "\n")
    return captions


def rows_in(cache: Path) -> int:
    """Rows that a cache has on disk, a part or not; it must have no writer."""
    with CacheWriter.open(cache) as writer:
        return writer.rows


def vectors_of(cache: Path, captions: Sequence[str]) -> np.ndarray:
    with CacheWriter.open(cache) as writer:
        hits = writer.get(caption_keys(captions))
    assert hits.found.all()
    return hits.vectors


def filled(log: Path) -> bool:
    """Whether a part has rows, as far as files tell."""
    return log.exists() and log.stat().st_size > 1 << 18


def test_one_engine_fills_a_directory_and_leaves_it_to_others(
    start: Callable[..., Filling], tmp_path: Path
) -> None:
    source, cache = tmp_path / "captions.txt", tmp_path / "cache"
    captions = write(source, 400)
    into = (source, "--cache", cache, "--model", "minilm", "--engine", "transformers")
    filling = start(*into, "--snapshot")
    status, said = filling.end()
    assert status == 0, said
    summary = filling.summary()
    assert (summary["rows"], summary["unique"], summary["embedded"]) == (600, 400, 400)
    assert CacheReader(cache).rows == 400 and summary["snapshot"] in said
    assert rows_in(cache) == len(captions), "the lock was given back"

    began = time.monotonic()
    again = start(*into)
    assert again.end()[0] == 0
    assert (again.summary()["files_done"], again.summary()["rows"]) == (1, 0)
    assert time.monotonic() - began < 15, "no engine is started for nothing"

    with CacheWriter.open(cache):
        locked = lift_embed("fill", *into, "--recheck")
    assert locked.returncode == 2 and "Traceback" not in locked.stderr
    (line,) = [line for line in locked.stderr.splitlines() if line.startswith("error: ")]
    assert "has a writer already" in line and "--server" in line

    other = lift_embed("fill", *into, "--recheck", "--max-tokens", 7)
    assert other.returncode == 2 and "max_tokens" in other.stderr and "Traceback" not in other.stderr


def test_two_engines_one_of_them_killed_make_the_same_rows_without_duplicates(
    start: Callable[..., Filling], tmp_path: Path
) -> None:
    source, cache = tmp_path / "captions.txt", tmp_path / "cache"
    captions = write(source, 3000)
    into = ("--model", "minilm", "--engine", "vllm", "--store", "float32", "--batch-tokens", 1024)
    filling = start(source, "--cache", cache, *into, "--devices", "cpu,cpu", "--batch", 64)
    part = cache / "parts" / "1"
    assert wait_until(lambda: filled(part / "live" / "data.mdb"), SECONDS), filling.end()[1]
    os.kill(filling.servers()[str(part)], signal.SIGKILL)
    status, said = filling.end()
    assert status == 0, said
    summary = filling.summary()
    assert summary["restarts"] == 1 and "ended (signal 9)" in said
    assert summary["unique"] == len(captions) == summary["embedded"] + summary["cached"]
    merged = re.findall(r"merged \S+parts/(\d): ([\d,]+) captions$", said, re.MULTILINE)
    assert [number for number, _ in merged] == ["0", "1"], "no part has a caption that another has"
    shares = [int(rows.replace(",", "")) for _, rows in merged]
    assert sum(shares) == len(captions) and min(shares) > 0.4 * len(captions)
    assert not (cache / "parts").exists() and rows_in(cache) == len(captions)

    some = write(tmp_path / "some.txt", 200)
    assert start(tmp_path / "some.txt", "--cache", tmp_path / "alone", *into).end()[0] == 0
    theirs, ours = vectors_of(tmp_path / "alone", some), vectors_of(cache, some)
    assert np.abs(theirs - ours).max() < 1e-5


def test_kill_9_of_everything_loses_nothing_and_another_number_of_engines_goes_on(
    start: Callable[..., Filling], tmp_path: Path
) -> None:
    sources = [tmp_path / f"{i}.txt" for i in range(4)]
    captions = [caption for i, source in enumerate(sources) for caption in write(source, 900, f"kind {i}")]
    cache = tmp_path / "cache"
    into = ("--cache", cache, "--model", "minilm", "--engine", "transformers", "--batch-tokens", 1024)
    filling = start(*sources, *into, "--devices", "cpu,cpu", "--batch", 64)
    marks = tmp_path / "state" / "marks"
    assert wait_until(lambda: len(list(marks.glob("*/[0-9a-f]*.json"))) >= 2, SECONDS), filling.end()[1]
    started = filling.kill()
    assert wait_until(lambda: not any(map(alive, started)), 10), "a process was left over"
    done = [json.loads(path.read_text()) for path in marks.glob("*/[0-9a-f]*.json")]
    stored = sum(rows_in(cache / "parts" / str(i)) for i in range(2))
    assert stored >= sum(len(set(Path(mark["path"]).read_text().split("\n"))) - 1 for mark in done) > 0
    assert stored < len(captions)

    again = start(*sources, *into, "--devices", "cpu,cpu,cpu", "--batch", 64)
    status, said = again.end()
    assert status == 0, said
    summary = again.summary()
    assert (summary["files_done"], summary["embedded"]) == (len(done), len(captions) - stored)
    assert not (cache / "parts").exists() and rows_in(cache) == len(captions)
    vectors_of(cache, captions)


def test_sigterm_stops_in_good_order_and_the_next_run_takes_the_parts_up(
    start: Callable[..., Filling], tmp_path: Path
) -> None:
    source, cache = tmp_path / "captions.txt", tmp_path / "cache"
    captions = write(source, 3000)
    into = ("--cache", cache, "--model", "minilm", "--engine", "transformers", "--batch-tokens", 1024)
    filling = start(source, *into, "--devices", "cpu,cpu", "--batch", 32)
    assert wait_until(lambda: filled(cache / "parts" / "0" / "live" / "data.mdb"), SECONDS)
    started = descendants(filling.process.pid)
    filling.process.terminate()
    status, said = filling.end()
    assert status == 130 and "the same command goes on" in said and "Traceback" not in said
    assert not any(map(alive, started))
    stored = sum(rows_in(cache / "parts" / str(i)) for i in range(2))
    again = start(source, *into)
    assert again.end()[0] == 0
    assert again.summary()["embedded"] == len(captions) - stored
    assert rows_in(cache) == len(captions)


def test_hosts_fill_shards_of_the_same_files_and_adopt_joins_them(
    start: Callable[..., Filling], tmp_path: Path
) -> None:
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    captions = sorted({*write(sources[0], 300), *write(sources[1], 500)})
    into = ("--model", "minilm", "--engine", "transformers")
    embedded = []
    for i in range(2):
        filling = start(*sources, "--cache", tmp_path / f"part-{i}", *into, "--shard", f"{i}/2")
        assert filling.end()[0] == 0
        embedded.append(filling.summary()["embedded"])
    assert sum(embedded) == len(captions) and min(embedded) > 0.4 * len(captions)

    main = tmp_path / "main"
    (tmp_path / "first.txt").write_text(captions[0] + "\n")
    assert start(tmp_path / "first.txt", "--cache", main, *into).end()[0] == 0
    command = [sys.executable, "-m", "lift_cache.cli", "adopt", str(main)]
    parts = [str(path) for path in sorted(tmp_path.glob("part-*/segments"))]
    done = subprocess.run([*command, *parts, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["added"] == len(captions) - 1
    assert rows_in(main) == len(captions)
    vectors_of(main, captions)


def test_a_server_that_cannot_run_ends_the_fill_with_one_line_that_names_its_log(
    start: Callable[..., Filling], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "captions.txt"
    write(source, 10)
    status, said = start(source, "--cache", tmp_path / "cache", "--model", "nowhere/nothing").end()
    assert status == 2 and "Traceback" not in said and "nowhere/nothing" in said
