"""Work in forked children, so that what is tried may crash, hang or be killed without harm.

The parent has imported everything and started no thread: a child begins in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
J = TypeVar("J")

PR_SET_PDEATHSIG = 1
WORKERS = max(2, os.cpu_count() or 2)
PATIENCE = 120.0
"""Seconds after which a child that does nothing counts as hung."""

LONGEST = 10
"""Times that patience, for one that goes on doing something."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a child returned, or how it ended instead ("signal 11 (SIGSEGV)", "hung", a traceback)."""

    value: T | None
    death: str = ""


@dataclass
class Child:
    """A running child: its process id and the pipe on which its result comes."""

    pid: int
    pipe: int
    since: float
    received: bytes = b""

    def read(self) -> bool:
        """Take what has come; False at the end."""
        data = os.read(self.pipe, 1 << 20)
        self.received += data
        return bool(data)

    def runs(self) -> bool:
        """Whether one of its threads computes or waits for the disk: slow on a busy machine, and not hung."""
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{self.pid}/task").iterdir():
                if (thread / "stat").read_text().rpartition(")")[2].split()[0] in "RD":
                    return True
        return False

    def show_threads(self) -> None:
        """Have it say on stderr where each of its threads stands."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.5)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Outcome:
        """Wait for the end of the child, whose pipe has ended."""
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return Outcome(None, f"signal {number} ({signal.Signals(number).name})")
        if not self.received:
            return Outcome(None, f"exit status {os.WEXITSTATUS(status)} without a result")
        value, death = pickle.loads(self.received)
        return Outcome(value, death)


def start(work: Callable[[], object]) -> Child:
    """Fork a child that runs `work` and sends back what it returns."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(pid, ours, time.monotonic())
    status = 1
    try:
        ctypes.CDLL(None).prctl(
            PR_SET_PDEATHSIG, signal.SIGKILL
        )  # whoever is killed takes its children along
        os.close(ours)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        logging.disable()
        try:
            result: tuple[object, str] = work(), ""
        except BaseException:
            result = None, traceback.format_exc()
        with os.fdopen(theirs, "wb") as out:
            pickle.dump(result, out)
        status = 0
    finally:
        os._exit(status)


def each(
    work: Callable[[J], T], jobs: Iterable[J], *, until: float = float("inf"), patience: float = PATIENCE
) -> Iterator[tuple[J, Outcome[T]]]:
    """Run `work` on every job, each in a child of its own, a few at a time; results as they come.

    Args:
        until: time.monotonic() after which no more jobs are begun.
        patience: seconds after which a child that does nothing is taken to hang.
    """
    running: dict[int, tuple[J, Child]] = {}
    waiting = iter(jobs)
    more = True
    try:
        while more or running:
            while more and len(running) < WORKERS:
                job = next(waiting, None) if time.monotonic() < until else None
                if job is None:
                    more = False
                    break
                child = start(lambda job=job: work(job))  # type: ignore[misc]
                running[child.pipe] = job, child
            ready, _, _ = select.select(list(running), [], [], 0.5)
            for pipe in ready:
                job, child = running[pipe]
                if not child.read():
                    del running[pipe]
                    yield job, child.end()
            for pipe, (job, child) in list(running.items()):
                waited = time.monotonic() - child.since
                if waited > LONGEST * patience or (waited > patience and not child.runs()):
                    child.show_threads()
                    child.kill()
                    del running[pipe]
                    child.end()
                    yield job, Outcome(None, f"hung for {patience:.0f} s")
    finally:
        for _, child in running.values():
            child.kill()
            child.end()


def alone(work: Callable[[], T], *, patience: float = PATIENCE) -> Outcome[T]:
    """Run one piece of work in a child."""
    for _, outcome in each(lambda _: work(), [True], patience=patience):
        return outcome
    raise AssertionError


def must(outcome: Outcome[T]) -> T:
    """The value of a child that had no reason to fail. Raises RuntimeError with how it ended otherwise."""
    if outcome.death:
        raise RuntimeError(f"a child of the suite failed: {outcome.death}")
    return outcome.value  # type: ignore[return-value]
