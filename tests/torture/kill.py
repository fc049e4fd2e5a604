"""kill -9 at random moments and at every named step, while a writer is busy.

A life is one cache that is written, killed, checked and written again. The steps are not listed here: they are
what the shim sees a busy writer do, on a new cache and on one that is there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from children import Child, Outcome, alone, each, must, start
from shim import Action, Op, Step, no_rule, read_trace, rule, steps, watch
from tally import Tally, keep
from workloads import OVERLAP, STRAY, Materials, keep_snapshots, merge, put, snapshot, source_rows
from world import Promise, Say, broken, open_writer, verify_problems

from lift_cache.segment import captions_path, segment_ids, segment_path

PUTTERS = 2
ROUNDS = 10
"""Rounds in a life, in which what kills leave behind adds up."""

LIVES = 8
"""Lives after which a step counts as one that cannot be come to."""

PATIENCE = 3.0
"""Seconds a writer is given to come to a step."""

KILLS = (Action.KILL_BEFORE, Action.KILL_AFTER, Action.KILL_MIDDLE)


def busy(
    cache: Path, say: Say, materials: Materials, promise: Promise, chance: Random, seconds: float
) -> None:
    """Put from two threads, seal in the background, and tend the cache meanwhile."""
    done = threading.Event()
    failures: list[BaseException] = []
    with open_writer(cache) as writer:
        if not promise.rows.issuperset(range(OVERLAP)):
            put(writer, say, 0, OVERLAP)

        def keep_putting(thread: int) -> None:
            mine = Random(chance.random())
            at = 1 + max((n for n in promise.offered if n // 100_000 == thread), default=100_000 * thread - 1)
            try:
                while not done.is_set():
                    count = mine.randint(1, 12)
                    put(writer, say, at, at + count)
                    at += count
                    time.sleep(mine.random() * 0.01)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=keep_putting, args=(i,)) for i in range(PUTTERS)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and not failures:
                match chance.choice(("snapshot", "snapshot", "compact", "merge", "keep", "gc", "note")):
                    case "snapshot":
                        snapshot(writer, say)
                    case "compact":
                        writer.compact(everything=chance.random() < 0.3)
                    case "merge":
                        number = chance.randrange(materials.sources)
                        merge(writer, say, materials.source(number), source_rows(number))
                    case "keep":
                        keep_snapshots(writer, say, 2)
                    case "gc":
                        writer.gc()
                    case "note":
                        writer.note_provenance({"engine": f"torture {chance.random()}"})
                time.sleep(chance.random() * 0.02)
        finally:
            done.set()
            for thread in threads:
                thread.join()
    if failures:
        raise failures[0]


def leave_strays(cache: Path, say: Say, materials: Materials) -> None:
    """Leave two segments in the way of the next opening: one that is right, one that is cut short."""
    if not (cache / "segments").is_dir():
        return
    source = materials.stray / "segments"
    say(f"offer {STRAY.start} {STRAY.stop}")
    for name, cut in zip(segment_ids(source)[:2], (0, 100), strict=True):
        for file in (captions_path(source, name), segment_path(source, name)):
            say(f"foreign {file.name}")
            data = file.read_bytes()
            (cache / "segments" / file.name).write_bytes(data[: len(data) - cut])


@dataclass
class Killed:
    """One round: whether the named step was come to, and what was wrong afterwards."""

    reached: bool
    problems: list[str]

    def kind(self, kind: str) -> str:
        return kind if self.reached else "checks without a kill"


class Life:
    """A cache that is killed again and again."""

    def __init__(self, materials: Materials, scratch: Path, chance: Random) -> None:
        self._where = Path(tempfile.mkdtemp(dir=scratch))
        self._materials, self._chance = materials, chance
        self._root = self._where / "root"
        self.new()

    def new(self) -> None:
        """Begin again with no cache."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir()
        self._log = self._where / "log"
        self._log.write_bytes(b"")
        self._heard = 0
        self._promise = Promise()

    def end(self) -> Killed:
        """Read every byte of what it has become."""
        cache = self._root / "cache"
        verified = alone(lambda: verify_problems(cache) if (cache / "recipe.json").exists() else [])
        shutil.rmtree(self._where)
        problems = [verified.death] if verified.value is None else verified.value
        return Killed(False, [f"verify, at the end: {problem}" for problem in problems])

    def round(
        self,
        arm: Callable[[], None],
        seconds: float,
        kill_after: float | None = None,
        *,
        strays: bool,
        again: bool = False,
    ) -> Killed:
        """Let a writer work until it is killed, or for some seconds; then check what it left.

        Args:
            strays: two segments lie in the way of its opening.
            again: the names that these have in quarantine are taken.
        """
        seed = self._chance.random()

        def work() -> None:
            out = os.open(self._log, os.O_WRONLY | os.O_APPEND)
            cache, mine = self._root / "cache", Random(seed)

            def say(line: str) -> None:
                os.write(out, f"{line}\n".encode())

            if strays:
                if not again:
                    shutil.rmtree(cache / "quarantine", ignore_errors=True)
                leave_strays(cache, say, self._materials)
            watch(self._root)
            arm()
            busy(cache, say, self._materials, self._promise, mine, seconds)

        child = start(work)
        if kill_after is not None:
            time.sleep(kill_after)
            child.kill()
        outcome = _ended(child)
        reached = outcome.death == "signal 9 (SIGKILL)"
        problems = [] if reached or not outcome.death else [f"the writer failed: {outcome.death}"]
        for line in self._new_lines():
            self._promise.hear(line)
        before = self._where / "before"
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(self._root, before)
        cache, promise = self._root / "cache", self._promise
        checked = alone(lambda: broken(cache, promise, go_on=False))
        problems += checked.value if checked.value is not None else [f"the check ended by {checked.death}"]
        if problems:
            problems[0] += f" ({keep(partial(shutil.copytree, before))})"
        return Killed(reached, problems)

    def _new_lines(self) -> Iterator[str]:
        data = self._log.read_bytes()
        whole = data[self._heard : data.rfind(b"\n") + 1]
        self._heard += len(whole)
        yield from whole.decode().splitlines()


