"""What the cache costs: against plain files with the same bytes, against other layouts, and in itself.

    python bench/cache.py --out bench/results/cache.json
    python bench/cache.py --only gather lookup --quick

Every ratio is a median over pairs that were measured in turn, the order of the two changing from pair to pair,
with the quartiles of the pairs' own ratios: what else the machine does then meets both. Rows, bytes, memory and
the machine's load stand beside the numbers. `--work` needs about 8 GB on a local disk and is empty afterwards.

    gather   warm: keys in, vectors out, against `take` from a NumPy memory-map of the same rows; bytes on disk
    cold     a cache of four times the memory that a control group allows (root, or a group of one's own)
    lookup   keys/s in an index of 10 million, beside `numpy.searchsorted`
    peers    the LIFT authors' layout read as their training code reads it, LMDB, Lance (pandas, pylance)
    puts     durable puts and bulk writing, against writing and fsyncing the same bytes
    open     opening a snapshot of 10 million rows in a new process, and the memory of a reader
    build    a snapshot of 50 million rows, and the memory that takes
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App, Parameter
from reporting import Record, Spread, machine, markdown, rounded

import lift_cache.reader
from lift_cache.bulk import BulkWriter
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import make_directory, write_atomic
from lift_cache.flatmap import FlatMap
from lift_cache.keys import caption_keys, sort_order
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import (
    SegmentInfo,
    SegmentWriter,
    StoredRows,
    list_values,
    row_bytes,
    row_checksums,
    vector_schema,
)
from lift_cache.snapshot import build_snapshot
from lift_cache.tools.export import export_aligned
from lift_cache.writer import CacheWriter, Rows

Part = Callable[[Path, bool], Iterator[tuple[str, Record]]]

CHUNK = 8_192
"""Rows that are made at a time."""

RNG = np.random.default_rng(0)

app = App(help=__doc__, help_format="plaintext")


# Rows


def recipe(dimensions: int) -> Recipe:
    return Recipe(
        model="bench/none",
        revision="0" * 40,
        dtype="float32",
        tokenizer_revision="0" * 40,
        end_token=True,
        pooling="last",
        max_tokens=77,
        normalize=True,
        dimensions=dimensions,
        declared=True,
    )


@lru_cache(maxsize=1)
def drawn(dimensions: int) -> np.ndarray:
    """Vectors of about unit length: float32 [16,384, d]."""
    return np.random.default_rng(1).standard_normal((16_384, dimensions), np.float32) / dimensions**0.5


def vectors(start: int, stop: int, dimensions: int) -> np.ndarray:
    """Distinct ones: float32 [stop − start, d]."""
    number, block = np.arange(start, stop), drawn(dimensions)
    return block[number % len(block)] * (1 + number / 2**24).astype(np.float32)[:, None]


def captions(start: int, stop: int) -> list[str]:
    return [f"a photograph of thing number {i}, seen from the left" for i in range(start, stop)]


def encoding(dimensions: int, dtype: str) -> Encoding:
    if dtype != "int8":
        return Encoding.model_validate({"dimensions": dimensions, "dtype": dtype})
    widest = 1.5 * np.abs(drawn(dimensions)).max(0)
    return Encoding.int8_of_range(-widest, widest)


def stored(start: int, stop: int, how: Encoding) -> StoredRows:
    texts = captions(start, stop)
    keys, (values, bad) = caption_keys(texts), how.encode(vectors(start, stop, how.dimensions))
    assert not bad
    n = stop - start
    return StoredRows(
        keys,
        values,
        np.full(n, 12, np.int32),
        np.zeros(n, bool),
        row_checksums(keys, values),
        pa.array(texts, pa.large_string()),
    )


def to_put(start: int, stop: int, dimensions: int) -> Rows:
    n = stop - start
    return Rows(
        captions(start, stop),
        vectors(start, stop, dimensions),
        np.full(n, 12, np.int32),
        np.zeros(n, bool),
    )


def spans(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def write_in_bulk(path: Path, how: Encoding, rows: int, segment_rows: int | None = None) -> None:
    with BulkWriter(path, recipe(how.dimensions), how, segment_rows=segment_rows) as writer:
        for start, stop in spans(rows, CHUNK):
            writer.add_stored(stored(start, stop, how))
        writer.finish()


def write_in_seals(path: Path, how: Encoding, rows: int, seals: int) -> None:
    with CacheWriter.open(path, recipe(how.dimensions), how, segment_rows=rows + 1) as writer:
        for start, stop in spans(rows, math.ceil(rows / seals)):
            writer.put(to_put(start, stop, how.dimensions))
            writer.seal()
        writer.snapshot()
        writer.gc()
    shutil.rmtree(path / "live")


def write_plain(path: Path, reader: CacheReader) -> np.ndarray:
    """The vectors in the order of the snapshot's rows as one file; returns its memory-map."""
    with path.open("wb") as file:
        for start, stop in spans(reader.rows, CHUNK):
            reader.gather(np.arange(start, stop)).tofile(file)
    return np.memmap(path, reader.encoding.numpy_dtype, "r", shape=(reader.rows, reader.dimensions))


