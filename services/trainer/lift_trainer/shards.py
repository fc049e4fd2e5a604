"""Where shards lie: files here, or objects of a store (`s3://bucket/train-{000..099}.tar`), read by byte range.

What is read of an object is kept in pieces of 4 MiB in a directory of bounded size, `$LIFT_SHARD_CACHE` (default:
`lift/shards` in the user's cache directory) with at most `$LIFT_SHARD_CACHE_GIB` (default 50); the pieces used longest
ago go first. Pieces instead of whole shards, because a block of samples is a part of a shard, whatever its size.
A piece stands under its name only when it is whole and on the disk; any number of processes may share the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from lift_cache.errors import BadConfig, BadSource, LiftError, ServerUnavailable
from lift_cache.files import OUT_OF_ROOM, TEMPORARY, free_bytes, temporary_name
from lift_cache.sources import _braces
from lift_cache.tools.stores import Location, _explained, _file_system, parse_location

PIECE = 4 << 20
"""Bytes: large against a request's 30 ms, small against a block of 256 images."""

OPEN_FILES = 256
OPEN_OBJECTS = 32

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further attempt to read an object."""

DEFAULT_GIB = 50.0
STALE_SECONDS = 3600.0
LOCKS = 1024

T = TypeVar("T")


@dataclass(frozen=True)
class LocalShard:
    """A file of this machine, or of a file system that is mounted here."""

    path: Path

    @property
    def shown(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> str:
        return str(self.path.absolute())

    def stamp(self) -> tuple[int, int]:
        """Size in bytes and time of the last change in ns. Raises BadSource."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise BadSource(f"{self.path}: {error.strerror or error}") from None
        return found.st_size, found.st_mtime_ns

    @contextlib.contextmanager
    def here(self) -> Iterator[Path]:
        """The whole file, to read it from its beginning to its end."""
        yield self.path

    def read(self, offset: int, size: int) -> bytes:
        """Raises OSError."""
        return read_local(self.path, offset, size)

    def read_ahead(self, offset: int, size: int) -> None:
        """Have the system read a range into its page cache. Raises OSError."""
        _opened(self.path).read_ahead(offset, size)