def _ended(child: Child) -> Outcome[None]:
    while child.read():
        pass
    return child.end()


def named_steps(materials: Materials, scratch: Path) -> dict[Step, tuple[int, bool]]:
    """Step → how often a busy writer comes to it, and whether only on a new cache."""
    where = Path(tempfile.mkdtemp(dir=scratch))
    found: dict[Step, tuple[int, bool]] = {}
    promise = Promise()
    for turn in range(6):
        trace = where / f"trace-{turn}"

        def work(trace: Path = trace, turn: int = turn) -> list[str]:
            said: list[str] = []
            cache = where / "root" / "cache"
            leave_strays(cache, said.append, materials)
            watch(where / "root", trace)
            busy(cache, said.append, materials, promise, Random(turn), 1.0)
            return said

        (where / "root").mkdir(exist_ok=True)
        for line in must(alone(work)):
            promise.hear(line)
        for step, count in steps(read_trace(trace)).items():
            if step not in found:
                found[step] = count, turn == 0
            else:
                found[step] = found[step][0], False
    shutil.rmtree(where)
    return found


def run(
    tally: Tally, materials: Materials, scratch: Path, chance: Random, *, until: float, full: bool
) -> None:
    """500 random kills and 20 at every named step; or as many of both as time allows."""
    known = named_steps(materials, scratch)
    tally.remark(f"{len(known)} named steps")

    def random_life(seed: int) -> list[Killed]:
        mine = Random(seed)
        life = Life(materials, scratch, mine)
        killed = [
            life.round(no_rule, 60, mine.uniform(0.0, 0.5), strays=mine.random() < 0.5) for _ in range(ROUNDS)
        ]
        return [*killed, life.end()]

    def step_life(job: tuple[Step, int, int]) -> list[Killed]:
        step, seed, rounds = job
        mine = Random(seed)
        count, only_new = known[step]
        life = Life(materials, scratch, mine)
        killed = []
        again = step.pattern.endswith(".arrow.*")
        if not only_new:
            killed.append(life.round(no_rule, 0.2, strays=False))
        if again:  # puts the names into quarantine that are taken from now on
            killed.append(life.round(no_rule, 0.2, strays=True))
        for _ in range(rounds):
            if only_new:
                life.new()
            kill = mine.choice(KILLS if step.op in (Op.WRITE, Op.WRITE_SYNC) else KILLS[:2])
            arm = partial(rule, kill, step, mine.randrange(min(count, 6)))
            killed.append(life.round(arm, PATIENCE, strays=True, again=again))
        return [*killed, life.end()]

    reached: dict[Step, int] = dict.fromkeys(known, 0)
    lives: Counter[Step] = Counter()
    wanted = 20 if full else 1
    random_wanted = 500 if full else 0
    while True:
        seeds = [chance.randrange(2**32) for _ in range(2)]
        for seed, outcome in each(random_life, seeds) if random_wanted > 0 or not full else ():
            for killed in outcome.value or ():
                tally.count(killed.kind("kills at random moments"), killed.problems, f"seed {seed}")
                random_wanted -= killed.reached
            if outcome.death:
                tally.violate("kills at random moments", outcome.death, f"seed {seed}")
        late = float("inf") if full else until
        todo = [step for step, count in reached.items() if count < wanted and lives[step] < LIVES]
        chance.shuffle(todo)
        jobs = [(step, chance.randrange(2**32), min(wanted - reached[step], ROUNDS)) for step in todo[:20]]
        lives.update(step for step, _, _ in jobs)
        for (step, seed, _), outcome in each(step_life, jobs, until=late, patience=600):
            for killed in outcome.value or ():
                reached[step] += killed.reached
                tally.count(killed.kind("kills at named steps"), killed.problems, f"{step}, seed {seed}")
            if outcome.death:
                tally.violate("kills at named steps", outcome.death, f"{step}, seed {seed}")
        if random_wanted <= 0 and not todo if full else time.monotonic() >= until:
            break
    missed = [str(step) for step, count in reached.items() if count < wanted]
    tally.remark(f"{len(known) - len(missed)} of {len(known)} named steps killed at least {wanted} times")
    for name in missed if full else ():
        tally.violate("kills at named steps", f"not come to {wanted} times", name)
