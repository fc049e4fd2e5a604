"""All that is trained in one module: image tower, text side, loss.

pixels → tower ─────────────────────────────→ x ┐
cached vectors → transform → head, or none  → y ┼→ loss
tokens → text transformer                   → y ┘
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lift_cache.errors import BadConfig
from lift_trainer.batches import Batch
from lift_trainer.config import TextShape, TrainConfig
from lift_trainer.losses import Extra, Loss, LossValue, build_loss
from lift_trainer.sampling import torch_seed
from lift_trainer.text_towers import CachedTextTower, ClipTextTower
from lift_trainer.towers import ImageTower, build_tower, tower_width
from lift_trainer.transform import TextTransform


class Inputs(NamedTuple):
    """A batch as the model sees it: texts transformed, all on one device."""

    pixels: torch.Tensor
    """uint8 [B, 3, S, S], or kept states float32 [B, width]."""
    texts: tuple[torch.Tensor, ...]
    """One per cache: unit vectors, float32 [B, D] or [B, P, D]; or tokens, int64 [B, L] or [B, P, L]."""
    captions: torch.Tensor
    """int64 [B] or [B, P], −1: absent."""
    images: torch.Tensor
    """int64 [B]."""
    known: torch.Tensor
    """int64 [B, K]: every caption of each image, −1: absent."""
    further: tuple[torch.Tensor, ...]
    """One per cache: texts beyond the batch, [M, D] or [M, L]; none of them without negatives."""
    further_captions: torch.Tensor
    """int64 [M]."""

    @classmethod
    def of(cls, batch: Batch, transforms: Sequence[TextTransform]) -> Inputs:
        """Through the text transforms, on the device of the batch."""
        return cls(
            batch.pixels,
            transformed(batch.texts, transforms),
            batch.captions,
            batch.images,
            batch.known,
            transformed(batch.extra_texts, transforms) if len(batch.extra_captions) else (),
            batch.extra_captions,
        )


def transformed(
    texts: Sequence[torch.Tensor], transforms: Sequence[TextTransform]
) -> tuple[torch.Tensor, ...]:
    """Stored vectors through the transform of their cache; tokens as they are."""
    if not transforms:
        return tuple(texts)
    return tuple(transform(text) for transform, text in zip(transforms, texts, strict=True))


class LiftModel(nn.Module):
    """Image tower, text side and loss under one forward, as DistributedDataParallel wants them."""

    def __init__(
        self, tower: ImageTower, texts: Sequence[CachedTextTower | ClipTextTower], loss: Loss
    ) -> None:
        """
        Args:
            texts: one per cache, or the one text transformer.
        """
        super().__init__()
        self.tower = tower
        self.texts = nn.ModuleList(texts)
        self.loss = loss

    @property
    def joint(self) -> bool:
        """Whether texts come as tokens."""
        return isinstance(self.texts[0], ClipTextTower)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S], or the states of a frozen tower, float [B, width] → unit vectors, float32 [B, D]."""
        return self.tower.project(pixels) if pixels.is_floating_point() else self.tower(pixels)

    def encode_texts(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Texts of `Inputs` → unit vectors, float32 [B, D]; where an image has several, [B, P, D]."""
        encoded = [tower(text) for tower, text in zip(self.texts, texts, strict=True)]
        if len(encoded) == 1:
            return encoded[0]
        return torch.cat([y if y.ndim == 3 else y[:, None] for y in encoded], 1)

    def compare(self, inputs: Inputs, x_bd: torch.Tensor, y_bd: torch.Tensor, *, bf16: bool) -> LossValue:
        """The loss of encoded images and texts; further texts are encoded here."""
        captions, extra = inputs.captions, None
        if len(self.texts) > 1:  # the same captions once more, in the words of another encoder
            captions = torch.cat([captions if captions.ndim == 2 else captions[:, None]] * len(self.texts), 1)
        if inputs.further:
            with torch.autocast(x_bd.device.type, torch.bfloat16, enabled=bf16):
                vectors = torch.cat(
                    [tower(text) for tower, text in zip(self.texts, inputs.further, strict=True)]
                )
            extra = Extra(vectors, inputs.further_captions.repeat(len(self.texts)), inputs.known)
        return self.loss(x_bd, y_bd, captions, inputs.images, extra)

    def forward(self, inputs: Inputs, *, bf16: bool = False) -> LossValue:
        """One step's loss. The towers run under autocast where `bf16`, the loss in float32."""
        with torch.autocast(inputs.pixels.device.type, torch.bfloat16, enabled=bf16):
            x_bd = self.encode_images(inputs.pixels)
            y_bd = self.encode_texts(inputs.texts)
        return self.compare(inputs, x_bd, y_bd, bf16=bf16)


def build_model(config: TrainConfig, widths: Sequence[int], *, fetch: bool = True) -> LiftModel:
    """A model with fresh weights, a function of the seed.

    Args:
        widths: of the text vectors after the transform, one per cache; none with a text transformer.
        fetch: as for `build_tower`.

    Raises:
        BadConfig: the tower cannot be built, or the two sides do not meet in one space.
    """
    dimensions = common_dimensions(config, widths)
    torch.manual_seed(torch_seed(config.seed, 0))
    tower = build_tower(
        config.tower,
        config.image_size,
        config.pos_embed,
        dimensions,
        start=config.start,
        weights=config.weights,
        pooling=config.pooling,
        head=config.head,
        init=config.init,
        fetch=fetch,
    )
    texts: list[CachedTextTower | ClipTextTower]
    if config.text_tower == "clip":
        texts = [ClipTextTower(dimensions, TextShape.parse(config.text_shape))]
    else:
        texts = [CachedTextTower(width, dimensions, config.text_head) for width in widths]
    if config.gradient_checkpointing:
        tower.checkpoint_gradients()
        for text in texts:
            if isinstance(text, ClipTextTower):
                text.checkpoint_gradients()
    loss = build_loss(
        config.loss, config.mask, scale=config.scale, bias=config.bias, learn_scale=config.learn_scale
    )
    return LiftModel(tower, texts, loss)


def common_dimensions(config: TrainConfig, widths: Sequence[int]) -> int:
    """Width of the common space: that of the side without a head, or what the configuration says.

    Raises:
        BadConfig: neither or both decide, differently.
    """
    fixed = {}
    if config.head == "none":
        fixed["the image tower (--head none)"] = tower_width(config.tower, config.pooling)
    if config.text_tower == "cached" and config.text_head == "none":
        for number, width in enumerate(widths):
            name = config.cache[number] if number < len(config.cache) else "the text vectors"
            fixed[f"{name} (--text-head none)"] = width
    if config.dimensions is not None:
        fixed["--dimensions"] = config.dimensions
    if len(set(fixed.values())) > 1:
        said = ", ".join(f"{name} {width}" for name, width in fixed.items())
        raise BadConfig(
            f"images and texts do not meet: {said}; put a head on one side (--head, --text-head), or bring the texts "
            "to one width with --text-transform whiten:K"
        )
    if fixed:
        return next(iter(fixed.values()))
    if config.text_tower == "clip":
        return TextShape.parse(config.text_shape).width
    raise BadConfig(
        "--dimensions is missing: with a head on either side nothing else says how wide the space is"
    )
