"""What evaluators and encoders are to each other.

An encoder is a checkpoint with its way from captions to vectors: the recipe and the text transform of its training
(`TrainedRun`), or a released file. An evaluator holds the data of one task and knows nothing of how vectors are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lift_trainer.evaluators.result import Result, Subject

NEAR = 1e-5
"""Difference of two cosines that another batch size or device could turn around."""


class Encoder(Protocol):
    """A checkpoint opened for evaluation; both sides end in one space of width D."""

    @property
    def image_size(self) -> int:
        """Pixels: images are brought to their central view of S × S."""
        ...

    @property
    def max_pixels(self) -> int:
        """Images of more pixels are left out as broken."""
        ...

    @property
    def batch_size(self) -> int:
        """Images at a time; it changes no score."""
        ...

    @property
    def subject(self) -> Subject:
        """What stands in the head of every result."""
        ...

    def embed_images(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        """Central views, uint8 [n, 3, S, S] → unit vectors, float32 [n, D]. Raises LiftError: not finite."""

    def features(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        """The same views → states before the head, float32 [n, W], as probes take them. Raises LiftError."""

    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions → unit vectors, float32 [n, D]: embedded or looked up, transformed, as in training.

        Raises:
            BadCaption: one is empty.
            MissingCaptions: the cache lacks some, and no server was given.
            RecipeMismatch: cache or server make other vectors than the training had (which field).
            LiftError: not finite.
        """

    def mean_image(self) -> torch.Tensor | None:
        """Mean of the training images' unit vectors, float32 [D], for blind scores; None when none are at hand."""

    def mean_text(self) -> torch.Tensor | None:
        """Mean of the training captions' unit vectors, float32 [D]; None when none are at hand."""


class Evaluator(Protocol):
    """One task on one set of data."""

    @property
    def task(self) -> str: ...

    @property
    def protocol(self) -> str:
        """Which rules of the task."""
        ...

    @property
    def name(self) -> str:
        """Of the data."""
        ...

    @property
    def scores(self) -> Sequence[str]:
        """Names of all that it can score, known before anything is computed; of each the higher value is better."""
        ...

    def evaluate(self, encoder: Encoder) -> Result:
        """Raises LiftError: data that cannot be used, an encoder that cannot answer."""