class _OpenFile:
    """A descriptor read by position only, so that processes forked from one another may share it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def read_ahead(self, offset: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


_opened = lru_cache(maxsize=OPEN_FILES)(_OpenFile)


def read_local(path: Path, offset: int, size: int) -> bytes:
    """A byte range of a file that stays open for the next one. Raises OSError."""
    return _opened(path).read(offset, size)


# ---------------------------------------------------------------------------------------------- object stores


def is_remote(source: str) -> bool:
    return re.match(r"(s3|gs|gcs)://", source) is not None


@dataclass(frozen=True)
class Store:
    """A bucket and how it is reached."""

    location: Location

    def __hash__(self) -> int:
        return hash((self.location.scheme, self.location.bucket, *sorted(self.location.options.items())))

    @property
    def files(self) -> fs.FileSystem:
        """One connection per process: what was opened before a fork must not be used after it."""
        return _connected(self, os.getpid())

    def shown(self, path: str) -> str:
        return f"{self.location.scheme}://{path}"

    def asked(self, where: str, verb: str, ask: Callable[[], T]) -> T:
        """What a store answers, after several attempts. Raises ServerUnavailable, BadConfig, CacheNotFound."""
        for wait in (*WAITS, None):
            try:
                return ask()
            except LiftError:
                raise
            except (OSError, pa.ArrowException) as error:
                explained = _explained(where, verb, error, self.location)
                if wait is None or not isinstance(explained, ServerUnavailable):
                    raise explained from None
                time.sleep(wait)
        raise AssertionError


@lru_cache(maxsize=8)
def _connected(store: Store, process: int) -> fs.FileSystem:
    return _file_system(store.location)


def expand_remote(source: str) -> list[RemoteShard]:
    """The tars behind a URI: one, several by `{000..010}` braces or `*`, all under a prefix that ends in a slash.

    Raises:
        BadSource: nothing is there, or something other than tars.
        BadConfig, CacheNotFound, ServerUnavailable: the URI, the credentials, the bucket or the network.
    """
    name, question, options = source.partition("?")
    found: list[RemoteShard] = []
    for plain in _braces(name):
        location = parse_location(f"{plain}{question}{options}")
        path = f"{location.bucket}/{location.path}"
        store = Store(
            Location(
                location.scheme, location.bucket, "", None, location.options, location.user, location.password
            )
        )
        if plain.endswith("/") or any(sign in location.path for sign in "*["):
            folder = (
                path if plain.endswith("/") else re.split(r"[*\[]", path, maxsplit=1)[0].rpartition("/")[0]
            )
            pattern = f"{path.rstrip('/')}/*.tar" if plain.endswith("/") else path
            selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
            listed = store.asked(store.shown(folder), "listed", lambda: store.files.get_file_info(selector))  # noqa: B023
            infos = [info for info in listed if fnmatch.fnmatchcase(info.path, pattern)]
        else:
            infos = store.asked(store.shown(path), "opened", lambda: store.files.get_file_info([path]))  # noqa: B023
        infos = sorted((i for i in infos if i.type == fs.FileType.File), key=lambda info: info.path)
        if not infos:
            raise BadSource(f"no such object: {plain}" + ("" if plain == name else f" (from {source})"))
        found += [RemoteShard(store, i.path, i.size, i.mtime_ns or 0) for i in infos]
    for shard in found:
        if not shard.path.lower().endswith(".tar"):
            raise BadSource(f"{shard.shown}: only plain .tar files are read from an object store")
    return found


@dataclass(frozen=True)
class RemoteShard:
    """A tar in an object store, as it was when it was listed."""

    store: Store
    path: str
    """`bucket/name`."""
    size: int
    changed_ns: int

    @property
    def shown(self) -> str:
        return self.store.shown(self.path)

    @property
    def identity(self) -> str:
        return f"{self.shown}?{self.store.location.options.get('endpoint_override', '')}"

    def stamp(self) -> tuple[int, int]:
        """Size in bytes and time of the last change in ns."""
        return self.size, self.changed_ns

    @contextlib.contextmanager
    def here(self) -> Iterator[Path]:
        """A copy of the whole file, for as long as it is needed. Raises ServerUnavailable, BadSource."""
        pieces = PieceCache.default()
        target = temporary_name(pieces.directory / f"{self._hash}.tar")
        try:
            with target.open("wb") as file:
                for start in range(0, self.size, PIECE):
                    file.write(self._fetch(start, min(PIECE, self.size - start)))
            yield target
        except BadSource as error:
            raise BadSource(str(error).replace(str(target), self.shown)) from None
        finally:
            target.unlink(missing_ok=True)

    def read(self, offset: int, size: int) -> bytes:
        """Raises ServerUnavailable, OSError."""
        pieces = PieceCache.default()
        out = []
        for number in range(offset // PIECE, (offset + size - 1) // PIECE + 1):
            start = max(offset - number * PIECE, 0)
            stop = min(offset + size - number * PIECE, PIECE)
            fetch = partial(self._fetch_piece, number)
            out.append(pieces.read(self._piece(number), fetch, start, stop - start))
        return b"".join(out)

    def read_ahead(self, offset: int, size: int) -> None:
        """Fetch the pieces of a range that are not here yet. Raises ServerUnavailable, OSError."""
        pieces = PieceCache.default()
        for number in range(offset // PIECE, (offset + size - 1) // PIECE + 1):
            pieces.read(self._piece(number), partial(self._fetch_piece, number), 0, 1)

    @property
    def _hash(self) -> str:
        return _hashed(self.identity, self.size, self.changed_ns)

    def _piece(self, number: int) -> str:
        return f"{self._hash}-{number:06d}"

    def _fetch_piece(self, number: int) -> bytes:
        return self._fetch(number * PIECE, min(PIECE, self.size - number * PIECE))

    def _fetch(self, offset: int, size: int) -> bytes:
        """A byte range. Raises ServerUnavailable, BadConfig, CacheNotFound."""

        def ask() -> bytes:
            data = _object(self.store, self.path, os.getpid()).read_at(size, offset)
            if len(data) != size:
                raise OSError(f"{len(data):,} of {size:,} bytes arrived; was the object replaced?")
            return data

        return self.store.asked(self.shown, "read", ask)


@lru_cache(maxsize=1 << 16)
def _hashed(*words: object) -> str:
    return hashlib.blake2b(repr(words).encode(), digest_size=12).hexdigest()


@lru_cache(maxsize=OPEN_OBJECTS)
def _object(store: Store, path: str, process: int) -> pa.NativeFile:
    return store.files.open_input_file(path)


# ---------------------------------------------------------------------------------------------- pieces on disk


class PieceCache:
    """A directory of pieces with a bound on their bytes, which processes keep by locks on files in it."""

    def __init__(self, directory: Path, budget: int) -> None:
        """
        Raises:
            BadConfig: the directory cannot be used.
        """
        self.directory, self.budget = directory, budget
        self._since_checked = self._step = max(PIECE, budget >> 10)
        try:
            (directory / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadConfig(
                f"{directory} cannot keep shards ({error.strerror}); set LIFT_SHARD_CACHE to a directory with room"
            ) from None

    @classmethod
    def default(cls) -> PieceCache:
        """Where the environment says. Raises BadConfig."""
        given = os.environ.get("LIFT_SHARD_CACHE")
        base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        size = os.environ.get("LIFT_SHARD_CACHE_GIB", str(DEFAULT_GIB))
        return _piece_cache(Path(given).absolute() if given else Path(base) / "lift" / "shards", size)

    def read(self, name: str, fetch: Callable[[], bytes], offset: int, size: int) -> bytes:
        """A byte range of a piece, which is fetched when it is not here.

        Raises:
            What `fetch` raises; OSError.
        """
        path = self.directory / name
        while True:
            try:
                # Opened before it is read: another process may delete it in between, which does no harm then.
                with path.open("rb", buffering=0) as file:
                    os.utime(file.fileno())
                    return os.pread(file.fileno(), size, offset)
            except FileNotFoundError:
                data = self._fill(path, fetch)
                if data is not None:
                    return data[offset : offset + size]

    def _fill(self, path: Path, fetch: Callable[[], bytes]) -> bytes | None:
        """Fetch a piece and keep it. None when another process did so meanwhile."""
        with self._locked(f"{int(_hashed(path.name), 16) % LOCKS:02d}"):
            if path.exists():
                return None
            data = fetch()
            temporary = temporary_name(path)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # a name that outlives a power loss must not stand for zeros
                temporary.replace(path)
            except OSError as error:
                if error.errno not in OUT_OF_ROOM:
                    raise
                self._since_checked = self._step  # the data are used all the same
            finally:
                temporary.unlink(missing_ok=True)
        self._since_checked += len(data)
        if self._since_checked >= self._step:
            self._since_checked = 0
            self._make_room()
        return data

    def _make_room(self) -> None:
        """Delete the pieces used longest ago, until the others and a step of every process fit."""
        with self._locked("room"):
            found = []
            for entry in os.scandir(self.directory):
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file():
                        stat = entry.stat()
                        found.append((stat.st_mtime, stat.st_size, entry.path, entry.name))
            total = sum(size for _, size, _, _ in found)
            disk = shutil.disk_usage(self.directory)
            keep = min(self.budget, total + free_bytes(self.directory) - disk.total // 50)
            for used, size, path, name in sorted(found):
                stale = name.startswith(TEMPORARY) and time.time() - used > STALE_SECONDS
                if total > keep - self._step or stale:
                    if name.startswith(TEMPORARY) and not stale:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        Path(path).unlink()
                    total -= size

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        fd = os.open(self.directory / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # no locks on this file system: some pieces come twice
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


@lru_cache(maxsize=4)
def _piece_cache(directory: Path, gib: str) -> PieceCache:
    try:
        budget = int(float(gib) * (1 << 30))
    except (ValueError, OverflowError):
        budget = 0
    if budget < 4 * PIECE:
        raise BadConfig(f"LIFT_SHARD_CACHE_GIB is {gib!r}; give a number of GiB, such as 50")
    cache = PieceCache(directory, budget)
    if directory.exists() and free_bytes(directory) < min(budget, 64 * PIECE):
        print(
            f"little room for shards in {directory}; set LIFT_SHARD_CACHE to a larger disk", file=sys.stderr
        )
    return cache
