"""The items of a score: what intervals resample and comparisons pair."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator


class Items(BaseModel):
    """Every item of a score; lists of one length n."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: tuple[int, ...]
    """Number of the image that the item is about: what intervals resample."""
    value: tuple[FiniteFloat, ...]
    """1.0 where the item was right, 0.0 where not, unless the score says otherwise."""
    group: tuple[int, ...] | None = None
    """Where the score is the unweighted mean over groups' means."""

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if {len(self.image), len(self.group if self.group is not None else self.image)} != {len(self.value)}:
            raise ValueError("image, value and group are not of one length")
        return self

    @classmethod
    def of(cls, image: np.ndarray, value: np.ndarray, group: np.ndarray | None = None) -> Items:
        """From arrays [n]; bool values too."""
        return cls(
            image=tuple(image.tolist()),
            value=tuple(value.astype(float).tolist()),
            group=None if group is None else tuple(group.tolist()),
        )


def mean(items: Items) -> float:
    """The score of some items. NaN without any."""
    value = np.array(items.value)
    if not len(value):
        return float("nan")
    if items.group is None:
        return float(value.mean())
    _, group = np.unique(np.array(items.group), return_inverse=True)
    return float((np.bincount(group, weights=value) / np.bincount(group)).mean())
