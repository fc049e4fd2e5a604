"""Readers beside a busy writer, and readers that may not write."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lift_cache.errors import BadConfig
from lift_cache.keys import caption_keys
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter, Rows

NOBODY = 65_534


def vector_of(number: int) -> np.ndarray:
    """What caption `number` must have: float32 [24]."""
    return np.random.default_rng(number).normal(size=24).astype(np.float16).astype(np.float32)


def caption(number: int) -> str:
    return f"caption number {number}"


def put(writer: CacheWriter, start: int, stop: int) -> None:
    vectors = np.stack([vector_of(i) for i in range(start, stop)])
    captions = [caption(i) for i in range(start, stop)]
    writer.put(Rows(captions, vectors, np.ones(stop - start), np.zeros(stop - start)))


def read_on(
    cache: str, known: int, reader: CacheReader | None, ready: object, stop: object, uid: int
) -> None:
    """Read again and again, from one snapshot and from the newest one; exit 1 on a wrong byte."""
    if uid:
        os.setgid(uid)
        os.setuid(uid)
    keys = caption_keys([caption(i) for i in range(known)])
    expected = np.stack([vector_of(i) for i in range(known)])
    pinned = reader or CacheReader(cache)
    rng = np.random.default_rng(os.getpid())
    rounds = 0
    while not stop.is_set() or rounds < 3:  # type: ignore[attr-defined]
        for one in (pinned, CacheReader(cache)):
            order = rng.permutation(known)
            rows = one.lookup(keys[order])
            if (rows < 0).any() or not np.array_equal(one.gather(rows), expected[order]):
                sys.exit(1)
            if not np.array_equal(one.gather(rows, check=True), expected[order]):
                sys.exit(1)
        rounds += 1
        ready.set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn", "another user"])
def test_readers_see_only_right_rows_while_the_writer_fills_compacts_and_collects(
    method: str, tmp_path: Path, recipe: Recipe
) -> None:
    if method == "another user" and os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    cache = tmp_path / "cache"
    known = 200
    context = multiprocessing.get_context("spawn" if method == "spawn" else "fork")
    with CacheWriter.open(cache, recipe, segment_rows=40) as writer:
        for start in range(0, known, 20):
            put(writer, start, start + 20)
        writer.snapshot()
        pinned = CacheReader(cache) if method != "another user" else None
        stop = context.Event()
        ready = [context.Event() for _ in range(3)]
        readers = [
            context.Process(
                target=read_on,
                args=(str(cache), known, pinned, one, stop, NOBODY if method == "another user" else 0),
            )
            for one in ready
        ]
        for process in readers:
            process.start()
        try:
            for one in ready:
                assert one.wait(60), "a reader did not come up"
            for turn in range(12):
                put(writer, known + turn * 20, known + turn * 20 + 20)
                writer.snapshot()
                writer.compact(everything=turn % 3 == 0)
                writer.keep_snapshots(3)
                writer.gc()
        finally:
            stop.set()
            for process in readers:
                process.join(60)
        assert [process.exitcode for process in readers] == [0, 0, 0]
        assert writer.rows == known + 240
    assert not verify(cache).problems


def test_threads_of_one_reader_share_it(tmp_path: Path, recipe: Recipe) -> None:
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, 0, 100)
        writer.snapshot()
    reader = CacheReader(tmp_path / "cache")
    keys = caption_keys([caption(i) for i in range(100)])
    expected = np.stack([vector_of(i) for i in range(100)])
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(50):
            order = np.random.default_rng(seed).permutation(100)
            if not np.array_equal(reader.gather(reader.lookup(keys[order])), expected[order]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def read_only_medium(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A small file system that can be made read-only."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    where = tmp_path / "medium"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "medium", str(where)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")

    def freeze() -> Path:
        subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True)
        return where

    yield freeze
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_read_only_medium_is_read_and_a_writer_says_why_it_cannot(
    read_only_medium: Callable[[], Path], tmp_path: Path, recipe: Recipe
) -> None:
    cache = tmp_path / "medium" / "cache"
    with CacheWriter.open(cache, recipe) as writer:
        put(writer, 0, 50)
        writer.snapshot()
    read_only_medium()
    reader = CacheReader(cache)
    rows = reader.lookup(caption_keys([caption(i) for i in range(50)]))
    np.testing.assert_array_equal(reader.gather(rows, check=True), [vector_of(i) for i in range(50)])
    report = verify(cache)
    assert not report.problems and "lock cannot be taken" in report.live
    with pytest.raises(BadConfig, match="cannot be written"):
        CacheWriter.open(cache)
