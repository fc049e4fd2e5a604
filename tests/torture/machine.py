"""A hypothesis state machine: any order of put, seal, snapshot, compact, merge, adopt, gc, reopen and crash,
against a dictionary.

A crash is a process of its own that opens the cache, begins one more thing and is killed at a change to the
disk that hypothesis chooses.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import shim
from children import alone, each
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from shim import Action, Op, Step
from tally import Tally
from workloads import (
    OVERLAP,
    Materials,
    keep_snapshots,
    make_cache,
    merge,
    put,
    snapshot,
    source_rows,
)
from world import Promise, Say, broken_rows, broken_snapshots, open_writer, verify_problems

from lift_cache.snapshot import snapshots_of
from lift_cache.writer import CacheWriter

ADOPTED = 3_000_000
"""Captions of segments that are laid into the cache while it is closed."""

HISTORIES = 5
"""Histories that one process goes through."""

DOING = ("put", "seal", "snapshot", "compact", "merge", "keep", "gc")


class Cache(RuleBasedStateMachine):
    """The cache under test, and what it promised."""

    materials: Materials
    scratch: Path
    steps_done = 0

    @initialize()
    def begin(self) -> None:
        self.where = Path(tempfile.mkdtemp(dir=self.scratch))
        self.cache = self.where / "cache"
        self.promise = Promise()
        self.at = OVERLAP
        self.adopted = 0
        self.writer = open_writer(self.cache)
        put(self.writer, self.promise.hear, 0, OVERLAP)

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
            problems = alone(lambda: verify_problems(self.cache))
            shutil.rmtree(self.where)
            assert problems.value == [], problems

    @rule(count=st.integers(1, 60))
    def put(self, count: int) -> None:
        put(self.writer, self.promise.hear, self.at, self.at + count)
        self.at += count

    @rule(count=st.integers(1, 30), back=st.integers(1, 200))
    def put_again(self, count: int, back: int) -> None:
        """Some that are there, some that are not."""
        first = max(0, self.at - back)
        put(self.writer, self.promise.hear, first, first + count)
        self.at = max(self.at, first + count)

    @rule()
    def seal(self) -> None:
        self.writer.seal()

    @rule()
    def snapshot(self) -> None:
        snapshot(self.writer, self.promise.hear)

    @rule(everything=st.booleans())
    def compact(self, everything: bool) -> None:
        self.writer.compact(everything=everything)

    @rule(number=st.integers(0, 3), cache=st.booleans())
    def merge(self, number: int, cache: bool) -> None:
        source = self.materials.source(number)
        merge(self.writer, self.promise.hear, source if cache else source / "segments", source_rows(number))

    @rule(count=st.integers(1, 3))
    def remove_snapshots(self, count: int) -> None:
        keep_snapshots(self.writer, self.promise.hear, count)

    @rule()
    def gc(self) -> None:
        self.writer.gc()

    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.writer = open_writer(self.cache)

    @rule(fresh=st.integers(1, 20), known=st.integers(0, OVERLAP))
    def adopt(self, fresh: int, known: int) -> None:
        """A segment that another process laid into the directory: new rows, and some that are there."""
        first = ADOPTED + self.adopted
        self.adopted += fresh
        made = self.where / "made"
        make_cache(made, [*range(first, first + fresh), *range(known)])
        self.promise.hear(f"offer {first} {first + fresh}")
        self.writer.close()
        for file in sorted((made / "segments").iterdir(), key=lambda file: "captions" not in file.name):
            shutil.copy(file, self.cache / "segments")
        shutil.rmtree(made)
        self.writer = open_writer(self.cache)
        self.promise.hear(f"have {first} {first + fresh}")

    @precondition(lambda self: bool(snapshots_of(self.cache)))
    @rule()
    def lose_live(self) -> None:
        """live/ of a cache without fresh rows may be taken away."""
        self.writer.seal()
        self.writer.close()
        shutil.rmtree(self.cache / "live")
        self.writer = open_writer(self.cache)

    @rule(
        doing=st.sampled_from(DOING),
        changes=st.integers(0, 60),
        op=st.sampled_from((Op.WRITE, Op.WRITE_SYNC, Op.SYNC, Op.RENAME)),
    )
    def crash(self, doing: str, changes: int, op: Op) -> None:
        """Killed at the n-th write, sync or rename of opening the cache and doing one thing."""
        self.writer.close()
        log = self.where / "log"

        def work() -> None:
            with log.open("w", buffering=1) as out:

                def say(line: str) -> None:
                    out.write(f"{line}\n")

                shim.watch(self.cache)
                shim.rule(Action.KILL_BEFORE, Step(op, "*"), changes)
                self._do(open_writer(self.cache), say, doing)

        alone(work)
        for line in log.read_text().splitlines():
            self.promise.hear(line)
        self.at += 30
        self.writer = open_writer(self.cache)

    def _do(self, writer: CacheWriter, say: Say, doing: str) -> None:
        match doing:
            case "put":
                put(writer, say, self.at, self.at + 30)
            case "seal":
                writer.seal()
            case "snapshot":
                snapshot(writer, say)
            case "compact":
                writer.compact(everything=True)
            case "merge":
                merge(writer, say, self.materials.source(0), source_rows(0))
            case "keep":
                keep_snapshots(writer, say, 1)
            case "gc":
                writer.gc()

    @invariant()
    def all_is_kept(self) -> None:
        if hasattr(self, "writer"):
            type(self).steps_done += 1
            problems = broken_rows(self.writer, self.promise) + broken_snapshots(self.cache, self.promise)
            assert not problems, "; ".join(problems)


def run(
    tally: Tally, materials: Materials, scratch: Path, chance: Random, *, until: float, full: bool
) -> None:
    """400 histories of up to 40 steps; or as many as time allows."""

    def work(number: int) -> tuple[int, str]:
        class Machine(Cache):
            pass

        Machine.materials, Machine.scratch = materials, scratch
        phases = (Phase.generate, Phase.shrink) if full else (Phase.generate,)
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                run_machine(
                    seed(number)(Machine),
                    settings=settings(
                        max_examples=HISTORIES,
                        stateful_step_count=40,
                        deadline=None,
                        database=None,
                        suppress_health_check=list(HealthCheck),
                        phases=phases,
                    ),
                )
        except Exception as error:
            history = "\n".join(getattr(error, "__notes__", []))
            return Machine.steps_done, f"{type(error).__name__}: {error}\n{said.getvalue()}{history}"
        return Machine.steps_done, ""

    seeds = (chance.randrange(2**32) for _ in range(400 // HISTORIES if full else 10**9))
    for number, outcome in each(work, seeds, until=float("inf") if full else until, patience=1800):
        steps, problem = outcome.value or (0, outcome.death)
        tally.cases["histories"] += HISTORIES
        tally.cases["steps of histories"] += steps
        if problem:
            tally.violate("histories", problem, f"hypothesis seed {number}")
