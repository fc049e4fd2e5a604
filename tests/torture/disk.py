"""A model of what a file system may leave after a power loss.

POSIX promises only what was fsynced: of a file its bytes, of a directory its names. Everything since the last
fsync may have reached the disk or not: of a file any of its 512-byte sectors, each as it was at any moment;
of a directory any of the changes to its names, where changes to the same name keep their order. A write
through O_DSYNC is on the disk when it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from shim import Op, Record

SECTOR = 512

Tree = dict[str, bytes | None]
"""Path → content of a file, None for a directory."""


@dataclass
class Change:
    """Bytes written at an offset, or (data None) a new size."""

    offset: int
    data: bytes | None
    durable: bool = False
    doomed: bool = False
    """An fsync failed after it: the system may have thrown it away, whatever later fsyncs say."""

    def sectors(self) -> range:
        return range(self.offset // SECTOR, -(-(self.offset + len(self.data or b"")) // SECTOR))

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.offset :]
            content.extend(bytes(self.offset - len(content)))
        else:
            content.extend(bytes(max(0, self.offset - len(content))))
            content[self.offset : self.offset + len(self.data)] = self.data


@dataclass
class File:
    durable: bytearray = field(default_factory=bytearray)
    current: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        change.apply(self.current)
        self.pending.append(change)

    def sync(self) -> None:
        """Everything is on the disk, but for sectors that a failed fsync gave up and nobody wrote again."""
        lost = {s for change in self.pending if change.doomed for s in change.sectors()}
        lost -= {s for change in self.pending if not change.doomed for s in change.sectors()}
        before, self.durable = self.durable, bytearray(self.current)
        self.pending = []
        for start in (SECTOR * sector for sector in sorted(lost)):
            self.pending.append(Change(start, bytes(self.current[start : start + SECTOR]), doomed=True))
            there = len(self.current[start : start + SECTOR])
            self.durable[start : start + there] = before[start : start + there].ljust(there, b"\0")

    def after_power_loss(self, policy: str, chance: Random) -> bytes:
        """The file as the disk may have it.

        Args:
            policy: of the bytes since the last fsync, `none` · `all` · `some` writes · `torn`: some sectors ·
                `zeros`: none, but the new size.
        """
        if policy == "all" or not self.pending:
            return bytes(self.current)
        memory, disk = bytearray(self.durable), bytearray(self.durable)
        for change in self.pending:
            change.apply(memory)
            kept = change.durable or (policy in ("some", "torn") and chance.random() < 0.5)
            if change.data is None:
                if kept:
                    change.apply(disk)
                continue
            for sector in change.sectors():
                if policy == "torn" and not change.durable:
                    kept = chance.random() < 0.5
                if kept:
                    start = sector * SECTOR
                    Change(start, bytes(memory[start : start + SECTOR])).apply(disk)
        if policy == "zeros":
            disk.extend(bytes(max(0, len(memory) - len(disk))))
        return bytes(disk)


@dataclass
class Naming:
    """One change to the names of a directory: names that vanish, names that appear."""

    gone: tuple[str, ...] = ()
    come: tuple[tuple[str, Node], ...] = ()

    @property
    def names(self) -> set[str]:
        return {*self.gone, *(name for name, _ in self.come)}

    def apply(self, names: dict[str, Node]) -> None:
        for name in self.gone:
            names.pop(name, None)
        names.update(self.come)


@dataclass
class Directory:
    durable: dict[str, Node] = field(default_factory=dict)
    current: dict[str, Node] = field(default_factory=dict)
    pending: list[Naming] = field(default_factory=list)

    def change(self, naming: Naming) -> None:
        naming.apply(self.current)
        self.pending.append(naming)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.current), []

    def after_power_loss(self, policy: str, chance: Random) -> dict[str, Node]:
        """The names as the disk may have them; policy: `none` · `all` · `some` changes."""
        if policy == "all":
            return self.current
        names, dropped = dict(self.durable), set[str]()
        for naming in self.pending if policy == "some" else ():
            if naming.names & dropped or chance.random() < 0.5:
                dropped |= naming.names
            else:
                naming.apply(names)
        return names


Node = File | Directory


class Disk:
    """Replays a trace; `after_power_loss` says what may be left at the point that was reached."""

    def __init__(self) -> None:
        self._root = Directory()
        self._nodes: dict[int, Node] = {}

    def apply(self, record: Record) -> None:
        op = record.op
        if op in (Op.CREATE, Op.MKDIR):
            node: Node = File() if op == Op.CREATE else Directory()
            self._nodes[record.inode] = node
            directory, name = self._find(record.path)
            directory.change(Naming(come=((name, node),)))
        elif op in (Op.WRITE, Op.WRITE_SYNC, Op.TRUNCATE):
            data = None if op == Op.TRUNCATE else record.data
            self._file(record.inode).change(Change(record.offset, data, op == Op.WRITE_SYNC))
        elif op in (Op.SYNC, Op.FAILED_SYNC):
            node = self._root if record.path == "." else self._nodes[record.inode]
            if op == Op.SYNC:
                node.sync()
            elif isinstance(node, File):
                for change in node.pending:
                    change.doomed = not change.durable
        elif op in (Op.UNLINK, Op.RMDIR):
            directory, name = self._find(record.path)
            directory.change(Naming(gone=(name,)))
        elif op in (Op.RENAME, Op.LINK):
            (source, old), (target, new) = self._find(record.path), self._find(record.target)
            come = ((new, source.current[old]),)
            gone = (old,) if op == Op.RENAME else ()
            if source is target:
                source.change(Naming(gone, come))
            else:
                target.change(Naming(come=come))
                if gone:
                    source.change(Naming(gone=gone))

    def _file(self, inode: int) -> File:
        node = self._nodes[inode]
        assert isinstance(node, File)
        return node

    def _find(self, path: str) -> tuple[Directory, str]:
        *parents, name = path.split("/")
        directory = self._root
        for parent in parents:
            node = directory.current[parent]
            assert isinstance(node, Directory)
            directory = node
        return directory, name

    def after_power_loss(self, data: Callable[[], str], names: Callable[[], str], chance: Random) -> Tree:
        """One tree that the disk may hold now.

        Args:
            data, names: the policy for the next file, and for the next directory.
        """
        tree: Tree = {}

        def visit(directory: Directory, prefix: str) -> None:
            for name, node in directory.after_power_loss(names(), chance).items():
                path = f"{prefix}{name}"
                if isinstance(node, File):
                    tree[path] = node.after_power_loss(data(), chance)
                else:
                    tree[path] = None
                    visit(node, f"{path}/")

        visit(self._root, "")
        return tree
