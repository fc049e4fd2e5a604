"""Shards in an object store: pieces that are whole, a bounded directory, and a store that fails."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import fs

from lift_cache.errors import BadConfig, BadSource, ServerUnavailable
from lift_trainer import shards
from lift_trainer.batches import Batches
from lift_trainer.images import ImageStore
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index
from lift_trainer.sampling import Sampler, Shuffle
from lift_trainer.shards import PieceCache, expand_remote
from tests.unit.trainer.conftest import World, png, write_tar

pytestmark = pytest.mark.slow

PIECE = 4096


class Bucket(fs.FileSystemHandler):  # type: ignore[misc]
    """A folder as a store, that refuses as often as it is told to and counts what is read."""

    def __init__(self, root: Path) -> None:
        self._inner = fs.SubTreeFileSystem(str(root), fs.LocalFileSystem())
        self.failures = 0
        self.reads: list[tuple[str, int, int]] = []

    def get_type_name(self) -> str:
        return "bucket"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        self._fail()
        return self._inner.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        self._fail()
        return self._inner.get_file_info(selector)

    def open_input_file(self, path: str) -> Any:
        bucket, inner = self, self._inner.open_input_file(path)

        class File:
            def read_at(self, size: int, offset: int) -> bytes:
                bucket._fail()
                bucket.reads.append((path, offset, size))
                return inner.read_at(size, offset)

        return File()

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("AWS Error NETWORK_CONNECTION: connection reset")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)

    open_input_stream = open_output_stream = open_append_stream = create_dir = delete_dir = None
    delete_dir_contents = delete_root_dir_contents = delete_file = move = copy_file = None


Bucket.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """`s3://bucket/…` is the folder `bucket`; pieces are small, and waiting takes no time."""
    made = Bucket(tmp_path)
    (tmp_path / "bucket").mkdir()

    class Files:
        """What a PyFileSystem does, without its detour over C++ for files that are not Arrow's."""

        get_file_info = staticmethod(
            lambda what: (
                made.get_file_info_selector(what)
                if isinstance(what, fs.FileSelector)
                else made.get_file_info(what)
            )
        )
        open_input_file = staticmethod(made.open_input_file)

    monkeypatch.setattr(shards, "_file_system", lambda location: Files())
    monkeypatch.setattr(shards, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(shards, "PIECE", PIECE)
    monkeypatch.setenv("LIFT_SHARD_CACHE", str(tmp_path / "pieces"))
    monkeypatch.setenv("LIFT_SHARD_CACHE_GIB", "1")
    for cached in (shards._connected, shards._object, shards._piece_cache):
        cached.cache_clear()
    yield made
    for cached in (shards._connected, shards._object, shards._piece_cache):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the disk has left, whatever is on the one that the tests run on."""
    left = [1 << 60]
    monkeypatch.setattr(shards, "free_bytes", lambda path: left[0])
    return left


def fill(root: Path, tars: int = 3, samples: int = 8) -> list[Path]:
    return [
        write_tar(
            root / "bucket" / f"train-{t:03d}.tar",
            [(f"{t}{i:03d}", png(10 * t + i, (24, 24)), {"caption": f"{t} {i}"}) for i in range(samples)],
        )
        for t in range(tars)
    ]


@pytest.mark.parametrize("uri", ["train-{000..002}.tar", "train-*.tar", ""])
def test_a_store_gives_the_index_and_the_images_of_the_same_shards_here(
    tmp_path: Path, bucket: Bucket, uri: str
) -> None:
    paths = fill(tmp_path)
    here = build_index([str(path) for path in paths], Rejects(0))
    there = build_index([f"s3://bucket/{uri}"], Rejects(0))
    assert there.digest == here.digest and there.where(9) == "s3://bucket/train-001.tar:1001"
    assert [there.image_bytes(i) for i in range(24)] == [here.image_bytes(i) for i in range(24)]
    bucket.reads.clear()
    assert [there.image_bytes(i) for i in range(24)] == [here.image_bytes(i) for i in range(24)]
    assert not bucket.reads, "what was read once is kept"


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("s3://bucket/train-{000..005}.tar", BadSource, r"no such object: s3://bucket/train-003\.tar \(from"),
        ("s3://bucket/none-*.tar", BadSource, "no such object"),
        ("s3://bucket/notes.txt", BadSource, "only plain .tar files are read from an object store"),
        ("s3://", BadConfig, "names no bucket"),
        ("s3://bucket/a.tar?colour=red", BadConfig, "unknown option 'colour'"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_clear_line(
    tmp_path: Path, bucket: Bucket, uri: str, error: type[Exception], message: str
) -> None:
    fill(tmp_path)
    (tmp_path / "bucket" / "notes.txt").write_text("x")
    with pytest.raises(error, match=message) as caught:
        expand_remote(uri)
    assert "\n" not in str(caught.value)


def test_a_store_that_fails_is_asked_again_and_then_named(tmp_path: Path, bucket: Bucket) -> None:
    fill(tmp_path)
    bucket.failures = 2
    index = build_index(["s3://bucket/train-000.tar"], Rejects(0))
    bucket.failures = 2
    assert len(index.image_bytes(3)) == index.size[3]
    bucket.failures = 3
    with pytest.raises(
        ServerUnavailable, match=r"s3://bucket/train-000\.tar cannot be read .*connection reset"
    ):
        index.image_bytes(7)
    assert not list((tmp_path / "pieces").glob(".tmp-*"))


def test_a_damaged_shard_in_a_store_is_named_by_its_address(tmp_path: Path, bucket: Bucket) -> None:
    path = fill(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadSource, match=r"^s3://bucket/train-000\.tar: cut short or corrupt"):
        build_index(["s3://bucket/train-000.tar"], Rejects(0))


def test_the_directory_stays_within_its_bytes_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    pieces = PieceCache(tmp_path / "pieces", budget=8 * PIECE)
    pieces._step = PIECE
    fetched: list[str] = []

    def piece(name: str) -> bytes:
        def fetch() -> bytes:
            fetched.append(name)
            return name.encode() * (PIECE // len(name))

        return pieces.read(name, fetch, 10, 7)

    for number in range(30):
        assert piece("a000") == b"00a000a"
        assert piece(f"b{number:03d}")[:2] == f"{number:03d}"[1:].encode()
        used = [path for path in (tmp_path / "pieces").iterdir() if path.is_file()]
        assert sum(path.stat().st_size for path in used) <= 8 * PIECE
        time.sleep(0.002)
    assert fetched.count("a000") == 1, "what is used all the time stays"
    fetched.clear()
    for number in range(29, 24, -1):
        piece(f"b{number:03d}")
    assert not fetched


def test_a_disk_with_little_left_gets_no_pieces_and_the_data_are_used_all_the_same(
    tmp_path: Path, room: list[int]
) -> None:
    pieces = PieceCache(tmp_path / "pieces", budget=8 * PIECE)
    pieces._step = PIECE
    assert pieces.read("one", lambda: b"1" * PIECE, 5, 3) == b"111"
    room[0] = 0
    assert pieces.read("two", lambda: b"2" * PIECE, 5, 3) == b"222"
    assert not [path for path in (tmp_path / "pieces").iterdir() if path.is_file()]


def _read_many(directory: Path, log: Path, seed: int) -> None:
    pieces, draw = PieceCache(directory, budget=16 * PIECE), random.Random(seed)
    pieces._step = PIECE

    def fetch(number: int) -> bytes:
        time.sleep(0.001)
        with log.open("a") as file:
            file.write(f"{number}\n")
        return bytes([number]) * PIECE

    for _ in range(150):
        number = draw.randrange(40)
        data = pieces.read(f"p{number}", lambda n=number: fetch(n), PIECE - 100, 100)  # type: ignore[misc]
        assert data == bytes([number]) * 100


def test_processes_that_share_a_directory_read_whole_pieces_and_keep_its_bound(tmp_path: Path) -> None:
    directory, log = tmp_path / "pieces", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_read_many, args=(directory, log, seed)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * 4
    sizes = [path.stat().st_size for path in directory.iterdir() if path.is_file()]
    assert set(sizes) == {PIECE} and sum(sizes) <= 16 * PIECE


def test_a_piece_wanted_by_several_at_a_time_is_fetched_once(tmp_path: Path) -> None:
    pieces, fetched = PieceCache(tmp_path / "pieces", budget=64 * PIECE), []
    pieces._step = PIECE

    def fetch() -> bytes:
        fetched.append(1)
        time.sleep(0.1)
        return bytes(PIECE)

    threads = [threading.Thread(target=pieces.read, args=("one", fetch, 0, 1)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_a_full_disk_leaves_no_half_piece_and_the_data_are_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = PieceCache(tmp_path / "pieces", budget=64 * PIECE)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert pieces.read("one", lambda: b"x" * PIECE, 5, 3) == b"xxx"
    assert not [path for path in (tmp_path / "pieces").iterdir() if path.is_file()]


@pytest.mark.parametrize("gib", ["0", "many", "nan"])
def test_a_bound_that_is_none_is_one_clear_line(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, gib: str
) -> None:
    monkeypatch.setenv("LIFT_SHARD_CACHE_GIB", gib)
    with pytest.raises(BadConfig, match="give a number of GiB"):
        PieceCache.default()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_store_are_those_from_here(
    tmp_path: Path, bucket: Bucket, workers: int, world: World
) -> None:
    paths = fill(tmp_path)

    class NoText:
        dimensions, resolution = 2, 1.0

        def gather(self, captions: np.ndarray) -> np.ndarray:
            return np.zeros((len(captions), 2), np.float32)

    def pixels(source: list[str], shuffle: Shuffle) -> list[torch.Tensor]:
        store = ImageStore(build_index(source, Rejects(0)), 10**6)
        batches = Batches(store, (NoText(),), Sampler(0, 24, 4, shuffle), 0, 16, 0)
        return [batch.pixels for batch in batches.stream(0, 12, workers, torch.device("cpu"))]

    for shuffle in (Shuffle(), Shuffle(4, 2)):
        here, there = pixels([str(p) for p in paths], shuffle), pixels(["s3://bucket/"], shuffle)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_run_whose_store_goes_away_is_saved_and_goes_on(
    tmp_path: Path, bucket: Bucket, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket" / "a.tar").write_bytes(world.shard.read_bytes())
    settings: dict[str, Any] = {"data": ["s3://bucket/a.tar"], "cache_images": 0, "steps": 6}
    monkeypatch.setattr(shards, "PIECE", 512)
    expected = train(prepare(world.config("whole", **settings | {"data": [str(world.shard)]})))
    job = prepare(world.config(**settings))
    bucket.failures = 0
    read, count = bucket._fail, [0]

    def goes_away() -> None:
        count[0] += 1
        if count[0] > 40:
            bucket.failures = 1
        read()

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "_fail", goes_away)
        with pytest.raises(ServerUnavailable, match=r"connection reset.*; saved as .*step-00000\d"):
            train(job)
    bucket.failures = 0
    outcome = train(prepare(world.config(**settings)))
    assert outcome.finished
    assert (outcome.checkpoint / "model.safetensors").read_bytes() == (
        expected.checkpoint / "model.safetensors"
    ).read_bytes()
