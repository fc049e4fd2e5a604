"""Order: a pure function of (seed, epoch, step).

Every random choice about data is a hash of the names of what it decides, never the next draw of a
generator: which image comes when, which of its captions, how it is cropped. So the choices do not depend
on the number of workers or ranks, and resuming at a step needs no generator state. The hash is SplitMix64
(Steele et al. 2014), so the order is also the same for every version of NumPy and torch.

Data that do not fit into a buffer of 1,048,576 samples are shuffled by blocks: blocks of consecutive samples are
permuted, as many as fill the buffer are taken together, and within the buffer every sample is permuted. So a disk or
an object store reads a block at a time, while a batch still comes from a thousand places (bench/order.py measures
how this differs from a full permutation). Blocks are counted in samples, not in shards, so that packing the same
samples into other shards does not change the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from lift_cache.errors import BadConfig

ORDER, CAPTION, CROP, MODEL, PERMUTE, GALLERY, BUFFER, NEGATIVE = range(1, 9)
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


def torch_seed(seed: int, step: int, *rank: int) -> int:
    """Seed for whatever is random inside the model at one step (dropout), on a rank beyond the first."""
    return int(random_words(seed, MODEL, step, *rank) >> np.uint64(1))


@dataclass(frozen=True)
class Shuffle:
    """How far an epoch's order is from that of the shards."""

    block: int = 256
    """Consecutive samples that stay together until they are in the buffer."""
    buffer: int = 4096
    """Blocks that are mixed with one another. A whole epoch that fits is one full permutation."""

    @property
    def window(self) -> int:
        """Samples in the buffer."""
        return self.block * self.buffer


FULL = Shuffle(block=1, buffer=1 << 62)
"""The full permutation, whatever the number of samples."""


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch of n samples: positions 0 … n − 1, a part of them at a time.

    Every sample stands at one position. Holds 16 bytes per block, and some windows of 8 bytes per sample.
    """

    seed: int
    epoch: int
    samples: int
    shuffle: Shuffle

    @cached_property
    def _blocks(self) -> np.ndarray:
        """Permuted block numbers: int64 [blocks]."""
        return permutation(-(-self.samples // self.shuffle.block), self.seed, ORDER, self.epoch)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Position of the first sample of each permuted block, and n: int64 [blocks + 1]."""
        sizes = np.full(len(self._blocks), self.shuffle.block)
        sizes[self._blocks == len(self._blocks) - 1] = self.samples - (len(sizes) - 1) * self.shuffle.block
        return np.concatenate([[0], np.cumsum(sizes)])

    @cached_property
    def _windows(self) -> np.ndarray:
        """First permuted block of each window, and their number: int64 [windows + 1]; windows as equal as can be."""
        windows = max(1, round(len(self._blocks) / self.shuffle.buffer))
        return np.arange(windows + 1) * len(self._blocks) // windows

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Samples at positions start … stop − 1: int64."""
        if self.samples <= self.shuffle.window:
            return _full_order(self.seed, self.epoch, self.samples)[positions]
        edges = self._starts[self._windows]
        first, last = np.searchsorted(edges, [positions.start, positions.stop - 1], side="right") - 1
        pieces = [
            _window(self, w)[max(positions.start - edge, 0) : positions.stop - edge]
            for w in range(int(first), int(last) + 1)
            for edge in [int(edges[w])]
        ]
        return np.concatenate(pieces)

    def ahead(self, positions: slice) -> list[range]:
        """Runs of samples to read while those at some positions are in use: blocks of the next window.

        Over an epoch each block comes once, except those of the first window, which nothing comes before.
        Nothing under a full permutation.
        """
        if self.samples <= self.shuffle.window:
            return []
        shift = self.shuffle.window
        first, last = np.searchsorted(self._starts, [positions.start + shift, positions.stop + shift])
        return [
            range(start, min(start + self.shuffle.block, self.samples))
            for start in (self._blocks[first : min(last, len(self._blocks))] * self.shuffle.block).tolist()
        ]


@lru_cache(maxsize=2)
def _full_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return permutation(n, seed, ORDER, epoch)


@lru_cache(maxsize=4)
def _window(order: EpochOrder, window: int) -> np.ndarray:
    first, last = order._windows[window : window + 2].tolist()
    size = order.shuffle.block
    samples = (order._blocks[first:last, None] * size + np.arange(size)).reshape(-1)
    samples = samples[samples < order.samples]
    return samples[np.argsort(random_words(order.seed, BUFFER, order.epoch, samples), kind="stable")]


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, samples: int, shuffle: Shuffle) -> EpochOrder:
    return EpochOrder(seed, epoch, samples, shuffle)


def epoch_order(seed: int, epoch: int, n: int, shuffle: Shuffle = Shuffle()) -> np.ndarray:
    """All samples in the order of an epoch: int64 [n]."""
    return EpochOrder(seed, epoch, n, shuffle)[0:n]


@dataclass(frozen=True)
class Sampler:
    """Batches of a run. Every epoch is a fresh order whose last, incomplete batch is dropped.

    Raises:
        BadConfig: fewer samples than one batch.
    """

    seed: int
    samples: int
    batch_size: int
    shuffle: Shuffle = Shuffle()  # frozen

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

    def batch(self, step: int, part: slice = slice(None)) -> np.ndarray:
        """The global batch of a step, or a part of it: sample numbers, int64 [batch_size]."""
        order, positions = self._positions(step, part)
        return order[positions]

    def share(self, rank: int, ranks: int) -> slice:
        """The part of every global batch that one of several ranks takes. Joined in order, they are the batch.

        Raises:
            BadConfig: the batch cannot be shared out equally.
        """
        return equal_share(self.batch_size, rank, ranks, "--batch-size")

    def ahead(self, step: int, part: slice = slice(None)) -> list[range]:
        """Runs of samples that are worth reading into a buffer while a batch, or a part of it, is in use."""
        order, positions = self._positions(step, part)
        return order.ahead(positions)

    def _positions(self, step: int, part: slice) -> tuple[EpochOrder, slice]:
        epoch, within = divmod(step, self.steps_per_epoch)
        start, stop, _ = part.indices(self.batch_size)
        first = within * self.batch_size
        return _epoch(self.seed, epoch, self.samples, self.shuffle), slice(first + start, first + stop)


def equal_share(total: int, rank: int, ranks: int, flag: str) -> slice:
    """The part of 0 … total − 1 that one of several ranks takes.

    Args:
        flag: the setting that the total comes from.

    Raises:
        BadConfig: it cannot be shared out equally.
    """
    if total % ranks:
        raise BadConfig(
            f"{flag} is {total} for all processes together and there are {ranks}; "
            "give a multiple of their number"
        )
    each = total // ranks
    return slice(rank * each, (rank + 1) * each)


@dataclass(frozen=True)
class Captions:
    """Which of its captions stand for an image.

    Raises:
        BadConfig: fewer than one of all captions, or a mix that is none.
    """

    choice: Literal["one", "all"] = "one"
    """One, drawn anew in every epoch; or all of them, as so many positives."""
    most: int = 5
    """Of all: an image with more is given so many, drawn anew in every epoch."""
    mix: tuple[float, ...] = ()
    """Of one: how often it comes from each caption field (any positive scale). An image that lacks fields draws
    among those it has; one with none but fields that never come, among these. Empty: captions of all fields alike."""

    def __post_init__(self) -> None:
        if self.most < 1:
            raise BadConfig(f"{self.most} captions of an image as positives; at least 1")
        if self.mix and self.choice == "all":
            raise BadConfig(
                "a mix of caption fields draws one caption of an image; it cannot be had with all"
            )
        if self.mix and (not np.isfinite(self.mix).all() or min(self.mix) < 0 or not sum(self.mix)):
            raise BadConfig(
                f"mix of caption fields {', '.join(f'{p:g}' for p in self.mix)}: give a share from 0 for each "
                "field, one of them above 0"
            )

    def width(self, most_captions: int) -> int:
        """Texts of each image in a batch, where no image of the data has more captions than so many."""
        return 1 if self.choice == "one" else min(self.most, most_captions)


def choose_caption(seed: int, epoch: int, samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of its captions stands for each image this time: int64 [n] in [0, counts)."""
    return (uniform(seed, CAPTION, epoch, samples) * counts).astype(np.int64)


