"""The encoding: how vectors are stored, apart from how they were made.

    float32, float16    the value, rounded to the dtype
    int8                round((value − centre) / scale), −127 … 127; each dimension has its own centre and scale

A second object with its own digest; merging needs both to be equal. A value that the dtype cannot hold is
an error for its row and is never stored: nothing is clipped.

Why int8 has a scale for each dimension and not one for each vector: a few dimensions of a language model's
states are many times larger than the others, and a scale that covers them rounds the others away. Cosines
hardly show it; whitened neighbours do (bench/encodings.py).

`dimensions` below the recipe's keeps the first ones and leaves them as they are: what is kept of a unit
vector is shorter than one. Libraries that cut Matryoshka embeddings (vLLM, OpenAI's `dimensions`) scale to
unit length after the cut; so does whoever compares these vectors, as the trainer's text transform does. So
a cut of a cut is the cut, and float32 stays exact.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from lift_cache.errors import CacheDamaged, EncodingMismatch, UnsupportedFormat, VectorRejected
from lift_cache.files import write_atomic

ENCODING_VERSION = 2
"""Version 1 is float16 and float32, version 2 int8: software that knows no int8 says so by the version."""

INT8_LIMIT = 127
"""Largest stored magnitude: −128 is left out, so that the range is the same on both sides of the centre."""

HEADROOM = 1.0
"""By what share of its half-width a range seen in a sample is widened on either side: 1 doubles it, for one
of the eight bits. Of SmolLM2's vectors, the range of 1,000 refuses 32 % of the others as it is, 4 % widened
by 0.25, 0.6 % by 0.5 and 0.05 % by 1 (bench/encodings.py)."""

BLOCK_VALUES = 1 << 16
"""Values that are encoded at a time, so that what lies between float32 and the dtype stays in the processor's cache."""

# Base64 of little-endian float32: exact, one spelling for one value, and half the size of decimal numbers
# (4,096 dimensions: 22 KB each for centre and scale), as an encoding is repeated in every segment.
Float32s = Annotated[
    bytes,
    BeforeValidator(
        lambda value: base64.b64decode(value, validate=True) if isinstance(value, str) else value
    ),
    PlainSerializer(lambda value: base64.b64encode(value).decode(), when_used="json"),
]


