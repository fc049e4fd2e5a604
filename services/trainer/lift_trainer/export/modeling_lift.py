"""A LIFT image encoder for transformers: pixels → vision transformer (timm) → pooled states → head → unit vector.

Copied by `lift-export --to huggingface` into a folder whose head no class of transformers has; needs
transformers, timm and torch, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


class LiftImageConfig(PretrainedConfig):
    model_type = "lift_image"

    def __init__(
        self,
        architecture: str = "vit_base_patch16_clip_224",
        model_args: dict[str, Any] | None = None,
        pooling: str = "mean",
        head: str = "mlp",
        width: int = 768,
        dimensions: int = 768,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            architecture, model_args: of `timm.create_model`.
            pooling: mean | class | class+mean, of the last tokens.
            head: none | linear | mlp | gated | sharelock.
            width: of the pooled states. dimensions: of the vectors.
        """
        self.architecture, self.model_args = architecture, model_args or {}
        self.pooling, self.head, self.width, self.dimensions = pooling, head, width, dimensions
        super().__init__(**kwargs)


@dataclass
class LiftImageOutput(ModelOutput):
    image_embeds: torch.Tensor | None = None
    """[B, dimensions], unit length."""
    pooled: torch.Tensor | None = None
    """[B, width], before the head."""


class Gated(nn.Module):
    """W₃(ReLU6(W₁x) · W₂x), x = LayerNorm of the pooled states."""

    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 8 * width)
        self.value = nn.Linear(width, 8 * width)
        self.out = nn.Linear(8 * width, dimensions)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        x = self.norm(states)
        return self.out(F.relu6(self.gate(x)) * self.value(x).clamp(-1e3, 1e3))


def build_head(head: str, width: int, dimensions: int) -> nn.Module:
    if head == "linear":
        return nn.Linear(width, dimensions)
    if head == "mlp":
        return nn.Sequential(nn.Linear(width, dimensions), nn.GELU(), nn.Linear(dimensions, dimensions))
    if head == "gated":
        return Gated(width, dimensions)
    if head == "sharelock":
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(width, 4096), nn.BatchNorm1d(4096), nn.ReLU(), nn.Dropout(0.2)]
            width = 4096
        return nn.Sequential(*layers, nn.Linear(width, dimensions))
    if head != "none":
        raise ValueError(f"head {head!r} is none of none, linear, mlp, gated, sharelock")
    return nn.Identity()


class LiftImageModel(PreTrainedModel):
    config_class = LiftImageConfig
    main_input_name = "pixel_values"
    base_model_prefix = "lift"

    def __init__(self, config: LiftImageConfig) -> None:
        super().__init__(config)
        self.vit = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, **(config.model_args | {"global_pool": ""})
        )
        self.head = build_head(config.head, config.width, config.dimensions)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every weight is in the file."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> LiftImageOutput:
        """Normalised pixels [B, 3, S, S] → unit vectors [B, dimensions]."""
        tokens = self.vit(pixel_values)
        patches = tokens[:, self.vit.num_prefix_tokens :].mean(1)
        if self.config.pooling == "mean":
            pooled = patches
        elif self.config.pooling == "class":
            pooled = tokens[:, 0]
        else:
            pooled = torch.cat([tokens[:, 0], patches], 1)
        return LiftImageOutput(image_embeds=F.normalize(self.head(pooled), dim=-1), pooled=pooled)
