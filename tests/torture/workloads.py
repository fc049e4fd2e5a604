"""What writers do while they are recorded, failed and killed. Every workload begins with no cache at its path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shim import Action, Op, Step, no_rule, rule
from world import ENCODING, RECIPE, Say, caption, open_writer, rows_of, tokens_of, truncated_of, vectors_of

from lift_cache.bulk import write_cache
from lift_cache.segment import captions_path, segment_ids, segment_path
from lift_cache.snapshot import snapshots_of
from lift_cache.tools.convert import convert_cache
from lift_cache.tools.remote import pull_snapshot
from lift_cache.tools.repair import mend
from lift_cache.writer import CacheWriter

OVERLAP = 20
"""Captions 0 … 19 are in every source too, there with other vectors: a merge must keep the cache's own."""

SOURCE_ROWS = 30
STRAY = range(2_000_000, 2_000_030)


def source_rows(number: int) -> range:
    """The captions that only source `number` has."""
    return range(1_000_000 + 1000 * number, 1_000_000 + 1000 * number + SOURCE_ROWS)


def make_cache(path: Path, numbers: Iterable[int], *, other: Iterable[int] = ()) -> None:
    """A sealed cache of captions; those in `other` get vectors that are not theirs."""
    right, wrong = list(numbers), list(other)
    every = [*wrong, *right]
    vectors = np.concatenate([vectors_of(n + 10**9 for n in wrong), vectors_of(right)])
    captions = [caption(n) for n in every]
    tokens, truncated = tokens_of(every), truncated_of(every)
    write_cache(path, RECIPE, ENCODING, captions, vectors, tokens, truncated, segment_rows=25)


@dataclass(frozen=True)
class Materials:
    """What workloads take in: caches to merge, and segments to leave in a cache's way."""

    where: Path
    sources: int = 4

    def make(self) -> None:
        for number in range(self.sources):
            make_cache(self.source(number), source_rows(number), other=range(OVERLAP))
        make_cache(self.stray, STRAY)

    def source(self, number: int) -> Path:
        return self.where / f"source-{number % self.sources}"

    @property
    def stray(self) -> Path:
        return self.where / "stray"


def put(writer: CacheWriter, say: Say, first: int, last: int) -> None:
    say(f"offer {first} {last}")
    writer.put(rows_of(range(first, last)))
    say(f"have {first} {last}")


def snapshot(writer: CacheWriter, say: Say) -> str:
    say("begin")
    made = writer.snapshot()
    say(f"snapshot {made.id}")
    return made.id


def merge(writer: CacheWriter, say: Say, source: Path, rows: range) -> None:
    say(f"offer {rows.start} {rows.stop}")
    writer.merge(source)
    say(f"have {rows.start} {rows.stop}")


def keep_snapshots(writer: CacheWriter, say: Say, count: int) -> None:
    for name in snapshots_of(writer.path)[:-count]:
        say(f"forget {name}")
    for name in writer.keep_snapshots(count):
        say(f"gone {name}")


def fill(cache: Path, say: Say, materials: Materials) -> None:
    """Create, put, seal in the background, snapshot, go on."""
    with open_writer(cache) as writer:
        for start in range(0, 120, 12):
            put(writer, say, start, start + 12)
        writer.note_provenance({"engine": "torture", "version": "1"})
        say("exists provenance.json")
        snapshot(writer, say)
        for start in range(120, 180, 20):
            put(writer, say, start, start + 20)
        snapshot(writer, say)
        put(writer, say, 180, 185)


def tend(cache: Path, say: Say, materials: Materials) -> None:
    """Merge, compact, remove snapshots, collect, over several openings."""
    with open_writer(cache) as writer:
        for start in range(0, 160, 40):
            put(writer, say, start, start + 40)
            writer.seal()
            snapshot(writer, say)
        writer.compact()
        merge(writer, say, materials.source(0), source_rows(0))
        snapshot(writer, say)
        keep_snapshots(writer, say, 2)
        writer.gc()
    with open_writer(cache) as writer:
        put(writer, say, 160, 170)
        merge(writer, say, materials.source(1) / "segments", source_rows(1))
        writer.compact(everything=True)
        snapshot(writer, say)
        put(writer, say, 170, 175)
        keep_snapshots(writer, say, 1)
        writer.gc()
        put(writer, say, 175, 180)


