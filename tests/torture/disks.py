"""Disks that are full or fail: an error that says so, nothing acknowledged lost, and writing goes on afterwards.

Two ways: a small real file system that is filled to the last byte, and errors from the shim at every named
step of a writer: EIO, ENOSPC, and writes that take only a part.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from children import alone, each, must
from shim import Action, Op, Step, fired, no_rule, read_trace, rule, steps, watch
from tally import Tally
from workloads import OVERLAP, Materials, keep_snapshots, merge, put, snapshot, source_rows
from world import Promise, broken, broken_rows, open_writer

from lift_cache.errors import CacheFull, LiftError
from lift_cache.writer import CacheWriter

SIZE = 4 << 20
"""Bytes of the small file system."""

WRITES = (Op.WRITE, Op.WRITE_SYNC)
TRIES = 3
"""Puts until one must succeed once the disk is well: earlier ones may bring a failure of the background."""


class Ordeal:
    """A cache that is used while its disk fails, with what it promised and what it broke."""

    def __init__(self, cache: Path, materials: Materials, promise: Promise, *, full: bool = False) -> None:
        """`full`: what the disk lacks is room, and errors must say so."""
        self.cache, self.materials, self.promise, self.full = cache, materials, promise, full
        self.problems: list[str] = []
        self.errors = 0

    def attempt(self, what: str, work: Callable[[], object]) -> bool:
        """Do something that may fail, in the one way in which it may."""
        try:
            work()
            return True
        except (LiftError, OSError) as error:
            self.errors += 1
            if not str(error).strip() or "\n" in str(error).strip():
                self.problems.append(f"{what}: an error without a clear text: {error!r}")
            if self.full and not isinstance(error, CacheFull) and getattr(error, "errno", 0) != errno.ENOSPC:
                self.problems.append(f"{what}: not told that the disk is full: {error!r}")
        except Exception as error:
            self.errors += 1
            self.problems.append(f"{what} raised {type(error).__name__}: {error}")
        return False

    def use(self, writer: CacheWriter, at: int) -> None:
        """Everything that a writer does; after each failure, what was acknowledged must be readable."""
        say = self.promise.hear
        for what, work in (
            ("put", partial(put, writer, say, 0, OVERLAP)),
            ("put", partial(put, writer, say, at, at + 15)),
            ("put", partial(put, writer, say, at + 15, at + 30)),
            ("seal", writer.seal),
            ("put", partial(put, writer, say, at + 30, at + 75)),
            ("snapshot", partial(snapshot, writer, say)),
            ("put", partial(put, writer, say, at + 75, at + 80)),
            ("note_provenance", partial(writer.note_provenance, {"engine": f"torture {at}"})),
            ("merge", partial(self.merge, writer, at)),
            ("compact", partial(writer.compact, everything=True)),
            ("snapshot", partial(snapshot, writer, say)),
            ("keep_snapshots", partial(keep_snapshots, writer, say, 1)),
            ("gc", writer.gc),
        ):
            if not self.attempt(what, work):
                self.look(writer, f"after a failed {what}")

    def merge(self, writer: CacheWriter, at: int) -> None:
        if self.promise.rows.issuperset(range(OVERLAP)):
            number = at % self.materials.sources
            merge(writer, self.promise.hear, self.materials.source(number), source_rows(number))

    def look(self, writer: CacheWriter, when: str) -> None:
        try:
            self.problems += [f"{when}: {problem}" for problem in broken_rows(writer, self.promise)]
        except Exception as error:
            self.problems.append(f"{when} reading fails: {type(error).__name__}: {error}")

    def through(self, cure: Callable[[], None], at: int) -> None:
        """Open and use the cache while its disk fails, then cure that, go on, and open it again."""
        writers: list[CacheWriter] = []
        if self.attempt("open", lambda: writers.append(open_writer(self.cache))):
            self.use(writers[0], at)
        cure()
        try:
            writer = writers[0] if writers else open_writer(self.cache)
            self.look(writer, "with the disk well again")
            for left in reversed(range(TRIES)):
                try:
                    put(writer, self.promise.hear, at + 80, at + 82)
                    snapshot(writer, self.promise.hear)
                    break
                except (LiftError, OSError):
                    if not left:
                        raise
            self.look(writer, "after going on")
            writer.close()
        except Exception as error:
            self.problems.append(f"with the disk well again: {type(error).__name__}: {error}")
            for writer in writers:
                writer.close()
        self.problems += [f"opened again: {problem}" for problem in broken(self.cache, self.promise)]


def base_cache(path: Path, materials: Materials) -> Promise:
    """Some segments, a snapshot, fresh rows."""
    promise = Promise()
    with open_writer(path) as writer:
        for start in range(0, 60, 20):
            put(writer, promise.hear, start, start + 20)
            writer.seal()
        snapshot(writer, promise.hear)
        put(writer, promise.hear, 60, 75)
    return promise


# Errors at named steps


@dataclass(frozen=True)
class Fault:
    """The step that fails, how, how many of its kind pass before, how many fail, and whether the cache is new."""

    step: Step
    action: Action
    error: int
    skip: int
    count: int
    new: bool

    def __str__(self) -> str:
        how = "a short write" if self.action == Action.SHORT else errno.errorcode[self.error]
        cache = "a new cache" if self.new else "a cache"
        return f"{how} at {self.step}, {self.skip} pass, {self.count} fail, on {cache}"


@dataclass
class Suffered:
    """How often a fault acted, how many errors came of it, and what was broken."""

    fired: int
    errors: int
    problems: list[str]


def suffer(fault: Fault, base: Path, known: Promise, materials: Materials, scratch: Path) -> Suffered:
    where = Path(tempfile.mkdtemp(dir=scratch))
    cache = where / "cache"
    try:
        if not fault.new:
            shutil.copytree(base, cache)
        watch(where)
        rule(fault.action, fault.step, fault.skip, fault.count, fault.error)
        promise = Promise() if fault.new else known.copy()
        ordeal = Ordeal(cache, materials, promise, full=fault.error == errno.ENOSPC)
        acted = 0

        def cure() -> None:
            nonlocal acted
            acted = fired()
            no_rule()

        ordeal.through(cure, 1000)
        return Suffered(acted, ordeal.errors, ordeal.problems)
    finally:
        no_rule()
        shutil.rmtree(where)


def named_steps(
    base: Path, known: Promise, materials: Materials, scratch: Path
) -> dict[tuple[Step, bool], int]:
    """(step, whether on a new cache) → how often an ordeal without faults comes to it."""
    found: dict[tuple[Step, bool], int] = {}
    for new in (True, False):
        where = Path(tempfile.mkdtemp(dir=scratch))
        trace = where.with_suffix(".trace")

        def work(where: Path = where, trace: Path = trace, new: bool = new) -> list[str]:
            if not new:
                shutil.copytree(base, where / "cache")
            watch(where, trace)
            ordeal = Ordeal(where / "cache", materials, Promise() if new else known.copy())
            ordeal.through(lambda: watch(Path("/nowhere")), 1000)
            return ordeal.problems

        if problems := must(alone(work)):
            raise RuntimeError(f"an ordeal without faults fails: {problems[0]}")
        for step, count in steps(read_trace(trace)).items():
            found[step, new] = count
        trace.unlink()
        shutil.rmtree(where)
    return found


def faults(known: dict[tuple[Step, bool], int], chance: Random) -> Iterator[Fault]:
    """Without end: every step with every error, in rounds."""
    while True:
        every = []
        for (step, new), times in known.items():
            kinds = [(Action.FAIL, errno.EIO), (Action.FAIL, errno.ENOSPC)]
            if step.op in WRITES:
                kinds.append((Action.SHORT, 0))
            for action, error in kinds:
                count = chance.choice((1, 1, 3, 10**6))
                every.append(Fault(step, action, error, chance.randrange(times), count, new))
        chance.shuffle(every)
        yield from every


# A small file system that is really full


def fill_up(
    ordeals: int, disk: Path, base: Path, known: Promise, materials: Materials, chance: Random
) -> list[str]:
    """Use a cache where only so many bytes are free: none at all, or as many as some step needs."""
    cache, ballast = disk / "cache", disk / "ballast"
    shutil.copytree(base, cache)
    promise = known.copy()
    problems = []
    for turn in range(ordeals):
        free = 0 if turn == 0 else 4096 * chance.randrange(60)
        with ballast.open("wb") as out:
            room = os.statvfs(disk)
            out.write(bytes(max(0, room.f_bavail * room.f_frsize - free)))
        ordeal = Ordeal(cache, materials, promise, full=True)
        ordeal.through(ballast.unlink, 1000 * (turn + 1))
        problems += [f"with {free} bytes free: {problem}" for problem in ordeal.problems]
    return problems


def mounted(where: Path) -> str:
    """Mount a small file system; why it cannot be done, or ""."""
    if os.geteuid() != 0:
        return "only root may mount a small file system"
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "small", str(where)],
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stderr.strip() if done.returncode else ""


def full_disks(
    tally: Tally,
    base: Path,
    known: Promise,
    materials: Materials,
    scratch: Path,
    chance: Random,
    *,
    until: float,
    lives: int,
) -> None:
    """Lives of a few ordeals each, each life on a small file system of its own."""
    ordeals = 5

    def life(seed: int) -> list[str]:
        disk = scratch / f"disk-{seed}"
        if reason := mounted(disk):
            return [reason]
        try:
            return must(alone(lambda: fill_up(ordeals, disk, base, known, materials, Random(seed))))
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)

    if reason := mounted(scratch / "disk"):
        tally.cases["a full file system: NOT RUN"] += 1
        tally.remark(f"A FULL FILE SYSTEM WAS NOT TRIED: {reason}")
        return
    subprocess.run(["umount", "--lazy", str(scratch / "disk")], check=True)
    seeds = (chance.randrange(2**32) for _ in range(lives))
    for seed, outcome in each(life, seeds, until=until):
        tally.cases["a full file system"] += ordeals
        for problem in [outcome.death] if outcome.value is None else outcome.value:
            tally.violate("a full file system", problem, f"seed {seed}")


def run(
    tally: Tally, materials: Materials, scratch: Path, chance: Random, *, until: float, full: bool
) -> None:
    """100 full disks and every fault three times; or as many as time allows."""
    base = Path(tempfile.mkdtemp(dir=scratch)) / "base"
    known = must(alone(lambda: base_cache(base, materials)))
    began = time.monotonic()
    soon = float("inf") if full else began + 0.3 * (until - began)
    full_disks(tally, base, known, materials, scratch, chance, until=soon, lives=20 if full else 10**6)
    times = named_steps(base, known, materials, scratch)
    tally.remark(f"{len(times)} named steps to fail at, counting those on a new cache apart")
    reached: dict[tuple[Step, bool], int] = dict.fromkeys(times, 0)
    some = faults(times, chance)
    rounds = 3 * sum(3 if step.op in WRITES else 2 for step, _ in times)
    chosen = (next(some) for _ in range(rounds if full else 10**9))
    late = float("inf") if full else until
    for fault, outcome in each(
        lambda fault: suffer(fault, base, known, materials, scratch), chosen, until=late
    ):
        if outcome.value is None:
            tally.count("failing steps", [outcome.death], str(fault))
            continue
        reached[fault.step, fault.new] += bool(outcome.value.fired)
        kind = "failing steps" if outcome.value.fired else "steps not come to"
        tally.count(kind, outcome.value.problems, str(fault))
    tally.remark(f"{sum(map(bool, reached.values()))} of {len(reached)} steps failed at least once")
    shutil.rmtree(base.parent)
