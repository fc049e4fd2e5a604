"""Images: encoded bytes → uint8 pixels → a random crop (training) or the centre (evaluation).

As in the authors' code: RandomResizedCrop of scale (0.9, 1.0), bicubic with antialiasing, no horizontal
flip (captions say left and right), OpenAI's mean and standard deviation (held by the tower).
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from lift_cache.errors import BadSource
from lift_trainer.formats import BROKEN, eight_bit, open_image
from lift_trainer.samples import Index
from lift_trainer.sampling import crop_boxes

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

GIB = 1 << 30

MAX_ASPECT = 200
"""Long side over short side. Evaluation resizes by the short side: an image one pixel high would fill the memory."""

AT_ONCE = 32 << 20
"""Bytes of decoded images that wait for their crops, so that small images still share the choice of boxes."""

NOTHING = -1
"""In `ImageStore.at`: no sample is being read or decoded."""

Image.MAX_IMAGE_PIXELS = None  # `decode` has its own limit; Pillow's would only warn


class BadImage(Exception):
    """An image that cannot be decoded, or is too large to try; the text is the reason."""


def decode(data: bytes, max_pixels: int) -> torch.Tensor:
    """Decode to RGB, transparency over white, 16-bit grey to 8 bits: uint8 [3, height, width].

    The orientation that a camera wrote beside the pixels (EXIF) is not applied, as in open_clip.

    Raises:
        BadImage: not an image, cut short, or more than `max_pixels` or thinner than 1 : MAX_ASPECT (judged by
            the header, before decoding).
    """
    try:
        with open_image(data) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise BadImage(f"{width} × {height} pixels, more than --max-pixels {max_pixels}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BadImage(f"{width} × {height} pixels, thinner than 1 : {MAX_ASPECT}")
            image = eight_bit(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image_rgba = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                rgb = Image.alpha_composite(white, image_rgba).convert("RGB")
            else:
                rgb = image.convert("RGB")
    except BROKEN as error:
        raise BadImage(str(error).partition("\n")[0] or type(error).__name__) from None
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _resize(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    return TF.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


def center_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """Evaluation's view: short side to `size`, then the central square. uint8 [3, size, size]."""
    return TF.center_crop(_resize(image, [size]), [size, size])


def _crop(
    images: list[torch.Tensor], views_b3ss: torch.Tensor, seed: int, epoch: int, samples: np.ndarray
) -> None:
    """Write the random crops of some images into their views."""
    size = list(views_b3ss.shape[-2:])
    sizes = np.array([image.shape[1:] for image in images], np.int64)
    boxes = crop_boxes(seed, epoch, samples, sizes).tolist()
    for view, image, (top, left, height, width) in zip(views_b3ss, images, boxes, strict=True):
        view.copy_(_resize(image[:, top : top + height, left : left + width], size))


def next_sample(index: Index, sample: int, reason: str, bad: dict[int, str], max_bad: int) -> int:
    """The sample that is tried in the place of a broken one, which is noted in `bad`.

    Raises:
        BadSource: more than `max_bad` of them in a batch, or no other image.
    """
    bad[sample] = reason
    if len(bad) > max_bad or len(bad) == len(index):
        where, first = next(iter(bad.items()))
        raise BadSource(
            f"{index.where(where)}: {first}; {len(bad)} broken images in one batch, "
            f"--max-bad is {max_bad}: repair the data, or raise the limit to train without them"
        )
    return (sample + 1) % len(index)


