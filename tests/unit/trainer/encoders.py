"""An encoder whose vectors a test chooses: images are squares of one grey, which is their number."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from lift_cache.keys import normalise
from lift_trainer.evaluators.result import Subject

SIDE = 8


def numbered(number: int) -> bytes:
    """A PNG that says which image it is, 0 … 255."""
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number, number, number)).save(out, "png")
    return out.getvalue()


@dataclass
class Known:
    images: np.ndarray
    """float32 [n, D]: the vector of each numbered image."""
    texts: Mapping[str, np.ndarray]
    """Normalised caption → float32 [D]."""
    mean: np.ndarray | None = None
    name: str = "known"
    batch_size: int = 4
    image_size: int = SIDE
    max_pixels: int = 10**6
    asked: list[str] = field(default_factory=list)

    @property
    def subject(self) -> Subject:
        return Subject(name=self.name, checkpoint=self.name)

    def embed_images(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.images)[views_n3ss[:, 0, 0, 0].long()]

    def features(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self.embed_images(views_n3ss)

    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        self.asked += captions
        return torch.from_numpy(np.stack([self.texts[normalise(caption)] for caption in captions]))

    def mean_image(self) -> torch.Tensor | None:
        return None if self.mean is None else torch.from_numpy(self.mean)

    def mean_text(self) -> torch.Tensor | None:
        return None
