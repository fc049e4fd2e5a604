"""What the dtype can hold comes back within its step; what it cannot hold is refused and never stored."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import BaseModel, ValidationError

from lift_cache.encoding import HEADROOM, Encoding
from lift_cache.errors import CacheDamaged, EncodingMismatch, UnsupportedFormat, VectorRejected

Vectors = Callable[..., np.ndarray]

FINITE = st.floats(-(2.0**120), 2.0**120, width=32)
FLOATS = st.floats(width=32)


@st.composite
def matrices(draw: Any, elements: Any = FLOATS) -> np.ndarray:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 8)))
    return draw(arrays(np.float32, shape, elements=elements))


def exact(encoding: Encoding) -> np.ndarray:
    """float32 [d] step of int8."""
    assert encoding.scale is not None
    return np.frombuffer(encoding.scale, "<f4")


# What comes back


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_good_rows_come_back_within_the_dtype(dtype: str, vectors: Vectors) -> None:
    encoding = Encoding(dtype=dtype, dimensions=24)
    drawn = vectors(10)
    stored, bad = encoding.encode(drawn)
    assert stored.dtype == dtype
    assert not bad
    np.testing.assert_allclose(encoding.decode(stored), drawn, rtol=2**-10 if dtype == "float16" else 0)


@given(matrices())
def test_floats_are_kept_to_the_bit_or_to_half_a_step_or_refused(x: np.ndarray) -> None:
    for dtype, relative, least in (("float32", 0.0, 0.0), ("float16", 2.0**-11, 2.0**-25)):
        encoding = Encoding(dtype=dtype, dimensions=x.shape[1])
        stored, bad = encoding.encode(x)
        decoded = encoding.decode(stored)
        for row in range(len(x)):
            largest = float(np.abs(x[row]).max())
            if not np.isfinite(x[row]).all():
                assert "not finite" in bad[row]
            elif dtype == "float16" and largest >= 65_520:
                assert "beyond the range of float16" in bad[row]
            elif largest <= least:
                assert "zero" in bad[row]
            else:
                assert row not in bad
                assert (np.abs(decoded[row] - x[row]) <= np.maximum(relative * np.abs(x[row]), least)).all()


@given(matrices(FINITE))
def test_int8_fitted_to_all_vectors_holds_each_within_half_a_step(x: np.ndarray) -> None:
    encoding = Encoding.int8_of_range(x.min(0), x.max(0))
    stored, bad = encoding.encode(x)
    assert stored.dtype == np.int8
    assert stored.min() >= -127
    # Half a step, and the rounding of float32 itself, which counts where a step is as fine as that.
    allowed = 0.5001 * exact(encoding).astype(np.float64) + 2.0**-23 * np.abs(x)
    error = np.abs(encoding.decode(stored).astype(np.float64) - x)
    for row in range(len(x)):
        assert (row in bad) == (not x[row].any() or not encoding.decode(stored)[row].any())
        if row not in bad:
            assert (error[row] <= allowed).all()


@given(matrices(FINITE), matrices())
def test_int8_refuses_what_is_outside_and_never_clips(sample: np.ndarray, x: np.ndarray) -> None:
    d = min(sample.shape[1], x.shape[1])
    encoding = Encoding.int8_of_range(sample[:, :d].min(0), sample[:, :d].max(0))
    low, high = encoding.held_range()
    half = 0.5001 * exact(encoding).astype(np.float64)
    stored, bad = encoding.encode(x)
    for row in range(len(x)):
        kept = x[row, :d].astype(np.float64)
        if not np.isfinite(kept).all():
            assert "not finite" in bad[row]
        elif (kept < low - half).any() or (kept > high + half).any():
            assert "beyond the range of int8" in bad[row]
        elif row not in bad:
            error = np.abs(encoding.decode(stored)[row].astype(np.float64) - kept)
            assert (error <= half + 2.0**-23 * np.maximum(np.abs(low), np.abs(high))).all()


def test_outlier_dimensions_do_not_coarsen_the_others(vectors: Vectors) -> None:
    drawn = vectors(200)
    drawn[:, 3] = 100 * drawn[:, 3] + 500
    encoding = Encoding.int8_of_range(drawn.min(0), drawn.max(0))
    decoded = encoding.decode(encoding.encode(drawn)[0])
    others = np.arange(24) != 3
    assert np.abs(decoded - drawn)[:, others].max() < 0.005
    assert np.abs(decoded - drawn)[:, 3].max() < 0.5


def test_a_dimension_that_never_changed_is_exact_and_refuses_a_change(vectors: Vectors) -> None:
    drawn = vectors(20)
    drawn[:, 5], drawn[:, 6] = 0.25, 0.0
    encoding = Encoding.int8_of_range(drawn.min(0), drawn.max(0))
    decoded = encoding.decode(encoding.encode(drawn)[0])
    np.testing.assert_array_equal(decoded[:, 5:7], drawn[:, 5:7])
    drawn[0, 5] += 0.01
    drawn[1, 6] += 0.01
    assert sorted(encoding.encode(drawn)[1]) == [0, 1]


# What is refused


def test_rows_that_cannot_be_held_are_named_with_the_reason(vectors: Vectors) -> None:
    drawn = vectors(6)
    fitted = Encoding.int8_of_range(drawn.min(0), drawn.max(0))
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
    _, bad = fitted.encode(drawn)
    assert sorted(bad)[:3] == [1, 2, 3]
    assert "dimension 5 is 7e+04" in bad[3]


def test_a_vector_that_rounds_to_zero_is_refused() -> None:
    _, bad = Encoding(dimensions=4).encode(np.full((1, 4), 1e-9, np.float32))
    assert "zero" in bad[0]
    around_zero = Encoding.int8_of_range(np.full(4, -1.0), np.full(4, 1.0))
    _, bad = around_zero.encode(np.array([[1e-9] * 4, [0.5] * 4], np.float32))
    assert list(bad) == [0]
    assert "zero" in bad[0]


def test_int8_asks_whether_the_vector_is_zero_not_whether_its_steps_are() -> None:
    encoding = Encoding.int8_of_range(np.full(4, -1.0), np.full(4, 3.0))
    stored, bad = encoding.encode(np.array([[1.0] * 4, [0.0] * 4], np.float32))
    assert not stored[0].any()
    assert list(bad) == [1]
    assert encoding.decode(stored[:1]).tolist() == [[1.0] * 4]


def test_only_the_kept_dimensions_count(vectors: Vectors) -> None:
    drawn = vectors(2)
    drawn[0, 20] = np.nan
    for encoding in (Encoding(dimensions=16), Encoding.fit_int8(drawn, 16)):
        stored, bad = encoding.encode(drawn)
        assert stored.shape == (2, 16)
        assert not bad


def test_too_few_dimensions_are_an_error(vectors: Vectors) -> None:
    with pytest.raises(EncodingMismatch, match="24 dimensions"):
        Encoding(dimensions=24).encode(vectors(2, dimensions=16))


def test_many_rows_are_encoded_as_each_alone(vectors: Vectors) -> None:
    drawn = vectors(500, dimensions=1000)
    fitted = Encoding.int8_of_range(drawn.min(0), drawn.max(0))
    drawn[::50, 7] = 9.0
    for encoding in (Encoding(dimensions=1000), fitted):
        stored, bad = encoding.encode(drawn)
        assert sorted(bad) == ([] if encoding.dtype == "float16" else list(range(0, 500, 50)))
        one_by_one = np.concatenate([encoding.encode(row[None])[0] for row in drawn])
        good = [row for row in range(500) if row not in bad]
        np.testing.assert_array_equal(stored[good], one_by_one[good])


def test_no_rows_are_no_error() -> None:
    for encoding in (Encoding(dimensions=4), Encoding.int8_of_range(np.zeros(4), np.ones(4))):
        stored, bad = encoding.encode(np.empty((0, 4), np.float32))
        assert stored.shape == (0, 4)
        assert not bad
        assert encoding.decode(stored).shape == (0, 4)


# int8 from a sample


def test_a_sample_leaves_head_room_for_what_comes_later(vectors: Vectors) -> None:
    drawn = vectors(4000, dimensions=64)
    tight = Encoding.fit_int8(drawn[:500], headroom=0)
    roomy = Encoding.fit_int8(drawn[:500])
    assert not tight.encode(drawn[:500])[1]
    assert len(tight.encode(drawn[500:])[1]) > 100
    assert not roomy.encode(drawn[500:])[1]
    np.testing.assert_allclose(exact(roomy), (1 + HEADROOM) * exact(tight), rtol=1e-5)


def test_int8_needs_finite_vectors_to_be_fitted_to(vectors: Vectors) -> None:
    with pytest.raises(VectorRejected, match="empty"):
        Encoding.fit_int8(vectors(0))
    drawn = vectors(3)
    drawn[1, 1] = np.inf
    with pytest.raises(VectorRejected, match="not finite"):
        Encoding.fit_int8(drawn)


@given(matrices(FINITE), st.integers(1, 8))
def test_a_cut_is_the_beginning_of_the_whole(x: np.ndarray, dimensions: int) -> None:
    dimensions = min(dimensions, x.shape[1])
    d = x.shape[1]
    for whole in (Encoding(dimensions=d), Encoding.int8_of_range(x.min(0), x.max(0))):
        cut = whole.cut(dimensions)
        np.testing.assert_array_equal(cut.encode(x)[0], whole.encode(x)[0][:, :dimensions])
        assert cut.dimensions == dimensions
        assert whole.cut(d) == whole


# Its identity


GOLDEN = {
    ("float16", 24): "6144d0b394822e44b803c618bcb4c23b8734b00220b79e0be08bb86ae6171aca",
    ("float16", 576): "fd1e8e4781477c581e84d45e3344becb138530503abed8777284467d94a7c57a",
    ("float16", 4096): "2f456d582e9047be88ea8bce921dfd9701726781324751776835961937cca8f8",
    ("float32", 24): "caf4d4ebceb290ab2fa475a787b79dbc6ac4a5ebcc189cf76be9aa09ebd2da36",
    ("float32", 576): "f29399cde1c890c9a6eead7957e6baeb77f39998f72ab0583211b6397091b32c",
    ("float32", 4096): "f769af782a57b9eb0d523965aa12ea4a4190e100481c295766c724965528f9b8",
}
"""Digests of version 1, as the first release wrote them."""


def test_float_encodings_are_for_ever_what_the_first_release_wrote(tmp_path: Path) -> None:
    for (dtype, dimensions), digest in GOLDEN.items():
        encoding = Encoding(dtype=dtype, dimensions=dimensions)
        assert encoding.digest == digest
        assert encoding.model_dump_json() == f'{{"version":1,"dtype":"{dtype}","dimensions":{dimensions}}}'
        encoding.save(tmp_path / "encoding.json")
        text = f'{{\n  "version": 1,\n  "dtype": "{dtype}",\n  "dimensions": {dimensions}\n}}\n'
        assert (tmp_path / "encoding.json").read_text() == text


def test_an_int8_encoding_is_for_ever_what_it_was() -> None:
    encoding = Encoding.int8_of_range(np.array([-1.0, 0.0, 5.0]), np.array([1.0, 254.0, 5.0]))
    assert json.loads(encoding.model_dump_json()) == {
        "version": 2,
        "dtype": "int8",
        "dimensions": 3,
        "centre": base64.b64encode(np.array([0, 127, 5], "<f4").tobytes()).decode(),
        "scale": base64.b64encode(np.array([1 / 127, 1, 5 * 2.0**-23], "<f4").tobytes()).decode(),
    }
    assert encoding.digest == "bbfb92ecb862738695aeb5d737d319e310a37caf954b37021bf77206a6fe6556"
    stored, bad = encoding.encode(np.array([[-1, 0, 5], [0.5, 254, 5]], np.float32))
    assert stored.tolist() == [[-127, -127, 0], [64, 127, 0]]
    assert not bad


class Holder(BaseModel):
    encoding: Encoding


@settings(max_examples=50)
@given(matrices(FINITE))
def test_json_gives_the_same_encoding_back_to_the_bit(x: np.ndarray) -> None:
    encoding = Encoding.int8_of_range(x.min(0), x.max(0))
    text = encoding.model_dump_json()
    again = Encoding.model_validate_json(text)
    assert again == encoding
    assert hash(again) == hash(encoding)
    assert again.digest == encoding.digest
    assert again.model_dump_json() == text
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == encoding.digest
    assert Holder.model_validate_json(Holder(encoding=encoding).model_dump_json()).encoding == encoding
    assert pickle.loads(pickle.dumps(encoding)) == encoding
    np.testing.assert_array_equal(again.encode(x)[0], encoding.encode(x)[0])


def test_saved_encodings_are_loaded_again(tmp_path: Path, vectors: Vectors) -> None:
    for encoding in (Encoding(dimensions=24), Encoding.fit_int8(vectors(30))):
        encoding.save(tmp_path / "encoding.json")
        assert Encoding.load(tmp_path / "encoding.json") == encoding


def test_a_newer_encoding_asks_for_an_update(tmp_path: Path) -> None:
    text = '{"version": 3, "dtype": "int4", "dimensions": 24, "groups": 4}'
    (tmp_path / "encoding.json").write_text(text)
    with pytest.raises(UnsupportedFormat, match=r"encoding\.json.*version 3.*update"):
        Encoding.load(tmp_path / "encoding.json")
    # Where it stands inside another file too.
    with pytest.raises(UnsupportedFormat, match=r"version 3.*update"):
        Holder.model_validate_json(f'{{"encoding": {text}}}')


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"dtype": "float16", "dimensions": 24}',
        '{"version": 1, "dtype": "float16", "dimensions": 0}',
        '{"version": 2, "dtype": "float16", "dimensions": 1}',
        '{"version": 1, "dtype": "float16", "dimensions": 1, "centre": "AAAAAA=="}',
        '{"version": 2, "dtype": "int8", "dimensions": 1}',
        '{"version": 1, "dtype": "int8", "dimensions": 1, "centre": "AAAAAA==", "scale": "AACAPw=="}',
        '{"version": 2, "dtype": "int8", "dimensions": 2, "centre": "AAAAAA==", "scale": "AACAPw=="}',
        '{"version": 2, "dtype": "int8", "dimensions": 1, "centre": "AAAAAA==", "scale": "AAAAAA=="}',
        '{"version": 2, "dtype": "int8", "dimensions": 1, "centre": "AADAfw==", "scale": "AACAPw=="}',
        '{"version": 2, "dtype": "int8", "dimensions": 1, "centre": "not base64", "scale": "AACAPw=="}',
    ],
)
def test_what_is_not_an_encoding_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "encoding.json").write_text(text)
    with pytest.raises(CacheDamaged, match=r"encoding\.json is not an encoding"):
        Encoding.load(tmp_path / "encoding.json")
    good = '{"version": 2, "dtype": "int8", "dimensions": 1, "centre": "AAAAAA==", "scale": "AACAPw=="}'
    (tmp_path / "encoding.json").write_text(good)
    assert Encoding.load(tmp_path / "encoding.json").dtype == "int8"


def test_a_missing_encoding_is_damage(tmp_path: Path) -> None:
    with pytest.raises(CacheDamaged, match="missing"):
        Encoding.load(tmp_path / "encoding.json")


def test_what_differs_is_named_in_one_short_line(vectors: Vectors) -> None:
    ours = Encoding.int8_of_range(np.zeros(24), np.ones(24))
    high = np.ones(24)
    high[7] = 2
    with pytest.raises(EncodingMismatch, match=r"centre of dimension 7 is 0\.5 in A and 1\.0 in B") as said:
        ours.require_same(Encoding.int8_of_range(np.zeros(24), high), here="A", there="B")
    assert len(str(said.value)) < 200
    with pytest.raises(EncodingMismatch, match="dtype is 'int8' in A and 'float16' in B") as said:
        ours.require_same(Encoding(dimensions=24), here="A", there="B")
    assert len(str(said.value)) < 200
    nothing = Encoding.int8_of_range(np.zeros(1), np.zeros(1))
    nothing.require_same(Encoding.int8_of_range(-np.zeros(1), -np.zeros(1)), here="A", there="B")
    ours.require_same(Encoding.int8_of_range(np.zeros(24), np.ones(24)), here="A", there="B")
    with pytest.raises(ValidationError) as refused:
        Encoding(dtype="int8", dimensions=3, centre=ours.centre, scale=ours.scale)
    assert "one float32 for each dimension" in str(refused.value)


def test_what_is_shown_to_people_is_short(vectors: Vectors) -> None:
    encoding = Encoding.int8_of_range(np.zeros(4096), np.linspace(1, 2, 4096))
    assert encoding.card() == {
        "version": 2,
        "dtype": "int8",
        "dimensions": 4096,
        "steps": [0.00394, 0.00591, 0.00787],
    }
    assert len(repr(encoding)) < 100
    assert Encoding(dimensions=3).card() == {"version": 1, "dtype": "float16", "dimensions": 3}


def test_the_resolution_says_how_much_variance_storing_adds(vectors: Vectors) -> None:
    drawn = vectors(4000, dimensions=64)
    for encoding in (Encoding(dimensions=64), Encoding.int8_of_range(drawn.min(0), drawn.max(0))):
        added = (encoding.decode(encoding.encode(drawn)[0]) - drawn).var()
        bound = encoding.resolution() ** 2 / 64
        assert added < bound < 100 * added
        assert encoding.resolution(2.0) in (encoding.resolution(), encoding.resolution() / 2)
