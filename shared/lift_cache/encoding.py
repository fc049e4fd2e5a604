"""The encoding: how vectors are stored, apart from how they were made.

A second object with its own digest; merging needs both to be equal. A value that the dtype cannot hold is
an error for its row and is never stored.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lift_cache.errors import CacheDamaged, EncodingMismatch, UnsupportedFormat
from lift_cache.files import write_atomic

ENCODING_VERSION = 1


class Encoding(BaseModel):
    """Stored form of a vector: the first `dimensions` values as `dtype`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    dtype: Literal["float16", "float32"] = "float16"
    dimensions: int = Field(gt=0, description="Dimensions that are kept, from the front.")

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

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
        kept = vectors[:, : self.dimensions]
        with np.errstate(over="ignore", invalid="ignore"):
            stored = np.ascontiguousarray(kept, self.numpy_dtype)
        finite = np.isfinite(kept).all(1)
        held = np.isfinite(stored).all(1)
        zero = ~stored.any(1)
        bad: dict[int, str] = {}
        for row in np.flatnonzero(~held | zero).tolist():
            if not finite[row]:
                bad[row] = "the vector has a value that is not finite"
            elif not held[row]:
                bad[row] = f"the vector has a value beyond the range of {self.dtype}"
            else:
                bad[row] = "the vector is zero"
        return stored, bad

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Stored form back to float32 [n, dimensions]."""
        return stored.astype(np.float32)

    def require_same(self, other: Encoding, *, here: str, there: str) -> None:
        """Raises EncodingMismatch naming what differs."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise EncodingMismatch(
                    f"the encodings differ: {name} is {ours!r} in {here} and {theirs!r} in {there}"
                )

    @classmethod
    def load(cls, path: Path) -> Encoding:
        """Read `encoding.json`. Raises CacheDamaged (missing too), UnsupportedFormat, OSError."""
        try:
            data = json.loads(path.read_bytes())
            if isinstance(data["version"], int) and data["version"] > ENCODING_VERSION:
                raise UnsupportedFormat(
                    f"{path} has encoding version {data['version']}; this software reads {ENCODING_VERSION}: update it"
                )
            return cls.model_validate(data)
        except FileNotFoundError:
            raise CacheDamaged(f"{path} is missing; restore it from a copy of the cache") from None
        except (ValueError, KeyError, TypeError, ValidationError):
            raise CacheDamaged(f"{path} is not an encoding; restore it from a copy of the cache") from None

    def save(self, path: Path) -> None:
        """Write `encoding.json` durably."""
        write_atomic(path, (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode())
