"""Where a cache may be copied to and from: a directory, or a prefix of an object store (S3, Google Cloud).

Both hold the files of a cache under the same relative names, so a directory that was pushed to is a cache
that can be read where it is. Object stores are reached through `pyarrow.fs`; what they and the network do
wrong becomes one line that never shows a secret.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from lift_cache import files
from lift_cache.errors import BadConfig, CacheDamaged, CacheNotFound, LiftError, ServerUnavailable
from lift_cache.lock import WriterLock

CHUNK_BYTES = 8 << 20
"""What is read, hashed and written at a time."""

CONNECT_SECONDS, STALLED_SECONDS, ATTEMPTS = 5, 15, 3
"""A store that does not answer is given up after ATTEMPTS × these, about a minute at most."""

MOST_SAID = 300
"""Characters of a library's message that are passed on."""

STAGING = f"{files.TEMPORARY}snapshot-"
"""Beginning of the name under which a snapshot is put together in a directory. It stays when a pull is
killed, so that the next one goes on; a writer that opens the cache deletes it."""


class Store(Protocol):
    """The files of a cache by relative name, such as `segments/<id>.arrow`."""

    shown: str
    """What to call it in messages; without secrets."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by relative name; empty where there is nothing yet."""
        ...

    def read(self, name: str) -> Iterator[bytes]:
        """Content, `CHUNK_BYTES` at a time."""
        ...

    def write(self, name: str, chunks: Iterator[bytes]) -> None:
        """Put a file there. When `chunks` raises, the file is not there, or not with its full size."""
        ...

    def publish(self, snapshot_id: str, manifest: bytes) -> None:
        """Make a snapshot appear whose other files have all been written."""
        ...