def write_keys_only(path: Path, rows: int, segments: int) -> None:
    """A cache of random keys and tiny vectors, without captions or row checksums: for what only reads keys."""
    how = Encoding(dimensions=8)
    (path / "segments").mkdir(parents=True)
    how.save(path / "encoding.json")
    recipe(8).save(path / "recipe.json")
    random = np.random.default_rng(2)
    infos: list[SegmentInfo] = []
    for start, stop in spans(rows, math.ceil(rows / segments)):
        n = stop - start
        keys = np.frombuffer(random.bytes(16 * n), np.uint8).reshape(n, 16)
        keys = keys[sort_order(keys)]
        ones, zeros = np.ones((n, 8), np.float16), np.zeros(n, np.uint64)
        with SegmentWriter(path / "segments", recipe(8), how, captions=False) as writer:
            writer.add(StoredRows(keys, ones, np.full(n, 12, np.int32), np.zeros(n, bool), zeros, None))
            infos.append(writer.finish())
    write_atomic(path / "infos.json", json.dumps([info.model_dump() for info in infos]).encode())


def index_keys_only(path: Path) -> None:
    infos = [SegmentInfo.model_validate(info) for info in json.loads((path / "infos.json").read_bytes())]
    build_snapshot(path, recipe(8), Encoding(dimensions=8), infos)


# Measuring


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(
    rounds: int,
    ours: Callable[[int], Any],
    plain: Callable[[int], Any],
    after_each: Callable[[], Any] = lambda: None,
) -> Record:
    """Time both, `rounds` times each, in pairs; the ratio is of speeds: above 1, ours is faster."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(seconds(partial((ours, plain)[which], number)))
            after_each()
    ratio = Spread.of([b / a for a, b in zip(*times, strict=True)])
    return {
        "ours_s": statistics.median(times[0]),
        "plain_s": statistics.median(times[1]),
        "ratio": ratio.median,
        "quartiles": [ratio.low, ratio.high],
    }


def _each(inputs: Sequence[Any], work: Callable[[Any], Any]) -> Callable[[int], Any]:
    return lambda number: work(inputs[number])


def _vectors_of(reader: CacheReader, keys: np.ndarray) -> np.ndarray:
    return reader.gather(reader.lookup(keys))


def anonymous_bytes() -> int:
    """Private memory of this process that no file backs."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise BadConfig("/proc/self/smaps_rollup does not say what memory is anonymous; use Linux")


class Peak:
    """The most private memory while something runs, beyond what there was at its start."""

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        self.before = self.most = anonymous_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self.most - self.before


