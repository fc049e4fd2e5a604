"""Order: a pure function of (seed, epoch, step).

Every random choice about data is a hash of the names of what it decides, never the next draw of a
generator: which image comes when, which of its captions, how it is cropped. So the choices do not depend
on the number of workers or ranks, and resuming at a step needs no generator state. The hash is SplitMix64
(Steele et al. 2014), so the order is also the same for every version of NumPy and torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lift_cache.errors import BadConfig

ORDER, CAPTION, CROP, MODEL, PERMUTE, GALLERY = range(1, 7)
"""Streams: the first word after the seed, so that no two decisions share their randomness."""

Word = int | np.ndarray


def random_words(*words: Word) -> np.ndarray:
    """Hash integers into uniform 64-bit words, elementwise under broadcasting: uint64."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*words: Word) -> np.ndarray:
    """Hash integers into [0, 1): float64."""
    return (random_words(*words) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, *words: Word) -> np.ndarray:
    """A random order of 0 … n−1: int64 [n]."""
    return np.argsort(random_words(*words, np.arange(n)), kind="stable")


def torch_seed(seed: int, step: int) -> int:
    """Seed for whatever is random inside the model at one step (dropout)."""
    return int(random_words(seed, MODEL, step) >> np.uint64(1))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return permutation(n, seed, ORDER, epoch)


@dataclass(frozen=True)
class Sampler:
    """Batches of a run. Every epoch is a fresh permutation whose last, incomplete batch is dropped.

    Raises:
        BadConfig: fewer samples than one batch.
    """

    seed: int
    samples: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.samples < self.batch_size:
            raise BadConfig(
                f"--batch-size is {self.batch_size} and the data hold {self.samples} images; "
                f"use --batch-size {self.samples} or less"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step: sample numbers, int64 [batch_size]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.samples)
        return order[within * self.batch_size : (within + 1) * self.batch_size]


def choose_caption(seed: int, epoch: int, samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of its captions stands for each image this time: int64 [n] in [0, counts)."""
    return (uniform(seed, CAPTION, epoch, samples) * counts).astype(np.int64)


def crop_boxes(
    seed: int,
    epoch: int,
    samples: np.ndarray,
    sizes: np.ndarray,
    scale: Sequence[float] = (0.9, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """RandomResizedCrop's boxes, as torchvision draws them, for a whole batch at once.

    Args:
        samples: int64 [n].
        sizes: int64 [n, 2], height and width in pixels.

    Returns:
        int64 [n, 4]: top, left, height, width. Ten attempts, then the largest central box within `ratio`.
    """
    n, attempts = len(samples), 10
    draws = uniform(seed, CROP, epoch, samples[:, None, None], np.arange(attempts)[:, None], np.arange(4))
    height, width = sizes[:, 0, None], sizes[:, 1, None]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[..., 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top = ((height - h + 1) * draws[..., 2]).astype(np.int64)
    left = ((width - w + 1) * draws[..., 3]).astype(np.int64)
    first = fits.argmax(1)
    drawn = np.stack([top, left, h, w], -1)[np.arange(n), first]

    height, width = height[:, 0], width[:, 0]
    w = np.minimum(width, np.rint(height * ratio[1]).astype(np.int64))
    h = np.minimum(height, np.rint(width / ratio[0]).astype(np.int64))
    central = np.stack([(height - h) // 2, (width - w) // 2, h, w], -1)
    return np.where(fits.any(1)[:, None], drawn, central)
