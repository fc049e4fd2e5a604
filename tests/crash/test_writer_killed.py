"""A writer that dies at any moment loses no acknowledged vector, and a full disk loses none either."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lift_cache.errors import CacheFull
from lift_cache.keys import caption_keys
from lift_cache.recipe import Recipe
from lift_cache.snapshot import snapshots_of
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter, Rows

ROUNDS = int(os.environ.get("LIFT_CRASH_ROUNDS", "25"))
BATCH = 20

WRITER = """
import sys
import numpy as np
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter, Rows

path, recipe, first = sys.argv[1], Recipe.parse(sys.argv[2], where="argument"), int(sys.argv[3])
with CacheWriter.open(path, recipe, segment_rows=100) as writer:
    for number in range(first, 10**9):
        captions = [f"caption {i}" for i in range(number * 20, number * 20 + 20)]
        vectors = np.array([[i, *range(1, 24)] for i in range(number * 20, number * 20 + 20)], np.float32)
        writer.put(Rows(captions, vectors, np.ones(20), np.zeros(20)))
        print(number, flush=True)
        if number % 7 == 0:
            writer.snapshot()
"""


def expected(numbers: range) -> np.ndarray:
    rows = range(numbers.start * BATCH, numbers.stop * BATCH)
    return np.array([[i, *range(1, 24)] for i in rows], np.float32)


def test_a_killed_writer_loses_no_acknowledged_vector(tmp_path: Path, recipe: Recipe) -> None:
    cache, acknowledged = tmp_path / "cache", 0
    chance = random.Random(0)
    for _ in range(ROUNDS):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(cache), recipe.canonical_json(), str(acknowledged)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline().strip() == str(acknowledged), (
            "the writer must open and go on where it was"
        )
        time.sleep(chance.uniform(0, 0.25))
        child.send_signal(signal.SIGKILL)
        said = [acknowledged, *map(int, child.stdout.read().split())]
        child.wait()
        child.stdout.close()
        acknowledged = said[-1] + 1
        with CacheWriter.open(cache, recipe) as writer:
            captions = [f"caption {i}" for i in range(acknowledged * BATCH)]
            hits = writer.get(caption_keys(captions))
            assert hits.found.all(), f"{(~hits.found).sum()} acknowledged rows lost"
            held = expected(range(acknowledged)).astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(hits.vectors, held)
        if acknowledged * BATCH > 1900:  # beyond float16's exact integers the expectation says less
            shutil.rmtree(cache)
            acknowledged = 0
    if cache.exists():
        report = verify(cache)
        assert not report.problems
        assert not (cache / "quarantine").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(where)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_full_disk_loses_nothing_acknowledged_and_writing_goes_on_with_room(
    small_disk: Path, recipe: Recipe
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    wide = recipe.model_copy(update={"dimensions": 512})
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {}
    with CacheWriter.open(small_disk / "cache", wide, segment_rows=500) as writer:

        def put(number: int) -> None:
            captions = [f"caption {number} {i}" for i in range(50)]
            vectors = rng.normal(size=(50, 512)).astype(np.float32)
            writer.put(Rows(captions, vectors, np.ones(50), np.zeros(50)))
            stored.update(zip(captions, vectors.astype(np.float16).astype(np.float32), strict=True))

        def all_there() -> bool:
            hits = writer.get(caption_keys(list(stored)))
            return bool(hits.found.all()) and np.array_equal(hits.vectors, np.stack(list(stored.values())))

        with pytest.raises(CacheFull, match="no space left"):
            for number in range(1000):
                put(number)
        assert len(stored) >= 200
        assert all_there()
        with pytest.raises(CacheFull):
            writer.snapshot()
        assert all_there()
        ballast.unlink()
        put(1000)
        assert all_there()
    with CacheWriter.open(small_disk / "cache", wide) as writer:
        hits = writer.get(caption_keys(list(stored)))
        assert hits.found.all()
        assert not snapshots_of(small_disk / "cache")
        assert not list((small_disk / "cache").rglob(".tmp-*"))
