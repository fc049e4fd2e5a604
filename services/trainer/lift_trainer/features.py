"""Kept features: what a frozen image tower makes of every image, computed once instead of in every epoch.

    <folder>/features.npy     float32 [n, width], row i of sample i: pooled states of the central view, before the head
    <folder>/features.json    of which data and which tower, what could not be read, and the digest of the rows

There is no augmentation then: a feature is of the view that evaluation uses. An image that cannot be read has a row
of zeros, which is never used; as everywhere, the next readable image stands in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache.errors import BadConfig, BadSource, CacheDamaged
from lift_cache.files import digest_file, publish, require_room, room_for, temporary_name, write_atomic
from lift_trainer.images import BadImage, ImageStore, center_view, next_sample
from lift_trainer.index_file import Progress
from lift_trainer.samples import Index

if TYPE_CHECKING:
    from lift_trainer.towers import ImageTower

ROWS, CARD = "features.npy", "features.json"

Precision = Literal["fp32", "bf16"]


class Card(BaseModel):
    """Of what features were made; equal cards but for the digest, equal features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    index: str
    """Digest of the sample index."""
    tower: str
    """`tower_digest`."""
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: Precision
    max_pixels: int
    samples: int
    width: int
    broken: dict[int, str]
    """Samples whose image could not be read, and why."""
    digest: str
    """BLAKE2b-128 of the file of rows."""

    def require(self, wanted: dict[str, object], folder: Path) -> None:
        """Raises BadSource: made of something else; says of what."""
        for field, value in wanted.items():
            if (here := getattr(self, field)) != value:
                raise BadSource(
                    f"{folder}: kept features of another {_NAMES[field]} ({here} there, {value} in this run); "
                    "delete them, or keep those of this run in another folder"
                )


_NAMES = {
    "index": "sample index",
    "tower": "image tower",
    "image_size": "image size",
    "mean": "mean of the pixels",
    "std": "standard deviation of the pixels",
    "precision": "precision",
    "max_pixels": "largest number of pixels",
    "samples": "number of samples",
    "width": "width",
}


