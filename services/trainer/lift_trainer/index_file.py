"""Index files: what was read from shards once, kept as Arrow files that are mapped into memory, never parsed.

    <directory>/parts/<source>-<stamp>.arrow    the samples of one source (a tar, a table)
    <directory>/<sources>.arrow                 an index over several sources; texts stay in the parts

The directory is `$LIFT_INDEX_DIR`, else `lift/index` in the user's cache directory (`$XDG_CACHE_HOME`, else
`~/.cache`), so that runs, ranks and evaluations over the same data share one index. Deleting it is safe: it is
made again. A source's stamp is its size and modification time (ns); an index of other stamps is not used.

A file is an Arrow IPC file with one record batch of one row: each column a list that holds a whole array, beside
a JSON card with the digest of all of them. It is written under a temporary name and renamed, so that processes
that build the same index at the same time end with one of two equal files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lift_cache.errors import CacheDamaged, CacheFull
from lift_cache.files import TEMPORARY, publish, room_for, temporary_name
from lift_cache.keys import KEY_BYTES, sort_order

FORMAT = 2
"""Part of every card and of every file name's hash: files of another format are other files."""

OPEN_PARTS = 64
BLOCK = 1 << 16
"""Texts that are Python strings at a time."""

INDEXES = 16
"""Indexes over several sources that are kept; the ones used last."""

STALE_SECONDS = 24 * 3600.0
"""A temporary file older than this belongs to nobody."""

Card = dict[str, Any]
Column: TypeAlias = Any
"""pa.Array or np.ndarray; Arrow has no types that could say so."""

_CARD = b"lift.index"


def index_directory() -> Path | None:
    """Where indexes are kept, None where that cannot be known (no home directory)."""
    if given := os.environ.get("LIFT_INDEX_DIR"):
        return Path(given).absolute()
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base).absolute() / "lift" / "index"


def short_hash(*values: object) -> str:
    """32 hex digits that stand for JSON values, and for the format."""
    text = json.dumps([FORMAT, *values], ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------- one file


def write_index_file(path: Path, columns: Mapping[str, Column], card: Card) -> None:
    """Publish arrays (1-d numbers, uint8 [n, 16] keys, large_binary texts) under a name, whole or not at all.

    Raises:
        CacheFull, OSError: nothing is left behind.
    """
    arrays = {name: _as_arrow(column) for name, column in columns.items()}
    card = {"format": FORMAT, **card, "digest": _digest(arrays)}
    lists = [
        pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array)
        for array in arrays.values()
    ]
    schema = pa.schema(
        [pa.field(name, array.type) for name, array in zip(arrays, lists, strict=True)],
        {_CARD: json.dumps(card).encode()},
    )
    temporary = temporary_name(path)
    with room_for(path.parent):
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(lists, schema=schema))
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_index_file(path: Path) -> tuple[Card, dict[str, pa.Array]]:
    """Map a file into memory and check its digest.

    Raises:
        FileNotFoundError.
        CacheDamaged: not the bytes that were written.
    """
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            card = json.loads((reader.schema.metadata or {})[_CARD])
            batch = reader.get_batch(0)
        arrays = {name: batch.column(name)[0].values for name in batch.schema.names}
        if card["format"] == FORMAT and card["digest"] == _digest(arrays):
            return card, arrays
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise CacheDamaged(f"{path} is not what was written")


def numbers(array: pa.Array) -> np.ndarray:
    """The values of a column without a copy; keys as uint8 [n, 16]. Not writable."""
    if pa.types.is_fixed_size_binary(array.type):
        return np.frombuffer(array.buffers()[1], np.uint8)[: len(array) * KEY_BYTES].reshape(-1, KEY_BYTES)
    return array.to_numpy(zero_copy_only=True)


def binary(texts: bytes | bytearray, ends: Sequence[int] | np.ndarray) -> pa.Array:
    """Texts one after the other, and where each ends, as large_binary."""
    offsets = np.concatenate([[0], np.asarray(ends, np.int64)]).astype(np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(texts)]
    )


def _as_arrow(column: Column) -> pa.Array:
    if isinstance(column, np.ndarray) and column.ndim == 2:
        buffer = pa.py_buffer(np.ascontiguousarray(column))
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(column), [None, buffer])
    return pa.array(column) if isinstance(column, np.ndarray) else column


