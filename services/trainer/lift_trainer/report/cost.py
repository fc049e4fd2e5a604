"""What runs cost: operations by count, time by the clock, and the texts' one pass through their encoder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from pydantic import ValidationError

from lift_cache.errors import BadConfig, LiftError
from lift_cache.tools.costs import find_encoder
from lift_trainer.config import TrainConfig
from lift_trainer.flops import StepShape, contrast_flops, image_flops, text_flops
from lift_trainer.model import build_model
from lift_trainer.report.runs import CacheCard, FillSummary, Run
from lift_trainer.sampling import Captions


@dataclass(frozen=True)
class Embedding:
    """Captions that went through the frozen text encoder, once for all runs on their cache."""

    captions: int
    tokens: int
    flops: float | None
    """By the encoder's shape and the mean length; None where that is not known."""
    seconds: float | None
    """From the fill's summary."""


@dataclass(frozen=True)
class Cost:
    per_image: int | None
    """Operations, forward and backward, of an image with its texts; None where the settings do not say."""
    samples: int
    seconds: float
    """Of the clock."""
    device: str | None
    devices: int
    encoder: bool
    """Whether texts came from a frozen encoder."""
    embedding: Embedding | None
    """None without one, or where its cache is not at hand."""

    @property
    def flops(self) -> int | None:
        return None if self.per_image is None else self.per_image * self.samples

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.devices


def cost_of(run: Run, card: CacheCard | None, fill: FillSummary | None) -> Cost:
    """
    Args:
        card: of the run's cache.
        fill: of the same cache.
    """
    libraries = run.state.libraries
    return Cost(
        per_image=flops_per_image(run),
        samples=run.samples,
        seconds=run.seconds,
        device=libraries.get("device"),
        devices=int(libraries.get("devices", "1")),
        encoder=run.state.recipe is not None,
        embedding=_embedding(card, fill) if card else None,
    )


def _embedding(card: CacheCard, fill: FillSummary | None) -> Embedding:
    manifest, flops = card.manifest, None
    with contextlib.suppress(LiftError):  # not an encoder whose shape is known
        shape = find_encoder(manifest.recipe.model).shape
        flops = float(shape.flops(np.asarray(manifest.tokens / max(manifest.rows, 1)))) * manifest.rows
    return Embedding(manifest.rows, manifest.tokens, flops, fill.seconds if fill else None)


def flops_per_image(run: Run) -> int | None:
    """As `lift-train --dry-run` counts them, on one device."""
    widths = [text.dimensions for text in run.state.texts]
    if None in widths:
        return None
    settings = {field: value for field, value in run.settings.items() if field not in ("run", "seed")}
    return _counted(json.dumps(settings, sort_keys=True), tuple(width for width in widths if width))


@lru_cache(maxsize=64)
def _counted(settings: str, widths: Sequence[int]) -> int | None:
    try:
        config = TrainConfig.model_validate(json.loads(settings))
        with torch.random.fork_rng(devices=[]):
            model = build_model(config, widths, fetch=False)
    except (ValidationError, BadConfig):  # of another version, or of an architecture that is not installed
        return None
    captions = Captions(config.captions, config.most_captions, tuple(config.caption_mix)).width(
        config.most_captions
    )
    shape = StepShape(
        config.batch_size, config.image_size, captions, config.text_negatives * len(model.texts)
    )
    flops = image_flops(model.tower, config.image_size, features=config.keep_features)
    for text in model.texts:
        flops += text_flops(text) * captions  # type: ignore[arg-type]
    flops += contrast_flops(
        shape.columns(len(model.texts)),
        model.texts[0].dimensions,  # type: ignore[arg-type]
        texts_train=any(text.trains for text in model.texts),
        images_train=any(p.requires_grad for p in model.tower.parameters()),
    )
    return flops.step
