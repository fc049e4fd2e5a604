"""What the suite stores, what has been acknowledged of it, and whether a cache still keeps that promise.

Caption number i has one vector, a function of i, so a vector that was lost, mixed up or changed shows at once.
Every workload says, in order, what it is about to do and what was acknowledged:

    offer A B        captions A … B-1 may be in the cache from now on
    have A B         captions A … B-1 are acknowledged
    begin            a snapshot is asked for: it must hold what is acknowledged by now
    snapshot ID      it is there
    forget ID        its removal is asked for
    foreign NAME     a file of that name is put in, or damaged, by someone else
    exists NAME      a file of that name must be somewhere below the cache
    gone ID          it was removed, or put aside
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from children import alone
from pydantic import ValidationError

from lift_cache import compaction, live, snapshot, verify
from lift_cache.encoding import Encoding
from lift_cache.errors import LiftError
from lift_cache.keys import caption_keys
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.snapshot import snapshots_of
from lift_cache.witness import Witness
from lift_cache.writer import CacheWriter, Rows

DIMENSIONS = 24
SEGMENT_ROWS = 40

# Limits that a few hundred rows come to, as millions would come to the real ones.
live.CHUNK_ROWS = 16
compaction.SEGMENTS = 4
snapshot.DELTA_FROM = 64

RECIPE = Recipe(
    model="tests/tiny",
    revision="0" * 40,
    dtype="float32",
    tokenizer_revision="0" * 40,
    end_token=True,
    pooling="last",
    max_tokens=77,
    normalize=True,
    dimensions=DIMENSIONS,
)
ENCODING = Encoding(dimensions=DIMENSIONS)

Say = Callable[[str], None]


def caption(number: int) -> str:
    return f"caption {number}"


@lru_cache(1 << 16)
def _vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=DIMENSIONS).astype(np.float16).astype(np.float32)


def vectors_of(numbers: Iterable[int]) -> np.ndarray:
    """The right vectors, exact in float16: float32 [n, d]."""
    return np.array([_vector(number) for number in numbers], np.float32).reshape(-1, DIMENSIONS)


def rows_of(numbers: Iterable[int]) -> Rows:
    chosen = list(numbers)
    captions = [caption(number) for number in chosen]
    return Rows(captions, vectors_of(chosen), tokens_of(chosen), truncated_of(chosen))


def tokens_of(numbers: Iterable[int]) -> np.ndarray:
    return np.array([1 + number % 70 for number in numbers], np.int32)


def truncated_of(numbers: Iterable[int]) -> np.ndarray:
    return np.array([number % 5 == 0 for number in numbers], bool)


def keys_of(numbers: Iterable[int]) -> np.ndarray:
    return caption_keys([caption(number) for number in numbers])


def open_writer(path: Path) -> CacheWriter:
    return CacheWriter.open(path, RECIPE, segment_rows=SEGMENT_ROWS)


@dataclass
class Promise:
    """What has been acknowledged: caption numbers, snapshots with the captions they must hold, files."""

    offered: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)
    snapshots: dict[str, frozenset[int]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    begun: frozenset[int] = frozenset()

    def hear(self, line: str) -> None:
        word, *rest = line.split(" ")
        if word == "offer":
            self.offered.update(range(int(rest[0]), int(rest[1])))
        elif word == "have":
            self.rows.update(range(int(rest[0]), int(rest[1])))
        elif word == "begin":
            self.begun = frozenset(self.rows)
        elif word == "snapshot":
            self.snapshots[rest[0]] = self.begun
        elif word == "forget":
            self.snapshots.pop(rest[0], None)
        elif word == "exists":
            self.files.add(rest[0])
        elif word == "foreign":
            self.foreign.add(rest[0])
        elif word == "gone":
            self.gone.add(rest[0])

    def copy(self) -> Promise:
        return deepcopy(self)


def broken(path: Path, promise: Promise, *, go_on: bool = True) -> list[str]:
    """What a cache that a crash left does not keep of its promise; one line each, none when all is well.

    Args:
        go_on: also write, seal and snapshot once more, and read that snapshot back.
    """
    problems = broken_snapshots(path, promise) + _back_again(path, promise)
    try:
        with open_writer(path) as writer:
            problems += broken_rows(writer, promise)
            if go_on:
                extra = 10_000_000 + len(promise.offered)
                promise.hear(f"offer {extra} {extra + 1}")
                writer.put(rows_of([extra]))
                promise.hear(f"have {extra} {extra + 1}")
                made = writer.snapshot()
                problems += wrong_in_snapshot(path, made.id, promise.rows, promise.offered)
    except Exception as error:
        problems.append(f"the cache does not open or go on: {type(error).__name__}: {error}")
    problems += _missing_files(path, promise)
    return problems


def _missing_files(path: Path, promise: Promise) -> list[str]:
    there = {file.name for file in path.rglob("*")}
    problems = [f"{name} is gone" for name in promise.files - there]
    # Put aside twice, a file gets a second name: `<name>.1`.
    quarantined = {
        file.name for file in path.glob("quarantine/*") if not file.name.startswith(tuple(promise.foreign))
    }
    return problems + [f"{name}, which the cache wrote itself, is in quarantine/" for name in quarantined]


def _back_again(path: Path, promise: Promise) -> list[str]:
    return [f"snapshot {name} was removed and is back" for name in promise.gone & {*snapshots_of(path)}]


def stay(cache: Path) -> None:
    """Have a copy of a cache pass for the original: `live.json` knows the directory that it speaks of."""
    try:
        written = Witness.model_validate_json((cache / "live.json").read_bytes())
    except (OSError, ValidationError):
        return
    here = written.model_copy(update={"directory": cache.stat().st_ino})
    (cache / "live.json").write_text(here.model_dump_json())


def broken_rows(writer: CacheWriter, promise: Promise) -> list[str]:
    """What an open writer does not answer as it was acknowledged."""
    numbers = sorted(promise.offered | promise.rows)
    if not numbers:
        return []
    hits = writer.get(keys_of(numbers))
    acknowledged = np.array([number in promise.rows for number in numbers])
    problems = []
    if lost := int((acknowledged & ~hits.found).sum()):
        problems.append(f"{lost} of {acknowledged.sum()} acknowledged rows are lost")
    wrong = hits.found & (
        (hits.vectors != vectors_of(numbers)).any(1)
        | (hits.tokens != tokens_of(numbers))
        | (hits.truncated != truncated_of(numbers))
    )
    if wrong.any():
        problems.append(f"{wrong.sum()} rows are wrong")
    if writer.rows != hits.found.sum():
        problems.append(f"the cache counts {writer.rows} rows and holds {hits.found.sum()}")
    return problems


def broken_snapshots(path: Path, promise: Promise) -> list[str]:
    """What readers do not find as it was acknowledged."""
    there = snapshots_of(path)
    problems = [f"snapshot {name} is lost" for name in promise.snapshots if name not in there]
    for name in set(there) - promise.foreign:
        problems += wrong_in_snapshot(path, name, promise.snapshots.get(name, frozenset()), promise.offered)
    return problems


def wrong_in_snapshot(path: Path, name: str, held: Iterable[int], offered: Iterable[int]) -> list[str]:
    """Read a whole snapshot: it opens, holds the captions it must, and each with its own vector and text."""
    try:
        reader = CacheReader(f"{path}@{name}")
        numbers = sorted({*offered, *held})
        rows = reader.lookup(keys_of(numbers))
        problems = []
        must_be = np.isin(numbers, list(held))
        if lost := int((rows[must_be] < 0).sum()):
            problems.append(f"snapshot {name} lacks {lost} acknowledged rows")
        here = np.flatnonzero(rows >= 0)
        found = [numbers[i] for i in here]
        if len(found) != reader.rows:
            problems.append(f"snapshot {name} counts {reader.rows} rows and holds {len(found)}")
        if not np.array_equal(reader.gather(rows[here], check=True), vectors_of(found)):
            problems.append(f"snapshot {name} has wrong vectors")
        if reader.captions(rows[here]) != [caption(number) for number in found]:
            problems.append(f"snapshot {name} has wrong captions")
        if not np.array_equal(reader.tokens(rows[here]), tokens_of(found)):
            problems.append(f"snapshot {name} has wrong token counts")
        return problems
    except LiftError as error:
        return [f"snapshot {name} cannot be read: {error}"]


def walk_in_fork(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
    """Stands in for `subprocess.run` of `python -m lift_cache.verify PATH`, a hundred times faster."""

    def walk() -> list[str]:
        found = []
        try:
            found += list(verify.walk_live(Path(command[-1])))
        except LiftError as error:
            found += [str(error), "checked: as far as it could be read"]
        return found

    outcome = alone(walk, patience=40)
    if outcome.death.startswith("hung"):
        raise TimeoutError("the process that walks live/ hangs")
    said = "\n".join(json.dumps(line) for line in outcome.value or ())
    return subprocess.CompletedProcess(command, 1 if outcome.death else 0, said, outcome.death)


def verify_problems(cache: Path, *, by_real_process: bool = False) -> list[str]:
    """What `verify` finds; for a child, which forks where `verify` starts a process."""
    if not by_real_process:
        subprocess.run = walk_in_fork  # type: ignore[assignment]
    return verify.verify(cache).problems