def choose_mixed(seed: int, epoch: int, samples: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As `choose_caption`, where captions are not equally likely: int64 [n].

    Args:
        weights: float64 [n, c], of each caption of each image; 0 where there is none, not all 0 in a row.
    """
    ends = weights.cumsum(1)
    point = uniform(seed, CAPTION, epoch, samples) * ends[:, -1]
    return (ends <= point[:, None]).sum(1)


def mix_weights(mix: Sequence[float], fields: np.ndarray) -> np.ndarray:
    """How likely each caption is under a mix of fields, which first draws the field and then a caption of it.

    Args:
        mix: probability of each field.
        fields: int64 [n, c]: field of each caption of each image; −1 where there is none.

    Returns:
        float64 [n, c], rows not normalised; captions of fields that never come only where there is no other.
    """
    share = np.zeros(fields.shape)
    for field, probability in enumerate(mix):
        here = fields == field
        share += probability * here / np.maximum(here.sum(1, keepdims=True), 1)
    never = share.sum(1) == 0
    share[never] = fields[never] >= 0
    return share


def choose_several(seed: int, epoch: int, samples: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """Which captions stand for each image, all or so many drawn at random: int64 [n, width], ascending, then −1."""
    most = int(counts.max(initial=0))
    position = np.arange(max(most, width))
    absent = position >= counts[:, None]
    words = random_words(seed, CAPTION, epoch, samples[:, None], position) >> np.uint64(1)
    words[absent] = np.iinfo(np.uint64).max
    chosen = np.argsort(words, 1, kind="stable")[:, :width]
    chosen.sort(1)
    return np.where(chosen < counts[:, None], chosen, -1)


def draw_texts(seed: int, step: int, numbers: np.ndarray, captions: int) -> np.ndarray:
    """Texts beyond the batch of a step, drawn with replacement.

    Args:
        numbers: int64 [m]: which of the step's further texts.
        captions: how many there are to draw from.

    Returns:
        int64 [m] in [0, captions).
    """
    return (uniform(seed, NEGATIVE, step, numbers) * captions).astype(np.int64)


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
