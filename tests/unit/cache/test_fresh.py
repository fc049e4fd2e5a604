"""Rows that are not sealed yet, read from where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_cache.encoding import Encoding
from lift_cache.errors import CacheDamaged
from lift_cache.fresh import FreshGroups
from lift_cache.segment import StoredRows, row_checksums

DIMENSIONS = 5


def rows_of(n: int, encoding: Encoding, seed: int = 0) -> StoredRows:
    drawn = np.random.default_rng(seed)
    keys = drawn.integers(0, 256, (n, 16), np.uint8)
    vectors = drawn.integers(-100, 100, (n, DIMENSIONS)).astype(encoding.numpy_dtype)
    return StoredRows(
        keys,
        vectors,
        drawn.integers(1, 90, n).astype(np.int32),
        drawn.random(n) < 0.5,
        row_checksums(keys, vectors),
        pa.array([f"caption {i}" for i in range(n)]),
    )


@given(
    st.integers(1, 70),
    st.sampled_from(["float32", "float16"]),
    st.lists(st.integers(0, 2**16), max_size=9),
)
def test_rows_taken_from_where_they_lie_are_those_of_the_whole_group(
    n: int, dtype: str, drawn: list[int]
) -> None:
    encoding = Encoding(dimensions=DIMENSIONS, dtype=dtype)  # type: ignore[arg-type]
    groups, given_rows = FreshGroups(Path("live"), encoding), rows_of(n, encoding, n)
    value = memoryview(groups.encode(given_rows))
    whole = groups.verified(value, 1)
    rows = np.array(drawn, np.int64) % n
    for _ in range(2):  # the second time the places are known
        some, expected = groups.take(value, 1, rows), whole.take(rows)
        for column in ("keys", "vectors", "tokens", "truncated", "checksums"):
            got, asked = getattr(some, column), getattr(expected, column)
            assert got.dtype == asked.dtype and np.array_equal(got, asked), column
        assert some.captions is None


def test_another_group_under_a_known_number_is_read_as_it_is_and_never_as_the_one_before() -> None:
    encoding = Encoding(dimensions=DIMENSIONS)
    groups = FreshGroups(Path("live"), encoding)
    for n in (3, 40):
        rows = rows_of(n, encoding, n)
        taken = groups.take(memoryview(groups.encode(rows)), 1, np.array([n - 1]))
        assert np.array_equal(taken.keys, rows.keys[-1:])


def test_a_row_that_a_group_lacks_and_a_torn_group_are_damage() -> None:
    encoding = Encoding(dimensions=DIMENSIONS)
    groups = FreshGroups(Path("live"), encoding)
    value = groups.encode(rows_of(4, encoding))
    with pytest.raises(CacheDamaged, match="batch 1 lacks rows"):
        groups.take(memoryview(value), 1, np.array([4]))
    with pytest.raises(CacheDamaged, match="batch 2 cannot be read"):
        groups.take(memoryview(value[: len(value) // 2]), 2, np.array([0]))
    flipped = bytearray(value)
    flipped[-1] ^= 1
    with pytest.raises(CacheDamaged, match="batch 1 fails its checksum"):
        groups.verified(memoryview(flipped), 1)
