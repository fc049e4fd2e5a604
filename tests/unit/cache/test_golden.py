"""Caches of every format and encoding that was ever written stay readable. The files are never made anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lift_cache.keys import caption_keys
from lift_cache.reader import CacheReader
from lift_cache.snapshot import load_stored_manifest
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter, Rows

pytestmark = pytest.mark.slow

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("format-*"))
CAPTIONS = [f"a photo of {i} golden things" for i in range(40)] + ["naïve café ☕", "two words kept"]


def expected() -> np.ndarray:
    """float32 [42, 24], as they were before they were stored."""
    drawn = np.random.default_rng(20260101).normal(size=(42, 24)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_there_are_golden_files_of_every_format_and_encoding() -> None:
    assert {
        "format-1-float16",
        "format-1-float32",
        "format-2-float16",
        "format-2-float32",
        "format-2-int8",
    } <= {path.name for path in GOLDEN}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_a_golden_cache_is_read_row_for_row(golden: Path) -> None:
    reader = CacheReader(golden)
    rows = reader.lookup(caption_keys(CAPTIONS))
    assert (rows >= 0).all() and reader.rows == 42
    stored, rejected = reader.encoding.encode(expected())
    assert not rejected
    for check in (False, True):
        np.testing.assert_array_equal(reader.gather(rows, check=check), stored)
    assert reader.tokens(rows).tolist() == list(range(1, 43))
    assert reader.truncated(rows).tolist() == [i % 7 == 0 for i in range(42)]
    assert reader.captions(rows) == CAPTIONS
    assert (reader.lookup(caption_keys(["not there"])) == -1).all()
    assert reader.flat or load_stored_manifest(golden, reader.snapshot_id).format == 1
    assert not verify(golden).problems


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_a_golden_cache_can_be_added_to_and_its_next_snapshot_is_of_today(
    golden: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(golden, tmp_path / "cache")
    with CacheWriter.open(cache) as writer:
        before = writer.snapshot()
        again = writer.snapshot()
        assert again.id == before.id
        writer.put(Rows(["new"], expected()[:1], np.ones(1), np.zeros(1)))
        after = writer.snapshot()
    assert load_stored_manifest(cache, after.id).format == 2
    reader = CacheReader(cache)
    stored, _ = reader.encoding.encode(np.concatenate([expected(), expected()[:1]]))
    rows = reader.lookup(caption_keys([*CAPTIONS, "new"]))
    np.testing.assert_array_equal(reader.gather(rows), stored)
    assert not verify(cache).problems
