"""Batches: decoded, cropped and joined to their text vectors, by worker processes when there are some.

A worker makes a part of one batch at a time, so that the first batch does not wait for one process and
prefetching stays small however large a batch is. What a sample becomes is a function of (seed, epoch,
sample), so neither the number of workers nor the size of a part changes anything.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lift_cache.errors import LiftError
from lift_trainer.aligned import AlignedText
from lift_trainer.features import FeatureStore
from lift_trainer.images import NOTHING, ImageStore
from lift_trainer.read_ahead import ReadAhead
from lift_trainer.samples import Index
from lift_trainer.sampling import (
    Captions,
    Sampler,
    choose_caption,
    choose_mixed,
    choose_several,
    draw_texts,
    equal_share,
    mix_weights,
)
from lift_trainer.text import TextVectors

PART = 512
"""Samples that a worker makes at a time."""


class WorkerDied(RuntimeError):
    """A process that reads images ended; the text says how, and what it was reading."""


class Batch(NamedTuple):
    """Input of one step, or a part of it. B images of side S, with one text each or P, from each of several
    caches: vectors of width W, or tokens. K: captions of the image that has the most; M further texts."""

    pixels: torch.Tensor
    """uint8 [B, 3, S, S]; or float32 [B, width], kept features of a frozen tower."""
    texts: tuple[torch.Tensor, ...]
    """One per cache: float16 or float32 [B, W] as stored, or int64 tokens [B, L]. Where all captions are positives
    [B, P, W] or [B, P, L], with zeros for absent ones."""
    captions: torch.Tensor
    """int64 [B] or [B, P]: number of each caption; −1: absent."""
    images: torch.Tensor
    """int64 [B]: number of the sample that each image is of."""
    known: torch.Tensor
    """int64 [B, K]: every caption of each image, also those not drawn; −1 where it has fewer. Without further
    texts [B, 0]."""
    extra_texts: tuple[torch.Tensor, ...]
    """Texts beyond the batch, this process's share: one per cache, [M, W] or [M, L]."""
    extra_captions: torch.Tensor
    """int64 [M]: number of each."""
    bad: list[tuple[int, str]]
    """Samples whose image could not be read, and why; others stand in their places."""

    def to(self, device: torch.device) -> Batch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            pixels=move(self.pixels),
            texts=tuple(map(move, self.texts)),
            captions=move(self.captions),
            images=move(self.images),
            known=move(self.known),
            extra_texts=tuple(map(move, self.extra_texts)),
            extra_captions=move(self.extra_captions),
            bad=self.bad,
        )

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        most = max(part.known.shape[1] for part in parts)
        return cls(
            pixels=torch.cat([part.pixels for part in parts]),
            texts=tuple(map(torch.cat, zip(*(part.texts for part in parts), strict=True))),
            captions=torch.cat([part.captions for part in parts]),
            images=torch.cat([part.images for part in parts]),
            known=torch.cat([F.pad(part.known, (0, most - part.known.shape[1]), value=-1) for part in parts]),
            extra_texts=tuple(map(torch.cat, zip(*(part.extra_texts for part in parts), strict=True))),
            extra_captions=torch.cat([part.extra_captions for part in parts]),
            bad=[bad for part in parts for bad in part.bad],
        )


