"""Rows that lie in several files, mapped into one array.

A snapshot has many segments, and a gather that visits them one by one pays for every one of them. Here the
files are mapped side by side into one reserved range of addresses, each placed so that its first row falls on
a multiple of the row size: the whole snapshot is one matrix with gaps, and a gather is one `take`, however
many segments there are.

That needs rows whose place in their file is aligned (`alignment`), which segments of format 2 have.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lift_cache.errors import CacheDamaged

PLACEMENT = 1 << 21
"""Addresses and offsets in a file agree modulo this, a multiple of every page size in use: the size of a huge page,
so that the kernel can map those parts of a file that it holds in huge pages as such."""

_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap module has no name for it
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class Extent:
    """Where consecutive rows lie: a file, the byte of its first row, how many rows."""

    path: Path
    offset: int
    rows: int


def alignment(row_bytes: int) -> int:
    """Bytes to which the first row must be aligned in its file, so that it can be placed anywhere."""
    power_of_two = row_bytes & -row_bytes
    return min(max(power_of_two, 64), PLACEMENT)


class FlatMap:
    """Read-only rows of several files under one numbering.

    Attributes:
        first: int64 [extents], the number of each extent's first row.
    """

    def __init__(self, extents: Sequence[Extent], row_bytes: int, *, random: bool) -> None:
        """Map them.

        Args:
            random: tell the kernel not to read ahead: rows are asked for in no order.

        Raises:
            Unplaceable: an extent whose rows are not aligned.
            CacheDamaged: a file that is missing or too short.
        """
        page = PLACEMENT
        unit = math.lcm(page, row_bytes)
        spans, shifts = [], []
        for extent in extents:
            lead = extent.offset % page
            shift = _shift(lead, page, row_bytes)
            if shift is None:
                raise Unplaceable(str(extent.path))
            shifts.append(shift)
            spans.append(-(-(shift + lead + extent.rows * row_bytes) // unit) * unit)
        size = sum(spans) + unit
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        base = _map(None, size, 0, flags, -1, 0)
        # Not at the end of the process: a thread that still gathers would be reading unmapped memory.
        weakref.finalize(self, _libc.munmap, base, size).atexit = False
        start = -(-base // unit) * unit
        first = []
        at = start
        for extent, shift, span in zip(extents, shifts, spans, strict=True):
            lead = extent.offset % page
            if extent.rows:
                _map_file(extent, at + shift, lead, extent.rows * row_bytes, random)
            first.append((at + shift + lead - start) // row_bytes)
            at += span
        self.first = np.array(first, np.int64)
        whole = (ctypes.c_char * max(at - start, 1)).from_address(start)
        self._rows = np.ctypeslib.as_array(whole).view(np.uint8)[: at - start].reshape(-1, row_bytes)

    def take(self, numbers: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        """Copy rows out: [n, row_bytes / itemsize]. Numbers must lie within extents: the gaps cannot be read."""
        return self._rows.view(dtype).take(numbers, axis=0)


class Unplaceable(Exception):
    """Rows that are not aligned as `alignment` says: files of an older format."""


def _shift(lead: int, page: int, row_bytes: int) -> int | None:
    """Bytes, whole pages, by which to move a file so that a row `lead` bytes into a page begins a row slot."""
    step = math.gcd(page, row_bytes)
    if lead % step:
        return None
    return -(lead // step) * pow(page // step, -1, row_bytes // step) % (row_bytes // step) * page


def _map_file(extent: Extent, address: int, lead: int, size: int, random: bool) -> None:
    try:
        fd = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CacheDamaged(f"{extent.path} is missing; restore it from a copy of the cache") from None
    try:
        if os.fstat(fd).st_size < extent.offset + size:  # reading beyond the end would kill the process
            raise CacheDamaged(f"{extent.path} is cut short; restore it from a copy of the cache")
        placed = _map(
            address, lead + size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, fd, extent.offset - lead
        )
        if random:
            _libc.madvise(placed, lead + size, mmap.MADV_RANDOM)
    finally:
        os.close(fd)


def _map(address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    placed = _libc.mmap(address, size, protection, flags, fd, offset)
    if placed is None or placed == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {size} bytes: {os.strerror(number)}")
    return int(placed)
