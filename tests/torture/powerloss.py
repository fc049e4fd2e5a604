"""Power loss: every state that a file system may legally leave must open and keep every promise.

A workload runs once with the shim recording what it writes, syncs and renames. The disk model (disk.py)
then leaves out what was not synced at points of that trace, and each resulting tree is opened.

Mutation shows that this would notice: each fsync that the code makes is taken out of the trace in turn, by
the line that calls it, and a violation must follow. Taking it out of the trace is taking it out of the
code: an fsync changes nothing that the program itself can see.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import workloads
from children import alone, each, must
from disk import Disk, Tree
from shim import Op, Record, note, read_trace, watch
from tally import Tally, keep
from workloads import Materials
from world import Promise, broken, stay

import lift_cache

PACKAGE = Path(lift_cache.__file__).parent
DATA = ("none", "all", "some", "torn", "zeros")
NAMES = ("none", "all", "some")
FIXED = (("none", "none"), ("all", "none"), ("none", "all"), ("zeros", "all"))
BATCH = 10
STRIDE = 5
ELSEWHERE = "the workload itself"
LMDB_DATA, LMDB_META = "lmdb: data pages", "lmdb: meta page"


@dataclass(frozen=True)
class Event:
    """One record of a trace; of a sync, also the line of lift_cache that asked for it."""

    record: Record
    site: str = ""


@dataclass(frozen=True)
class State:
    """A disk after a power loss: after how many events, what was left out, and what had been promised."""

    workload: str
    point: int
    left_out: str
    tree: Tree
    promise: Promise

    @property
    def where(self) -> str:
        return f"{self.workload} after {self.point} changes, {self.left_out}"

    def digest(self) -> bytes:
        promise = self.promise
        told = (promise.rows, promise.snapshots, promise.files, promise.gone)
        digest = hashlib.blake2b(repr([sorted(some) for some in told]).encode())
        for path, content in sorted(self.tree.items()):
            digest.update(f"{path} {-1 if content is None else len(content)}\n".encode())
            digest.update(content or b"")
        return digest.digest()


def record(name: str, materials: Materials, scratch: Path) -> list[Event]:
    """Run a workload in a child and return what it did."""
    root, trace = Path(tempfile.mkdtemp(dir=scratch)), Path(tempfile.mktemp(dir=scratch))

    def work() -> None:
        _note_call_sites()
        watch(root, trace)
        workloads.ALL[name](root / "cache", note, materials)

    must(alone(work))
    there = _read_tree(root)
    shutil.rmtree(root)
    sites: dict[int, str] = {}
    events = []
    for one in read_trace(trace):
        text = one.data.decode() if one.op == Op.NOTE else ""
        if text.startswith("site "):
            sites[one.thread] = text.removeprefix("site ")
        elif one.op == Op.SYNC:
            events.append(Event(one, sites.pop(one.thread, LMDB_DATA)))
        elif one.op == Op.WRITE_SYNC:
            events.append(Event(one, LMDB_META))
        else:
            events.append(Event(one))
    trace.unlink()
    _require_all_seen(events, there)
    return events


def _require_all_seen(events: list[Event], there: Tree) -> None:
    """The trace, replayed with nothing left out, must give the files that are there."""
    disk = Disk()
    for event in events:
        disk.apply(event.record)
    replayed = disk.after_power_loss(lambda: "all", lambda: "all", Random(0))
    for path in sorted({*there, *replayed}):
        if not path.endswith("lock.mdb") and there.get(path, -1) != replayed.get(path, -1):
            raise RuntimeError(f"the shim did not see all that was done to {path}")


def _read_tree(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")
    }


def _note_call_sites() -> None:
    """Let every os.fsync of this process say in the trace which line of lift_cache asked for it."""
    fsync = os.fsync

    def noting(fd: int) -> None:
        frame, site = sys._getframe(1), ELSEWHERE
        while frame is not None and site == ELSEWHERE:
            code = frame.f_code
            if Path(code.co_filename).is_relative_to(PACKAGE) and not code.co_name.startswith("sync_"):
                site = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
            frame = frame.f_back  # type: ignore[assignment]
        note(f"site {site}")
        fsync(fd)

    os.fsync = noting  # type: ignore[assignment]


def sync_calls() -> dict[str, Path]:
    """Every line of lift_cache that asks for an fsync, as `files.py:90`, and the file it is in."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("sync_"):
                for call in ast.walk(function):
                    if isinstance(call, ast.Call):
                        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                        if name in ("fsync", "fdatasync", "sync_file", "sync_directory"):
                            found[f"{path.name}:{call.lineno}"] = path
    return found


