"""Images of a task → vectors of those that can be read; the others are named and counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lift_cache.errors import BadSource
from lift_cache.tools.common import progress
from lift_trainer.evaluators.protocol import Encoder
from lift_trainer.images import BadImage, center_view, decode
from lift_trainer.rejects import Rejects


class Images(Protocol):
    """Encoded images by number: a sample index is one, a folder of files another."""

    @property
    def names(self) -> Sequence[str]:
        """Of each, wherever the images lie."""
        ...

    def __len__(self) -> int: ...

    def where(self, sample: int) -> str:
        """What to call an image in messages."""

    def shard(self, sample: int) -> str:
        """The tar that holds an image, or the image's own path."""

    def image_bytes(self, sample: int) -> bytes:
        """Raises OSError."""


@dataclass(frozen=True)
class ImageFiles:
    """Files of a folder."""

    folder: Path
    names: Sequence[str]
    """From the folder."""

    def __len__(self) -> int:
        return len(self.names)

    def where(self, sample: int) -> str:
        return str(self.folder / self.names[sample])

    def shard(self, sample: int) -> str:
        return self.where(sample)

    def image_bytes(self, sample: int) -> bytes:
        return (self.folder / self.names[sample]).read_bytes()


def encode(
    images: Images,
    encoder: Encoder,
    rejects: Rejects,
    what: str = "images",
    *,
    by: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors of all readable images.

    Args:
        what: they are, for the progress bar.
        by: what makes vectors of views; default: `encoder.embed_images`.

    Returns:
        float32 [n, D] and the number of each image, int64 [n], ascending.

    Raises:
        BadSource: too many broken images, or no readable one.
    """
    by = by or encoder.embed_images
    vectors: list[torch.Tensor] = []
    kept: list[np.ndarray] = []
    with progress(len(images), what) as advance:
        for numbers, views in central_views(
            images,
            np.arange(len(images)),
            encoder.image_size,
            encoder.max_pixels,
            encoder.batch_size,
            rejects,
        ):
            vectors.append(by(views))
            kept.append(numbers)
            advance(len(numbers))
    if not kept:
        raise BadSource(f"none of the {len(images):,} {what} can be read")
    return torch.cat(vectors), np.concatenate(kept)


def central_views(
    images: Images, order: np.ndarray, size: int, max_pixels: int, chunk: int, rejects: Rejects
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Read images in an order (int64 [n]), one chunk while another is in use.

    Yields:
        Numbers of readable ones, int64 [k], and their central views, uint8 [k, 3, S, S].

    Raises:
        BadSource: too many broken images.
    """

    def view(number: int) -> torch.Tensor | str:
        try:
            return center_view(decode(images.image_bytes(number), max_pixels), size)
        except BadImage as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    chunks = [order[start : start + chunk] for start in range(0, len(order), chunk)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        reading = pool.map(view, chunks[0].tolist() if chunks else [])
        for numbers, following in zip(chunks, [*chunks[1:], order[:0]], strict=True):
            found, reading = list(reading), pool.map(view, following.tolist())
            readable = np.array([not isinstance(one, str) for one in found])
            for number, one in zip(numbers.tolist(), found, strict=True):
                if isinstance(one, str):
                    rejects.add(images.where(number), one)
            if readable.any():
                yield numbers[readable], torch.stack([one for one in found if not isinstance(one, str)])
