"""Faults in the middle of something, and damage that must end in one error, never in a wrong answer or a crash."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import numpy as np
import pytest

from lift_cache import live
from lift_cache.bulk import BulkWriter, write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged, CacheFull, CacheLocked, EncodingMismatch, LiftError, StorageFailed
from lift_cache.fresh import FreshGroups
from lift_cache.keys import caption_keys
from lift_cache.live import LiveTier
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import segment_ids
from lift_cache.snapshot import snapshots_of
from lift_cache.tools.repair import mend
from lift_cache.verify import verify
from lift_cache.witness import Witness
from lift_cache.writer import CacheWriter, Rows

pytestmark = pytest.mark.slow

Vectors = Callable[..., np.ndarray]


def names(start: int, stop: int) -> list[str]:
    return [f"caption number {i}" for i in range(start, stop)]


def put(writer: CacheWriter, drawn: np.ndarray, start: int, stop: int) -> None:
    ones = np.ones(stop - start)
    writer.put(Rows(names(start, stop), drawn[start:stop], ones, np.zeros(stop - start)))


@pytest.mark.parametrize("what", ["seal", "compact"])
def test_a_commit_that_reports_failure_and_reached_the_disk_is_no_damage(
    what: str, tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(30)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        for start in (0, 10):
            put(writer, drawn, start, start + 10)
            if what == "compact":
                writer.seal()
        write = LiveTier._write

        @contextlib.contextmanager
        def late(tier: LiveTier) -> Iterator[object]:
            """Commits, and then says that it could not."""
            with write(tier) as txn:
                yield txn
            tier._suspect = True
            raise StorageFailed("the disk said no")

        with monkeypatch.context() as fault:
            fault.setattr(LiveTier, "_write", late)
            with pytest.raises(StorageFailed):
                writer.seal() if what == "seal" else writer.compact(everything=True)
        put(writer, drawn, 20, 30)
        assert writer.seal() == 10
        hits = writer.get(caption_keys(names(0, 30)))
        np.testing.assert_array_equal(hits.vectors, drawn.astype(np.float16).astype(np.float32))
        stats = writer.stats()
        assert (stats.rows, stats.tokens, stats.fresh_rows) == (30, 30, 0)
        writer.snapshot()
    assert not verify(tmp_path / "cache").problems


def test_a_reopening_that_fails_is_tried_again_by_reads_and_writes(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(20)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, drawn, 0, 10)
        writer._live._suspect = True
        with monkeypatch.context() as fault:
            fault.setattr(
                LiveTier, "_open", lambda *_: (_ for _ in ()).throw(StorageFailed("the disk is away"))
            )
            for work in (
                lambda: put(writer, drawn, 10, 20),
                lambda: writer.get(caption_keys(names(0, 10))),
            ):
                with pytest.raises(StorageFailed, match="the disk is away"):
                    work()
        assert writer.get(caption_keys(names(0, 10))).found.all()
        put(writer, drawn, 10, 20)
        assert writer.rows == 20


def test_closing_waits_for_a_commit_and_later_calls_say_that_it_is_closed(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(20)
    writer = CacheWriter.open(tmp_path / "cache", recipe)
    encode, begun, go_on = FreshGroups.encode, threading.Event(), threading.Event()

    def slow(tier: FreshGroups, rows: live.StoredRows) -> bytes:
        begun.set()
        assert go_on.wait(30)
        return encode(tier, rows)

    monkeypatch.setattr(FreshGroups, "encode", slow)
    putting = threading.Thread(target=put, args=(writer, drawn, 0, 10))
    putting.start()
    assert begun.wait(30)
    closing = threading.Thread(target=writer.close)
    closing.start()
    go_on.set()
    for thread in (putting, closing):
        thread.join(30)
        assert not thread.is_alive()
    with pytest.raises(StorageFailed, match="is closed"):
        put(writer, drawn, 10, 20)
    with CacheWriter.open(tmp_path / "cache") as again:
        assert again.rows == 10


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path, recipe: Recipe) -> None:
    writer = CacheWriter.open(tmp_path / "cache", recipe)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.read(reading, 1)
        os._exit(0)
    with pytest.raises(CacheLocked):
        CacheWriter.open(tmp_path / "cache")
    writer.close()
    CacheWriter.open(tmp_path / "cache").close()
    os.write(writing, b"x")
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


def test_a_process_may_end_while_a_thread_gathers(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    write_cache(tmp_path / "cache", recipe, Encoding(dimensions=24), names(0, 500), vectors(500))
    code = (
        "import sys, threading, numpy as np\n"
        "from lift_cache.reader import CacheReader\n"
        "reader = CacheReader(sys.argv[1])\n"
        "def work():\n"
        "    while True: reader.gather(np.arange(500))\n"
        "for _ in range(4): threading.Thread(target=work, daemon=True).start()\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")], check=False)
        assert done.returncode == 0


def test_a_damaged_captions_file_gives_right_captions_or_an_error(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    write_cache(tmp_path / "cache", recipe, Encoding(dimensions=24), names(0, 40), vectors(40))
    path = next((tmp_path / "cache" / "segments").glob("*.captions.arrow"))
    whole = path.read_bytes()
    rows = CacheReader(tmp_path / "cache").lookup(caption_keys(names(0, 40)))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            assert CacheReader(tmp_path / "cache").captions(rows) == names(0, 40)
        except CacheDamaged:
            refused += 1
    assert refused > 100


def test_a_damaged_vector_file_or_index_never_gives_a_wrong_vector(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(40)
    write_cache(tmp_path / "cache", recipe, Encoding(dimensions=24), names(0, 40), drawn, segment_rows=20)
    keys = caption_keys(names(0, 40))
    rng = np.random.default_rng(0)
    refused = missed = 0
    cache = tmp_path / "cache"
    segments = [path for path in (cache / "segments").glob("*.arrow") if "captions" not in path.name]
    for path in [*segments, *(cache / "snapshots").rglob("*.arrow")]:
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            try:
                reader = CacheReader(cache)
                rows = reader.lookup(keys)
                there = rows >= 0
                missed += int((~there).any())
                found = reader.gather(rows[there], check=True)
                np.testing.assert_array_equal(found, drawn[there].astype(np.float16))
            except LiftError:
                refused += 1
        path.write_bytes(whole)
    assert refused > 20 and missed > 0


def test_a_live_tier_that_is_cut_short_is_an_error_not_a_crash(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, vectors(200), 0, 200)
    data = tmp_path / "cache" / "live" / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(CacheDamaged, match="is cut short"):
        CacheWriter.open(tmp_path / "cache")
    assert any("is cut short" in problem for problem in verify(tmp_path / "cache").problems)


def test_rows_that_are_not_one_for_each_caption_are_refused(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    with (
        CacheWriter.open(tmp_path / "cache", recipe) as writer,
        pytest.raises(EncodingMismatch, match="3, 5, 3, 3 captions, vectors"),
    ):
        writer.put(Rows(names(0, 3), vectors(5), np.ones(3), np.zeros(3)))
    with (
        BulkWriter(tmp_path / "bulk", recipe) as bulk,
        pytest.raises(EncodingMismatch, match="5, 3, 5, 5 captions, vectors"),
    ):
        bulk.add(names(0, 5), vectors(3))


def test_a_large_put_is_committed_in_parts_of_bounded_size(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_cache.writer.GROUP_BYTES", 10 * 48)
    commits: list[int] = []
    commit = LiveTier.put
    monkeypatch.setattr(
        LiveTier, "put", lambda tier, rows: (commits.append(len(rows)), commit(tier, rows))[1]
    )
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, vectors(25), 0, 25)
        assert commits == [10, 10, 5]
        assert writer.get(caption_keys(names(0, 25))).found.all()


def test_a_snapshot_number_never_stands_for_two_snapshots(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(20)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, drawn, 0, 10)
        first = writer.snapshot()
        writer.remove_snapshot(first.id)
        put(writer, drawn, 10, 20)
        second = writer.snapshot()
    assert (first.id[:6], second.id[:6]) == ("000001", "000002")
    assert snapshots_of(tmp_path / "cache") == [second.id]


def test_provenance_goes_where_the_rows_go(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    made = {"engine": "some engine", "version": "1"}
    with BulkWriter(tmp_path / "bulk", recipe, provenance=[made]) as bulk:
        bulk.add(names(0, 10), vectors(10))
        bulk.finish()
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        writer.merge(tmp_path / "bulk")
        writer.snapshot()
    assert CacheReader(tmp_path / "cache").manifest.provenance == (made,)


def test_the_captions_of_a_lost_segment_are_not_collected(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    write_cache(tmp_path / "cache", recipe, Encoding(dimensions=24), names(0, 10), vectors(10))
    one = segment_ids(tmp_path / "cache" / "segments")[0]
    (tmp_path / "cache" / "segments" / f"{one}.arrow").unlink()
    with CacheWriter.open(tmp_path / "cache") as writer:
        assert writer.gc() == []
    assert (tmp_path / "cache" / "segments" / f"{one}.captions.arrow").exists()


@pytest.mark.parametrize("what", ["deleted", "older copy"])
@pytest.mark.parametrize("closed", [True, False])
def test_a_live_tier_that_went_missing_with_rows_is_noticed(
    what: str, closed: bool, tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(30)
    cache = tmp_path / "cache"
    with CacheWriter.open(cache, recipe) as writer:
        put(writer, drawn, 0, 10)
        writer.seal()
        put(writer, drawn, 10, 20)
    older = shutil.copytree(cache / "live", tmp_path / "older")
    writer = CacheWriter.open(cache)
    put(writer, drawn, 20, 30)
    if closed:
        writer.close()
    else:  # as a kill leaves it
        writer._live._env.close()
        writer._lock.release()
    shutil.rmtree(cache / "live")
    if what == "older copy":
        shutil.copytree(older, cache / "live")
    said = (
        "is missing" if what == "deleted" else "is an older copy"
    ) + f".*{'20 ' if closed else ''}rows that were not sealed"
    with pytest.raises(CacheDamaged, match=said):
        CacheWriter.open(cache)
    assert any(re.search(said, problem) for problem in verify(cache).problems)
    elsewhere = shutil.copytree(cache, tmp_path / "copy", ignore=shutil.ignore_patterns("live"))
    with CacheWriter.open(elsewhere) as copied:
        assert copied.rows == 10, "a copy without live/ is a cache of what was sealed"
    done = mend(cache)
    assert "live" in done.unread or "live" in done.quarantined
    with CacheWriter.open(cache) as again:
        assert again.rows == (10 if what == "deleted" else 20)
        again.snapshot()
    assert not verify(cache).problems


def test_a_live_tier_that_went_missing_with_nothing_in_it_is_made_anew(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, vectors(10), 0, 10)
        writer.seal()
    shutil.rmtree(tmp_path / "cache" / "live")
    assert not verify(tmp_path / "cache").problems
    with CacheWriter.open(tmp_path / "cache") as writer:
        assert writer.rows == 10


def test_a_full_disk_does_not_keep_a_cache_from_opening(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(20)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, drawn, 0, 10)
    with monkeypatch.context() as full:
        full.setattr(Witness, "save", lambda *_: (_ for _ in ()).throw(CacheFull("no space left")))
        with CacheWriter.open(tmp_path / "cache") as writer:
            assert writer.get(caption_keys(names(0, 10))).found.all()
    with CacheWriter.open(tmp_path / "cache") as writer:
        put(writer, drawn, 10, 20)
        assert writer.rows == 20


@pytest.mark.parametrize("table", ["retired", "segments", "pending", "batches", "counts"])
def test_a_record_of_the_live_tier_that_is_nonsense_is_damage_that_verify_names(
    table: str, tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        put(writer, vectors(20), 0, 10)
        writer.seal()
        put(writer, vectors(20), 10, 20)
    with lmdb.open(str(tmp_path / "cache" / "live"), max_dbs=16) as env, env.begin(write=True) as txn:
        txn.put(b"\xb8\xff", b"\xff nonsense", db=env.open_db(table.encode(), txn=txn, create=False))
    assert verify(tmp_path / "cache").problems
    with pytest.raises(CacheDamaged, match=r"repair|verify"), CacheWriter.open(tmp_path / "cache") as writer:
        writer.stats()
        writer.put(Rows(["another"], vectors(1), np.ones(1), np.zeros(1)))
        writer.gc()
