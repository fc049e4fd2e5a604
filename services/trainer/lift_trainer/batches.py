"""Batches: decoded, cropped and joined to their text vectors, by worker processes when there are some.

A worker makes a part of one batch at a time, so that the first batch does not wait for one process and
prefetching stays small however large a batch is. What a sample becomes is a function of (seed, epoch,
sample), so neither the number of workers nor the size of a part changes anything.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lift_cache.errors import LiftError
from lift_trainer.images import ImageStore
from lift_trainer.sampling import Sampler, choose_caption
from lift_trainer.text import TextVectors

PART = 512
"""Samples that a worker makes at a time."""


class Batch(NamedTuple):
    """Input of one step, or a part of it. B images of side S, text vectors of width D."""

    pixels: torch.Tensor
    """uint8 [B, 3, S, S]."""
    text: torch.Tensor
    """float16 or float32 [B, D], as stored."""
    captions: torch.Tensor
    """int64 [B]: number of each caption."""
    bad: list[tuple[int, str]]
    """Samples whose image could not be read, and why; others stand in their places."""

    def to(self, device: torch.device) -> Batch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(move(self.pixels), move(self.text), move(self.captions), self.bad)

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        return cls(
            torch.cat([part.pixels for part in parts]),
            torch.cat([part.text for part in parts]),
            torch.cat([part.captions for part in parts]),
            [bad for part in parts for bad in part.bad],
        )


@dataclass(frozen=True)
class Batches(Dataset[Batch | LiftError]):
    """Item `step · parts + p` is part p of the batch of a step."""

    images: ImageStore
    text: TextVectors
    sampler: Sampler
    seed: int
    image_size: int
    max_bad: int

    @property
    def parts(self) -> int:
        """Parts of a batch."""
        return -(-self.sampler.batch_size // PART)

    def stream(self, start: int, stop: int, workers: int, device: torch.device) -> Iterator[Batch]:
        """Batches of steps start … stop − 1, in order, on the device.

        Raises:
            LiftError: what ended a worker's part (too many broken images, a damaged cache).
            RuntimeError, OSError, EOFError: a worker died.
        """
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start * self.parts, stop * self.parts),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
        )
        arriving = iter(loader)
        if workers:
            # torch's handler raises the death of a worker anywhere, in the middle of an update too; next()
            # finds it as well, between two steps.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for _ in range(start, stop):
            yield Batch.join([_checked(next(arriving)).to(device) for _ in range(self.parts)])

    def __getitem__(self, item: int) -> Batch | LiftError:
        """A part, or the error that ends the run: raised here, a worker would wrap it in its own traceback."""
        step, part = divmod(item, self.parts)
        try:
            return self._part(step, slice(part * PART, (part + 1) * PART))
        except LiftError as error:
            return error

    def _part(self, step: int, which: slice) -> Batch:
        index, epoch = self.images.index, self.sampler.epoch_of(step)
        samples, pixels, bad = self.images.train_views(
            self.sampler.batch(step)[which], self.seed, epoch, self.image_size, self.max_bad
        )
        chosen = choose_caption(self.seed, epoch, samples, index.caption_counts(samples))
        captions = index.pairs[index.first[samples] + chosen]
        text = torch.from_numpy(np.ascontiguousarray(self.text.gather(captions)))
        return Batch(pixels, text, torch.from_numpy(captions), list(bad.items()))


def _checked(part: Batch | LiftError) -> Batch:
    if isinstance(part, LiftError):
        raise part
    return part


def _as_it_is(part: Any) -> Any:
    return part


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; only the training process answers, with
    a checkpoint, for which its workers must still be there. They end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