def without(events: list[Event], site: str) -> list[Event]:
    """The trace as the code would leave it without the syncs of one line; each becomes a note that says nothing."""

    def changed(record: Record) -> Record:
        return replace(record, op=Op.WRITE) if record.op == Op.WRITE_SYNC else replace(record, op=Op.NOTE)

    return [Event(changed(event.record)) if event.site == site else event for event in events]


def exposed(events: list[Event], site: str) -> list[int]:
    """The points where the syncs of one line make a difference: until the same file is synced again."""
    points, since = set[int](), dict[int, int]()
    for i, event in enumerate(events):
        if event.site == site:
            since.setdefault(event.record.inode, i)
        elif event.record.op == Op.SYNC and event.record.inode in since:
            points.update(range(since.pop(event.record.inode) + 1, i + 1))
    for first in since.values():
        points.update(range(first + 1, len(events) + 1))
    return sorted(points)


def interesting(events: list[Event]) -> list[int]:
    """Points just before and just after each sync, acknowledgement and change of a name."""
    points = set()
    for i, event in enumerate(events):
        if event.record.op not in (Op.WRITE, Op.TRUNCATE):
            points |= {i, i + 1}
    return sorted(points)


def states(
    name: str, events: list[Event], points: list[int], random: int, chance: Random, fixed: bool = True
) -> Iterator[State]:
    """At each point the states of `FIXED`, and `random` more in which every file and directory has its own fate."""
    disk, promise, wanted, seen = Disk(), Promise(), set(points), set()
    for point in range(len(events) + 1):
        if point in wanted:
            fates: list[tuple[str, Callable[[], str], Callable[[], str]]] = [
                (f"{data} data, {names} names", lambda data=data: data, lambda names=names: names)  # type: ignore[misc]
                for data, names in (FIXED if fixed else ())
            ]
            fates += [
                (f"random {i}", lambda: chance.choice(DATA), lambda: chance.choice(NAMES))
                for i in range(random)
            ]
            for left_out, data, names in fates:
                tree = disk.after_power_loss(data, names, chance)
                state = State(name, point, left_out, tree, promise.copy())
                if (digest := state.digest()) not in seen:
                    seen.add(digest)
                    yield state
        if point < len(events):
            one = events[point].record
            if one.op == Op.NOTE:
                promise.hear(one.data.decode())
            else:
                disk.apply(one)


def write_tree(tree: Tree, where: Path) -> None:
    where.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (where / path).mkdir()
        else:
            (where / path).write_bytes(content)


def examine(state: State, scratch: Path) -> list[str]:
    """Put a state on a real file system and open it; what is broken of its promise."""
    where = Path(tempfile.mkdtemp(dir=scratch)) / "disk"
    write_tree(state.tree, where)
    stay(where / "cache")
    try:
        return broken(where / "cache", state.promise)
    finally:
        shutil.rmtree(where.parent)