def _digest(arrays: Mapping[str, pa.Array]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in arrays.items():
        digest.update(f"{name}:{array.type}:{len(array)}\n".encode())
        if pa.types.is_large_binary(array.type):
            _, offsets, data = array.buffers()
            ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
            digest.update(ends.tobytes())
            if len(array):
                digest.update(memoryview(data)[ends[0] : ends[-1]])
        else:
            digest.update(np.ascontiguousarray(numbers(array)).data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- many texts


@lru_cache(maxsize=OPEN_PARTS)
def _opened(path: Path) -> dict[str, pa.Array]:
    return read_index_file(path)[1]


class Strings(Sequence[str]):
    """n texts of several parts that stay in Arrow, most of them in files that are mapped when first needed.

    Names that are not UTF-8 have surrogates in them, as Python's file names do. Raises CacheDamaged when a
    part's file is gone or damaged meanwhile.
    """

    def __init__(
        self,
        column: str,
        parts: Sequence[pa.Array | Path],
        starts: np.ndarray,
        which: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            column: name of the column in those parts that are files.
            starts: int64 [parts + 1], number of the first text of each part, and of all.
            which: int64 [n], the numbers of the texts that are meant; all, when None.
        """
        self._column, self._parts, self._starts, self._which = column, parts, starts, which

    @classmethod
    def of(cls, texts: Sequence[str]) -> Strings:
        encoded = [text.encode(errors="surrogateescape") for text in texts]
        array = binary(b"".join(encoded), np.cumsum([len(text) for text in encoded], dtype=np.int64))
        return cls("", [array], np.array([0, len(texts)]))

    def take(self, which: np.ndarray) -> Strings:
        """Some of the texts, by position (int64 [k]) or mask (bool [n])."""
        if which.dtype == bool:
            which = np.flatnonzero(which)
        chosen = which if self._which is None else self._which[which]
        return Strings(self._column, self._parts, self._starts, chosen)

    def arrow(self, start: int, stop: int) -> pa.Array:
        """Texts start … stop − 1 as large_binary."""
        if self._which is None:
            first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
            pieces = [
                self._part(p)[max(start - base, 0) : stop - base]
                for p in range(first, last + 1)
                for base in [int(self._starts[p])]
            ]
            return pa.concat_arrays(pieces) if start < stop else pa.array([], pa.large_binary())
        wanted = self._which[start:stop]
        part = np.searchsorted(self._starts, wanted, side="right") - 1
        order = np.argsort(part, kind="stable")
        pieces = [self._part(p).take(pa.array(wanted[part == p] - self._starts[p])) for p in np.unique(part)]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_arrays(pieces).take(pa.array(back)) if pieces else pa.array([], pa.large_binary())

    def joined(self, separator: bytes) -> Iterator[bytes]:
        """The bytes of `separator.join(texts)`, piece by piece."""
        for start in range(0, len(self), BLOCK):
            block = self.arrow(start, min(start + BLOCK, len(self)))
            whole = pa.LargeListArray.from_arrays(pa.array([0, len(block)], pa.int64()), block)
            joined = pc.binary_join(whole, pa.scalar(separator, pa.large_binary()))
            yield (separator if start else b"") + joined[0].as_py()

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._which is None else len(self._which)

    @overload
    def __getitem__(self, where: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, where: slice) -> list[str]: ...
    def __getitem__(self, where: SupportsIndex | slice) -> str | list[str]:
        if isinstance(where, slice):
            return [self[i] for i in range(*where.indices(len(self)))]
        position = int(where)
        position += len(self) if position < 0 else 0
        if not 0 <= position < len(self):
            raise IndexError(where)
        number = position if self._which is None else int(self._which[position])
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return _decoded(self._part(part)[number - int(self._starts[part])].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from map(_decoded, self.arrow(start, min(start + BLOCK, len(self))).to_pylist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({len(self)})"

    def _part(self, part: int) -> pa.Array:
        found = self._parts[part]
        if not isinstance(found, Path):
            return found
        try:
            return _opened(found)[self._column]
        except FileNotFoundError:
            raise CacheDamaged(f"{found} was deleted meanwhile; run the same command again") from None


def _decoded(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number keys (uint8 [p, 16]) by their first appearance.

    Returns:
        int64 [p], the number of each; int64 [u], the position where each number appears first, ascending.
    """
    if not len(keys):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = sort_order(keys)
    ordered = np.ascontiguousarray(keys[order]).view(np.uint64)
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    del ordered
    first = order[new]
    by_appearance = np.argsort(first)
    number = np.empty(len(first), np.int64)
    number[by_appearance] = np.arange(len(first))
    out = np.empty(len(keys), np.int64)
    out[order] = number[np.cumsum(new) - 1]
    return out, first[by_appearance]


# ---------------------------------------------------------------------------------------------- the directory


class IndexDirectory:
    """The files of indexes. What cannot be written is said once, and then everything works without it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts = path / "parts"
        self._writable = True
        self._known: dict[str, list[str]] | None = None

    @classmethod
    def default(cls) -> IndexDirectory | None:
        path = index_directory()
        return cls(path) if path else None

    def part_path(self, source: str, stamp: str) -> Path:
        """Where the part of a source (its `short_hash`) lies in the state of a stamp."""
        return self._parts / f"{source}-{stamp}.arrow"

    def read(self, path: Path) -> tuple[Card, dict[str, pa.Array]] | None:
        """None when there is none; a damaged one is said and deleted."""
        try:
            return read_index_file(path)
        except FileNotFoundError:
            return None
        except CacheDamaged as error:
            print(f"{error}; made again", file=sys.stderr)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write_part(self, source: str, stamp: str, columns: Mapping[str, Column], card: Card) -> Path | None:
        """Where it was written, None when that failed. Parts of earlier states of the source are deleted."""
        path = self.part_path(source, stamp)
        if not self._write(path, columns, card):
            return None
        for name in self._older().pop(source, []):
            if name != path.name:
                (self._parts / name).unlink(missing_ok=True)
        return path

    def index_path(self, name: str) -> Path:
        return self.path / f"{name}.arrow"

    def write_index(self, name: str, columns: Mapping[str, Column], card: Card) -> None:
        if self._write(self.index_path(name), columns, card):
            self._keep_the_newest()

    def used(self, name: str) -> None:
        """Remember that an index was used, so that others go first."""
        with contextlib.suppress(OSError):
            os.utime(self.index_path(name))

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[None]:
        """One process at a time builds an index; the others wait here and then find it made."""
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._without(error)
            yield
            return
        try:
            _wait_for(fd)
            self._remove_stale()
            yield
        finally:
            os.close(fd)

    def _write(self, path: Path, columns: Mapping[str, Column], card: Card) -> bool:
        if not self._writable:
            return False
        try:
            write_index_file(path, columns, card)
        except (OSError, CacheFull) as error:
            self._without(error)
        return self._writable

    def _without(self, error: Exception) -> None:
        if self._writable:
            self._writable = False
            print(
                f"the sample index is not kept in {self.path} ({error}); it will be made again each time, "
                "unless LIFT_INDEX_DIR names a place with room",
                file=sys.stderr,
            )

    def _older(self) -> dict[str, list[str]]:
        """Names of parts by source, listed once: there may be 10⁴ of them."""
        if self._known is None:
            self._known = {}
            for name in os.listdir(self._parts):  # noqa: PTH208
                self._known.setdefault(name.partition("-")[0], []).append(name)
        return self._known

    def _keep_the_newest(self) -> None:
        with contextlib.suppress(OSError):
            found = sorted(self.path.glob("*.arrow"), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in found[INDEXES:]:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """What a killed process left; not what another one is writing now."""
        for directory in (self.path, self._parts):
            for path in directory.glob(f"{TEMPORARY}*"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()


def _wait_for(fd: int) -> None:
    with contextlib.suppress(OSError):  # no locks on this file system: both build, both publish the same
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that reads the same samples", file=sys.stderr)
            fcntl.flock(fd, fcntl.LOCK_EX)


class Progress:
    """A line on stderr about something that takes more than some seconds."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._overwrite = sys.stderr.isatty()
        self._every = 0.5 if self._overwrite else 30.0
        self._shown = False

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._said < self._every or now - self._began < 2:
            return
        self._said, self._shown = now, True
        start, end = ("\r\x1b[2K", "") if self._overwrite else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown and self._overwrite:
            print(file=sys.stderr)