def read_bytes() -> int:
    """Bytes that this process has had read from the disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def forget(*paths: Path) -> None:
    """Drop files from the page cache."""
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class MemoryLimit:
    """A control group, below this process's own, whose members share so much memory, page cache among it."""

    def __init__(self, limit: int) -> None:
        """Raises BadConfig where none can be made."""
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        version1 = [name for _, controllers, name in groups if "memory" in controllers.split(",")]
        if version1:
            root, file = Path(f"/sys/fs/cgroup/memory{version1[0]}"), "memory.limit_in_bytes"
        else:
            root, file = Path(f"/sys/fs/cgroup{groups[-1][2]}"), "memory.max"
        self.path = root / f"bench-{os.getpid()}"
        try:
            self.path.mkdir()
            (self.path / file).write_text(str(limit))
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise BadConfig(
                f"no memory limit can be set ({error}); leave out `cold`, or run it as root"
            ) from None

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        self.path.rmdir()


def apart(work: Callable[..., Any], *args: Any, limit: MemoryLimit | None = None) -> Any:
    """Run in a new interpreter."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=limit.join if limit else None) as pool:
        return pool.submit(work, *args).result()


# The parts


def gather(work: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    payload = 1 << (26 if quick else 30)
    for dimensions in (384, 1024, 4096):
        for dtype in ("float16", "int8"):
            how, rows = encoding(dimensions, dtype), payload // (2 * dimensions)
            plain = None
            for made, seals in (("153 seals", 153), ("16 seals", 16), ("153 in bulk", 0)):
                path = work / "cache"
                if seals:
                    write_in_seals(path, how, rows, seals)
                else:
                    write_in_bulk(path, how, rows, math.ceil(rows / 153))
                reader = CacheReader(path)
                if plain is None:
                    plain = write_plain(work / "plain", reader)
                about = {"dims": dimensions, "dtype": dtype, "rows": rows}
                segments = len(reader.manifest.segments)
                for batch in (1024, 16_384):
                    measured = _gather(
                        reader, plain, batch, rounds=10 if quick else 300 if batch == 1024 else 40
                    )
                    target = {4096: 0.8, 384: 0.5}.get(dimensions)
                    yield (
                        "gather",
                        about
                        | {"made by": made, "segments": segments, "batch": batch}
                        | measured
                        | {"target": target},
                    )
                if seals != 16:
                    yield "disk", about | {"segments": segments} | _disk(reader)
                shutil.rmtree(path)
            (work / "plain").unlink()


def _gather(reader: CacheReader, plain: np.ndarray, batch: int, rounds: int) -> Record:
    rows = [RNG.integers(0, reader.rows, batch) for _ in range(rounds)]
    keys = [reader.keys(some) for some in rows]
    for start, stop in spans(reader.rows, CHUNK):  # every page is mapped, and every row is right
        some = np.arange(start, stop)
        assert np.array_equal(reader.gather(reader.lookup(reader.keys(some))), plain[start:stop])
    measured = in_turn(
        rounds, _each(keys, partial(_vectors_of, reader)), _each(rows, partial(plain.take, axis=0))
    )
    return {
        "cache rows/s": batch / measured["ours_s"],
        "memmap rows/s": batch / measured["plain_s"],
        "ratio": measured["ratio"],
        "quartiles": measured["quartiles"],
    }


def _disk(reader: CacheReader) -> Record:
    """Bytes that files take on the disk, per vector, as shares of the vector's own bytes."""

    def taken(paths: Iterator[Path]) -> int:
        return sum(path.stat().st_blocks * 512 for path in paths)

    payload = reader.rows * row_bytes(reader.encoding)
    segments = reader.path / "segments"
    every, texts = taken(segments.glob("*.arrow")), taken(segments.glob("*.captions.arrow"))
    index = taken((reader.path / "snapshots" / reader.snapshot_id).iterdir())
    return {
        "payload bytes": payload / reader.rows,
        "segments": (every - texts) / payload,
        "with the snapshot's index": (every - texts + index) / payload,
        "captions, bytes": texts / reader.rows,
        "target": 1.03 if row_bytes(reader.encoding) >= 8192 else None,
    }


COLD_LIMIT = 256 << 20
COLD_SECONDS = 10