def stray(cache: Path, say: Say, materials: Materials) -> None:
    """Open with segments in the way: one to adopt, one that is damaged."""
    with open_writer(cache) as writer:
        put(writer, say, 0, 50)
        writer.seal()
        put(writer, say, 50, 55)
    source = materials.stray / "segments"
    say(f"offer {STRAY.start} {STRAY.stop}")
    good, damaged = segment_ids(source)[:2]
    for name in (good, damaged):
        for file in (captions_path(source, name), segment_path(source, name)):
            data = file.read_bytes()
            say(f"foreign {file.name}")
            durable_copy(data if name == good else data[:-100], cache / "segments" / file.name)
    with open_writer(cache) as writer:
        say(f"exists {damaged}.arrow")
        say(f"exists {good}.arrow")
        put(writer, say, 55, 60)
        snapshot(writer, say)


def bulk(cache: Path, say: Say, materials: Materials) -> None:
    """A cache written at once, without a live tier."""
    say("offer 0 70")
    numbers = range(70)
    captions, tokens, truncated = [caption(n) for n in numbers], tokens_of(numbers), truncated_of(numbers)
    made = write_cache(
        cache, RECIPE, ENCODING, captions, vectors_of(numbers), tokens, truncated, segment_rows=25
    )
    say("have 0 70")
    say("begin")
    say(f"snapshot {made.id}")


def convert(cache: Path, say: Say, materials: Materials) -> None:
    """Another cache, in another encoding."""
    say(f"offer {STRAY.start} {STRAY.stop}")
    convert_cache(str(materials.stray), cache, dtype="float32")
    say(f"have {STRAY.start} {STRAY.stop}")
    say("begin")
    say(f"snapshot {snapshots_of(cache)[-1]}")


def pull(cache: Path, say: Say, materials: Materials) -> None:
    """A snapshot copied from elsewhere."""
    say(f"offer {STRAY.start} {STRAY.stop}")
    pull_snapshot(str(materials.stray), cache)
    say(f"have {STRAY.start} {STRAY.stop}")
    say("begin")
    say(f"snapshot {snapshots_of(cache)[-1]}")


def repair(cache: Path, say: Say, materials: Materials) -> None:
    """A snapshot whose index is damaged is put aside."""
    with open_writer(cache) as writer:
        put(writer, say, 0, 30)
        damaged = snapshot(writer, say)
        put(writer, say, 30, 50)
        snapshot(writer, say)
        put(writer, say, 50, 55)
    say(f"forget {damaged}")
    say(f"foreign {damaged}")
    index = cache / "snapshots" / damaged / "index-0.arrow"
    durable_copy(index.read_bytes()[:-1] + b"?", index)
    mend(cache)
    say(f"exists {damaged}")
    say(f"gone {damaged}")


def failing(cache: Path, say: Say, materials: Materials) -> None:
    """The disk refuses a sync or a write of the live tier now and then; what is acknowledged must hold."""
    at = 0
    for op, skip in ((Op.SYNC, 2), (Op.WRITE_SYNC, 3), (Op.SYNC, 5), (Op.WRITE, 8), (Op.WRITE_SYNC, 1)):
        with open_writer(cache) as writer:
            rule(Action.FAIL, Step(op, "cache/live/data.mdb"), skip=skip)
            for _ in range(8):
                try:
                    put(writer, say, at, at + 9)
                except Exception:
                    say("refused")
                at += 9
            no_rule()


def durable_copy(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    for place in (path, path.parent):
        fd = os.open(place, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


ALL = {work.__name__: work for work in (fill, tend, stray, bulk, convert, pull, repair, failing)}
