"""Texts on the way of a run's training: the recipe's vectors → the run's transform → its text tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lift_cache.errors import BadConfig
from lift_cache.keys import normalise
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_trainer.config import TextShape, TrainConfig
from lift_trainer.samples import captions_only
from lift_trainer.text import HASHED, Control, TextVectors, TokenText, open_texts, true_texts
from lift_trainer.transform import TextTransform

TEXTS = 1024
"""At a time."""


def embed_distinct(captions: Sequence[str], embed: Callable[[Sequence[str]], torch.Tensor]) -> torch.Tensor:
    """Vectors of captions, [n, D], from those of the distinct, normalised ones. Raises BadCaption: one is empty."""
    texts = [normalise(caption) for caption in captions]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    y_ud = embed([*number])
    return y_ud[torch.tensor([number[text] for text in texts], device=y_ud.device)]


@dataclass(frozen=True)
class RunTexts:
    """Of several caches a run is evaluated with the texts of the first."""

    run: Path
    """Where what had to be embedded is kept."""
    config: TrainConfig
    recipe: Recipe | None
    """Of the first cache; None where a text transformer was trained, and for a control without a cache."""
    tower: nn.Module
    transform: TextTransform | None
    device: torch.device
    cache: str | None = None
    """With the captions; None: the run's own."""
    server: str | None = None
    """Embedder for what the cache lacks; the next evaluation embeds nothing."""

    def embed(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions → unit vectors, float32 [n, D]. Raises as `Encoder.embed_texts`, but vectors may not be finite."""
        return embed_distinct(captions, lambda texts: self.encode(self._open(texts), np.arange(len(texts))))

    def encode(self, text: TextVectors, captions: np.ndarray) -> torch.Tensor:
        """Caption numbers int64 [n] → unit vectors, float32 [n, D]."""
        encoded = []
        for start in range(0, len(captions), TEXTS):
            some = captions[start : start + TEXTS]
            stored = torch.from_numpy(np.ascontiguousarray(text.gather(some))).to(self.device)
            encoded.append(self.project(stored))
        return torch.cat(encoded)

    def project(self, stored_nd: torch.Tensor) -> torch.Tensor:
        """What a cache stores, or tokens → unit vectors, float32 [n, D]."""
        unit_nd: torch.Tensor = self.tower(self.transform(stored_nd) if self.transform else stored_nd)
        return unit_nd

    @property
    def control(self) -> Control:
        """A run on permuted captions is evaluated with the true vectors: it must be at chance by itself."""
        return true_texts(self.config.text_control)

    @cached_property
    def location(self) -> str | None:
        """PATH@SNAPSHOT of the cache, one for all that is asked; None where texts need none.

        Raises:
            RecipeMismatch: the cache holds vectors of another recipe (which field).
            BadConfig, CacheNotFound, CacheDamaged: there is no cache to take texts from.
        """
        if self.config.text_tower == "clip" or self.control in HASHED:
            return None
        if self.config.text == "aligned" and self.cache is None:
            raise BadConfig(f"{self.run} was trained on an export, which has no other captions; give --cache")
        reader = CacheReader(self.cache or self.config.cache[0])
        if self.recipe:
            self.recipe.require_same(reader.recipe, here="the training run", there=str(reader.path))
        return f"{reader.path}@{reader.snapshot_id}"

    @property
    def snapshot(self) -> str | None:
        return self.location.rpartition("@")[2] if self.location else None

    def _open(self, captions: Sequence[str]) -> TextVectors:
        """Vectors of distinct, normalised captions."""
        index = captions_only(captions)
        if self.config.text_tower == "clip":
            return TokenText(index.captions, TextShape.parse(self.config.text_shape).context)
        (text,), _, _ = open_texts(
            index,
            caches=[self.location] if self.location else [],
            control=self.control,
            on_missing="embed" if self.server else "error",
            server=self.server,
            overlay=self.run / "eval" / "overlay.safetensors",
        )
        return text