def cold(work: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    limit = MemoryLimit(COLD_LIMIT)
    try:
        for dimensions in (4096, 384):
            how = encoding(dimensions, "float16")
            rows = (1 if quick else 4) * COLD_LIMIT // row_bytes(how)
            apart(write_in_bulk, work / "cache", how, rows)
            apart(_write_plain, work / "plain", work / "cache")
            ways = [
                ("memmap, random", _cold_memmap, {"in_order": False}),
                ("memmap, sorted", _cold_memmap, {"in_order": True}),
                ("gather, random", _cold_gather, {"in_order": False}),
                ("gather, sorted", _cold_gather, {"in_order": True}),
                ("gather, random, with read-ahead", _cold_gather, {"in_order": False, "read_ahead": True}),
                ("iter_rows", _cold_scan, {}),
            ]
            if dimensions == 4096:
                apart(_export, work / "cache", work / "aligned", rows)
                ways.append(("aligned export", _cold_aligned, {}))
            for name, way, settings in ways:
                forget(work)
                measured = apart(way, work, dimensions, settings, 2 if quick else COLD_SECONDS, limit=limit)
                yield (
                    "cold",
                    {
                        "dims": dimensions,
                        "rows": rows,
                        "limit bytes": COLD_LIMIT,
                        "access": name,
                    }
                    | measured,
                )
            for path in list(work.iterdir()):
                _remove(path)
    finally:
        limit.close()


def _write_plain(path: Path, cache: Path) -> None:
    write_plain(path, CacheReader(cache))


def _cold_loop(batches: Iterator[int], row_size: int, for_seconds: float) -> Record:
    """Run batches, each of which says its number of rows, for so long."""
    before, began, rows = read_bytes(), time.perf_counter(), 0
    for more in batches:
        rows += more
        if time.perf_counter() - began > for_seconds:
            break
    taken = time.perf_counter() - began
    got = (read_bytes() - before) / rows
    return {
        "rows/s": rows / taken,
        "bytes read per row": got,
        "of the vector": got / row_size,
        "rows read": rows,
    }


def _cold_memmap(work: Path, dimensions: int, settings: dict[str, bool], for_seconds: float) -> Record:
    plain = np.memmap(work / "plain", np.float16, "r").reshape(-1, dimensions)

    def batches() -> Iterator[int]:
        while True:
            rows = RNG.integers(0, len(plain), 4096)
            yield len(plain.take(np.sort(rows) if settings["in_order"] else rows, axis=0))

    return _cold_loop(batches(), dimensions * 2, for_seconds)


def _cold_gather(work: Path, dimensions: int, settings: dict[str, bool], for_seconds: float) -> Record:
    if settings.get("read_ahead"):  # as if the maps were not told that rows are asked for in no order
        lift_cache.reader.FlatMap = partial(_read_ahead, FlatMap)  # type: ignore[misc,assignment]
    reader = CacheReader(work / "cache")

    def batches() -> Iterator[int]:
        while True:
            rows = RNG.integers(0, reader.rows, 4096)
            keys = reader.keys(np.sort(rows) if settings["in_order"] else rows)
            yield len(reader.gather(reader.lookup(keys)))

    return _cold_loop(batches(), dimensions * 2, for_seconds)


def _read_ahead(kind: type[FlatMap], extents: Any, width: int, *, random: bool) -> FlatMap:
    return kind(extents, width, random=False)


def _cold_scan(work: Path, dimensions: int, settings: dict[str, bool], for_seconds: float) -> Record:
    reader = CacheReader(work / "cache")
    return _cold_loop((len(rows) for rows in reader.iter_rows()), dimensions * 2, for_seconds)


def _export(cache: Path, out: Path, rows: int) -> None:
    """Shards of samples with a byte for an image, and the vectors aligned to them."""
    shards = out.with_name("shards")
    shards.mkdir()
    for start, stop in spans(rows, CHUNK):
        with tarfile.open(shards / f"{start:08d}.tar", "w") as tar:
            for row, caption in zip(range(start, stop), captions(start, stop), strict=True):
                for name, data in ((f"{row:08d}.jpg", b"\0"), (f"{row:08d}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    export_aligned(str(cache), [str(shards)], out)


def _cold_aligned(work: Path, dimensions: int, settings: dict[str, bool], for_seconds: float) -> Record:
    def batches() -> Iterator[int]:
        for path in sorted((work / "aligned").glob("*.arrow")):
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            for number in range(file.num_record_batches):
                lists = file.get_batch(number).column("vectors").values
                yield len(list_values(lists, dimensions).copy())

    return _cold_loop(batches(), dimensions * 2, for_seconds)


def _ten_million(work: Path, quick: bool) -> Path:
    path = work.parent / "keys-only"
    if not path.exists():
        apart(write_keys_only, path, 1_000_000 if quick else 10_000_000, 16)
        apart(index_keys_only, path)
    return path


def lookup(work: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    reader = CacheReader(_ten_million(work, quick))
    high = np.concatenate([keys.view(">u8")[:, 0].astype(np.uint64) for keys in reader.iter_keys()])
    for batch in (1024, 16_384):
        for name, share in (("hits", 1.0), ("half of each", 0.5), ("misses", 0.0)):
            asked = []
            for _ in range(20 if quick else 200):
                keys = RNG.integers(0, 256, (batch, 16), np.uint8)
                hits = RNG.random(batch) < share
                keys[hits] = reader.keys(RNG.integers(0, reader.rows, int(hits.sum())))
                assert np.array_equal(reader.lookup(keys) >= 0, hits)
                asked.append(keys)
            first_halves = [keys.view(">u8")[:, 0].astype(np.uint64) for keys in asked]
            measured = in_turn(
                len(asked), _each(asked, reader.lookup), _each(first_halves, high.searchsorted)
            )
            yield (
                "lookup",
                {
                    "rows": reader.rows,
                    "batch": batch,
                    "keys": name,
                    "lookup keys/s": batch / measured["ours_s"],
                    "searchsorted keys/s": batch / measured["plain_s"],
                    "ratio": measured["ratio"],
                    "quartiles": measured["quartiles"],
                    "target": 5e6,
                },
            )


def peers(work: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    for dimensions in (384, 4096):
        how, rows = encoding(dimensions, "float16"), (1 << (24 if quick else 28)) // (2 * dimensions)
        write_in_bulk(work / "cache", how, rows)
        reader = CacheReader(work / "cache")
        order = RNG.permutation(rows)
        asked = [order[start : start + 1024] for start in range(0, rows - 1023, 1024)]
        keys = [reader.keys(some) for some in asked]
        right = [reader.gather(some) for some in asked[:2]]
        for name, prepare in (("LIFT authors' Parquet", _authors), ("LMDB", _lmdb), ("Lance", _lance)):
            try:
                read = prepare(work / "peer", reader, asked)
            except ImportError as error:
                yield "peers", {"dims": dimensions, "peer": name, "note": f"left out: {error}"}
                continue
            for i, vectors_there in enumerate(right):
                got = read(i)
                # The authors' files are read from one end to the other: there are no batches to ask for.
                assert name.startswith("LIFT") or np.array_equal(got, vectors_there), name
            rounds = min(len(asked) - 2, 16 if name.startswith("LIFT") else 100)
            measured = in_turn(rounds, _each(keys, partial(_vectors_of, reader)), read)
            yield (
                "peers",
                {
                    "dims": dimensions,
                    "rows": rows,
                    "batch": 1024,
                    "peer": name,
                    "cache rows/s": 1024 / measured["ours_s"],
                    "peer rows/s": 1024 / measured["plain_s"],
                    "ratio": measured["ratio"],
                    "quartiles": measured["quartiles"],
                    "target": 12 if name.startswith("LIFT") else None,
                    "bytes on disk of the peer": sum(
                        p.stat().st_size for p in (work / "peer").rglob("*") if p.is_file()
                    )
                    / rows,
                },
            )
            shutil.rmtree(work / "peer")
        shutil.rmtree(work / "cache")


def _authors(path: Path, reader: CacheReader, asked: list[np.ndarray]) -> Callable[[int], np.ndarray]:
    """Folders of Parquet files of 100 rows, `key` (an image's file name) and `embedding` (list<float32>).

    Their loader takes the files in the order of the directory; batches of 100 rows become a data frame, its rows
    are walked one by one, and a training batch is stacked of them. Random order comes from shuffling folders and
    a buffer of rows, which is left out here, as is the image: its cost is not the layout's.
    """
    importlib.import_module("pandas")
    for number, (start, stop) in enumerate(spans(reader.rows, 100)):
        folder = path / f"train-{number // 100:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        lists = pa.array(list(vectors(start, stop, reader.dimensions)), pa.list_(pa.float32()))
        names = pa.array([f"{row:09d}.jpg" for row in range(start, stop)])
        pq.write_table(pa.table({"key": names, "embedding": lists}), folder / f"{number % 100}.parquet")

    def rows() -> Iterator[np.ndarray]:
        for folder in os.listdir(path):  # noqa: PTH208 (as they do)
            for name in os.listdir(path / folder):  # noqa: PTH208
                file = pq.ParquetFile(path / folder / name)
                for batch in file.iter_batches(batch_size=100, columns=["key", "embedding"]):
                    for _, row in batch.to_pandas().iterrows():
                        yield row["embedding"]

    stream = rows()
    return lambda _: np.stack([next(stream) for _ in range(1024)])


def _lmdb(path: Path, reader: CacheReader, asked: list[np.ndarray]) -> Callable[[int], np.ndarray]:
    """One value for each row, under its key."""
    env = lmdb.open(str(path), map_size=1 << 40, readahead=False)
    for start, stop in spans(reader.rows, CHUNK):
        rows = np.arange(start, stop)
        pairs = zip(reader.keys(rows), reader.gather(rows), strict=True)
        with env.begin(write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti([(key.tobytes(), value.tobytes()) for key, value in pairs], append=True)
    names = [[key.tobytes() for key in reader.keys(rows)] for rows in asked]
    dtype, dimensions = reader.encoding.numpy_dtype, reader.dimensions

    def read(i: int) -> np.ndarray:
        out = np.empty((len(names[i]), dimensions), dtype)
        with env.begin(buffers=True) as txn:
            for row, name in zip(out, names[i], strict=True):
                row[:] = np.frombuffer(txn.get(name), dtype)
        return out

    return read


def _lance(path: Path, reader: CacheReader, asked: list[np.ndarray]) -> Callable[[int], np.ndarray]:
    """`take` of row numbers that are known: it need not look keys up."""
    lance = importlib.import_module("lance")
    batches = [rows.vector_batch(vector_schema(reader.encoding)) for rows in _in_order(reader)]
    dataset = lance.write_dataset(pa.Table.from_batches(batches), str(path))
    places = [rows.tolist() for rows in asked]

    def read(i: int) -> np.ndarray:
        column = dataset.take(places[i], columns=["vector"]).column("vector").combine_chunks()
        return column.values.to_numpy().reshape(len(places[i]), reader.dimensions)

    return read


def _in_order(reader: CacheReader) -> Iterator[StoredRows]:
    for start, stop in spans(reader.rows, CHUNK):
        rows = np.arange(start, stop)
        n, nothing = stop - start, np.zeros(stop - start, np.uint64)
        yield StoredRows(
            reader.keys(rows), reader.gather(rows), np.zeros(n, np.int32), np.zeros(n, bool), nothing, None
        )


PUT_BYTES = {384: 1 << 28, 1024: 1 << 29, 4096: 1 << 30}


def puts(work: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    for dimensions, payload in PUT_BYTES.items():
        how = encoding(dimensions, "float16")
        rows = (payload >> 4 if quick else payload) // row_bytes(how)
        for name, batch, target in (
            ("put, seal", 1024, 0.35),
            ("put, seal", 16_384, 0.35),
            ("bulk", 16_384, 0.8),
        ):
            way = _bulk if name == "bulk" else _put
            made = [_cheap_rows(start, stop, dimensions) for start, stop in spans(rows, batch)]
            blocks = [how.encode(drawn(dimensions)[:batch])[0][: len(part.captions)] for part in made]
            cpu: list[float] = []
            measured = in_turn(
                2 if quick else 5,
                partial(_counting_cpu, cpu, partial(way, work / "out", how, made)),
                partial(_write_plainly, work / "out", blocks, name != "bulk"),
                partial(_remove, work / "out"),
            )
            yield (
                "puts",
                {
                    "dims": dimensions,
                    "rows": rows,
                    "way": name,
                    "batch": batch,
                    "cache MB/s": rows * row_bytes(how) / 1e6 / measured["ours_s"],
                    "plain MB/s": rows * row_bytes(how) / 1e6 / measured["plain_s"],
                    "ratio": measured["ratio"],
                    "quartiles": measured["quartiles"],
                    "target": target,
                    "cache, CPU s per GB": statistics.median(cpu) / (rows * row_bytes(how) / 1e9),
                },
            )
    yield from _put_latency(work / "out", quick)
    yield from _small_puts(work / "out", quick)


def _cheap_rows(start: int, stop: int, dimensions: int) -> Rows:
    """As `to_put`, without memory of their own for vectors."""
    n = stop - start
    return Rows(captions(start, stop), drawn(dimensions)[:n], np.full(n, 12, np.int32), np.zeros(n, bool))


def _counting_cpu(into: list[float], work: Callable[[], Any], _: int) -> None:
    began = time.process_time()
    work()
    into.append(time.process_time() - began)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _put(path: Path, how: Encoding, made: list[Rows]) -> None:
    with CacheWriter.open(path, recipe(how.dimensions), how) as writer:
        for rows in made:
            writer.put(rows)
        writer.seal()


def _bulk(path: Path, how: Encoding, made: list[Rows]) -> None:
    with BulkWriter(path, recipe(how.dimensions), how) as writer:
        for rows in made:
            writer.add(rows.captions, rows.vectors, rows.tokens, rows.truncated)
        writer.finish()


def _write_plainly(path: Path, blocks: list[np.ndarray], sync_each: bool, _: int) -> None:
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
            if sync_each:
                os.fsync(file.fileno())
        os.fsync(file.fileno())


def _put_latency(path: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    """Puts of 64 rows, one after the other, while nothing else goes on and while rows are sealed."""
    dimensions, batch = 4096, 64
    before, during = 8_192 if quick else 65_536, []
    with CacheWriter.open(path, recipe(dimensions), segment_rows=1 << 40) as writer:
        for start, stop in spans(before, 4096):
            writer.put(to_put(start, stop, dimensions))
        more = (to_put(start, start + batch, dimensions) for start in range(before, 1 << 40, batch))
        alone = [seconds(partial(writer.put, next(more))) for _ in range(100)]
        with ThreadPoolExecutor(1) as sealer:
            sealing = sealer.submit(writer.seal)
            while not sealing.done():
                during.append(seconds(partial(writer.put, next(more))))
    shutil.rmtree(path)
    for name, taken in (("alone", alone), ("during a seal", during)):
        p50, p99 = np.quantile(taken, (0.5, 0.99)) * 1e3
        yield (
            "put latency",
            {
                "dims": dimensions,
                "rows": batch,
                "sealed rows": before,
                "when": name,
                "puts": len(taken),
                "p50 ms": float(p50),
                "p99 ms": float(p99),
                "most ms": max(taken) * 1e3,
            },
        )


def _small_puts(path: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    """One row at a time, from one thread and from eight."""
    dimensions, count = 1024, 200 if quick else 1_600
    rows = [to_put(i, i + 1, dimensions) for i in range(count)]

    def many(threads: int) -> float:
        with CacheWriter.open(path, recipe(dimensions)) as writer, ThreadPoolExecutor(threads) as pool:
            taken = seconds(lambda: list(pool.map(writer.put, rows)))
        shutil.rmtree(path)
        return count / taken

    rates = [(many(1), many(8)) for _ in range(2 if quick else 5)]
    ratio = Spread.of([eight / one for one, eight in rates])
    yield (
        "small puts",
        {
            "dims": dimensions,
            "rows": 1,
            "1 thread puts/s": statistics.median(one for one, _ in rates),
            "8 threads puts/s": statistics.median(eight for _, eight in rates),
            "ratio": ratio.median,
            "quartiles": [ratio.low, ratio.high],
        },
    )


def opening(work: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    path = _ten_million(work, quick)
    measured = [apart(_open, path) for _ in range(3 if quick else 9)]
    taken = Spread.of([one["s"] for one in measured])
    yield (
        "open",
        {
            "rows": measured[0]["rows"],
            "segments": measured[0]["segments"],
            "open ms": taken.median * 1e3,
            "quartiles": [taken.low * 1e3, taken.high * 1e3],
            "target ms": 50,
            **{
                f"private MB {when}": statistics.median(one[when] for one in measured) / 1e6
                for when in ("opened", "after 100 gathers", "after 1,000 gathers")
            },
            "target MB": 50,
        },
    )


def _open(path: Path) -> Record:
    random, before = np.random.default_rng(), anonymous_bytes()
    began = time.perf_counter()
    reader = CacheReader(path)
    found: Record = {"s": time.perf_counter() - began}
    found |= {
        "rows": reader.rows,
        "segments": len(reader.manifest.segments),
        "opened": anonymous_bytes() - before,
    }
    for number in range(1, 1001):
        reader.gather(reader.lookup(reader.keys(random.integers(0, reader.rows, 1024))))
        if number == 100:
            found["after 100 gathers"] = anonymous_bytes() - before
    return found | {"after 1,000 gathers": anonymous_bytes() - before}


def build(work: Path, quick: bool) -> Iterator[tuple[str, Record]]:
    for rows in (2_000_000,) if quick else (12_500_000, 50_000_000):
        path = work / "cache"
        apart(write_keys_only, path, rows, 16)
        measured = apart(_build, path)
        yield (
            "build",
            {
                "rows": rows,
                "segments": 16,
                "seconds": measured["s"],
                "rows/s": rows / measured["s"],
                "private GB": measured["grown"] / 1e9,
                "target GB": 2,
                "400 million, minutes": 400e6 / (rows / measured["s"]) / 60,
            },
        )
        shutil.rmtree(path)


def _build(path: Path) -> Record:
    with Peak() as peak:
        taken = seconds(partial(index_keys_only, path))
    return {"s": taken, "grown": peak.grown}


PARTS: dict[str, Part] = {
    "gather": gather,
    "cold": cold,
    "lookup": lookup,
    "peers": peers,
    "puts": puts,
    "open": opening,
    "build": build,
}


@app.default
def main(
    *,
    out: Path | None = None,
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = tuple(PARTS),
    quick: Annotated[bool, Parameter(negative=())] = False,
    work: Path | None = None,
) -> None:
    """Measure the cache; see the head of the file.

    Parameters
    ----------
    out
        Where the numbers go, as JSON, and the tables beside it as Markdown.
    only
        Parts to run. Default: all.
    quick
        Small and few: whether it runs at all, not how fast.
    work
        A directory on the disk to measure. Default: a new one where temporary files go.
    """
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        raise BadConfig(f"--only {unknown[0]}: no such part; there are {', '.join(PARTS)}")
    if out is not None:
        make_directory(out.parent)  # not after half an hour
    report: Record = {
        "machine": machine("numpy", "pyarrow"),
        "quick": quick,
        "load": {},
        "seconds": {},
        "tables": {},
    }
    with tempfile.TemporaryDirectory(dir=work, prefix="bench-cache-") as scratch:
        for name in only:
            place = Path(scratch) / name
            place.mkdir()
            before, began = os.getloadavg()[0], time.perf_counter()
            for table, record in PARTS[name](place, quick):
                report["tables"].setdefault(table, []).append(record)
                print(table, json.dumps(rounded(record)), flush=True)
            report["seconds"][name] = round(time.perf_counter() - began, 1)
            report["load"][name] = [before, os.getloadavg()[0]]
            shutil.rmtree(place)
    text = markdown(report["tables"])
    print(f"\n{text}")
    if out is not None:
        write_atomic(out, (json.dumps(report, indent=1) + "\n").encode())
        write_atomic(out.with_suffix(".md"), text.encode())


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