@dataclass(frozen=True)
class Batches(Dataset[Batch | LiftError]):
    """Item `step · parts + p` is part p of the share that this process has in the batch of a step."""

    images: ImageStore
    texts: tuple[TextVectors, ...]
    """Of one index, one per cache."""
    sampler: Sampler
    seed: int
    image_size: int
    max_bad: int
    share: slice | None = None
    """Which places of the global batch are this process's (`Sampler.share`); None: all."""
    captions: Captions = field(default_factory=Captions)
    negatives: int = 0
    """Texts beyond the batch in a step, for all processes together, drawn from the distinct captions."""
    features: FeatureStore | None = None
    """What stands for the pixels, if anything does."""

    def __post_init__(self) -> None:
        """Raises BadConfig: further texts that cannot be shared out equally."""
        _ = self._numbers

    @property
    def parts(self) -> int:
        """Parts of a batch."""
        return -(-len(self._places) // PART)

    @property
    def _places(self) -> range:
        return range(self.sampler.batch_size)[self.share or slice(None)]

    @property
    def _numbers(self) -> range:
        """Which of a step's further texts are this process's: the same share as of the places."""
        each = len(self._places)
        ranks, rank = self.sampler.batch_size // each, self._places.start // each
        return range(self.negatives)[equal_share(self.negatives, rank, ranks, "--text-negatives")]

    def stream(self, start: int, stop: int, workers: int, device: torch.device) -> Iterator[Batch]:
        """Batches of steps start … stop − 1, in order, on the device.

        The death of a worker is said on stderr when it happens; it ends the stream at the next batch, never in the
        middle of an update.

        Raises:
            LiftError: what ended a worker's part (too many broken images, a damaged cache, an object store).
            WorkerDied: a worker ended.
            RuntimeError, OSError, EOFError: what else goes wrong between processes.
        """
        # Anonymous shared memory, which workers inherit: one number each.
        at = torch.full((max(workers, 1),), NOTHING, dtype=torch.int64).share_memory_()
        loader = DataLoader(
            replace(self, images=replace(self.images, at=at.numpy())),
            batch_size=None,
            sampler=range(start * self.parts, stop * self.parts),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            worker_init_fn=_begin_worker,
        )
        arriving = iter(loader)
        deaths = _Deaths(self, getattr(arriving, "_workers", []), at.numpy())
        if workers:
            # torch's handler raises the death of a worker anywhere, in the middle of an update too.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with deaths:
            for _ in range(start, stop):
                parts = []
                for _ in range(self.parts):
                    deaths.require_none()
                    try:
                        parts.append(_checked(next(arriving)).to(device))
                    except (RuntimeError, OSError, EOFError):
                        deaths.require_none()
                        raise
                yield Batch.join(parts)

    def __getitem__(self, item: int) -> Batch | LiftError:
        """A part, or the error that ends the run: raised here, a worker would wrap it in its own traceback."""
        step, part = divmod(item, self.parts)
        places = self._places[part * PART : (part + 1) * PART]
        which = slice(places.start, places.stop)
        try:
            if self.features is None:
                _read_ahead(self).of(step, which)
            return self._part(step, part, which)
        except LiftError as error:
            return error

    def _part(self, step: int, part: int, which: slice) -> Batch:
        index, epoch, wanted = self.images.index, self.sampler.epoch_of(step), self.sampler.batch(step, which)
        if self.features is not None:
            samples, pixels, bad = self.features.views(wanted, index, self.max_bad)
        else:
            samples, pixels, bad = self.images.train_views(
                wanted, self.seed, epoch, self.image_size, self.max_bad
            )
        pairs = self._pairs(epoch, samples)
        edges = [len(self._numbers) * p // self.parts for p in (part, part + 1)]
        numbers = np.array(self._numbers[slice(*edges)], np.int64)
        extra = draw_texts(self.seed, step, numbers, len(index.captions))
        known = index.pairs_of(samples) if self.negatives else np.empty((len(samples), 0), np.int64)
        return Batch(
            pixels=pixels,
            texts=tuple(_texts(text, index, pairs) for text in self.texts),
            captions=torch.from_numpy(_captions(index, pairs)),
            images=torch.from_numpy(samples),
            known=torch.from_numpy(_captions(index, known)),
            extra_texts=tuple(_gathered(text, extra) for text in self.texts),
            extra_captions=torch.from_numpy(extra),
            bad=list(bad.items()),
        )

    def _pairs(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """(Sample, caption) pairs that stand for samples: int64 [n], or [n, P] with −1 for absent ones."""
        index, counts = self.images.index, self.images.index.caption_counts(samples)
        first = index.first[samples]
        if self.captions.choice == "all":
            width = self.captions.width(index.most_captions)
            chosen = choose_several(self.seed, epoch, samples, counts, width)
            return np.where(chosen < 0, -1, first[:, None] + chosen)
        if self.captions.mix:
            table = index.pairs_of(samples)
            fields = np.where(table < 0, -1, index.field_of_pair[table].astype(np.int64))
            return first + choose_mixed(self.seed, epoch, samples, mix_weights(self.captions.mix, fields))
        return first + choose_caption(self.seed, epoch, samples, counts)


def _captions(index: Index, pairs: np.ndarray) -> np.ndarray:
    """Caption numbers of pairs; −1 of −1."""
    return np.where(pairs < 0, -1, index.pairs[pairs])


def _texts(text: TextVectors, index: Index, pairs: np.ndarray) -> torch.Tensor:
    """Vectors or tokens of pairs, [*pairs.shape, W]; zeros of −1."""
    present = pairs >= 0
    if isinstance(text, AlignedText):
        gathered = text.gather_pairs(pairs[present])
    else:
        gathered = text.gather(index.pairs[pairs[present]])
    if present.all():
        return torch.from_numpy(np.ascontiguousarray(gathered)).view(*pairs.shape, -1)
    out = np.zeros((*pairs.shape, gathered.shape[-1]), gathered.dtype)
    out[present] = gathered
    return torch.from_numpy(out)


def _gathered(text: TextVectors, captions: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(text.gather(captions)))


class _Deaths:
    """Watches the worker processes while the trainer computes."""

    def __init__(self, batches: Batches, workers: list[Any], at: np.ndarray) -> None:
        self._index, self._workers, self._at = batches.images.index, workers, at
        self._first: str | None = None
        self._closing, self._close = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._watch, name="watch workers", daemon=True)

    def __enter__(self) -> _Deaths:
        if self._workers:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()
        if self._workers:
            self._thread.join()
        self._closing.close()

    def require_none(self) -> None:
        """Raises WorkerDied."""
        if self._first is None:
            self._first = next(
                (self._obituary(w) for w, worker in enumerate(self._workers) if worker.exitcode), None
            )
        if self._first is not None:
            raise WorkerDied(self._first)

    def _watch(self) -> None:
        by_sentinel = {worker.sentinel: number for number, worker in enumerate(self._workers)}
        while by_sentinel:
            ended = wait([*by_sentinel, self._closing])
            if self._closing in ended:
                return
            for sentinel in ended:
                number = by_sentinel.pop(sentinel)
                if self._ended_badly(number) and self._first is None:
                    self._first = self._obituary(number)
                    print(f"a process that reads images died: {self._first}", file=sys.stderr, flush=True)

    def _ended_badly(self, number: int) -> bool:
        """The sentinel comes a moment before the exit status."""
        for _ in range(100):
            if (code := self._workers[number].exitcode) is not None:
                return code != 0
            time.sleep(0.01)
        return False

    def _obituary(self, number: int) -> str:
        worker, sample = self._workers[number], int(self._at[number])
        code = worker.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        doing = f"while it read {self._index.where(sample)}" if sample != NOTHING else "between two images"
        return f"process {worker.pid} was {how} {doing}"


_reading_ahead: ReadAhead | None = None
"""Of this process."""


def _read_ahead(batches: Batches) -> ReadAhead:
    global _reading_ahead  # noqa: PLW0603
    if _reading_ahead is None or not _reading_ahead.serves(batches.images, batches.sampler):
        _reading_ahead = ReadAhead(batches.images, batches.sampler)
    return _reading_ahead


def _checked(part: Batch | LiftError) -> Batch:
    if isinstance(part, LiftError):
        raise part
    return part


def _as_it_is(part: Any) -> Any:
    return part


def _begin_worker(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; only the training process answers, with
    a checkpoint, for which its workers must still be there. They end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    info = get_worker_info()
    assert info is not None
    images: ImageStore = info.dataset.images  # type: ignore[attr-defined]
    assert images.at is not None
    images.at = images.at[worker : worker + 1]
