"""What is exported: the towers of a run, in float32 on the CPU, and the run's record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lift_cache.recipe import Recipe
from lift_trainer.config import RESUMABLE, HeadName, ViTShape
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.heads import GatedHead, LinearHead, MLPHead, NoHead, ShareLockHead
from lift_trainer.text_towers import CachedTextTower, ClipTextTower
from lift_trainer.towers import ImageTower
from lift_trainer.transform import TextTransform

TextTower = CachedTextTower | ClipTextTower
Encode = Callable[[torch.Tensor], torch.Tensor]
"""uint8 [B, 3, S, S] → unit vectors, float32 [B, D]."""

HEADS: dict[type[nn.Module], HeadName] = {
    NoHead: "none",
    LinearHead: "linear",
    MLPHead: "mlp",
    GatedHead: "gated",
    ShareLockHead: "sharelock",
}


@dataclass(frozen=True)
class TextSide:
    """What a caption goes through before it is compared with an image: one cache, or a trained text tower."""

    transform: TextTransform | None = None
    """Of cached vectors; None where the caption itself is read."""
    recipe: Recipe | None = None
    """How the cached vectors were made; None for a trained text tower and for the n-gram control."""
    snapshot: str | None = None
    tower: TextTower | None = None
    """Trained with the images; None where the transformed vectors are compared as they are."""


@dataclass(frozen=True)
class Source:
    """Everything that an export says, whatever its layout."""

    name: str
    """Of the model, for its card."""
    architecture: str
    """As `--tower`: a timm name, or `vit:width=…`."""
    tower: ImageTower
    texts: tuple[TextSide, ...]
    logit_scale: float | None = None
    """Logarithm of what the loss multiplied cosines with; None where it used none."""
    logit_bias: float | None = None
    training: dict[str, Any] = field(default_factory=dict)
    """JSON: settings, steps, data, software."""
    run: Path | None = None
    """Where its evaluations lie."""

    def __post_init__(self) -> None:
        for tower in (self.tower, *(side.tower for side in self.texts)):
            if tower is not None:
                tower.eval().float().cpu().requires_grad_(False)

    @property
    def image_size(self) -> int:
        """Side, in pixels."""
        return int(self.tower.vit.patch_embed.img_size[0])

    @property
    def head(self) -> HeadName:
        return HEADS[type(self.tower.head)]

    @property
    def dimensions(self) -> int:
        """Width of the exported vectors."""
        return int(self.tower.head.dimensions)  # type: ignore[arg-type]

    @property
    def mean(self) -> list[float]:
        """Of pixels in [0, 1], per channel."""
        return _shortest(self.tower.mean)

    @property
    def std(self) -> list[float]:
        return _shortest(self.tower.std)


def _shortest(values: torch.Tensor) -> list[float]:
    """float32 as the shortest decimals that mean the same float32."""
    return [float(str(value)) for value in values.flatten().numpy()]


def source_of(trained: TrainedRun, name: str) -> Source:
    """The newest checkpoint of a run; the only function here that knows how a checkpoint is laid out."""
    state, model = trained.checkpoint.state, trained.model
    scale, bias = (getattr(model.loss, part, None) for part in ("log_scale", "bias"))
    settings = {name: value for name, value in state.config.saved().items() if name not in RESUMABLE}
    if model.joint:
        texts = [TextSide(tower=model.texts[0])]  # type: ignore[arg-type]
    else:
        texts = [
            TextSide(transform, text.recipe, text.snapshot, tower if tower.trains else None)  # type: ignore[arg-type]
            for transform, text, tower in zip(
                trained.checkpoint.load_transforms(), state.texts, model.texts, strict=True
            )
        ]
    return Source(
        name=name,
        architecture=state.config.tower,
        tower=model.tower,
        texts=tuple(texts),
        logit_scale=None if scale is None else float(scale.detach()),
        logit_bias=None if bias is None else float(bias.detach()),
        training={
            "step": state.step,
            "total_steps": state.total_steps,
            "settings": settings,
            "sample_index": state.index_digest,
            "software": state.libraries,
            "left_out": len(state.bad),
        },
        run=trained.run,
    )


def timm_arguments(source: Source) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments with which `timm.create_model` builds the tower, without its head.

    Two sets of pooled states have to be taken from its tokens: it then does not pool.
    """
    pool = {"mean": "avg", "class": "token", "class+mean": ""}[source.tower.pooling]
    common: dict[str, Any] = {"img_size": source.image_size, "global_pool": pool, "fc_norm": False}
    if not source.architecture.startswith("vit:"):
        return source.architecture, common
    shape = ViTShape.parse(source.architecture)
    return "vit_base_patch16_224", common | {
        "patch_size": shape.patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "class_token": False,
    }
