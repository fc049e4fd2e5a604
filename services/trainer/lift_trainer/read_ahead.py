"""Reading ahead of the order, so that a disk or an object store is read in runs although samples come shuffled.

While one window of the order is in use, the blocks of the next are read one after the other: into the system's page
cache, or into the local pieces of an object store. Nothing is read ahead where there is no room to keep it until it
is needed, and whatever is read ahead or not, the samples are the same.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from pathlib import Path

from lift_cache.errors import LiftError
from lift_trainer.images import ImageStore
from lift_trainer.sampling import Sampler
from lift_trainer.shards import LocalShard, PieceCache, RemoteShard

STEPS = 2
"""Batches of a full permutation whose remote images are fetched ahead."""

WAITING = 64
"""Ranges in the queue; further ones are read when they are needed."""

Range = tuple[LocalShard | RemoteShard, int, int]


class ReadAhead:
    """Of one process: one thread that reads, begun with the first range."""

    def __init__(self, images: ImageStore, sampler: Sampler) -> None:
        self._images, self._sampler = images, sampler
        index = images.index
        window = sampler.shuffle.window
        self._blocks = len(index) > window and _room(remote=index.is_remote) > 2 * (
            index.image_bytes_in_all / len(index) * window
        )
        self._steps = STEPS if index.is_remote and not self._blocks else 0
        self._queue: queue.Queue[Range] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None

    def serves(self, images: ImageStore, sampler: Sampler) -> bool:
        return images is self._images and sampler is self._sampler

    def of(self, step: int, which: slice) -> None:
        """Read what comes after a part of a batch, in the background."""
        if self._images.in_memory:
            return
        if self._blocks:
            runs = self._sampler.ahead(step, which)
        elif self._steps:
            samples = self._sampler.batch(step + self._steps, which).tolist()
            runs = [range(sample, sample + 1) for sample in samples]
        else:
            return
        for run in runs:
            for where in self._images.index.byte_ranges(run):
                with contextlib.suppress(queue.Full):
                    self._queue.put_nowait(where)
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="read ahead", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        while True:
            shard, offset, size = self._queue.get()
            with contextlib.suppress(LiftError, OSError):  # raised where the image itself is read
                shard.read_ahead(offset, size)


def _room(*, remote: bool) -> float:
    """Bytes for images that wait."""
    if remote:
        return PieceCache.default().budget
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
