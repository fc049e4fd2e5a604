"""Compacting, collecting, merging: a cache of any age stays small and whole."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_cache import compaction, files, index, live, segment, snapshot
from lift_cache.bulk import BulkWriter, write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import (
    BadConfig,
    CacheDamaged,
    CacheFull,
    CacheNotFound,
    EncodingMismatch,
    RecipeMismatch,
    StorageFailed,
    UnsupportedFormat,
)
from lift_cache.flatmap import Extent, FlatMap, alignment
from lift_cache.fresh import FreshGroups
from lift_cache.keys import caption_keys
from lift_cache.live import LiveTier
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import SegmentInfo, segment_ids
from lift_cache.snapshot import load_manifest, snapshots_of
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter, Rows

pytestmark = pytest.mark.slow

Vectors = Callable[..., np.ndarray]


def names(start: int, stop: int) -> list[str]:
    return [f"caption number {i}" for i in range(start, stop)]


def put(writer: CacheWriter, drawn: np.ndarray, start: int, stop: int) -> None:
    ones = np.ones(stop - start)
    writer.put(Rows(names(start, stop), drawn[start:stop], ones, np.zeros(stop - start)))


def many_seals(path: Path, recipe: Recipe, drawn: np.ndarray, each: int) -> None:
    with CacheWriter.open(path, recipe) as writer:
        for start in range(0, len(drawn), each):
            put(writer, drawn, start, start + each)
            writer.seal()


def require_all(cache: Path, drawn: np.ndarray) -> CacheReader:
    reader = CacheReader(cache)
    keys = caption_keys(names(0, len(drawn)))
    rows = reader.lookup(keys)
    assert reader.rows == len(drawn)
    assert reader.flat
    for check in (False, True):
        np.testing.assert_array_equal(reader.gather(rows, check=check), drawn.astype(np.float16))
    np.testing.assert_array_equal(reader.keys(rows), keys)
    assert reader.captions(rows) == names(0, len(drawn))
    assert reader.tokens(rows).tolist() == [1] * len(drawn)
    return reader


# Compacting


def test_a_snapshot_of_many_seals_has_few_segments_and_every_row(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(300)
    many_seals(tmp_path / "cache", recipe, drawn, 5)
    with CacheWriter.open(tmp_path / "cache") as writer:
        assert writer.stats().segments == 60
        made = writer.snapshot()
        stats = writer.stats()
        assert stats.segments <= compaction.SEGMENTS
        assert (stats.rows, stats.tokens) == (300, 300)
        hits = writer.get(caption_keys(names(0, 300)))
        np.testing.assert_array_equal(hits.vectors, drawn.astype(np.float16).astype(np.float32))
        assert writer.snapshot().id == made.id
    require_all(tmp_path / "cache", drawn)
    assert not verify(tmp_path / "cache").problems


def test_what_was_merged_is_not_taken_for_new_at_the_next_opening(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, caplog: pytest.LogCaptureFixture
) -> None:
    many_seals(tmp_path / "cache", recipe, vectors(40), 10)
    with CacheWriter.open(tmp_path / "cache") as writer:
        merged = writer.compact(everything=True)
        assert len(merged) == 1 and len(merged[0].replaced) == 4
    caplog.set_level(logging.INFO)
    with CacheWriter.open(tmp_path / "cache") as writer:
        assert writer.stats().segments == 1
    assert "adopted" not in caplog.text


def test_a_lost_live_tier_is_rebuilt_from_merged_segments_and_their_sources(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(40)
    many_seals(tmp_path / "cache", recipe, drawn, 10)
    with CacheWriter.open(tmp_path / "cache") as writer:
        writer.compact(everything=True)
    shutil.rmtree(tmp_path / "cache" / "live")
    with CacheWriter.open(tmp_path / "cache") as writer:
        stats = writer.stats()
        assert (stats.rows, stats.tokens, stats.segments) == (40, 40, 1)
        assert len(writer.gc()) == 8
        writer.snapshot()
    require_all(tmp_path / "cache", drawn)


def test_puts_and_gets_go_on_while_segments_are_merged(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(600)
    stored = drawn.astype(np.float16).astype(np.float32)
    many_seals(tmp_path / "cache", recipe, drawn[:200], 5)
    wrong: list[int] = []
    stop = threading.Event()
    with CacheWriter.open(tmp_path / "cache", segment_rows=25) as writer:

        def read() -> None:
            keys = caption_keys(names(0, 200))
            while not stop.is_set():
                hits = writer.get(keys)
                if not hits.found.all() or not np.array_equal(hits.vectors, stored[:200]):
                    wrong.append(1)

        reading = threading.Thread(target=read)
        reading.start()
        for start in range(200, 600, 10):
            put(writer, drawn, start, start + 10)
            if start % 100 == 0:
                writer.compact(everything=True)
                writer.gc()
        stop.set()
        reading.join()
        assert not wrong
        writer.snapshot()
    require_all(tmp_path / "cache", drawn)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=300))
def test_the_number_of_segments_stays_bounded_and_rewriting_cheap(sizes: list[int]) -> None:
    segments: list[SegmentInfo] = []
    written = 0
    for number, size in enumerate(sizes):
        segments.append(_info(str(number), size))
        for group in compaction.choose(segments, {info.id for info in segments}):
            assert len(group) > 1
            total = sum(info.size for info in group)
            written += total
            ids = {info.id for info in group}
            segments = [info for info in segments if info.id not in ids]
            segments.append(_info(f"{number}-merged-{group[0].id}", total))
        assert len(segments) <= compaction.SEGMENTS
    assert written <= sum(sizes) * (1 + np.log2(len(sizes)))


def _info(name: str, size: int) -> SegmentInfo:
    return SegmentInfo(
        id=name, rows=size, size=size, tokens=0, truncated=0, captions_digest="", captions_size=1
    )


def test_rows_without_their_captions_are_merged_with_each_other_only(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(40)
    many_seals(tmp_path / "cache", recipe, drawn, 10)
    for path in sorted((tmp_path / "cache" / "segments").glob("*.captions.arrow"))[:2]:
        path.unlink()
    shutil.rmtree(tmp_path / "cache" / "live")
    with CacheWriter.open(tmp_path / "cache") as writer:
        writer.compact(everything=True)
        assert writer.stats().segments == 2
        assert writer.get(caption_keys(names(0, 40))).found.all()


def test_captions_that_are_missing_cost_no_other_captions(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    many_seals(tmp_path / "cache", recipe, vectors(40), 10)
    sibling = sorted((tmp_path / "cache" / "segments").glob("*.captions.arrow"))[0]
    sibling.unlink()
    assert [sibling.name[:32] in problem for problem in verify(tmp_path / "cache").problems] == [True]
    with CacheWriter.open(tmp_path / "cache") as writer:
        writer.compact(everything=True)
        writer.gc()
        writer.snapshot()
    reader = CacheReader(tmp_path / "cache")
    found = []
    for row in range(40):
        with contextlib.suppress(CacheDamaged):
            found += reader.captions(np.array([row]))
    assert len(found) == 30


# Snapshots and collecting


def test_only_what_no_snapshot_names_is_collected_and_only_on_request(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(40)
    cache = tmp_path / "cache"
    many_seals(cache, recipe, drawn, 10)
    with CacheWriter.open(cache) as writer:
        old = writer.snapshot()
        writer.compact(everything=True)
        assert writer.gc() == []
        new = writer.snapshot()
        assert len(segment_ids(cache / "segments")) == 5
        assert writer.remove_snapshot(old.id) == old.id
        promised = writer.gc(dry_run=True)
        assert len(segment_ids(cache / "segments")) == 5
        removed = writer.gc()
        assert removed == promised
        assert len(removed) == 8 and all(one.size > 0 for one in removed)
        assert len(segment_ids(cache / "segments")) == 1
    assert snapshots_of(cache) == [new.id]
    require_all(cache, drawn)


def test_old_snapshots_are_removed_by_count_and_the_newest_stay(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(50)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        ids = []
        for start in range(0, 50, 10):
            put(writer, drawn, start, start + 10)
            ids.append(writer.snapshot().id)
        assert writer.keep_snapshots(2) == ids[:3]
        assert writer.keep_snapshots(2) == []
        with pytest.raises(CacheNotFound, match="no single snapshot"):
            writer.remove_snapshot(ids[0])
    assert snapshots_of(tmp_path / "cache") == ids[3:]
    require_all(tmp_path / "cache", drawn)


def test_nothing_is_collected_while_a_snapshot_cannot_be_read(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    cache = tmp_path / "cache"
    many_seals(cache, recipe, vectors(20), 10)
    with CacheWriter.open(cache) as writer:
        made = writer.snapshot()
        writer.compact(everything=True)
        (made.path / "manifest.json").write_text("{}")
        with pytest.raises(CacheDamaged, match=r"manifest\.json"):
            writer.gc()
        assert len(segment_ids(cache / "segments")) == 3


def test_nothing_is_collected_when_what_took_its_place_is_damaged(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    cache = tmp_path / "cache"
    many_seals(cache, recipe, vectors(40), 10)
    with CacheWriter.open(cache) as writer:
        merged = writer.compact(everything=True)[0].info
        path = cache / "segments" / f"{merged.id}.arrow"
        path.write_bytes(path.read_bytes()[:-9] + b"?" + path.read_bytes()[-8:])
        with pytest.raises(CacheDamaged, match="may be the only copy"):
            writer.gc()
        assert len(segment_ids(cache / "segments")) == 5


def test_a_reader_goes_on_while_its_snapshot_is_removed_and_collected(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(20)
    many_seals(tmp_path / "cache", recipe, drawn, 10)
    with CacheWriter.open(tmp_path / "cache") as writer:
        made = writer.snapshot()
        reader = CacheReader(tmp_path / "cache")
        writer.compact(everything=True)
        writer.remove_snapshot(made.id)
        assert len(writer.gc()) == 4
    rows = reader.lookup(caption_keys(names(0, 20)))
    np.testing.assert_array_equal(reader.gather(rows), drawn.astype(np.float16))


def test_a_large_index_grows_by_deltas_that_agree_with_one_index(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "DELTA_FROM", 50)
    drawn = vectors(160)
    cache = tmp_path / "cache"
    kept: list[int] = []
    with CacheWriter.open(cache, recipe) as writer:
        for start, stop in ((0, 100), (100, 110), (110, 120), (120, 130), (130, 140), (140, 160)):
            put(writer, drawn, start, stop)
            made = writer.snapshot()
            kept.append(len(load_manifest(cache, made.id).index))
            require_all(cache, drawn[:stop])
    assert kept == [1, 2, 3, 4, 4, 1]
    reader = CacheReader(cache)
    in_order = np.concatenate(list(reader.iter_keys(7)))
    expected = caption_keys(names(0, 160))
    np.testing.assert_array_equal(in_order, expected[np.lexsort(expected.T[::-1])])
    first = snapshots_of(cache)[0]
    with CacheWriter.open(cache) as writer:
        for name in snapshots_of(cache)[:-1]:
            writer.remove_snapshot(name)
    assert first not in snapshots_of(cache)
    require_all(cache, drawn)
    assert not verify(cache).problems


@pytest.mark.parametrize("range_rows", [1, 7, 64, 1 << 20])
def test_an_index_is_the_same_however_small_the_ranges_it_is_built_in(
    range_rows: int, tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(200)
    monkeypatch.setattr(index, "RANGE_ROWS", range_rows)
    many_seals(tmp_path / "cache", recipe, drawn, 20)
    with CacheWriter.open(tmp_path / "cache") as writer:
        writer.snapshot()
    reader = require_all(tmp_path / "cache", drawn)
    assert (reader.lookup(caption_keys(names(200, 400))) == -1).all()


# Merging


def test_merging_adds_what_is_new_and_keeps_what_is_here(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    mine, theirs = vectors(60), vectors(60, seed=1)
    with CacheWriter.open(tmp_path / "theirs", recipe) as writer:
        for start, stop in ((20, 40), (40, 60)):
            put(writer, theirs, start, stop)
            writer.seal()
    with CacheWriter.open(tmp_path / "mine", recipe) as writer:
        put(writer, mine, 0, 30)
        result = writer.merge(tmp_path / "theirs")
        assert (result.added, result.present, result.segments) == (30, 10, 2)
        hits = writer.get(caption_keys(names(0, 60)))
        expected = np.concatenate([mine[:30], theirs[30:]]).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(hits.vectors, expected)
        again = writer.merge(tmp_path / "theirs")
        assert (again.added, again.present, again.segments) == (0, 40, 0)
        writer.snapshot()
    shutil.rmtree(tmp_path / "theirs")
    reader = CacheReader(tmp_path / "mine")
    rows = reader.lookup(caption_keys(names(0, 60)))
    np.testing.assert_array_equal(reader.gather(rows).astype(np.float32), expected)
    assert reader.captions(rows) == names(0, 60)
    assert not verify(tmp_path / "mine").problems


def test_a_put_during_a_merge_keeps_its_vector(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = vectors(20), vectors(20, seed=1)
    write_cache(tmp_path / "theirs", recipe, Encoding(dimensions=24), names(0, 20), theirs)
    with CacheWriter.open(tmp_path / "mine", recipe) as writer:
        take_in = CacheWriter._take_in

        def late(cache: CacheWriter, one: segment.Segment) -> None:
            monkeypatch.setattr(CacheWriter, "_take_in", take_in)
            put(writer, mine, 0, 5)  # acknowledged between the merge's look and its registration
            take_in(cache, one)

        monkeypatch.setattr(CacheWriter, "_take_in", late)
        writer.merge(tmp_path / "theirs")
        expected = np.concatenate([mine[:5], theirs[5:]]).astype(np.float16)
        for _ in range(2):
            hits = writer.get(caption_keys(names(0, 20)))
            np.testing.assert_array_equal(hits.vectors, expected.astype(np.float32))
            writer.snapshot()
        assert (writer.stats().rows, writer.stats().tokens) == (20, 5)
    reader = CacheReader(tmp_path / "mine")
    np.testing.assert_array_equal(reader.gather(reader.lookup(caption_keys(names(0, 20)))), expected)


def test_a_caption_that_a_bulk_job_wrote_twice_keeps_the_vector_of_its_snapshot(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    for seed in range(5):
        cache = tmp_path / str(seed)
        with BulkWriter(cache, recipe, segment_rows=10) as bulk:
            bulk.add(names(0, 10), vectors(10, seed=seed))
            bulk.add(names(5, 15), vectors(10, seed=seed + 100))
            bulk.finish()
        expected = np.concatenate([vectors(10, seed=seed), vectors(10, seed=seed + 100)[5:]])
        keys = caption_keys(names(0, 15))
        with CacheWriter.open(tmp_path / f"merged-{seed}", recipe) as writer:
            writer.merge(cache)
            into = writer.get(keys).vectors
        with CacheWriter.open(cache) as writer:
            opened = writer.get(keys).vectors
            writer.snapshot()
        reader = CacheReader(cache)
        read = reader.gather(reader.lookup(keys)).astype(np.float32)
        for found in (into, opened, read):
            np.testing.assert_array_equal(found, expected.astype(np.float16).astype(np.float32))
        first = CacheReader(f"{cache}@1")
        np.testing.assert_array_equal(first.gather(first.lookup(keys)), expected.astype(np.float16))
        assert not verify(cache).problems


def test_segments_written_elsewhere_are_adopted_from_their_directory(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(30)
    ones = np.ones(30, np.int32)
    write_cache(tmp_path / "worker", recipe, Encoding(dimensions=24), names(0, 30), drawn, ones)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        assert writer.merge(tmp_path / "worker" / "segments").added == 30
        writer.snapshot()
    require_all(tmp_path / "cache", drawn)


def test_what_may_not_be_merged_is_refused_and_nothing_is_added(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(20)
    cache = tmp_path / "cache"
    other = recipe.model_copy(update={"max_tokens": 78})
    write_cache(tmp_path / "recipe", other, Encoding(dimensions=24), names(0, 20), drawn)
    write_cache(tmp_path / "encoding", recipe, Encoding(dtype="float32", dimensions=24), names(0, 20), drawn)
    write_cache(tmp_path / "damaged", recipe, Encoding(dimensions=24), names(0, 20), drawn, segment_rows=10)
    path = sorted((tmp_path / "damaged" / "segments").glob("*[0-9a-f].arrow"))[-1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with CacheWriter.open(tmp_path / "unsealed", recipe) as writer:
        put(writer, drawn, 0, 10)
        writer.seal()
        put(writer, drawn, 10, 20)
    with CacheWriter.open(cache, recipe) as writer:
        for source, error, said in (
            ("recipe", RecipeMismatch, "max_tokens is 77 .* and 78"),
            ("encoding", EncodingMismatch, "dtype is 'float16' .* and 'float32'"),
            ("damaged", CacheDamaged, r"its bytes are not those its name stands for"),
            ("unsealed", BadConfig, "10 rows that are not sealed; run `lift-cache seal"),
            ("cache", BadConfig, "is the cache itself"),
            ("nowhere", CacheNotFound, "is not a directory"),
        ):
            with pytest.raises(error, match=said):
                writer.merge(tmp_path / source)
        assert writer.rows == 0
    assert not verify(cache).problems


# Commits


def test_puts_that_wait_together_share_a_commit_and_each_is_told_its_own(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(20)
    commits: list[int] = []
    commit = LiveTier.put
    begun, go_on = threading.Event(), threading.Event()

    def held_up(tier: LiveTier, rows: live.StoredRows) -> np.ndarray:
        commits.append(len(rows))
        begun.set()
        assert go_on.wait(30)
        return commit(tier, rows)

    monkeypatch.setattr(LiveTier, "put", held_up)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer, ThreadPoolExecutor(20) as pool:

        def one(i: int) -> int:
            return writer.put(Rows(names(i, i + 1), drawn[i][None], np.ones(1), np.zeros(1))).stored

        first = pool.submit(one, 0)
        assert begun.wait(30)
        others = [pool.submit(one, i % 10) for i in range(1, 20)]  # most captions twice, one a third time
        while len(writer._waiting) < 19:
            threading.Event().wait(0.001)
        go_on.set()
        stored = [first.result(), *(other.result() for other in others)]
        assert commits == [1, 10]
        assert sum(stored) == 10
        hits = writer.get(caption_keys(names(0, 10)))
        np.testing.assert_array_equal(hits.vectors, drawn[:10].astype(np.float16).astype(np.float32))


def test_after_a_failed_commit_the_disk_is_asked_again_before_the_next(
    tmp_path: Path,
    recipe: Recipe,
    vectors: Vectors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    drawn = vectors(30)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, drawn, 0, 10)
        with monkeypatch.context() as fault:
            broken = lmdb.Error("mdb_txn_commit: Input/output error")
            fault.setattr(FreshGroups, "encode", lambda *_: (_ for _ in ()).throw(broken))
            with pytest.raises(StorageFailed, match=r"nothing of this write was acknowledged"):
                put(writer, drawn, 10, 20)
        assert writer.contains(caption_keys(names(0, 20))).tolist() == [True] * 10 + [False] * 10
        put(writer, drawn, 10, 30)
        assert "was reopened after a failed write" in caplog.text
        hits = writer.get(caption_keys(names(0, 30)))
        np.testing.assert_array_equal(hits.vectors, drawn.astype(np.float16).astype(np.float32))
        writer.snapshot()
    require_all(tmp_path / "cache", drawn)


def test_what_a_failed_write_destroyed_stops_the_writer(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(30)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, drawn, 0, 10)
        before = shutil.copytree(tmp_path / "cache" / "live", tmp_path / "before")
        put(writer, drawn, 10, 20)
        with monkeypatch.context() as fault:
            broken = lmdb.Error("mdb_txn_commit: Input/output error")
            fault.setattr(FreshGroups, "encode", lambda *_: (_ for _ in ()).throw(broken))
            with pytest.raises(StorageFailed):
                put(writer, drawn, 20, 30)
        # What the disk kept is older than what was acknowledged.
        (tmp_path / "cache" / "live" / "data.mdb").write_bytes((before / "data.mdb").read_bytes())
        with pytest.raises(CacheDamaged, match="has lost batch"):
            put(writer, drawn, 20, 30)


def test_a_registration_that_is_cut_off_is_finished_at_the_next_opening(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(100)
    monkeypatch.setattr(live, "CHUNK_ROWS", 8)
    for what in ("seal", "compact"):
        cache = tmp_path / what
        many_seals(cache, recipe, drawn[:50], 25)
        with CacheWriter.open(cache) as writer:
            put(writer, drawn, 50, 100)
            with monkeypatch.context() as fault:
                fault.setattr(
                    LiveTier, "resume", lambda *_: (_ for _ in ()).throw(StorageFailed("the disk is gone"))
                )
                with pytest.raises(StorageFailed):
                    writer.seal() if what == "seal" else writer.compact(everything=True)
            assert writer.get(caption_keys(names(0, 100))).found.all()
        with CacheWriter.open(cache) as writer:
            stats = writer.stats()
            assert (stats.rows, stats.tokens) == (100, 100)
            assert stats.segments == (3 if what == "seal" else 1)
            writer.snapshot()
        require_all(cache, drawn)
        assert not verify(cache).problems


def test_expensive_work_is_refused_before_it_begins_when_there_is_no_room(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(40)
    cache = tmp_path / "cache"
    many_seals(cache, recipe, drawn, 10)
    write_cache(tmp_path / "other", recipe, Encoding(dimensions=24), names(35, 45), vectors(10))
    with CacheWriter.open(cache) as writer:
        before = sorted(cache.rglob("*"))
        monkeypatch.setattr(files, "free_bytes", lambda _: 100)
        for work in (
            writer.snapshot,
            lambda: writer.compact(everything=True),
            lambda: writer.merge(tmp_path / "other"),
        ):
            with pytest.raises(CacheFull, match=r"no space left for .* needs about .* MB"):
                work()
        assert sorted(cache.rglob("*")) == before
        monkeypatch.undo()
        writer.snapshot()
    require_all(cache, drawn)


def test_a_live_tier_of_another_version_is_refused_with_what_to_do(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, said in ((live.LIVE_VERSION + 1, "update it, or run"), (live.LIVE_VERSION - 1, ": run")):
        cache = tmp_path / str(version)
        with monkeypatch.context() as other:
            other.setattr(live, "LIVE_VERSION", version)
            CacheWriter.open(cache, recipe).close()
        with pytest.raises(
            UnsupportedFormat, match=said + " `lift-cache seal` with the version that wrote it"
        ):
            CacheWriter.open(cache)


# Mapping


@pytest.mark.parametrize(("dimensions", "dtype"), [(384, "float16"), (1000, "float32"), (4096, "float16")])
def test_every_batch_of_a_segment_is_aligned_so_that_a_gather_is_one_take(
    dimensions: int,
    dtype: Literal["float16", "float32"],
    tmp_path: Path,
    recipe: Recipe,
    vectors: Vectors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoding = Encoding(dtype=dtype, dimensions=dimensions)
    monkeypatch.setattr(segment, "BATCH_BYTES", 7 * segment.row_bytes(encoding))
    wide = recipe.model_copy(update={"dimensions": dimensions})
    drawn = vectors(40, dimensions=dimensions)
    write_cache(tmp_path / "cache", wide, encoding, names(0, 40), drawn, segment_rows=25)
    reader = CacheReader(tmp_path / "cache")
    assert reader.flat
    for info in reader.manifest.segments:
        one = segment.Segment(tmp_path / "cache" / "segments", info.id)
        assert len(one.vector_extents()) == -(-one.rows // 7)
        for extent in one.vector_extents():
            assert extent.offset % alignment(segment.row_bytes(encoding)) == 0
    order = np.random.default_rng(0).permutation(40)
    rows = reader.lookup(caption_keys(names(0, 40)))[order]
    for check in (False, True):
        np.testing.assert_array_equal(reader.gather(rows, check=check), drawn[order].astype(dtype))
    assert reader.captions(rows) == [names(0, 40)[i] for i in order]


@settings(deadline=None)
@given(st.data())
def test_rows_of_several_files_read_as_one_array(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    row_bytes = data.draw(st.sampled_from([16, 48, 96, 768, 2048, 8192, 384, 100]))
    directory = tmp_path_factory.mktemp("flat")
    rng = np.random.default_rng(0)
    extents, rows = [], []
    for number in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, 200))
        offset = data.draw(st.integers(0, 300)) * alignment(row_bytes)
        content = rng.integers(0, 256, (count, row_bytes), np.uint8)
        path = directory / str(number)
        path.write_bytes(bytes(offset) + content.tobytes())
        extents.append(Extent(path, offset, count))
        rows.append(content)
    flat = FlatMap(extents, row_bytes, random=True)
    wanted = [(e, r) for e in range(len(rows)) for r in range(len(rows[e]))]
    rng.shuffle(wanted)
    numbers = np.array([flat.first[e] + r for e, r in wanted])
    np.testing.assert_array_equal(flat.take(numbers, np.uint8), np.stack([rows[e][r] for e, r in wanted]))
