"""A set of caption keys in about 16 bytes each; Python's own set takes six times that."""

from __future__ import annotations

import numpy as np

from lift_cache.keys import halves, sort_order

FRESH = 65_536
"""Keys kept in a Python set before they join the arrays."""


class KeySet:
    """Keys that were seen. Arrays of doubling size, each sorted, so that adding n keys costs n log n."""

    def __init__(self) -> None:
        self._fresh: set[bytes] = set()
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._fresh) + sum(len(high) for high, _ in self._sorted)

    def add(self, key: bytes) -> bool:
        """Add a key; False when it was there."""
        if key in self._fresh or self._in_arrays(key):
            return False
        self._fresh.add(key)
        if len(self._fresh) >= FRESH:
            self._settle()
        return True

    def _in_arrays(self, key: bytes) -> bool:
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        for highs, lows in self._sorted:
            first, last = highs.searchsorted(np.uint64(high)), highs.searchsorted(np.uint64(high), "right")
            if low in lows[first:last]:
                return True
        return False

    def _settle(self) -> None:
        keys = np.frombuffer(b"".join(self._fresh), np.uint8).reshape(-1, 16)
        self._fresh.clear()
        high, low = halves(keys)
        order = sort_order(keys)
        high, low = high[order], low[order]
        while self._sorted and len(self._sorted[-1][0]) <= len(high):
            older_high, older_low = self._sorted.pop()
            high, low = np.concatenate([older_high, high]), np.concatenate([older_low, low])
            order = np.lexsort((low, high))
            high, low = high[order], low[order]
        self._sorted.append((high, low))
