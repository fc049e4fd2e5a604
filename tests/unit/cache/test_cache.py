"""What the cache promises to those who fill it and to those who read it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_cache import files
from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import (
    BadCaption,
    BadConfig,
    CacheDamaged,
    CacheFull,
    CacheLocked,
    CacheNotFound,
    EncodingMismatch,
    RecipeMismatch,
    UnsafeFileSystem,
    UnsupportedFormat,
)
from lift_cache.index import OpenIndex, prefix_bits
from lift_cache.keys import caption_keys
from lift_cache.live import LiveTier
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import segment_ids
from lift_cache.snapshot import snapshots_of
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter, Rows

Vectors = Callable[..., np.ndarray]


def rows_of(captions: list[str], vectors: np.ndarray) -> Rows:
    tokens = np.array([len(caption.split()) for caption in captions], np.int32)
    return Rows(captions, vectors, tokens, tokens > 5)


def names(n: int, start: int = 0) -> list[str]:
    return [f"a caption with the number {i}" for i in range(start, start + n)]


def fill(
    path: Path, recipe: Recipe, vectors: np.ndarray, *, segment_rows: int = 65_536, seal_every: int = 0
) -> None:
    with CacheWriter.open(path, recipe, segment_rows=segment_rows) as writer:
        for start in range(0, len(vectors), 10):
            part = vectors[start : start + 10]
            writer.put(rows_of(names(len(part), start), part))
            if seal_every and start % seal_every == 0:
                writer.seal()
        writer.snapshot()


# Putting and getting


def test_what_was_put_is_got_back_from_every_tier(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    drawn = vectors(30)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        writer.put(rows_of(names(15), drawn[:15]))
        writer.seal()
        writer.put(rows_of(names(15, 15), drawn[15:]))
        hits = writer.get(caption_keys(names(31)))
    assert hits.found.tolist() == [True] * 30 + [False]
    np.testing.assert_array_equal(hits.vectors[:30], drawn.astype(np.float16).astype(np.float32))
    assert not hits.vectors[30].any()
    assert hits.tokens[:30].tolist() == [6] * 30
    assert hits.truncated[:30].all()


def test_an_acknowledged_put_is_there_after_reopening_without_closing(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from lift_cache.recipe import Recipe\n"
        "from lift_cache.writer import CacheWriter, Rows\n"
        "recipe = Recipe.parse(sys.argv[2], where='argument')\n"
        "w = CacheWriter.open(sys.argv[1], recipe)\n"
        "w.put(Rows(['kept'], np.ones((1, 24), np.float32), np.ones(1), np.zeros(1)))\n"
        "os._exit(9)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache"), recipe.canonical_json()], check=False
    )
    with CacheWriter.open(tmp_path / "cache") as writer:
        assert writer.get(caption_keys(["kept"])).vectors.tolist() == [[1.0] * 24]


def test_the_first_vector_of_a_caption_stays(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    drawn = vectors(4)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        result = writer.put(rows_of(["one", " one ", "two"], drawn[:3]))
        assert (result.stored, result.present) == (2, 1)
        result = writer.put(rows_of(["two"], drawn[3:]))
        assert (result.stored, result.present) == (0, 1)
        hits = writer.get(caption_keys(["one", "two"]))
    np.testing.assert_array_equal(hits.vectors, drawn[[0, 2]].astype(np.float16).astype(np.float32))


def test_rows_that_may_not_be_stored_do_not_hold_up_the_others(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(4)
    drawn[1, 0] = np.nan
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        result = writer.put(Rows(["good", "nan", "  ", "fine"], drawn, np.ones(4), np.zeros(4)))
        assert result.stored == 2
        assert sorted(result.rejected) == [1, 2]
        assert writer.contains(caption_keys(["good", "nan", "fine"])).tolist() == [True, False, True]


def test_sealing_in_the_background_loses_nothing_while_others_put_and_get(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(1200)
    stored = drawn.astype(np.float16).astype(np.float32)
    problems: list[str] = []
    with CacheWriter.open(tmp_path / "cache", recipe, segment_rows=50) as writer:

        def work(offset: int) -> None:
            for start in range(offset, 1200, 30):
                writer.put(rows_of(names(10, start), drawn[start : start + 10]))
                known = writer.get(caption_keys(names(10, start)))
                if not known.found.all() or not np.array_equal(known.vectors, stored[start : start + 10]):
                    problems.append(f"rows from {start}")

        threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 10, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        snapshot = writer.snapshot()
    assert not problems
    assert snapshot.rows == 1200
    reader = CacheReader(tmp_path / "cache")
    np.testing.assert_array_equal(
        reader.gather(reader.lookup(caption_keys(names(1200)))), drawn.astype(np.float16)
    )


# Refusals


def test_another_recipe_is_refused_with_field_and_both_values(tmp_path: Path, recipe: Recipe) -> None:
    CacheWriter.open(tmp_path / "cache", recipe).close()
    with pytest.raises(RecipeMismatch, match=r"pooling is 'last' in cache .* and 'mean'"):
        CacheWriter.open(tmp_path / "cache", recipe.model_copy(update={"pooling": "mean"}))
    with pytest.raises(EncodingMismatch, match="dtype"):
        CacheWriter.open(tmp_path / "cache", recipe, Encoding(dtype="float32", dimensions=24))
    CacheWriter.open(tmp_path / "cache", recipe).close()


def test_a_second_writer_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    with (
        CacheWriter.open(tmp_path / "cache", recipe),
        pytest.raises(CacheLocked, match="has a writer already"),
    ):
        CacheWriter.open(tmp_path / "cache", recipe)
    CacheWriter.open(tmp_path / "cache", recipe).close()


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path, recipe: Recipe) -> None:
    writer = CacheWriter.open(tmp_path / "cache", recipe)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        writer.close()
        CacheWriter.open(tmp_path / "cache", recipe).close()
    finally:
        child.communicate(b"\n")


def test_a_network_file_system_is_refused_by_name(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "file_system_of", lambda _: "nfs4")
    with pytest.raises(UnsafeFileSystem, match="nfs4"):
        CacheWriter.open(tmp_path / "cache", recipe)
    assert files.file_system_of(Path("/proc")) == "nfs4"


def test_a_directory_of_other_things_is_not_turned_into_a_cache(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(BadConfig, match=r"holds photo\.jpg already"):
        CacheWriter.open(tmp_path, recipe)
    with pytest.raises(CacheNotFound, match="not a cache"):
        CacheWriter.open(tmp_path)
    with pytest.raises(CacheNotFound, match="not a cache"):
        CacheReader(tmp_path)


def test_a_cache_without_a_snapshot_says_how_to_make_one(tmp_path: Path, recipe: Recipe) -> None:
    CacheWriter.open(tmp_path / "cache", recipe).close()
    with pytest.raises(CacheNotFound, match="lift-cache snapshot"):
        CacheReader(tmp_path / "cache")


# Snapshots and readers


def test_a_snapshot_never_changes_and_can_be_named(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    drawn = vectors(20)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        writer.put(rows_of(names(10), drawn[:10]))
        first = writer.snapshot()
        assert writer.snapshot() == first, "nothing new, no new snapshot"
        old = CacheReader(tmp_path / "cache")
        writer.put(rows_of(names(10, 10), drawn[10:]))
        second = writer.snapshot()
    assert snapshots_of(tmp_path / "cache") == [first.id, second.id]
    assert (old.rows, CacheReader(tmp_path / "cache").rows) == (10, 20)
    for name in (first.id, first.id[:9], "1"):
        named = CacheReader(f"{tmp_path / 'cache'}@{name}")
        assert named.snapshot_id == first.id
        assert (named.lookup(caption_keys(names(20))) >= 0).sum() == 10
    with pytest.raises(CacheNotFound, match="no single snapshot '3'"):
        CacheReader(f"{tmp_path / 'cache'}@3")


def test_counts_are_over_distinct_captions(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        writer.put(rows_of(["one two", "one two", "a b c d e f"], vectors(3)))
        writer.note_provenance({"engine": "vllm", "version": "0"})
        writer.note_provenance({"engine": "vllm", "version": "0"})
        writer.snapshot()
    manifest = CacheReader(tmp_path / "cache").manifest
    assert (manifest.rows, manifest.tokens, manifest.truncated) == (2, 8, 1)
    assert manifest.provenance == ({"engine": "vllm", "version": "0"},)
    assert manifest.fingerprint == recipe.fingerprint


def test_readers_work_on_a_copy_without_the_live_tier_and_without_captions(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(40)
    fill(tmp_path / "cache", recipe, drawn, seal_every=10)
    shutil.copytree(
        tmp_path / "cache",
        tmp_path / "copy",
        ignore=shutil.ignore_patterns("live", "*.captions.arrow", "writer.lock"),
    )
    shutil.rmtree(tmp_path / "cache")
    reader = CacheReader(tmp_path / "copy")
    rows = reader.lookup(caption_keys(names(40)))
    np.testing.assert_array_equal(reader.gather(rows, check=True), drawn.astype(np.float16))
    with pytest.raises(CacheDamaged, match="without captions"):
        reader.captions(rows[:1])
    assert not verify(tmp_path / "copy").problems


def test_a_copy_without_the_live_tier_is_a_whole_cache_again(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(40)
    fill(tmp_path / "cache", recipe, drawn, seal_every=10)
    shutil.rmtree(tmp_path / "cache" / "live")
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        assert writer.get(caption_keys(names(40))).found.all()
        assert writer.put(rows_of(names(1), drawn[:1])).present == 1
        assert len(snapshots_of(tmp_path / "cache")) == 1
        assert writer.snapshot().id == snapshots_of(tmp_path / "cache")[0], (
            "the same segments, the same snapshot"
        )


def test_a_reader_pickles_as_its_path_and_works_in_other_processes(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(30)
    fill(tmp_path / "cache", recipe, drawn)
    reader = CacheReader(tmp_path / "cache")
    assert len(pickle.dumps(reader)) < 500
    keys = caption_keys(names(30))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            rows = pool.apply(reader.lookup, (keys,))
            np.testing.assert_array_equal(pool.apply(reader.gather, (rows,)), drawn.astype(np.float16))


def test_another_user_can_read_it(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    drawn = vectors(30)
    fill(tmp_path / "cache", recipe, drawn)
    for part in (tmp_path, *tmp_path.parents):
        if part != Path("/") and part != Path("/tmp"):
            part.chmod(part.stat().st_mode | 0o055)

    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        reader = CacheReader(tmp_path / "cache")
        np.testing.assert_array_equal(
            reader.gather(reader.lookup(caption_keys(names(30))), check=True), drawn.astype(np.float16)
        )

    process = multiprocessing.get_context("fork").Process(target=as_nobody)
    process.start()
    process.join()
    assert process.exitcode == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lookup_agrees_with_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    recipe = Recipe(
        model="m", revision="r", dtype="float32", tokenizer_revision="r", end_token=True, pooling="last",
        max_tokens=9, normalize=True, dimensions=4,
    )  # fmt: skip
    have = data.draw(st.lists(st.integers(0, 400), unique=True, max_size=200))
    asked = data.draw(st.lists(st.integers(0, 400), max_size=50))
    path = tmp_path_factory.mktemp("cache")
    values = np.array([[i, 1, 2, 3] for i in have], np.float32).reshape(-1, 4)
    size = data.draw(st.sampled_from([7, 50, 1000]))
    write_cache(
        path / "c", recipe, Encoding(dimensions=4), [f"c{i}" for i in have], values, segment_rows=size
    )
    reader = CacheReader(path / "c")
    rows = reader.lookup(caption_keys([f"c{i}" for i in asked]))
    assert (rows >= 0).tolist() == [i in have for i in asked]
    found = rows[rows >= 0]
    assert reader.gather(found, check=True)[:, 0].tolist() == [i for i in asked if i in have]
    everything = np.concatenate(list(reader.iter_keys(batch=9))) if have else np.zeros((0, 16), np.uint8)
    assert [key.tobytes() for key in everything] == sorted(
        key.tobytes() for key in caption_keys([f"c{i}" for i in have])
    )


def test_keys_that_share_their_first_half_are_told_apart() -> None:
    def keys_of(pairs: list[tuple[int, int]]) -> np.ndarray:
        data = b"".join(high.to_bytes(8) + low.to_bytes(8) for high, low in pairs)
        return np.frombuffer(data, np.uint8).reshape(-1, 16)

    held = [(7, 3), (7, 5), (7, 9), (2**63, 1)]
    bits = prefix_bits(4)
    high = np.array([pair[0] for pair in held], np.uint64)
    first = np.searchsorted(high >> np.uint64(64 - bits), np.arange(2**bits + 1, dtype=np.uint64))
    index = OpenIndex(keys_of(held), np.arange(4, dtype=np.uint64), first, bits, "the index")
    asked = [*held, (7, 4), (7, 10), (7, 0), (2**63, 2), (0, 0), (2**64 - 1, 1)]
    assert index.lookup(keys_of(asked)).tolist() == [0, 1, 2, 3, -1, -1, -1, -1, -1, -1]


# Damage


def test_a_flipped_bit_anywhere_in_a_sealed_file_is_found(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    fill(tmp_path / "cache", recipe, vectors(20), seal_every=10)
    assert not verify(tmp_path / "cache").problems
    rng = np.random.default_rng(0)
    sealed = [*(tmp_path / "cache" / "segments").iterdir(), *(tmp_path / "cache" / "snapshots").glob("*/*")]
    assert len(sealed) == 2 * 2 + 3
    shutil.rmtree(tmp_path / "cache" / "live")  # which every look would read as well
    for path in sealed:
        whole = path.read_bytes()
        for _ in range(8):
            at = int(rng.integers(len(whole)))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
            assert verify(tmp_path / "cache").problems, f"{path.name} byte {at}"
            path.write_bytes(whole)
        path.write_bytes(whole[: len(whole) // 2])
        assert verify(tmp_path / "cache").problems, f"{path.name} cut short"
        path.write_bytes(whole)
    assert not verify(tmp_path / "cache").problems


def test_verify_reads_rows_that_are_not_sealed_and_changes_nothing(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(30)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        writer.put(rows_of(names(10), drawn[:10]))
        writer.seal()
        writer.put(rows_of(names(20, 10), drawn[10:]))
        assert "a writer is at work" in verify(tmp_path / "cache").live
    (tmp_path / "cache" / "segments" / ("0" * 32 + ".arrow")).write_bytes(b"not a segment")
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    report = verify(tmp_path / "cache")
    assert report.live == "checked: 20 rows not sealed yet"
    assert len(report.problems) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before
    data = tmp_path / "cache" / "live" / "data.mdb"
    whole = data.read_bytes()
    at = whole.find(drawn[17].astype(np.float16).tobytes())
    data.write_bytes(whole[: at + 2] + bytes([whole[at + 2] ^ 8]) + whole[at + 3 :])
    assert "fails its checksum" in verify(tmp_path / "cache").problems[-1]
    with (
        CacheWriter.open(tmp_path / "cache") as writer,
        pytest.raises(CacheDamaged, match="fails its checksums"),
    ):
        writer.get(caption_keys(names(30)))


def test_a_live_tier_of_another_cache_is_refused_and_can_be_moved_away(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    fill(tmp_path / "cache", recipe, vectors(10))
    fill(tmp_path / "other", recipe.model_copy(update={"pooling": "mean"}), vectors(10))
    shutil.rmtree(tmp_path / "cache" / "live")
    shutil.copytree(tmp_path / "other" / "live", tmp_path / "cache" / "live")
    with pytest.raises(CacheDamaged, match="belongs to another cache"):
        CacheWriter.open(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "live")
    with CacheWriter.open(tmp_path / "cache") as writer:
        assert writer.rows == 10


def test_a_checked_gather_never_returns_a_wrong_byte(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(20)
    fill(tmp_path / "cache", recipe, drawn)
    path = next((tmp_path / "cache" / "segments").glob("*[0-9a-f].arrow"))
    whole = bytearray(path.read_bytes())
    at = bytes(whole).find(drawn[7].astype(np.float16).tobytes())
    whole[at + 3] ^= 4
    path.write_bytes(whole)
    reader = CacheReader(tmp_path / "cache")
    rows = reader.lookup(caption_keys(names(20)))
    with pytest.raises(CacheDamaged, match="fails its checksum"):
        reader.gather(rows, check=True)
    with (
        CacheWriter.open(tmp_path / "cache") as writer,
        pytest.raises(CacheDamaged, match="fails its checksum"),
    ):
        writer.get(caption_keys(names(20)))


def test_a_segment_that_a_crash_left_unregistered_is_adopted(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    drawn = vectors(30)
    fill(tmp_path / "a", recipe, drawn[:20], seal_every=10)
    with CacheWriter.open(tmp_path / "b", recipe) as writer:
        writer.put(rows_of(names(30), drawn))
    for path in (tmp_path / "a" / "segments").iterdir():
        shutil.copy(path, tmp_path / "b" / "segments" / path.name)
    with CacheWriter.open(tmp_path / "b", recipe) as writer:
        assert writer.stats().segments == 2
        hits = writer.get(caption_keys(names(30)))
        assert hits.found.all()
        np.testing.assert_array_equal(hits.vectors, drawn.astype(np.float16).astype(np.float32))
        assert writer.snapshot().rows == 30


def test_a_segment_that_does_not_prove_itself_goes_to_quarantine(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    fill(tmp_path / "cache", recipe, vectors(10))
    segments = tmp_path / "cache" / "segments"
    (segments / ("0" * 32 + ".arrow")).write_bytes(b"not a segment")
    fill(tmp_path / "other", recipe.model_copy(update={"pooling": "mean"}), vectors(10, seed=1))
    foreign = segment_ids(tmp_path / "other" / "segments")[0]
    for path in (tmp_path / "other" / "segments").iterdir():
        shutil.copy(path, segments / path.name)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        assert writer.rows == 10
    inside = {path.name for path in (tmp_path / "cache" / "quarantine").iterdir()}
    assert inside == {"0" * 32 + ".arrow", f"{foreign}.arrow", f"{foreign}.captions.arrow"}


def test_only_temporary_names_are_deleted_at_open(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    fill(tmp_path / "cache", recipe, vectors(10))
    before = {path for path in (tmp_path / "cache").rglob("*") if "live" not in path.parts}
    (tmp_path / "cache" / "segments" / ".tmp-1-segment.arrow").write_bytes(b"half")
    (tmp_path / "cache" / "snapshots" / ".tmp-2-snapshot").mkdir()
    (tmp_path / "cache" / "snapshots" / ".tmp-2-snapshot" / "index.arrow").write_bytes(b"half")
    CacheWriter.open(tmp_path / "cache").close()
    assert {path for path in (tmp_path / "cache").rglob("*") if "live" not in path.parts} == before


def test_a_missing_segment_is_named_by_reader_and_writer(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    fill(tmp_path / "cache", recipe, vectors(10))
    path = next((tmp_path / "cache" / "segments").glob("*[0-9a-f].arrow"))
    path.unlink()
    with pytest.raises(CacheDamaged, match=path.name):
        CacheReader(tmp_path / "cache")
    with pytest.raises(CacheDamaged, match=path.name):
        CacheWriter.open(tmp_path / "cache")


def test_a_newer_format_is_said_to_be_newer(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    fill(tmp_path / "cache", recipe, vectors(10))
    manifest = next((tmp_path / "cache" / "snapshots").glob("*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(UnsupportedFormat, match="format version 3"):
        CacheReader(tmp_path / "cache")


# Faults in the middle of something


def test_a_seal_that_cannot_be_registered_is_tried_again_and_loses_nothing(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = vectors(20)
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        writer.put(rows_of(names(10), drawn[:10]))
        with monkeypatch.context() as fault:
            fault.setattr(
                LiveTier, "register", lambda *_, **__: (_ for _ in ()).throw(CacheFull("no space left"))
            )
            with pytest.raises(CacheFull):
                writer.seal()
        writer.put(rows_of(names(10, 10), drawn[10:]))
        assert writer.seal() == 20
        hits = writer.get(caption_keys(names(20)))
        np.testing.assert_array_equal(hits.vectors, drawn.astype(np.float16).astype(np.float32))
    with CacheWriter.open(tmp_path / "cache", recipe) as writer:
        stats = writer.stats()
        assert (stats.rows, stats.tokens, stats.segments) == (20, 120, 2), (
            "what the fault left is adopted, not counted"
        )
        assert writer.snapshot().rows == 20


def test_a_segment_that_disagrees_with_acknowledged_vectors_adds_only_what_is_new(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    mine, theirs = vectors(10), vectors(10, seed=1)
    fill(tmp_path / "theirs", recipe, np.concatenate([theirs, vectors(5, seed=2)]))
    for seal_first in (False, True):
        cache = tmp_path / f"mine-{seal_first}"
        with CacheWriter.open(cache, recipe) as writer:
            writer.put(rows_of(names(10), mine))
            if seal_first:
                writer.seal()
        for path in (tmp_path / "theirs" / "segments").iterdir():
            shutil.copy(path, cache / "segments" / path.name)
        with CacheWriter.open(cache, recipe) as writer:
            hits = writer.get(caption_keys(names(15)))
            expected = np.concatenate([mine, vectors(5, seed=2)]).astype(np.float16)
            np.testing.assert_array_equal(hits.vectors, expected.astype(np.float32))
            writer.snapshot()
            assert writer.rows == 15
        reader = CacheReader(cache)
        rows = reader.lookup(caption_keys(names(15)))
        np.testing.assert_array_equal(reader.gather(rows), expected)
        assert not (cache / "quarantine").exists() and not verify(cache).problems


def test_creating_a_cache_that_was_cut_short_can_be_repeated(tmp_path: Path, recipe: Recipe) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for left in ("writer.lock", "encoding.json", ".tmp-0123-recipe.json"):
        (cache / left).write_text("half")
    CacheWriter.open(cache, recipe).close()
    assert not list(cache.glob(".tmp-*"))


def test_a_cache_that_another_process_created_meanwhile_keeps_its_recipe(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.refuse_network_file_system

    def created_now(path: Path) -> None:
        monkeypatch.setattr(files, "refuse_network_file_system", real)
        CacheWriter.open(path, recipe.model_copy(update={"pooling": "mean"})).close()

    monkeypatch.setattr(files, "refuse_network_file_system", created_now)
    with pytest.raises(RecipeMismatch, match="pooling"):
        CacheWriter.open(tmp_path / "cache", recipe)
    assert Recipe.load(tmp_path / "cache" / "recipe.json").pooling == "mean"


@pytest.mark.parametrize("damaged", ["manifest.json", "index-0.arrow", "prefix-0.arrow"])
def test_a_damaged_snapshot_is_replaced_by_making_a_new_one(
    damaged: str, tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    fill(tmp_path / "cache", recipe, vectors(10))
    path = next((tmp_path / "cache" / "snapshots").glob(f"*/{damaged}"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with CacheWriter.open(tmp_path / "cache") as writer:
        made = writer.snapshot()
    assert made.id.startswith("000002-")
    assert len(CacheReader(tmp_path / "cache").lookup(caption_keys(names(10)))) == 10


def test_snapshots_asked_for_at_once_are_one(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    with CacheWriter.open(tmp_path / "cache", recipe) as writer, ThreadPoolExecutor(4) as pool:
        writer.put(rows_of(names(10), vectors(10)))
        made = {future.result().id for future in [pool.submit(writer.snapshot) for _ in range(8)]}
    assert made == set(snapshots_of(tmp_path / "cache"))
    assert len(made) == 1


def test_closing_twice_and_after_a_failed_seal_frees_the_cache(
    tmp_path: Path, recipe: Recipe, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CacheWriter.open(tmp_path / "cache", recipe, segment_rows=5)
    with monkeypatch.context() as fault:
        fault.setattr(
            LiveTier, "register", lambda *_, **__: (_ for _ in ()).throw(OSError("input/output error"))
        )
        writer.put(rows_of(names(10), vectors(10)))
        writer.close()
    writer.close()
    with CacheWriter.open(tmp_path / "cache", recipe) as again:
        assert again.rows == 10


def test_everything_in_a_cache_takes_the_group_of_its_directory(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory another group")
    os.chown(tmp_path, -1, 12345)
    fill(tmp_path / "cache", recipe, vectors(10))
    read_by_others = [path for path in (tmp_path / "cache").rglob("*") if "live" not in path.parts]
    assert len(read_by_others) >= 8
    assert {path.stat().st_gid for path in read_by_others} == {12345}


def test_nothing_can_be_read_from_a_missing_row(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    fill(tmp_path / "cache", recipe, vectors(3))
    reader = CacheReader(tmp_path / "cache")
    for read in (reader.gather, reader.keys, reader.tokens, reader.truncated, reader.captions):
        with pytest.raises(IndexError):
            read(np.array([0, -1]))


def test_a_refused_bulk_write_leaves_room_for_the_corrected_one(
    tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    encoding = Encoding(dimensions=24)
    with pytest.raises(BadCaption):
        write_cache(tmp_path / "cache", recipe, encoding, ["one", " "], vectors(2))
    assert write_cache(tmp_path / "cache", recipe, encoding, ["one", "two"], vectors(2)).rows == 2
    with pytest.raises(BadConfig, match="holds cache already"):
        write_cache(tmp_path, recipe, encoding, ["one"], vectors(1))