def tower_digest(tower: ImageTower) -> str:
    """BLAKE2b-128 over what a tower's features depend on: weights, their names and types, and the pooling."""
    digest = hashlib.blake2b(tower.pooling.encode(), digest_size=16)
    for name, tensor in sorted(tower.vit.state_dict().items()):
        digest.update(f"\n{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureStore:
    """Kept features of all samples of an index."""

    folder: Path
    card: Card

    @property
    def width(self) -> int:
        return self.card.width

    @property
    def broken(self) -> dict[int, str]:
        """Samples whose image could not be read → reason."""
        return self.card.broken

    def gather(self, samples: np.ndarray) -> np.ndarray:
        """Sample numbers int64 [n] → features, float32 [n, width]. Raises CacheDamaged."""
        rows = _mapped(self.folder / ROWS, self.card.digest, self.card.samples, self.card.width)
        return np.asarray(rows[samples])

    def views(
        self, samples: np.ndarray, index: Index, max_bad: int
    ) -> tuple[np.ndarray, torch.Tensor, dict[int, str]]:
        """What `ImageStore.train_views` is for images.

        Returns:
            The samples really used, int64 [n]; float32 [n, width]; and the broken: sample → reason.

        Raises:
            BadSource: more than `max_bad` broken images in this batch.
            CacheDamaged.
        """
        used, bad = samples.copy(), dict[int, str]()
        for place in np.flatnonzero(np.isin(samples, [*self.broken])).tolist():
            while (sample := int(used[place])) in self.broken:
                used[place] = next_sample(index, sample, self.broken[sample], bad, max_bad)
        return used, torch.from_numpy(self.gather(used)), bad


def keep_features(
    folder: Path,
    images: ImageStore,
    tower: ImageTower,
    image_size: int,
    *,
    device: torch.device,
    max_bad: int,
    precision: Precision = "fp32",
    batch_size: int = 256,
) -> FeatureStore:
    """Open the features in a folder, or compute them where there are none.

    Of several ranks one calls this first, and the others when it is done. Takes nothing from any random stream.

    Args:
        tower: frozen, on the device.
        device, precision: for computing; the precision is part of what the features are.
        max_bad: how many images may be broken.

    Raises:
        BadConfig: the tower trains, so that its features change.
        BadSource: kept features are of something else (which field); too many broken images.
        CacheDamaged: not the bytes that were written.
        CacheFull.
    """
    if not tower.frozen:
        raise BadConfig("image features can be kept of a frozen tower only; this one trains")
    wanted: dict[str, object] = {
        "samples": len(images.index),
        "index": images.index.digest,
        "image_size": image_size,
        "width": tower.width,
        "mean": tuple(tower.mean.flatten().tolist()),
        "std": tuple(tower.std.flatten().tolist()),
        "tower": tower_digest(tower),
        "precision": precision,
        "max_pixels": images.max_pixels,
    }
    if (folder / CARD).exists():
        return _open(folder, wanted)
    rows, broken = folder / ROWS, dict[int, str]()
    folder.mkdir(parents=True, exist_ok=True)
    require_room(folder, 4 * len(images.index) * tower.width, ROWS)
    temporary = temporary_name(rows)
    with room_for(folder):
        try:
            shape = (len(images.index), tower.width)
            out = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            _reserve(temporary)
            for start, views, bad in _central_views(images, image_size, batch_size):
                broken |= bad
                if len(broken) > max_bad or len(broken) == len(out):
                    where, reason = next(iter(broken.items()))
                    raise BadSource(
                        f"{images.index.where(where)}: {reason}; {len(broken)} broken images, --max-bad is "
                        f"{max_bad}: repair the data, or raise the limit to train without them"
                    )
                kept = [start + place for place in range(len(views) + len(bad)) if start + place not in bad]
                if kept:
                    out[kept] = _features(tower, views, device, precision)
            out.flush()
            del out
            digest = digest_file(temporary)
            publish(temporary, rows)
        finally:
            temporary.unlink(missing_ok=True)
        card = Card.model_validate({**wanted, "broken": broken, "digest": digest})
        # Last: features without a card are none, and are computed again.
        write_atomic(folder / CARD, card.model_dump_json(indent=1).encode() + b"\n")
    return FeatureStore(folder, card)


def _open(folder: Path, wanted: dict[str, object]) -> FeatureStore:
    """Raises BadSource, CacheDamaged."""
    again = "delete the folder's features, and they are computed again"
    try:
        card = Card.model_validate(json.loads((folder / CARD).read_bytes()))
    except (OSError, ValueError, ValidationError) as error:
        line = str(error).partition("\n")[0]
        raise CacheDamaged(f"{folder / CARD} cannot be read ({line}); {again}") from None
    card.require(wanted, folder)
    try:
        digest = digest_file(folder / ROWS)
    except OSError as error:
        raise CacheDamaged(f"{folder / ROWS} cannot be read ({error.strerror or error}); {again}") from None
    if digest != card.digest:
        raise CacheDamaged(f"{folder / ROWS} is not what was written; {again}")
    return FeatureStore(folder, card)


@lru_cache(maxsize=2)
def _mapped(path: Path, digest: str, samples: int, width: int) -> np.ndarray:
    """Rows of a file that was verified under a digest. Raises CacheDamaged."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise CacheDamaged(f"{path} cannot be read ({error}); run the same command again") from None
    if rows.shape != (samples, width) or rows.dtype != np.float32:
        raise CacheDamaged(f"{path} was replaced meanwhile; run the same command again")
    return rows


def _reserve(path: Path) -> None:
    """Take the room of a sparse file now: a full disk would end a write to its map with SIGBUS. Raises OSError."""
    with path.open("r+b") as file, contextlib.suppress(AttributeError):
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _central_views(
    images: ImageStore, image_size: int, batch_size: int
) -> Iterator[tuple[int, list[torch.Tensor], dict[int, str]]]:
    """(First sample, readable views, broken: sample → reason) of consecutive samples, decoded one batch ahead."""
    count, progress = len(images.index), Progress()

    def view(sample: int) -> torch.Tensor | str:
        try:
            return center_view(images.pixels(sample), image_size)
        except BadImage as error:
            return str(error)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        ahead = pool.map(view, range(min(batch_size, count)))
        for start in range(0, count, batch_size):
            progress(f"computing features: {start:,} of {count:,} images")
            made = [*ahead]
            stop = start + len(made)
            ahead = pool.map(view, range(stop, min(stop + batch_size, count)))
            bad = {start + place: one for place, one in enumerate(made) if isinstance(one, str)}
            yield start, [one for one in made if not isinstance(one, str)], bad
    progress.end()


@torch.inference_mode()
def _features(
    tower: ImageTower, views: Sequence[torch.Tensor], device: torch.device, precision: Precision
) -> np.ndarray:
    """Central views, uint8 [3, S, S] each → features, float32 [n, width]."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return tower.features(torch.stack(list(views)).to(device)).float().cpu().numpy()