@dataclass
class ImageStore:
    """Decoded images of an index, from memory where they were preloaded, else from their files."""

    index: Index
    max_pixels: int
    preloaded: Preloaded | None = None
    at: np.ndarray | None = None
    """int64 [1], shared with the training process: the sample being read or decoded, for when this is the last."""

    def pixels(self, sample: int) -> torch.Tensor:
        """uint8 [3, height, width]. Raises BadImage."""
        if self.preloaded is not None:
            return self.preloaded[sample]
        try:
            return decode(self.index.image_bytes(sample), self.max_pixels)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None

    @property
    def in_memory(self) -> bool:
        return self.preloaded is not None

    @property
    def broken(self) -> dict[int, str]:
        """Broken images that preloading met: sample → reason."""
        return self.preloaded.broken if self.preloaded else {}

    def train_views(
        self, samples: np.ndarray, seed: int, epoch: int, size: int, max_bad: int
    ) -> tuple[np.ndarray, torch.Tensor, dict[int, str]]:
        """Random crops of a batch, each a function of (seed, epoch, sample).

        A broken image is replaced by the next readable one in index order, with that one's captions. So it
        changes one place of its batch and nothing else: the batch keeps its size, the order stays a function
        of the data, and every worker or rank that meets it decides alike.

        Returns:
            The samples really used, int64 [n]; uint8 [n, 3, size, size]; and the broken: sample → reason.

        Raises:
            BadSource: more than `max_bad` broken images in this batch.
        """
        bad: dict[int, str] = {}
        used = np.empty(len(samples), np.int64)
        views = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
        waiting: list[torch.Tensor] = []
        held = 0
        for place, sample in enumerate(samples.tolist()):
            used[place], image = self._readable(sample, bad, max_bad)
            waiting.append(image)
            held += image.numel()
            if held > AT_ONCE or place + 1 == len(samples):
                done = slice(place + 1 - len(waiting), place + 1)
                _crop(waiting, views[done], seed, epoch, used[done])
                waiting, held = [], 0
        if self.at is not None:
            self.at[0] = NOTHING
        return used, views, bad

    def _readable(self, sample: int, bad: dict[int, str], max_bad: int) -> tuple[int, torch.Tensor]:
        while True:
            if self.at is not None:
                self.at[0] = sample
            try:
                return sample, self.pixels(sample)
            except BadImage as error:
                sample = next_sample(self.index, sample, str(error), bad, max_bad)

    def preload(self, budget: int) -> bool:
        """Decode every image into memory if all fit into `budget` bytes; returns whether they did.

        A few of them tell beforehand whether it is worth starting.
        """
        probe = np.linspace(0, len(self.index) - 1, num=min(32, len(self.index)), dtype=np.int64)
        mean = np.mean(
            [image.numel() for image in map(self._try, probe.tolist()) if isinstance(image, torch.Tensor)]
            or [0]
        )
        if mean * len(self.index) > budget:
            return False
        images: list[torch.Tensor | str] = []
        ahead: deque[Future[torch.Tensor | str]] = deque()
        total, threads = 0, min(16, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            for sample in range(len(self.index) + threads):
                if sample < len(self.index):
                    ahead.append(pool.submit(self._try, sample))
                if sample < threads or not ahead:
                    continue
                image = ahead.popleft().result()
                images.append(image)
                total += image.numel() if isinstance(image, torch.Tensor) else 0
                if total > budget:
                    return False
        self.preloaded = Preloaded.pack(images)
        return True

    def _try(self, sample: int) -> torch.Tensor | str:
        try:
            return self.pixels(sample)
        except BadImage as error:
            return str(error)


@dataclass(frozen=True)
class Preloaded:
    """Decoded images end to end in one buffer, which forked workers share because nobody writes to it."""

    buffer: torch.Tensor
    """uint8 [bytes]: images as height × width × 3."""
    start: np.ndarray
    """int64 [n]."""
    sizes: np.ndarray
    """int64 [n, 2]: height, width."""
    broken: dict[int, str]

    @classmethod
    def pack(cls, images: list[torch.Tensor | str]) -> Preloaded:
        """Images, or the reason why there is none."""
        sizes = np.array(
            [(0, 0) if isinstance(image, str) else image.shape[1:] for image in images], np.int64
        )
        ends = np.cumsum(sizes.prod(1) * 3)
        buffer = torch.empty(int(ends[-1]), dtype=torch.uint8)
        start = np.concatenate([[0], ends[:-1]])
        broken = {}
        for number, image in enumerate(images):
            if isinstance(image, str):
                broken[number] = image
            else:
                buffer[start[number] : ends[number]] = image.permute(1, 2, 0).reshape(-1)
        return cls(buffer, start, sizes, broken)

    def __getitem__(self, sample: int) -> torch.Tensor:
        """uint8 [3, height, width], a view. Raises BadImage."""
        if sample in self.broken:
            raise BadImage(self.broken[sample])
        height, width = self.sizes[sample].tolist()
        flat = self.buffer[self.start[sample] : self.start[sample] + height * width * 3]
        return flat.view(height, width, 3).permute(2, 0, 1)
