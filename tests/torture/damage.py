"""Damage: bits that flip, files cut short, longer, exchanged, missing, or from an earlier day.

Of a sealed file `verify` must find every damage. Of live/, `verify` finds it or opening refuses, or every
acknowledged row reads back equal. Whatever is damaged, no read gives a caption the vector of another, and
none with checks on gives a wrong byte. Each look is taken in a process of its own: `verify` and readers may not
crash; LMDB may, where `verify` finds the damage.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from children import Outcome, alone, each, must
from shim import pattern
from tally import Tally
from workloads import Materials, keep_snapshots, merge, put, snapshot, source_rows
from world import Promise, keys_of, open_writer, stay, vectors_of, verify_problems

from lift_cache.errors import LiftError
from lift_cache.reader import CacheReader
from lift_cache.snapshot import snapshots_of

BY_REAL_PROCESS = 50
"""One case in so many runs `verify` as users do; the others fork where it starts a process."""

PATIENCE = 60.0


def make(older: Path, cache: Path, materials: Materials, promise: Promise) -> None:
    """A cache with several segments, snapshots, retired segments and fresh rows; and what it was before."""
    with open_writer(cache) as writer:
        for start in range(0, 120, 20):
            put(writer, promise.hear, start, start + 20)
            writer.seal()
        snapshot(writer, promise.hear)
        put(writer, promise.hear, 120, 150)
    shutil.copytree(cache, older)
    with open_writer(cache) as writer:
        merge(writer, promise.hear, materials.source(0), source_rows(0))
        snapshot(writer, promise.hear)
        put(writer, promise.hear, 150, 200)
        writer.seal()
        snapshot(writer, promise.hear)
        keep_snapshots(writer, promise.hear, 2)
        writer.gc()
        writer.note_provenance({"engine": "torture"})
        for start in range(200, 230, 10):
            put(writer, promise.hear, start, start + 10)


# Damages: each changes something under a cache and says what; None: it would change nothing.

Damage = Callable[[Path, Path, Path, Random], str | None]


def flip(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    """One bit."""
    data = bytearray(file.read_bytes())
    at, bit = chance.randrange(len(data)), chance.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {at}"


def blank(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    """A sector that reads as zeros, or as noise."""
    data = bytearray(file.read_bytes())
    start = chance.randrange(0, len(data), 512)
    there = data[start : start + 512]
    data[start : start + 512] = bytes(len(there)) if chance.random() < 0.5 else chance.randbytes(len(there))
    if data == file.read_bytes():
        return None
    file.write_bytes(data)
    return f"sector at {start}"


def _same(data: bytes, before: bytes, suffix: str) -> bool:
    """Whether nothing is damaged: the bytes are those there were, or white space moved in JSON."""
    if data == before or suffix != ".json":
        return data == before
    try:
        return bool(json.loads(data) == json.loads(before))
    except ValueError:
        return False


def mix_up(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    """Two words of 8 bytes that are not far apart have changed places."""
    data = file.read_bytes()
    words = [data[at : at + 8] for at in range(0, len(data), 8)]
    first = chance.randrange(len(words))
    second = min(len(words) - 1, first + chance.randint(1, 100))
    words[first], words[second] = words[second], words[first]
    if _same(b"".join(words), data, file.suffix):
        return None
    file.write_bytes(b"".join(words))
    return f"words {first} and {second} exchanged"


def cut(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    """The end is missing."""
    size = chance.randrange(file.stat().st_size)
    with file.open("r+b") as out:
        out.truncate(size)
    return f"cut to {size} bytes"


def extend(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    """Bytes too many."""
    with file.open("ab") as out:
        out.write(chance.randbytes(chance.randint(1, 5000)))
    return "made longer"


def remove(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    file.unlink()
    return "removed"


def exchange(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    """Exchanged with another file of its kind."""
    others = [
        other
        for other in cache.rglob(f"*{''.join(file.suffixes[-2:])}")
        if other != file and other.is_file() and other.read_bytes() != file.read_bytes()
    ]
    if not others:
        return None
    other = chance.choice(others)
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)
    return f"exchanged with {other.relative_to(cache)}"


def age(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    """Replaced by what was there before."""
    before = older / file.relative_to(cache)
    if not before.exists() or before.read_bytes() == file.read_bytes():
        return None
    shutil.copyfile(before, file)
    return "replaced by an older copy"


FILE_DAMAGES: tuple[Damage, ...] = (
    flip,
    flip,
    mix_up,
    mix_up,
    blank,
    cut,
    extend,
    remove,
    exchange,
    age,
)


def live_gone(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    shutil.rmtree(cache / "live")
    return "live/ removed"


def live_older(file: Path, cache: Path, older: Path, chance: Random) -> str | None:
    shutil.rmtree(cache / "live")
    shutil.copytree(older / "live", cache / "live")
    return "live/ replaced by an older copy"


@dataclass(frozen=True)
class Case:
    """A file (relative; "live" for the whole tier), what is done to it, and the seed that it is done with."""

    kind: str
    path: Path
    damage: Damage
    seed: int
    by_real_process: bool


@dataclass
class Looks:
    """What verify, readers and the writer made of a damaged cache."""

    done: str | None
    verified: Outcome[list[str]]
    read: Outcome[list[str]]
    written: Outcome[str]


UNSEALED = ("writer.lock", "live.json")
"""Files whose damage costs nothing while live/ is right."""


def cases(cache: Path, chance: Random) -> Iterator[Case]:
    """Without end: live/ and sealed files, of these every kind as often."""
    sealed: dict[str, list[Path]] = {}
    for path in sorted(cache.rglob("*")):
        if path.is_file() and not path.is_relative_to(cache / "live") and path.name not in UNSEALED:
            inside = path.relative_to(cache)
            sealed.setdefault(pattern(str(inside)), []).append(inside)
    number = 0
    while True:
        number += 1
        seed, real = chance.randrange(2**32), number % BY_REAL_PROCESS == 1
        if number % 2:
            of_kind = chance.choice(sorted(sealed))
            path = chance.choice(sealed[of_kind])
            kind = of_kind if of_kind == "provenance.json" else f"sealed {of_kind}"
            yield Case(kind, path, chance.choice(FILE_DAMAGES), seed, real)
        elif number % 40 == 0:
            damage: Damage = chance.choice((live_gone, live_older))
            yield Case(damage.__name__.replace("_", "/ "), Path("live"), damage, seed, real)
        elif number % 40 == 20:
            yield Case("live.json", Path("live.json"), chance.choice(FILE_DAMAGES), seed, real)
        else:
            damage = chance.choice([d for d in FILE_DAMAGES if d not in (exchange, age)])
            yield Case("live/data.mdb", Path("live/data.mdb"), damage, seed, real)


def look(case: Case, base: Path, older: Path, promise: Promise, scratch: Path) -> Looks:
    """Damage a copy of the cache and look at it in every way."""
    where = Path(tempfile.mkdtemp(dir=scratch))
    cache = where / "cache"
    shutil.copytree(base, cache)
    stay(cache)
    try:
        done = case.damage(cache / case.path, cache, older, Random(case.seed))
        if done is None:
            nothing: Outcome = Outcome(None)
            return Looks(None, nothing, nothing, nothing)
        verified = alone(
            lambda: verify_problems(cache, by_real_process=case.by_real_process), patience=PATIENCE
        )
        read = alone(lambda: misread(cache, promise), patience=PATIENCE)
        written = alone(lambda: written_wrong(cache, promise), patience=PATIENCE)
        return Looks(done, verified, read, written)
    finally:
        shutil.rmtree(where)


def judge(case: Case, looks: Looks) -> list[str]:
    """What of the promise the damage broke."""
    problems = []
    found = bool(looks.verified.value)
    if looks.verified.death:
        problems.append(f"verify ended by {looks.verified.death}")
    if looks.read.death:
        problems.append(f"a reader ended by {looks.read.death}")
    problems += looks.read.value or []
    if looks.written.death:
        if not found:
            problems.append(f"the writer ended by {looks.written.death}, and verify finds nothing")
    elif looks.written.value not in (ALL_RIGHT, REFUSED) and not found:
        problems.append(f"{looks.written.value}, and verify finds nothing")
    if looks.written.value == WRONG:
        problems.append("the writer answers with wrong vectors")
    if case.kind.startswith("sealed") and not found and not looks.verified.death:
        problems.append("verify finds nothing")
    return problems


ALL_RIGHT, REFUSED, WRONG = "all right", "refused", "wrong vectors"


def written_wrong(cache: Path, promise: Promise) -> str:
    """Open for writing and read everything that was acknowledged."""
    numbers = sorted(promise.rows)
    try:
        with open_writer(cache) as writer:
            hits = writer.get(keys_of(numbers))
    except (LiftError, OSError):
        return REFUSED
    if (hits.vectors != vectors_of(numbers))[hits.found].any():
        return WRONG
    return ALL_RIGHT if hits.found.all() else f"{(~hits.found).sum()} acknowledged rows are lost"


def misread(cache: Path, promise: Promise) -> list[str]:
    """Read every snapshot with and without checks, all rows at once and some one by one."""
    numbers = sorted(promise.offered)
    right = vectors_of(numbers)
    owner = {vector.tobytes(): i for i, vector in enumerate(right)}
    problems = []
    for name in snapshots_of(cache):
        try:
            reader = CacheReader(f"{cache}@{name}")
            rows = reader.lookup(keys_of(numbers))
        except (LiftError, OSError):
            continue
        there = np.flatnonzero(rows >= 0)
        for check in (False, True):
            for some in (there, *there[::7, None]):
                try:
                    vectors = reader.gather(rows[some], check=check).astype(np.float32)
                except (LiftError, OSError):
                    continue
                wrong = np.flatnonzero((vectors != right[some]).any(1))
                if check and len(wrong):
                    problems.append(f"{len(wrong)} wrong vectors from a checked read")
                if any(owner.get(vectors[i].tobytes(), some[i]) != some[i] for i in wrong):
                    problems.append(f"the vector of another row, from a read with check={check}")
    return sorted(set(problems))


def run(
    tally: Tally, materials: Materials, scratch: Path, chance: Random, *, until: float, full: bool
) -> None:
    """4,000 cases; or as many as time allows."""
    where = Path(tempfile.mkdtemp(dir=scratch))
    base, older = where / "base", where / "older"

    def build() -> Promise:
        promise = Promise()
        make(older, base, materials, promise)
        return promise

    promise = must(alone(build))
    found = islice(cases(base, chance), 4000 if full else None)
    done = each(
        lambda case: look(case, base, older, promise, scratch),
        found,
        until=float("inf") if full else until,
        patience=4 * PATIENCE,
    )
    last = time.monotonic()
    for case, outcome in done:
        if outcome.value is None:
            tally.count(case.kind, [outcome.death], str(case))
        elif outcome.value.done:
            name = f"{case.path}, {outcome.value.done}"
            tally.count(case.kind, judge(case, outcome.value), name)
        if time.monotonic() > last + 60:
            last = time.monotonic()
            tally.say()
    shutil.rmtree(where)
