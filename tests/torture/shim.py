"""The C shim (shim.c) from Python: compiled once per run, preloaded by starting this program again."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_SHIM = "TORTURE_SHIM"


class Op(IntEnum):
    NOTE = 0
    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    RENAME = 4
    LINK = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8
    SYNC = 9
    FAILED_SYNC = 10
    WRITE_SYNC = 11
    """A write through O_DSYNC or O_SYNC."""


class Action(IntEnum):
    NOTHING = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    KILL_MIDDLE = 3
    FAIL = 4
    SHORT = 5


@dataclass(frozen=True)
class Record:
    """One change. `path` is relative to the watched directory; `data` is what was written, or the note."""

    op: Op
    inode: int
    offset: int
    thread: int
    path: str
    data: bytes

    @property
    def target(self) -> str:
        """The new path of a rename or link."""
        return os.fsdecode(self.data)


_HEAD = struct.Struct("<QqIIII")


def read_trace(path: Path) -> Iterator[Record]:
    data, at = path.read_bytes(), 0
    while at < len(data):
        inode, offset, op, thread, first, second = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Record(
            Op(op),
            inode,
            offset,
            thread,
            os.fsdecode(data[at : at + first]),
            data[at + first : at + first + second],
        )
        at += first + second


@dataclass(frozen=True, order=True)
class Step:
    """A named step: an operation on one kind of file, as in `RENAME segments/*.arrow`."""

    op: Op
    pattern: str

    def __str__(self) -> str:
        return f"{self.op.name.lower()} {self.pattern}"


def pattern(path: str) -> str:
    """A path with the digests and numbers in it left open."""
    return re.sub(r"[0-9a-f]{12,}|\d+", "*", path)


def steps(trace: Iterable[Record]) -> Counter[Step]:
    """Every named step of a trace and how often it came; digests and numbers in names are left open."""
    found: Counter[Step] = Counter()
    for record in trace:
        if record.op not in (Op.NOTE, Op.FAILED_SYNC):
            path = record.target if record.op in (Op.RENAME, Op.LINK) else record.path
            found[Step(record.op, pattern(path))] += 1
    return found


def preload(scratch: Path) -> None:
    """Start this program again with the shim loaded, unless it is. Returns in the process that has it."""
    if os.environ.get(_SHIM):
        return
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        sys.exit(
            "the torture suite needs a C compiler (cc, or $CC): install one, for example `apt install gcc`"
        )
    library = scratch / "shim.so"
    source = Path(__file__).with_name("shim.c")
    done = subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{compiler} cannot compile {source}:\n{done.stderr}")
    os.environ |= {_SHIM: str(library), "LD_PRELOAD": str(library), "TORTURE_SCRATCH": str(scratch)}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[_SHIM])


def watch(root: Path, trace: Path | None = None) -> None:
    """Follow what this process changes under `root`; with `trace`, write it there."""
    _library().torture_watch(os.fsencode(root), os.fsencode(trace or ""))


def note(text: str) -> None:
    """Put a line of the workload's own into the trace."""
    data = text.encode()
    _library().torture_note(data, ctypes.c_size_t(len(data)))


def rule(action: Action, step: Step, skip: int = 0, count: int = 1, error: int = errno.EIO) -> None:
    """Do `action` at the matching changes number skip+1 … skip+count. One rule at a time."""
    _library().torture_rule(
        int(action), int(step.op), os.fsencode(step.pattern), ctypes.c_long(skip), ctypes.c_long(count), error
    )


def no_rule() -> None:
    rule(Action.NOTHING, Step(Op.NOTE, ""), 0, 0)


def fired() -> int:
    """How often the rule has acted."""
    count = _library().torture_fired
    count.restype = ctypes.c_long
    return int(count())