def run(
    tally: Tally, materials: Materials, scratch: Path, chance: Random, *, until: float, full: bool
) -> None:
    """Every workload's fixed states, then mutation, then random states: 8 per point, or as time allows."""
    traces = {name: record(name, materials, scratch) for name in workloads.ALL}
    late, began, known = float("inf") if full else until, time.monotonic(), set[str]()

    def try_all(found: Iterator[State], until: float) -> None:
        for state, problems in _examined(found, scratch, until):
            if problems:
                where = keep(lambda place: write_tree(state.tree, place))  # noqa: B023  called at once
                tally.count(f"states of {state.workload}", problems, f"{state.where} ({where})")
                known.update(map(_gist, problems))
            else:
                tally.count(f"states of {state.workload}", [], "")

    try_all(_fixed_states(traces, chance), late if full else began + 0.4 * (until - began))
    tally.say()
    mutate(tally, traces, known, scratch, chance, until=late)
    while full or time.monotonic() < until:
        traces = {name: record(name, materials, scratch) for name in workloads.ALL}
        for name, events in traces.items():
            every = range(len(events) + 1)
            points = sorted({*interesting(events), *chance.sample(every, len(every) if full else 50)})
            try_all(states(name, events, points, 8 if full else 1, chance, fixed=False), late)
        if full:
            break


def mutate(
    tally: Tally,
    traces: dict[str, list[Event]],
    known: set[str],
    scratch: Path,
    chance: Random,
    *,
    until: float,
) -> None:
    """Take every line that syncs out in turn; one that can go unnoticed is a violation.

    Args:
        known: what is broken without that.
    """
    every = [event for events in traces.values() for event in events if event.site]
    sites = sorted({event.site for event in every if event.site != ELSEWHERE})
    for call, path in sorted(sync_calls().items()):
        if call not in {site.split(" ")[0] for site in sites}:
            if path.parent == PACKAGE:
                tally.violate("fsyncs taken out", "no workload comes to this fsync", call)
            else:
                tally.remark(f"the fsync of tools/{call} was not tried")
    chance.shuffle(sites)
    for number, site in enumerate(sites):
        if time.monotonic() > until:
            tally.remark(f"time for {number} of {len(sites)} lines that sync")
            break
        caught = _caught(traces, site, known, scratch, chance)
        tally.count("fsyncs taken out", [] if caught else ["nothing shows that it is needed"], site)
        if caught:
            print(f"  without {site}: {caught[:150]}", flush=True)
    tally.say()


def _caught(
    traces: dict[str, list[Event]],
    site: str,
    known: set[str],
    scratch: Path,
    chance: Random,
) -> str:
    """What is broken, and where, when some fsyncs are taken out; "" when nothing is."""
    mutants = {name: events for name, events in traces.items() if any(event.site == site for event in events)}
    for state, problems in _examined(_mutated_states(mutants, site, chance), scratch, float("inf")):
        for problem in problems:
            if _gist(problem) not in known:
                return f"{state.where}: {problem}"
    return ""


def _fixed_states(traces: dict[str, list[Event]], chance: Random) -> Iterator[State]:
    """Of every workload some points, spread over the whole of it, then the next ones."""
    for first in chance.sample(range(STRIDE), STRIDE):
        for name, events in traces.items():
            yield from states(name, events, interesting(events)[first::STRIDE], 0, chance)


def _mutated_states(traces: dict[str, list[Event]], site: str, chance: Random) -> Iterator[State]:
    for random in (0, 1, 16):
        for name, events in traces.items():
            points = exposed(events, site)
            if not random:
                points = sorted({*points}.intersection(interesting(events)))
            yield from states(name, without(events, site), points, random, chance, fixed=not random)


def _examined(found: Iterator[State], scratch: Path, until: float) -> Iterator[tuple[State, list[str]]]:
    """Examine states in children, a few in each; where a child dies, each of its states by itself."""

    def work(batch: list[State]) -> list[list[str]]:
        return [examine(state, scratch) for state in batch]

    batches = iter(lambda: list(islice(found, BATCH)), [])
    for batch, outcome in each(work, batches, until=until):
        if outcome.value is not None:
            yield from zip(batch, outcome.value, strict=True)
            continue
        for state in batch:
            one = alone(lambda state=state: examine(state, scratch))  # type: ignore[misc]
            yield state, [f"the check ended by {one.death}"] if one.value is None else one.value


def _gist(problem: str) -> str:
    """A problem without its paths and numbers, to tell a new one from a known one."""
    return re.sub(r"/\S+|[0-9a-f]{8,}|\d+", "…", problem)
