"""A model while it is trained, as an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lift_trainer.evaluators.result import Subject
from lift_trainer.evaluators.texts import RunTexts
from lift_trainer.model import LiftModel

if TYPE_CHECKING:
    from lift_trainer.job import Job


@dataclass(frozen=True)
class LiveRun:
    """To be asked in evaluation mode, without gradient. Vectors that are not finite are wrong, and training goes on."""

    model: LiftModel
    """Of the job, as it is at the time."""
    texts: RunTexts
    batch_size: int = 256

    @classmethod
    def open(cls, job: Job) -> LiveRun:
        """The model of a job, with its cache at the run's snapshot. Raises as `RunTexts.location`."""
        config = job.config
        texts = RunTexts(
            run=config.run,
            config=config,
            recipe=job.origins[0].recipe if job.origins else None,
            tower=job.model.texts[0],
            transform=job.transforms[0] if job.transforms else None,
            device=job.device,
            cache=job.caches[0] if job.caches and config.text == "cache" else None,
            server=config.server if config.on_missing == "embed" else None,
        )
        _ = texts.location
        return cls(job.model, texts)

    @property
    def image_size(self) -> int:
        return self.texts.config.image_size

    @property
    def max_pixels(self) -> int:
        return self.texts.config.max_pixels

    @property
    def subject(self) -> Subject:
        return Subject(name=self.texts.run.name, checkpoint=str(self.texts.run), snapshot=self.texts.snapshot)

    def embed_images(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self.model.encode_images(views_n3ss.to(self.texts.device))

    def features(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self.model.tower.features(views_n3ss.to(self.texts.device))

    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        return self.texts.embed(captions)

    def mean_image(self) -> None:
        """It would take all training images, each time."""

    def mean_text(self) -> None:
        """As for images."""
