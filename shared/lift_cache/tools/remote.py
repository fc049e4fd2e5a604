"""Copying a snapshot to a store and from one: `push` and `pull`.

Files are named by their content, so that what is there already is not sent again; every byte is hashed on its
way and compared with what the name or the manifest says; the manifest comes last, so that a snapshot exists
only where all that it names is there. Both ways can be killed at any moment and run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheDamaged, CacheNotFound, LiftError
from lift_cache.recipe import Recipe
from lift_cache.snapshot import Manifest, ManifestV1, digest_of_manifest, parse_manifest, snapshot_files
from lift_cache.tools.common import AsJson, say
from lift_cache.tools.stores import Directory, ObjectStore, Store, open_store, parse_location

TRANSFERS = 8
"""Files under way at the same time."""

MOST_MANIFEST_BYTES = 64 << 20
"""A manifest is read into memory; what is longer is none."""

_SNAPSHOT_ID = re.compile(r"snapshots/((\d{6,})-[0-9a-f]{16})/manifest\.json")
_FILE_NAME = re.compile(r"(segments|snapshots/\d+-[0-9a-f]+)/[0-9a-z][0-9a-z-]*(\.[0-9a-z-]+)+")


@dataclass(frozen=True)
class StoredFile:
    """A file that a snapshot names: its name in the cache, its bytes, their BLAKE2b-128."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Transfer:
    """What a push or pull did, or would do. Sizes are in bytes."""

    snapshot: str
    rows: int
    source: str
    target: str
    files: int
    bytes: int
    files_present: int
    bytes_present: int
    captions: bool
    newest: bool
    """The snapshot is the one that the target's readers get when they name none."""
    others: list[str]
    """Other snapshots of the source."""
    dry_run: bool


def files_of(snapshot_id: str, manifest: Manifest | ManifestV1, *, captions: bool = True) -> list[StoredFile]:
    """The files of a snapshot, the manifest itself apart; captions first, so that no segment is without its own.

    Raises:
        CacheDamaged: a name that could lead out of the cache.
    """
    found = []
    if captions:
        found += [
            StoredFile(f"segments/{info.id}.captions.arrow", info.captions_size, info.captions_digest)
            for info in manifest.segments
            if info.captions_size
        ]
    found += [StoredFile(f"segments/{info.id}.arrow", info.size, info.id) for info in manifest.segments]
    found += [
        StoredFile(f"snapshots/{snapshot_id}/{name}", info.size, info.digest)
        for name, info in snapshot_files(manifest).items()
    ]
    for file in found:
        if not _FILE_NAME.fullmatch(file.name):
            raise CacheDamaged(f"snapshot {snapshot_id} names {file.name!r}, which is no file of a cache")
    return found


def push_snapshot(
    cache: str, uri: str, *, captions: bool = True, dry_run: bool = False, watch: Watch | None = None
) -> Transfer:
    """Copy a snapshot of a cache (`PATH` or `PATH@ID`) to a store.

    Raises:
        CacheNotFound: no cache, no snapshot, no bucket.
        CacheDamaged: a file of the cache is missing or has other bytes than were written; it is not sent.
        RecipeMismatch, EncodingMismatch: the store holds a cache that was made otherwise.
        BadConfig: a URI that cannot be used, or no right to write there.
        ServerUnavailable: the store does not answer, or not as it should.
        CacheLocked, CacheFull: the store is a directory, with a writer or without room.
    """
    source = parse_location(cache)
    if source.scheme != "file":
        raise BadConfig(f"{source.shown} is not a directory; push a cache on this machine (pull it first)")
    target = parse_location(uri)
    if target.snapshot is not None:
        raise BadConfig(f"name the snapshot after the cache: {source.shown}@{target.snapshot}")
    return _copy(
        open_store(source), source.snapshot, open_store(target), captions, dry_run, watch or _unwatched
    )


def pull_snapshot(
    uri: str, cache: Path, *, captions: bool = True, dry_run: bool = False, watch: Watch | None = None
) -> Transfer:
    """Copy a snapshot of a store (`URI` or `URI@ID`) into a cache, a new one or one made in the same way.

    Raises:
        As `push_snapshot`; CacheDamaged: what arrived is not what the snapshot names, and is not kept.
    """
    source = parse_location(uri)
    return _copy(
        open_store(source), source.snapshot, Directory(cache), captions, dry_run, watch or _unwatched
    )