class Directory:
    """A cache on a file system, as source or as target."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shown = str(path)

    def sizes(self) -> dict[str, int]:
        found = {}
        for folder in ("", "segments", *(f"snapshots/{name}" for name in _listed(self.path / "snapshots"))):
            if files.TEMPORARY in folder and STAGING not in folder:
                continue
            for base in _listed(self.path / folder):
                # A staged manifest is not there yet: the copy was killed before the snapshot took its name.
                if base.startswith(files.TEMPORARY) or (STAGING in folder and base == "manifest.json"):
                    continue
                with contextlib.suppress(FileNotFoundError):  # a writer at work
                    status = (self.path / folder / base).stat()
                    if stat.S_ISREG(status.st_mode):
                        found[f"{folder.replace(STAGING, '')}/{base}".lstrip("/")] = status.st_size
        return found

    def read(self, name: str) -> Iterator[bytes]:
        try:
            with (self.path / name).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise CacheDamaged(
                f"{self.path / name} cannot be read ({error.strerror}); restore it from a copy of the cache"
            ) from None

    def require_cache_or_empty(self) -> None:
        """Raises BadConfig: there is something else than a cache."""
        if self.path.exists() and not self.path.is_dir():
            raise BadConfig(f"{self.path} is a file; a cache is a directory")
        if not (self.path / "recipe.json").is_file():
            files.refuse_other_content(self.path)

    @contextlib.contextmanager
    def as_target(self, snapshot_id: str) -> Iterator[None]:
        """Hold the writer's right meanwhile; what an interrupted copy left half-written is deleted.

        Raises:
            CacheLocked: another process writes to this cache.
            BadConfig: something that is not a cache, or not writable.
            CacheFull.
        """
        self.require_cache_or_empty()
        try:
            with files.room_for(self.path):
                files.make_directory(self.path)
                lock = WriterLock(self.path)
                try:
                    self._clear(snapshot_id)
                    yield
                finally:
                    lock.release()
        except PermissionError as error:
            raise BadConfig(
                f"{error.filename or self.path} may not be written by this user; give it the right to"
            ) from None

    def _clear(self, snapshot_id: str) -> None:
        staging = self._staging(snapshot_id)
        goes_on = not (self.path / "snapshots" / snapshot_id).exists()
        for folder in (self.path, self.path / "segments", self.path / "snapshots", staging):
            for left in folder.glob(f"{files.TEMPORARY}*"):
                if left != staging or not goes_on:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _staging(self, snapshot_id: str) -> Path:
        return self.path / "snapshots" / f"{STAGING}{snapshot_id}"

    def _place(self, name: str) -> Path:
        """Files of a snapshot that is not there yet are put together beside it, so that it appears whole."""
        folder, _, base = name.rpartition("/")
        top, _, snapshot_id = folder.partition("/")
        if top == "snapshots" and not (self.path / folder).is_dir():
            return self._staging(snapshot_id) / base
        return self.path / name

    def write(self, name: str, chunks: Iterator[bytes]) -> None:
        final = self._place(name)
        files.make_directory(final.parent)
        temporary = files.temporary_name(final)
        with files.room_for(final.parent):
            try:
                with temporary.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                files.publish(temporary, final)
            finally:
                temporary.unlink(missing_ok=True)

    def publish(self, snapshot_id: str, manifest: bytes) -> None:
        name = f"snapshots/{snapshot_id}/manifest.json"
        self.write(name, iter([manifest]))
        staging = self._staging(snapshot_id)
        if staging.is_dir():
            final = self.path / "snapshots" / snapshot_id
            staging.rename(final)
            files.sync_directory(final.parent)


def _listed(folder: Path) -> list[str]:
    """Names in a folder; none where there is no folder, or no longer."""
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


class ObjectStore:
    """A prefix of a bucket."""

    def __init__(self, location: Location) -> None:
        self.shown = location.shown
        self._location = location
        self._root = f"{location.bucket}/{location.path}".rstrip("/")
        with self._errors("opened"):
            self._fs = _file_system(location)

    def sizes(self) -> dict[str, int]:
        with self._errors("listed"):
            everything = fs.FileSelector(self._root, allow_not_found=True, recursive=True)
            found = {
                info.path.removeprefix(f"{self._root}/"): info.size
                for info in self._fs.get_file_info(everything)
                if info.type == fs.FileType.File
            }
            # A bucket that does not exist lists as one that is empty.
            bucket = self._location.bucket
            if not found and self._fs.get_file_info(bucket).type == fs.FileType.NotFound:
                raise CacheNotFound(
                    f"{self.shown}: there is no bucket {bucket!r}; check the name, or create it"
                )
        return found

    def read(self, name: str) -> Iterator[bytes]:
        key = f"{self._root}/{name}"
        with self._errors("read", name), self._fs.open_input_stream(key, compression=None) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def write(self, name: str, chunks: Iterator[bytes]) -> None:
        key = f"{self._root}/{name}"
        first = next(chunks, b"")  # a wrong file of one chunk is found before anything is sent
        with self._errors("written", name):
            stream = self._fs.open_output_stream(key, compression=None)
            try:
                stream.write(first)
                for chunk in chunks:
                    stream.write(chunk)
                stream.close()
            except BaseException:
                # Arrow cannot abandon an upload (apache/arrow#40502): closing it, as the collector would, makes
                # an object of what was sent. It has another size than it should, so that nobody takes it for whole.
                with contextlib.suppress(Exception):
                    stream.close()
                with contextlib.suppress(Exception):
                    self._fs.delete_file(key)
                raise

    def publish(self, snapshot_id: str, manifest: bytes) -> None:
        self.write(f"snapshots/{snapshot_id}/manifest.json", iter([manifest]))

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str = "") -> Iterator[None]:
        """Turn what Arrow raises into one line that says what to do, without secrets."""
        try:
            yield
        except LiftError:
            raise
        except (OSError, pa.ArrowException) as error:
            where = f"{self.shown}/{name}" if name else self.shown
            raise _explained(where, verb, error, self._location) from None


@dataclass(frozen=True)
class Location:
    """What a URI says. `path` is the prefix in the bucket, or the directory of a `file` location."""

    scheme: str
    bucket: str
    path: str
    snapshot: str | None
    options: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        return (
            self.path if self.scheme == "file" else f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")
        )


OPTIONS = {
    "s3": ("region", "scheme", "endpoint_override", "anonymous"),
    "gs": ("scheme", "endpoint_override", "anonymous", "project_id"),
}

_SNAPSHOT = re.compile(r"@(\d+(?:-[0-9a-f]*)?)$")


def redact(text: str) -> str:
    """A URI as it was typed, without what may be a password."""
    return re.sub(r"(\w+://)\S*:\S*@", r"\1***@", text)


def parse_location(text: str) -> Location:
    """`s3://bucket/prefix?options`, `gs://…`, `file:///path` or a path; each with `@SNAPSHOT` at its end.

    Raises:
        BadConfig: another scheme, no bucket, or an unknown option.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        snapshot = None if Path(text).exists() else _SNAPSHOT.search(text)
        path = text[: snapshot.start()] if snapshot else text
        return Location("file", "", path, snapshot[1] if snapshot else None)
    scheme = {"gcs": "gs"}.get(scheme, scheme)
    base, question, query = text.partition("?")
    snapshot = _SNAPSHOT.search(base) or _SNAPSHOT.search(query)
    base, query = (_SNAPSHOT.sub("", part) for part in (base, query))
    try:
        parts = urlsplit(base)
    except ValueError as error:
        raise BadConfig(f"{redact(text)} is not a URI ({error})") from None
    secrets, _, bucket = parts.netloc.rpartition("@")
    user, _, password = secrets.partition(":")
    name = snapshot[1] if snapshot else None
    if scheme == "file":
        if bucket or question:
            raise BadConfig(f"{redact(text)}: a file URI is file:///path, without host and options")
        return Location("file", "", unquote(parts.path), name)
    if scheme not in OPTIONS:
        raise BadConfig(f"{redact(text)}: no such kind of store; use s3://, gs://, file:// or a path")
    if not bucket or ":" in bucket:
        raise BadConfig(
            f"{redact(text)} names no bucket; write {scheme}://bucket/prefix, a server of your own as "
            "?endpoint_override=host:port, and in a user name or password %2F for a slash and %40 for an @"
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(options.keys() - OPTIONS[scheme]):
        raise BadConfig(
            f"{redact(text)}: unknown option {unknown[0]!r}; {scheme}:// takes {', '.join(OPTIONS[scheme])}"
        )
    return Location(
        scheme,
        bucket,
        unquote(parts.path).strip("/"),
        name,
        options,
        unquote(user) or None,
        unquote(password) or None,
    )


def open_store(location: Location) -> Directory | ObjectStore:
    """Raises BadConfig, ServerUnavailable."""
    return Directory(Path(location.path)) if location.scheme == "file" else ObjectStore(location)


def _file_system(location: Location) -> fs.FileSystem:
    options = dict(location.options)
    anonymous = options.pop("anonymous", "false").lower() in ("true", "1", "")
    endpoint = options.pop("endpoint_override", None)
    scheme = options.pop("scheme", "https")
    if endpoint and "://" in endpoint:
        scheme, _, endpoint = endpoint.rstrip("/").partition("://")
    if location.scheme == "gs":
        return fs.GcsFileSystem(
            anonymous=anonymous,
            endpoint_override=endpoint,
            scheme=scheme,
            project_id=options.get("project_id"),
            retry_time_limit=timedelta(seconds=STALLED_SECONDS),
        )
    set_region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    elsewhere = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        access_key=location.user,
        secret_key=location.password,
        anonymous=anonymous,
        region=set_region or ("us-east-1" if elsewhere else fs.resolve_s3_region(location.bucket)),
        endpoint_override=endpoint,
        scheme=scheme,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=STALLED_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        background_writes=False,  # in the background, a fast disk would fill the memory before a slow network
        allow_delayed_open=True,  # small files are one request then
    )


