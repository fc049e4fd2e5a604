"""A value that the stored dtype cannot hold is refused for its row and never stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lift_cache.encoding import Encoding
from lift_cache.errors import EncodingMismatch


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_good_rows_come_back_within_the_dtype(dtype: str, vectors: Callable[..., np.ndarray]) -> None:
    encoding = Encoding(dtype=dtype, dimensions=24)
    drawn = vectors(10)
    stored, bad = encoding.encode(drawn)
    assert stored.dtype == dtype
    assert not bad
    np.testing.assert_allclose(encoding.decode(stored), drawn, rtol=2**-10 if dtype == "float16" else 0)


def test_rows_that_cannot_be_held_are_named_with_the_reason(vectors: Callable[..., np.ndarray]) -> None:
    drawn = vectors(6)
    drawn[1, 3] = np.nan
    drawn[2, 0] = np.inf
    drawn[3, 5] = 70_000.0
    drawn[4] = 0.0
    _, bad = Encoding(dimensions=24).encode(drawn)
    assert sorted(bad) == [1, 2, 3, 4]
    assert "not finite" in bad[1]
    assert "not finite" in bad[2]
    assert "float16" in bad[3]
    assert "zero" in bad[4]
    _, bad = Encoding(dtype="float32", dimensions=24).encode(drawn)
    assert sorted(bad) == [1, 2, 4]


def test_a_vector_that_rounds_to_zero_is_refused() -> None:
    _, bad = Encoding(dimensions=4).encode(np.full((1, 4), 1e-9, np.float32))
    assert "zero" in bad[0]


def test_only_the_kept_dimensions_count(vectors: Callable[..., np.ndarray]) -> None:
    drawn = vectors(2)
    drawn[0, 20] = np.nan
    stored, bad = Encoding(dimensions=16).encode(drawn)
    assert stored.shape == (2, 16)
    assert not bad


def test_too_few_dimensions_are_an_error(vectors: Callable[..., np.ndarray]) -> None:
    with pytest.raises(EncodingMismatch, match="24 dimensions"):
        Encoding(dimensions=24).encode(vectors(2, dimensions=16))