Watch = Callable[[int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""Given the bytes to come, opens what is then called with the bytes just done."""


@contextlib.contextmanager
def _unwatched(total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def _copy(
    source: Directory | ObjectStore,
    wanted: str | None,
    target: Directory | ObjectStore,
    captions: bool,
    dry_run: bool,
    watch: Watch,
) -> Transfer:
    there = source.sizes()
    snapshot_id = _choose(source, there, wanted)
    manifest_bytes, manifest = _read_manifest(source, snapshot_id)
    wanted_files = files_of(snapshot_id, manifest, captions=captions)
    if isinstance(target, Directory):
        target.require_cache_or_empty()
    right = (
        target.as_target(snapshot_id)
        if isinstance(target, Directory) and not dry_run
        else contextlib.nullcontext()
    )
    with right:
        here = target.sizes()
        _require_same(source, manifest, target, here)
        missing = [file for file in wanted_files if here.get(file.name) != file.size]
        _require_there(source, there, missing)
        manifest_name = f"snapshots/{snapshot_id}/manifest.json"
        snapshots = {snapshot_id, *_snapshots(here)}
        total = sum(file.size for file in missing)
        result = Transfer(
            snapshot=snapshot_id,
            rows=manifest.rows,
            source=source.shown,
            target=target.shown,
            files=len(missing),
            bytes=total,
            files_present=len(wanted_files) - len(missing),
            bytes_present=sum(file.size for file in wanted_files) - total,
            captions=captions,
            newest=max(snapshots, key=_order) == snapshot_id,
            others=sorted(_snapshots(there).keys() - {snapshot_id}, key=_order),
            dry_run=dry_run,
        )
        if dry_run:
            return result
        if isinstance(target, Directory):
            files.require_room(target.path, total, f"snapshot {snapshot_id}")
        _write_card(source, there, manifest, target, here)
        if missing:
            with watch(total) as done:  # captions first, so that no segment is ever without its own
                for captions_turn in (True, False):
                    files_now = [f for f in missing if f.name.endswith(".captions.arrow") == captions_turn]
                    _send(files_now, source, target, done)
        if isinstance(target, ObjectStore):
            _require_there(target, target.sizes(), wanted_files)
        if here.get(manifest_name) != len(manifest_bytes):
            target.publish(snapshot_id, manifest_bytes)
    return result


# What a store holds


def _snapshots(sizes: dict[str, int]) -> dict[str, int]:
    """Snapshots by id, with their sequence number."""
    found = (_SNAPSHOT_ID.fullmatch(name) for name in sizes)
    return {match[1]: int(match[2]) for match in found if match}


def _order(snapshot_id: str) -> tuple[int, str]:
    return int(snapshot_id.partition("-")[0]), snapshot_id


def _choose(store: Store, sizes: dict[str, int], wanted: str | None) -> str:
    have = _snapshots(sizes)
    names = sorted(have, key=_order)
    if not names:
        hint = f"; make one with `lift-cache snapshot {store.shown}`" if isinstance(store, Directory) else ""
        if "recipe.json" not in sizes:
            raise CacheNotFound(f"{store.shown} is not a cache (no recipe.json); check the path")
        raise CacheNotFound(f"{store.shown} has no snapshot{hint}")
    if wanted is None:
        return names[-1]
    matching = [name for name in names if name.startswith(wanted) or str(have[name]) == wanted]
    if len(matching) != 1:
        raise CacheNotFound(
            f"{store.shown} has no single snapshot {wanted!r}; it has {', '.join(names[-5:])}"
        )
    return matching[0]


def _read_manifest(store: Store, snapshot_id: str) -> tuple[bytes, Manifest | ManifestV1]:
    """The manifest, proven by the digest in its snapshot's name. Raises CacheDamaged, UnsupportedFormat."""
    name = f"snapshots/{snapshot_id}/manifest.json"
    data, where = _small(store, name), f"{store.shown}/{name}"
    manifest = parse_manifest(data, where)
    if digest_of_manifest(data) != snapshot_id.partition("-")[2]:
        raise CacheDamaged(f"{where}: its bytes are not those its name stands for; push the snapshot again")
    return data, manifest


def _small(store: Store, name: str) -> bytes:
    data = bytearray()
    for chunk in store.read(name):
        data += chunk
        if len(data) > MOST_MANIFEST_BYTES:
            raise CacheDamaged(f"{store.shown}/{name} is too long to be what it should")
    return bytes(data)


def _require_same(
    source: Store, manifest: Manifest | ManifestV1, target: Store, here: dict[str, int]
) -> None:
    """Raises RecipeMismatch, EncodingMismatch where the target is another cache."""
    if "recipe.json" not in here:
        return
    recipe = Recipe.parse(_small(target, "recipe.json"), where=f"{target.shown}/recipe.json")
    encoding = _encoding(target)
    recipe.require_same(manifest.recipe, here=target.shown, there=source.shown)
    encoding.require_same(manifest.encoding, here=target.shown, there=source.shown)


def _encoding(store: Store) -> Encoding:
    with tempfile.TemporaryDirectory(prefix="lift-cache-") as temporary:
        path = Path(temporary, "encoding.json")
        path.write_bytes(_small(store, "encoding.json"))
        try:
            return Encoding.load(path)
        except LiftError as error:
            raise type(error)(str(error).replace(temporary, store.shown)) from None


def _require_there(store: Store, sizes: dict[str, int], wanted: Sequence[StoredFile]) -> None:
    absent = [file for file in wanted if sizes.get(file.name) != file.size]
    if not absent:
        return
    captions = [file for file in absent if file.name.endswith(".captions.arrow")]
    if len(captions) == len(absent):
        raise CacheNotFound(
            f"{store.shown} lacks the captions of {len(captions)} segments: it is a copy made without them; "
            "add --no-captions"
        )
    first = next(file for file in absent if file not in captions)
    found = sizes.get(first.name)
    state = "is missing" if found is None else f"has {found:,} bytes, not {first.size:,}"
    raise CacheDamaged(
        f"{store.shown}/{first.name} {state} ({len(absent)} such files); restore it, or push the snapshot again "
        "from a whole copy"
    )


def _write_card(
    source: Store, there: dict[str, int], manifest: Manifest | ManifestV1, target: Store, here: dict[str, int]
) -> None:
    """What makes a directory of segments a cache, and what its next writer should know."""
    with tempfile.TemporaryDirectory(prefix="lift-cache-") as temporary:
        card = Path(temporary)
        manifest.encoding.save(card / "encoding.json")
        manifest.recipe.save(card / "recipe.json")
        _write_provenance(manifest, target, here, card / "provenance.json")
        if "canaries.json" in there:
            _copy_canaries(source, manifest, card / "canaries.json")
        for name in ("encoding.json", "recipe.json", "canaries.json", "provenance.json"):
            if (card / name).exists() and (name not in here or name == "provenance.json"):
                target.write(name, iter([(card / name).read_bytes()]))


def _write_provenance(
    manifest: Manifest | ManifestV1, target: Store, here: dict[str, int], path: Path
) -> None:
    known: list[dict[str, Any]] = []
    if "provenance.json" in here:
        with contextlib.suppress(ValueError):
            known = list(json.loads(_small(target, "provenance.json")))
    added = [entry for entry in manifest.provenance if entry not in known]
    if added:
        path.write_bytes((json.dumps([*known, *added], indent=2) + "\n").encode())


def _copy_canaries(source: Store, manifest: Manifest | ManifestV1, path: Path) -> None:
    """Canaries are named by nothing, but they say to which recipe they belong; others are left out."""
    data = _small(source, "canaries.json")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if json.loads(data)["fingerprint"] == manifest.fingerprint:
            path.write_bytes(data)


# The way


class _Stopped(Exception):
    """Another file failed, or the user stopped; this one is not to go on."""


def _send(wanted: Sequence[StoredFile], source: Store, target: Store, done: Callable[[int], None]) -> None:
    """Copy files, several at a time. Raises the first error, after all have stopped."""
    stop = threading.Event()
    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="copy") as pool:
        sent = [pool.submit(target.write, file.name, _proven(file, source, stop, done)) for file in wanted]
        try:
            for future in as_completed(sent):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _proven(
    file: StoredFile, source: Store, stop: threading.Event, done: Callable[[int], None]
) -> Iterator[bytes]:
    """The chunks of a file; the last one comes only when all of them are what the snapshot names."""
    digest, size, held = hashlib.blake2b(digest_size=16), 0, b""
    for chunk in source.read(file.name):
        if stop.is_set():
            raise _Stopped
        if held:
            yield held
        digest.update(chunk)
        size += len(chunk)
        done(len(chunk))
        held = chunk
    if size != file.size or digest.hexdigest() != file.digest:
        raise CacheDamaged(
            f"{source.shown}/{file.name} does not hold the bytes that the snapshot names; it was not copied: "
            "restore it from a whole copy of the cache"
        )
    yield held


# Commands

Captions = Annotated[
    bool,
    Parameter(
        name="--captions",
        negative="--no-captions",
        help="Copy the caption texts too; training does not need them.",
    ),
]
DryRun = Annotated[bool, Parameter(negative="", help="Say what would be copied, and copy nothing.")]
Uri = Annotated[
    str,
    Parameter(
        help="s3://bucket/prefix, gs://bucket/prefix, file:///path or a path; for an S3 server of your own "
        "s3://bucket/prefix?endpoint_override=http://host:port. Credentials come from the environment."
    ),
]


def push(
    cache: Annotated[
        str, Parameter(help="The cache directory, or DIRECTORY@SNAPSHOT; the newest by default.")
    ],
    uri: Uri,
    *,
    captions: Captions = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Copy a snapshot to S3, Google Cloud Storage or a directory; only what is not there yet is sent.

    Every byte is checked on its way, and the snapshot appears there when all of it has arrived. Run the same
    command again after an interruption. An upload that was killed may leave parts that S3 bills and no listing
    shows: let a lifecycle rule of the bucket remove incomplete multipart uploads.

    Examples: `lift-cache push runs/cache s3://bucket/cache`, `lift-cache push runs/cache@3 /mnt/backup/cache`
    """
    result = push_snapshot(cache, uri, captions=captions, dry_run=dry_run, watch=_bar("pushing"))
    say(as_json, asdict(result), _text(result))


def pull(
    uri: Annotated[
        str, Parameter(help="What `push` was given, or that and @SNAPSHOT; the newest by default.")
    ],
    cache: Annotated[Path, Parameter(help="The cache directory: a new one, or one with the same recipe.")],
    *,
    captions: Captions = True,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Copy a snapshot from a store into a cache, proven byte by byte; only what is not there yet is fetched.

    The cache can be trained from at once, and be filled further. Run the same command again after an
    interruption.

    Examples: `lift-cache pull s3://bucket/cache data/cache`, `lift-cache pull s3://bucket/cache@3 data/cache
    --no-captions`
    """
    result = pull_snapshot(uri, cache, captions=captions, dry_run=dry_run, watch=_bar("pulling"))
    say(as_json, asdict(result), _text(result))


def _bar(what: str) -> Watch:
    @contextlib.contextmanager
    def watch(total: int) -> Iterator[Callable[[int], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.advance(task, done)

    return watch


def _text(result: Transfer) -> str:
    left_out = "" if result.captions else ", without captions"
    said = (
        f"snapshot {result.snapshot} ({result.rows:,} captions{left_out}), {result.source} → {result.target}: "
        f"{result.files:,} files, {result.bytes / 1e6:,.1f} MB "
        + ("to copy" if result.dry_run else "copied")
        + f"; {result.files_present:,} files, {result.bytes_present / 1e6:,.1f} MB were there"
    )
    if not result.newest:
        said += (
            f"; the newest snapshot there is another one: name this one as {result.target}@{result.snapshot}"
        )
    if result.dry_run and result.others:
        said += f"; the source also has {', '.join(result.others[-5:])}"
    return said
