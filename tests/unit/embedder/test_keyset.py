"""A set of keys that is not Python's own must still be a set, and must stay within its bound."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_embedder import keyset
from lift_embedder.keyset import KeySet

pytestmark = pytest.mark.slow

# Few distinct halves, so that keys share their first or their last eight bytes.
KEYS = st.builds(bytes.__add__, *[st.sampled_from([bytes(8), b"\x00" * 7 + b"\x01", b"\xff" * 8])] * 2)


def as_array(keys: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


def drawn(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 16), np.uint8)


@given(st.lists(st.lists(KEYS)))
def test_it_answers_as_a_python_set_does(batches: list[list[bytes]]) -> None:
    theirs: set[bytes] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyset, "FIRST_SLOTS", 2)
        ours = KeySet(1 << 20)
        for batch in batches:
            new = []
            for key in batch:
                new.append(key not in theirs)
                theirs.add(key)
            assert ours.add(as_array(batch)).tolist() == new
            assert len(ours) == len(theirs) and not ours.full


def test_it_forgets_nothing_when_it_grows() -> None:
    seen, keys = KeySet(1 << 24), drawn(200_000)
    for start in range(0, len(keys), 1000):
        assert seen.add(keys[start : start + 1000]).all()
    assert not seen.add(keys).any()
    assert len(seen) == len(keys) and not seen.full


def test_at_its_bound_it_keeps_what_it_has_and_calls_everything_else_new() -> None:
    seen, keys = KeySet(1 << 20), drawn(100_000)
    for start in range(0, len(keys), 500):
        assert seen.add(keys[start : start + 500]).all()
    assert seen.full and len(seen) < len(keys)
    again = np.concatenate([seen.add(keys[start : start + 500]) for start in range(0, len(keys), 500)])
    assert not again[:25_000].any(), "1 MiB holds 25,000 keys of 16 bytes with room to spare"
    assert len(seen) > 50_000
    assert len(seen) - (~again).sum() in range(500), "hardly any is taken in after the bound was met"


def test_its_memory_stays_below_its_bound_while_it_grows() -> None:
    batches = [drawn(4096, seed) for seed in range(60)]
    tracemalloc.start()
    try:
        seen = KeySet(2 << 20)
        for batch in batches:
            seen.add(batch)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen.full and len(seen) > 100_000
    assert peak < (2 << 20) + (4 << 20), "the bound, and what one batch needs besides"
