"""Writing files so that a name never stands for half of a file, and is there after a power loss.

The order is always: write under a temporary name in the same directory, fsync the file, rename, fsync the
directory. Files take the umask's mode and the directory's group, so that another account in that group (a
trainer's container) can read them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from lift_cache.errors import BadConfig, CacheFull, UnsafeFileSystem

TEMPORARY = ".tmp-"
"""Prefix of names that a crash may leave behind and that opening a cache deletes."""

CREATED_FIRST = frozenset({"writer.lock", "encoding.json", "lost+found"})
"""What may be in a directory that is not a cache yet: creating one writes `recipe.json` last of these files."""

NETWORK_FILE_SYSTEMS = frozenset(
    "9p afs beegfs ceph cifs coda fuse.ceph fuse.gcsfuse fuse.glusterfs fuse.goofys fuse.juicefs fuse.rclone "
    "fuse.s3fs fuse.sshfs glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 smb3 smbfs".split()
)

OUT_OF_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def sync_directory(path: Path) -> None:
    """Make renames and removals inside a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably; one that exists is left as it is."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        share_with_group(path)
        sync_directory(path.parent)


def temporary_name(final: Path) -> Path:
    """A fresh name beside `final` that `remove_temporaries` recognises."""
    return final.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{final.name}")


def share_with_group(path: Path) -> None:
    """Give a file its directory's group; where that cannot be done it keeps the writer's."""
    with contextlib.suppress(OSError):
        os.chown(path, -1, path.parent.stat().st_gid)


def publish(temporary: Path, final: Path) -> None:
    """Turn a finished temporary file into the final one, durably."""
    sync_file(temporary)
    rename(temporary, final)


def rename(temporary: Path, final: Path) -> None:
    """As `publish`, for a file that is durable already."""
    if temporary.stat().st_nlink == 1:  # a link has its group from where it was made
        share_with_group(temporary)
    temporary.replace(final)
    sync_directory(final.parent)


def no_room(path: Path) -> CacheFull:
    """The error for a full disk under `path`."""
    return CacheFull(
        f"no space left under {path}; free some room and run the same command again: "
        "nothing that was acknowledged is lost"
    )


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of an existing path."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


def require_room(path: Path, need: int, what: str) -> None:
    """Compare the free space under an existing path with what a long piece of work is going to write.

    Args:
        need: bytes, as estimated.
        what: the work, for the message ("a snapshot").

    Raises:
        CacheFull: begun, it could not be finished.
    """
    free = free_bytes(path)
    if free < need:
        raise CacheFull(
            f"no space left for {what}: it needs about {need / 1e6:,.1f} MB under {path} and "
            f"{free / 1e6:,.1f} MB are free; free some room first: nothing that was acknowledged is lost"
        )


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn "no space left" anywhere inside into CacheFull."""
    try:
        yield
    except OSError as error:
        if error.errno in OUT_OF_ROOM:
            raise no_room(path) from error
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file durably. Raises CacheFull, OSError; leaves nothing behind on failure."""
    temporary = temporary_name(path)
    with room_for(path.parent):
        try:
            temporary.write_bytes(data)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, final: Path) -> None:
    """Give a file that never changes a second, durable name; copied where links are not to be had."""
    temporary = temporary_name(final)
    with room_for(final.parent):
        try:
            try:
                os.link(source, temporary)
            except OSError as error:
                if error.errno not in (
                    errno.EXDEV,
                    errno.EPERM,
                    errno.EMLINK,
                    errno.EOPNOTSUPP,
                    errno.EACCES,
                ):
                    raise
                with source.open("rb") as reader, temporary.open("wb") as writer:
                    while piece := reader.read(1 << 22):
                        writer.write(piece)
            publish(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)


def digest_file(path: Path) -> str:
    """BLAKE2b-128 of a file's bytes, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def refuse_other_content(path: Path) -> None:
    """A new cache may begin in a directory that is empty, or that holds what an earlier beginning left.

    Raises:
        BadConfig: something else is there.
    """
    for found in path.iterdir() if path.is_dir() else ():
        if found.name not in CREATED_FIRST and not found.name.startswith(TEMPORARY):
            raise BadConfig(
                f"{path} holds {found.name} already; choose an empty or new directory for a cache"
            )


def put_aside(cache: Path, path: Path) -> None:
    """Move a file or directory of a cache to its quarantine/, durably, under a name that is free."""
    where = cache / "quarantine"
    make_directory(where)
    target, number = where / path.name, 0
    while target.exists():
        number += 1
        target = where / f"{path.name}.{number}"
    path.rename(target)
    sync_directory(where)
    sync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Delete what a crash left under a temporary name. Only the writer may call this."""
    for path in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def file_system_of(path: Path) -> str:
    """Type of the file system that holds an existing path ("ext4"), or "" where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    device = path.stat().st_dev
    want = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == want:
            return rest.split()[0]
    return ""


def refuse_network_file_system(path: Path) -> None:
    """Raises UnsafeFileSystem where memory-mapped writes and locks are not dependable."""
    kind = file_system_of(path)
    if kind in NETWORK_FILE_SYSTEMS:
        raise UnsafeFileSystem(
            f"{path} is on {kind}, a network file system, where the writer cannot promise durability; "
            "put the cache on a local disk (readers may use a copy anywhere)"
        )
