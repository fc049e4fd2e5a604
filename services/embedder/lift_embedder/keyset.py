"""A set of caption keys in 16 to 43 bytes each and never more than it may take; Python's own takes a hundred."""

from __future__ import annotations

import numpy as np

from lift_cache.keys import KEY_BYTES, first_of_each, halves

PARTS = 16
"""Tables, by the first bits of a key: they grow one at a time, so that growing takes little memory besides."""

FIRST_SLOTS = 1 << 10
GROW_AT, FULL_AT = 0.75, 0.9
"""Shares of its slots in use at which a table doubles, and beyond which one that may not double takes no more."""

MOVED = 1 << 16
"""Keys that are moved together when a table doubles."""


class KeySet:
    """Keys that were seen: as many as fit into a bound, from then on the first that came."""

    def __init__(self, most_bytes: int) -> None:
        """
        Args:
            most_bytes: what the keys may take in memory, at any moment.
        """
        self._most_bytes = most_bytes
        self._tables = [_Table(FIRST_SLOTS) for _ in range(PARTS)]
        self._zero = False
        self.full = False
        """Whether keys were left out: what `add` calls new may then have been there before."""

    def __len__(self) -> int:
        return self._zero + sum(table.count for table in self._tables)

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add keys (uint8 [n, 16]); of equal ones the first counts. Returns which were new: bool [n]."""
        new = np.zeros(len(keys), bool)
        first = first_of_each(keys)
        high, low = halves(keys[first])
        if len(first) and not high[0] and not low[0]:  # an empty slot of the tables is a key of zeros
            new[first[0]], self._zero = not self._zero, True
            first, high, low = first[1:], high[1:], low[1:]
        bounds = (high >> np.uint64(60)).searchsorted(np.arange(PARTS + 1, dtype=np.uint64))
        for part in np.flatnonzero(np.diff(bounds)).tolist():
            here = slice(bounds[part], bounds[part + 1])
            new[first[here]] = self._add_to(part, high[here], low[here])
        return new

    def _add_to(self, part: int, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        table = self._tables[part]
        while table.count + len(high) > GROW_AT * table.slots and self._may_take(2 * table.slots):
            table = self._tables[part] = table.doubled()
        if table.count + len(high) <= FULL_AT * table.slots:
            return table.visit(high, low, insert=True)
        new = table.visit(high, low, insert=False)
        self.full |= bool(new.any())
        return new

    def _may_take(self, slots: int) -> bool:
        return sum(table.slots for table in self._tables) + slots <= self._most_bytes // KEY_BYTES


class _Table:
    """Open addressing with a step of its own for each key. Keys are hashes already."""

    def __init__(self, slots: int) -> None:
        self.slots, self.count = slots, 0
        self._high, self._low = np.zeros(slots, np.uint64), np.zeros(slots, np.uint64)

    def visit(self, high: np.ndarray, low: np.ndarray, *, insert: bool) -> np.ndarray:
        """Look for distinct keys (uint64 [n] twice) and insert those that are not there: bool [n], which these were."""
        new = np.zeros(len(high), bool)
        mask = np.uint64(self.slots - 1)
        slot, step = low & mask, high >> np.uint64(20) | np.uint64(1)
        todo = np.arange(len(high))
        while len(todo):
            at = slot[todo]
            found_high, found_low = self._high[at], self._low[at]
            free = (found_high | found_low) == 0
            if insert and free.any():
                # Of several keys that take one slot the last stays; the others find it taken and go on.
                self._high[at[free]], self._low[at[free]] = high[todo[free]], low[todo[free]]
                won = free & (self._high[at] == high[todo]) & (self._low[at] == low[todo])
                self.count += int(won.sum())
            else:
                won = free
            new[todo[won]] = True
            there = (found_high == high[todo]) & (found_low == low[todo])
            todo = todo[~(there | won)]
            slot[todo] = (slot[todo] + step[todo]) & mask
        return new

    def doubled(self) -> _Table:
        larger = _Table(2 * self.slots)
        for start in range(0, self.slots, MOVED):
            high, low = self._high[start : start + MOVED], self._low[start : start + MOVED]
            used = (high | low) != 0
            larger.visit(high[used], low[used], insert=True)
        return larger
