"""The disk model leaves what a file system may leave, no less and no more."""

from __future__ import annotations

from random import Random

from disk import Disk, Tree
from shim import Op, Record


def disk_after(*records: Record) -> Disk:
    disk = Disk()
    for record in records:
        disk.apply(record)
    return disk


def create(path: str, inode: int) -> Record:
    return Record(Op.CREATE, inode, 0, 0, path, b"")


def write(inode: int, offset: int, data: bytes, *, durable: bool = False) -> Record:
    return Record(Op.WRITE_SYNC if durable else Op.WRITE, inode, offset, 0, "", data)


def sync(path: str, inode: int = 0, op: Op = Op.SYNC) -> Record:
    return Record(op, inode, 0, 0, path, b"")


def rename(path: str, target: str) -> Record:
    return Record(Op.RENAME, 0, 0, 0, path, target.encode())


def left(disk: Disk, data: str, names: str) -> Tree:
    return disk.after_power_loss(lambda: data, lambda: names, Random(0))


def all_left(disk: Disk) -> set[tuple[tuple[str, bytes | None], ...]]:
    chance = Random(0)
    trees = [
        disk.after_power_loss(
            lambda: chance.choice(("none", "all", "some", "torn")),
            lambda: chance.choice(("none", "all", "some")),
            chance,
        )
        for _ in range(500)
    ]
    return {tuple(sorted(tree.items())) for tree in trees}


def test_a_name_needs_the_directory_synced_and_bytes_need_the_file_synced() -> None:
    disk = disk_after(create("a", 1), write(1, 0, b"x"))
    assert left(disk, "none", "none") == {}
    assert left(disk, "none", "all") == {"a": b""}
    assert left(disk, "zeros", "all") == {"a": b"\0"}
    disk.apply(sync("a", 1))
    assert left(disk, "none", "all") == {"a": b"x"}
    disk.apply(sync("."))
    assert left(disk, "none", "none") == {"a": b"x"}


def test_a_rename_is_there_or_not_and_never_half() -> None:
    disk = disk_after(create("new", 1), write(1, 0, b"2"), sync("new", 1), create("old", 2), sync("."))
    disk.apply(rename("new", "old"))
    assert all_left(disk) == {(("new", b"2"), ("old", b"")), (("old", b"2"),)}


def test_a_second_change_to_a_name_is_not_there_without_the_first() -> None:
    disk = disk_after(create("a", 1), sync("a", 1), rename("a", "b"), rename("b", "c"))
    assert {tree for ((tree, _),) in filter(None, all_left(disk))} == {"a", "b", "c"}


def test_a_write_through_o_dsync_is_there_and_leaves_others_open() -> None:
    disk = disk_after(
        create("a", 1), sync("."), write(1, 0, b"1" * 1024), write(1, 512, b"2" * 512, durable=True)
    )
    assert left(disk, "none", "none") == {"a": bytes(512) + b"2" * 512}
    assert left(disk, "all", "none") == {"a": b"1" * 512 + b"2" * 512}


def test_a_torn_write_leaves_whole_sectors() -> None:
    disk = disk_after(
        create("a", 1), write(1, 0, bytes(1024)), sync("a", 1), sync("."), write(1, 0, b"1" * 1024)
    )
    old, new = bytes(512), b"1" * 512
    assert {tree[0][1] for tree in all_left(disk)} == {a + b for a in (old, new) for b in (old, new)}


def test_what_a_failed_fsync_gave_up_may_be_missing_for_good_unless_it_is_written_again() -> None:
    disk = disk_after(create("a", 1), sync("."), write(1, 0, b"1" * 1024), sync("a", 1, Op.FAILED_SYNC))
    disk.apply(write(1, 0, b"2" * 512))
    disk.apply(sync("a", 1))
    assert left(disk, "none", "none") == {"a": b"2" * 512 + bytes(512)}
    assert left(disk, "all", "none") == {"a": b"2" * 512 + b"1" * 512}