class Encoding(BaseModel):
    """Stored form of a vector: the first `dimensions` values as `dtype`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 2] = 1
    dtype: Literal["float16", "float32", "int8"] = "float16"
    dimensions: int = Field(gt=0, description="Dimensions that are kept, from the front.")
    centre: Float32s | None = Field(None, repr=False, description="int8: float32 for each kept dimension.")
    scale: Float32s | None = Field(None, repr=False, description="int8: float32 for each kept dimension.")

    @model_validator(mode="before")
    @classmethod
    def _known_version(cls, data: Any) -> Any:
        if isinstance(data, dict):
            version = data.get("version")
            if isinstance(version, int) and version > ENCODING_VERSION:
                raise UnsupportedFormat(
                    f"the vectors have encoding version {version}; this software reads {ENCODING_VERSION}: update it"
                )
            if version is None and data.get("dtype") == "int8":
                return {**data, "version": 2}
        return data

    @model_validator(mode="after")
    def _whole(self) -> Encoding:
        if self.dtype != "int8":
            if self.version != 1 or self.centre is not None or self.scale is not None:
                raise ValueError(f"{self.dtype} is version 1 and has neither centre nor scale")
            return self
        if self.version != 2 or self.centre is None or self.scale is None:
            raise ValueError("int8 is version 2 and has a centre and a scale")
        if not len(self.centre) == len(self.scale) == 4 * self.dimensions:
            raise ValueError("centre and scale need one float32 for each dimension")
        low_d, high_d = self.held_range()
        if not (np.isfinite(low_d) & np.isfinite(high_d) & (_floats(self.scale) > 0)).all():
            raise ValueError("centre and scale must be finite, and scale above zero")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    @classmethod
    def int8_of_range(cls, low_d: np.ndarray, high_d: np.ndarray) -> Encoding:
        """int8 with the finest steps that hold every value from `low_d` to `high_d`, float32 [dimensions].

        Raises:
            VectorRejected: a bound is not finite.
        """
        low, high = np.asarray(low_d, np.float64), np.asarray(high_d, np.float64)
        if not (np.isfinite(low) & np.isfinite(high)).all():
            raise VectorRejected("the range of the vectors is not finite; fill again what is not")
        centre = ((low + high) / 2).astype(np.float32) + np.float32(0)  # which turns −0 into 0
        # A step is never finer than float32 is there, which also gives a constant dimension its step.
        finest = np.finfo(np.float32).eps * np.maximum(abs(low), abs(high))
        scale = np.maximum(np.maximum(high - centre, centre - low) / INT8_LIMIT, finest)
        scale = np.maximum(scale.astype(np.float32), np.finfo(np.float32).tiny)
        return cls(
            dtype="int8",
            dimensions=len(centre),
            centre=centre.astype("<f4").tobytes(),
            scale=scale.astype("<f4").tobytes(),
        )

    @classmethod
    def fit_int8(
        cls, sample: np.ndarray, dimensions: int | None = None, *, headroom: float = HEADROOM
    ) -> Encoding:
        """int8 for vectors of which only a sample is known: its range, widened by `headroom` on either side.

        A later value beyond that is refused for its row. Where all vectors are at hand, take their range
        (`int8_of_range`): its steps are finer, and it holds every one.

        Args:
            sample: float32 [n, d], n at least 1.
            dimensions: how many are kept, from the front; d by default.
            headroom: share of the half-width that is added.

        Raises:
            VectorRejected: the sample is empty or has a value that is not finite.
        """
        kept = np.asarray(sample, np.float32)[:, :dimensions]
        if not len(kept):
            raise VectorRejected("the sample is empty; int8 needs vectors to take its range from")
        low, high = kept.min(0).astype(np.float64), kept.max(0).astype(np.float64)
        more = headroom * (high - low) / 2
        return cls.int8_of_range(low - more, high + more)

    def cut(self, dimensions: int) -> Encoding:
        """The same for fewer dimensions, from the front; what it stores is the beginning of what this stores."""
        kept = {} if self.dtype != "int8" else {"centre": self.centre, "scale": self.scale}
        return type(self).model_validate(
            {"dtype": self.dtype, "dimensions": dimensions}
            | {name: values[: 4 * dimensions] for name, values in kept.items() if values}
        )

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def held_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest value that each dimension can hold: float64 [dimensions] each."""
        if self.dtype != "int8":
            most = np.full(self.dimensions, np.finfo(self.numpy_dtype).max, np.float64)
            return -most, most
        centre_d, scale_d = _floats(self.centre).astype(np.float64), _floats(self.scale).astype(np.float64)
        return centre_d - INT8_LIMIT * scale_d, centre_d + INT8_LIMIT * scale_d

    def resolution(self, length: float = 1.0) -> float:
        """Rounding step of the stored values, relative to a vector of this length.

        resolution² / dimensions is about the variance that storing adds to each dimension of a unit vector.
        """
        if self.dtype == "int8":
            return float(np.linalg.norm(_floats(self.scale).astype(np.float64)) / length)
        return float(np.finfo(self.numpy_dtype).eps)

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Bring vectors into their stored form.

        Args:
            vectors: float32 [n, d], d at least `dimensions`.

        Returns:
            The stored array [n, dimensions], and row → reason for rows that must not be stored (their
            content in the array is meaningless).

        Raises:
            EncodingMismatch: the array is not [n, at least dimensions].
        """
        if vectors.ndim != 2 or vectors.shape[1] < self.dimensions:
            raise EncodingMismatch(
                f"vectors have shape {vectors.shape}; the cache keeps {self.dimensions} dimensions"
            )
        n, kept = len(vectors), vectors[:, : self.dimensions]
        stored = np.empty((n, self.dimensions), self.numpy_dtype)
        held, zero = np.empty(n, bool), np.empty(n, bool)
        store = self._store_int8 if self.dtype == "int8" else _store_float
        step = max(1, BLOCK_VALUES // self.dimensions)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, n, step):
                block = slice(start, start + step)
                held[block], zero[block] = store(kept[block], stored[block])
        bad: dict[int, str] = {}
        for row in np.flatnonzero(~held | zero).tolist():
            if not np.isfinite(kept[row]).all():
                bad[row] = "the vector has a value that is not finite"
            elif not held[row]:
                bad[row] = self._beyond(kept[row])
            else:
                bad[row] = "the vector is zero"
        return stored, bad

    def _store_int8(self, kept: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `_store_float`."""
        centre, scale = _floats(self.centre), _floats(self.scale)
        steps = np.subtract(kept, centre, dtype=np.float32)
        steps /= scale
        np.rint(steps, out=steps)
        stored[:] = steps
        held = np.less_equal(np.abs(steps, out=steps).max(1), INT8_LIMIT)  # False for NaN too
        # A stored zero is a vector like any other; what decodes to zero in every dimension has lost its direction.
        zero = np.logical_not(kept.any(1))
        if not (centre + scale * np.rint(-centre / scale)).any():
            zero |= ~self.decode(stored).any(1)
        return held, zero

    def _beyond(self, kept: np.ndarray) -> str:
        """Why a finite vector [dimensions] cannot be held."""
        if self.dtype != "int8":
            return f"the vector has a value beyond the range of {self.dtype}"
        low, high = self.held_range()
        outside = np.maximum(low - kept, kept - high) / _floats(self.scale)
        worst = int(outside.argmax())
        return (
            f"the vector has a value beyond the range of int8 (dimension {worst} is {kept[worst]:.4g}; "
            f"this cache holds {low[worst]:.4g} to {high[worst]:.4g} there)"
        )

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Stored form back to float32 [n, dimensions]."""
        decoded = stored.astype(np.float32)
        if self.dtype == "int8":
            decoded *= _floats(self.scale)
            decoded += _floats(self.centre)
        return decoded

    def card(self) -> dict[str, Any]:
        """What there is to say of it, for people: of an int8's scales their least, median and greatest."""
        said = self.model_dump(mode="json", exclude={"centre", "scale"})
        if self.dtype == "int8":
            said["steps"] = [float(f"{q:.3g}") for q in np.quantile(_floats(self.scale), (0, 0.5, 1))]
        return said

    def require_same(self, other: Encoding, *, here: str, there: str) -> None:
        """Raises EncodingMismatch naming what differs."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours == theirs or name == "version":  # which follows from the dtype
                continue
            what = name
            if isinstance(ours, bytes) and isinstance(theirs, bytes):
                first = int(np.flatnonzero(_floats(ours).view("u4") != _floats(theirs).view("u4"))[0])
                what = f"{name} of dimension {first}"
                ours, theirs = float(_floats(ours)[first]), float(_floats(theirs)[first])
            raise EncodingMismatch(
                f"the encodings differ: {what} is {ours!r} in {here} and {theirs!r} in {there}"
            )

    @classmethod
    def load(cls, path: Path) -> Encoding:
        """Read `encoding.json`. Raises CacheDamaged (missing too), UnsupportedFormat, OSError."""
        try:
            data = json.loads(path.read_bytes())
            data["version"]
            return cls.model_validate(data)
        except UnsupportedFormat as error:
            raise UnsupportedFormat(f"{path}: {error}") from None
        except FileNotFoundError:
            raise CacheDamaged(f"{path} is missing; restore it from a copy of the cache") from None
        except (ValueError, KeyError, TypeError, ValidationError):
            raise CacheDamaged(f"{path} is not an encoding; restore it from a copy of the cache") from None

    def save(self, path: Path) -> None:
        """Write `encoding.json` durably."""
        write_atomic(path, (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode())


def _store_float(kept: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill `stored` [n, d] from `kept` [n, d].

    Returns:
        Whether every value of a row is held, and whether a row is zero as stored: bool [n] each.
    """
    stored[:] = kept
    # Without their sign, the bits of floats are ordered as the floats are, infinity and NaN above all.
    bits = stored.view(f"u{stored.itemsize}")
    largest = (bits & np.iinfo(bits.dtype).max // 2).max(1)
    return largest < np.array(np.inf, stored.dtype).view(bits.dtype), largest == 0


def _floats(data: bytes | None) -> np.ndarray:
    """float32 [d], without a copy."""
    assert data is not None, "int8 has a centre and a scale"
    return np.frombuffer(data, "<f4")
