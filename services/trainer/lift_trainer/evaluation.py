"""A trained run opened for evaluation: its tower, its text transform, and texts by the recipe of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lift_cache.errors import BadConfig, BadSource, LiftError
from lift_trainer.checkpoint import Checkpoint, require_checkpoint
from lift_trainer.config import TextShape
from lift_trainer.images import BadImage, ImageStore, center_view
from lift_trainer.job import choose_device
from lift_trainer.model import LiftModel, build_model
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index
from lift_trainer.text import TextVectors, TokenText, open_texts
from lift_trainer.transform import TextTransform

TEXTS = 1024
"""At a time."""


@dataclass(frozen=True)
class TrainedRun:
    """A run opened for evaluation."""

    run: Path
    """Where it was opened, not where it was trained: a run may have been copied since."""
    checkpoint: Checkpoint
    model: LiftModel
    transform: TextTransform | None
    """Of the first cache, whose texts a run is evaluated with; None where a text transformer was trained."""
    device: torch.device

    @classmethod
    def open(cls, run: Path, device: str = "auto") -> TrainedRun:
        """Load the newest whole checkpoint. Raises CacheNotFound, CacheDamaged, BadConfig."""
        checkpoint, where = require_checkpoint(run), choose_device(device)
        widths = [text.dimensions for text in checkpoint.state.texts]
        model = build_model(checkpoint.state.config, widths, fetch=False)
        checkpoint.load_model(model)
        transforms = [transform.to(where) for transform in checkpoint.load_transforms()]
        return cls(run, checkpoint, model.to(where).eval(), next(iter(transforms), None), where)

    @torch.inference_mode()
    def embed_images(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Central views, uint8 [3, S, S] each → unit vectors, float32 [n, D], in fp32. Raises LiftError."""
        return self._finite("image", self.model.tower(torch.stack(list(views)).to(self.device)))

    @torch.inference_mode()
    def embed_texts(self, text: TextVectors, captions: np.ndarray) -> torch.Tensor:
        """Caption numbers int64 [n] → unit vectors, float32 [n, D], as in training. Raises LiftError."""
        encoded = []
        for start in range(0, len(captions), TEXTS):
            some = captions[start : start + TEXTS]
            stored = torch.from_numpy(np.ascontiguousarray(text.gather(some))).to(self.device)
            encoded.append(self.model.texts[0](self.transform(stored) if self.transform else stored))
        return self._finite("text", torch.cat(encoded))

    def _finite(self, kind: str, vectors_nd: torch.Tensor) -> torch.Tensor:
        if not vectors_nd.isfinite().all():
            raise LiftError(
                f"{self.checkpoint.path}: it makes {kind} vectors that are not finite; delete it to use the "
                "checkpoint before, or train anew with a lower --lr"
            )
        return vectors_nd

    def open_text(
        self, index: Index, *, cache: str | None = None, server: str | None = None
    ) -> tuple[TextVectors, str | None]:
        """The texts of an evaluation index, made by the recipe of training; and the snapshot they are from.

        A run on permuted captions is evaluated with the true vectors: it must be at chance by itself.

        Raises:
            RecipeMismatch: the cache holds vectors of another recipe (which field).
            MissingCaptions: the cache lacks some, and no server was given.
        """
        state = self.checkpoint.state
        if self.model.joint:
            return TokenText(index.captions, TextShape.parse(state.config.text_shape).context), None
        where = cache or next(iter(state.config.cache), None)
        if state.config.text == "aligned" and cache is None:
            raise BadConfig(f"{self.run} was trained on an export, which has no other captions; give --cache")
        (text,), _, (origin,) = open_texts(
            index,
            caches=[where] if where else [],
            control="ngram-hash" if state.config.text_control == "ngram-hash" else "none",
            on_missing="embed" if server else "error",
            server=server,
            overlay=self.run / "eval" / "overlay.safetensors",
        )
        if state.recipe and origin.recipe:
            state.recipe.require_same(origin.recipe, here="the training run", there=str(where))
        return text, origin.snapshot


def embed_index(
    trained: TrainedRun, index: Index, rejects: Rejects, batch_size: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors of all readable images, float32 [n, D], and their sample numbers, int64 [n].

    Raises:
        BadSource: too many broken images, or no readable one.
    """
    config = trained.checkpoint.state.config
    store = ImageStore(index, config.max_pixels)
    vectors: list[torch.Tensor] = []
    kept: list[int] = []
    for start in range(0, len(index), batch_size):
        views = []
        for sample in range(start, min(start + batch_size, len(index))):
            try:
                views.append(center_view(store.pixels(sample), config.image_size))
                kept.append(sample)
            except BadImage as error:
                rejects.add(index.where(sample), str(error))
        if views:
            vectors.append(trained.embed_images(views))
    if not kept:
        raise BadSource("--data: no readable image in it")
    return torch.cat(vectors), np.array(kept, np.int64)
