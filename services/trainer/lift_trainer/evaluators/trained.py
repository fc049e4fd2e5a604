"""A trained run opened for evaluation: its tower, its text transform, and texts by the recipe of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lift_cache.errors import LiftError
from lift_trainer.checkpoint import MODEL, Checkpoint, require_checkpoint
from lift_trainer.evaluators.means import kept_mean, mean_image, mean_vector, sample_of
from lift_trainer.evaluators.result import Subject
from lift_trainer.evaluators.texts import RunTexts
from lift_trainer.job import choose_device, open_training_texts
from lift_trainer.model import LiftModel, build_model
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.transform import TextTransform


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
    cache: str | None = None
    server: str | None = None
    """See `RunTexts`."""
    batch_size: int = 256

    @classmethod
    def open(
        cls,
        run: Path,
        device: str = "auto",
        *,
        cache: str | None = None,
        server: str | None = None,
        batch_size: int = 256,
        checkpoint: Checkpoint | None = None,
    ) -> TrainedRun:
        """Load a checkpoint; default: the newest whole one. Raises CacheNotFound, CacheDamaged, BadConfig."""
        checkpoint, where = checkpoint or require_checkpoint(run), choose_device(device)
        widths = [text.dimensions for text in checkpoint.state.texts]
        model = build_model(checkpoint.state.config, widths, fetch=False)
        checkpoint.load_model(model)
        transforms = [transform.to(where) for transform in checkpoint.load_transforms()]
        return cls(
            run,
            checkpoint,
            model.to(where).eval(),
            next(iter(transforms), None),
            where,
            cache,
            server,
            batch_size,
        )

    @cached_property
    def texts(self) -> RunTexts:
        state = self.checkpoint.state
        return RunTexts(
            self.run,
            state.config,
            state.recipe,
            self.model.texts[0],
            self.transform,
            self.device,
            self.cache,
            self.server,
        )

    @property
    def image_size(self) -> int:
        return self.checkpoint.state.config.image_size

    @property
    def max_pixels(self) -> int:
        return self.checkpoint.state.config.max_pixels

    @property
    def subject(self) -> Subject:
        """Raises as `RunTexts.location`."""
        state = self.checkpoint.state
        return Subject(
            name=self.run.resolve().name,
            checkpoint=str(self.checkpoint.path),
            step=state.step,
            snapshot=self.texts.snapshot,
            recipe=state.recipe.fingerprint if state.recipe else None,
            text_control=state.config.text_control,
            text_transform=str(self.transform.spec) if self.transform else "none",
        )

    @torch.inference_mode()
    def embed_images(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self._finite("image", self.model.tower(views_n3ss.to(self.device)))

    @torch.inference_mode()
    def features(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self._finite("image", self.model.tower.features(views_n3ss.to(self.device)))

    @torch.inference_mode()
    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        return self._finite("text", self.texts.embed(captions))

    def _finite(self, kind: str, vectors_nd: torch.Tensor) -> torch.Tensor:
        if not vectors_nd.isfinite().all():
            raise LiftError(
                f"{self.checkpoint.path}: it makes {kind} vectors that are not finite; delete it to use the "
                "checkpoint before, or train anew with a lower --lr"
            )
        return vectors_nd

    # ---- means over the training data

    def mean_image(self) -> torch.Tensor | None:
        return self._kept("image", self._mean_image)

    def mean_text(self) -> torch.Tensor | None:
        return self._kept("text", self._mean_text)

    def _kept(self, kind: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        weights = self.checkpoint.state.files[MODEL][:12]
        return kept_mean(kind, self.run / "eval" / f"mean-{kind}-{weights}.safetensors", compute, self.device)

    def _training_sample(self, rejects: Rejects) -> Index:
        config = self.checkpoint.state.config
        index = build_index(
            config.data,
            rejects,
            caption_fields=config.caption_field,
            images=config.images,
            image_field=config.image_field,
        )
        return sample_of(index)

    def _mean_image(self) -> torch.Tensor:
        rejects = Rejects(self.checkpoint.state.config.max_bad)
        return mean_image(self._training_sample(rejects), self, rejects)

    @torch.inference_mode()
    def _mean_text(self) -> torch.Tensor:
        config = self.checkpoint.state.config
        texts, index, _ = open_training_texts(
            config,
            self._training_sample(Rejects(config.max_bad)),
            config.cache[:1],
            self.run / "overlay.safetensors",
            control=self.texts.control,
        )
        return mean_vector(self.texts.encode(texts[0], np.unique(index.pairs)))