def _explained(where: str, verb: str, error: Exception, location: Location) -> LiftError:
    said = str(error).splitlines()[0][:MOST_SAID] if str(error) else type(error).__name__
    for secret in (location.user, location.password):
        if secret:
            said = said.replace(secret, "***")
    if isinstance(error, FileNotFoundError):
        return CacheNotFound(f"{where} is not there")
    kinds = said.upper().replace("_", "").replace(" ", "")
    if "NOSUCHBUCKET" in kinds:
        return CacheNotFound(f"{where}: there is no bucket {location.bucket!r}; check the name, or create it")
    denied = (
        "ACCESSDENIED HTTPSTATUS403 INVALIDACCESSKEY SIGNATUREDOESNOTMATCH PERMISSIONDENIED UNAUTHENTICATED"
    )
    if any(word in kinds for word in (*denied.split(), "MISSINGAUTHENTICATION", "INVALIDCLIENTTOKEN")):
        which = (
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE"
            if location.scheme == "s3"
            else "GOOGLE_APPLICATION_CREDENTIALS"
        )
        return BadConfig(f"{where} may not be {verb} with these credentials ({said}); set {which}")
    return ServerUnavailable(
        f"{where} cannot be {verb} ({said}); check the address and the network, and run the same command again: "
        "what has arrived is not sent again"
    )
