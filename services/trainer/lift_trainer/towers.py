"""The image tower: a vision transformer trained from scratch, average pooling, a head into the text space.

    uint8 pixels → (x − mean) / std → ViT → mean over patch tokens → Linear–GELU–Linear → unit vector

The final norm stands before the pooling and a class token stays out of the average, as in the authors'
tower (timm's `vit_base_patch16_clip_224` shape).
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lift_cache.errors import BadConfig
from lift_trainer.config import PosEmbed, ViTShape
from lift_trainer.images import OPENAI_MEAN, OPENAI_STD


class ImageTower(nn.Module):
    """Images to unit vectors of the text's width. Pixel statistics are buffers, so every checkpoint holds them."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, vit: VisionTransformer, dimensions: int) -> None:
        super().__init__()
        self.vit = vit
        self.head = nn.Sequential(
            nn.Linear(vit.embed_dim, dimensions), nn.GELU(), nn.Linear(dimensions, dimensions)
        )
        self.register_buffer("mean", torch.tensor(OPENAI_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(OPENAI_STD).view(3, 1, 1))

    def features(self, pixels_b3ss: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] → pooled states [B, width], before the head."""
        return self.vit((pixels_b3ss.float() / 255 - self.mean) / self.std)

    def forward(self, pixels_b3ss: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] → unit vectors, float32 [B, D]."""
        return F.normalize(self.head(self.features(pixels_b3ss)).float(), dim=-1)


def build_tower(tower: str, image_size: int, pos_embed: str, dimensions: int) -> ImageTower:
    """Build a tower with fresh weights (from torch's global generator).

    Args:
        tower: a timm name, or `vit:width=…,depth=…,heads=…,patch=…`.
        image_size: side in pixels.
        pos_embed: see `PosEmbed`.
        dimensions: width of the text vectors, after the transform.

    Raises:
        BadConfig: timm has no such vision transformer, or the patches do not tile the image.
    """
    if tower.startswith("vit:"):
        shape = ViTShape.parse(tower)
        _require_tiles(image_size, shape.patch, tower)
        vit = VisionTransformer(
            img_size=image_size,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            num_classes=0,
            global_pool="avg",
            class_token=False,
            fc_norm=False,
        )
    else:
        vit = _timm_vit(tower, image_size)
    set_pos_embed(vit, PosEmbed.parse(pos_embed))
    return ImageTower(vit, dimensions)


def _timm_vit(name: str, image_size: int) -> VisionTransformer:
    if not timm.is_model(name):
        near = (
            ", ".join(timm.list_models(f"*{name.split('_')[0]}*patch16*")[:3]) or "vit_base_patch16_clip_224"
        )
        raise BadConfig(
            f"--tower {name}: timm has no such model; try {near}, or vit:width=128,depth=4,heads=4,patch=8"
        )
    unfit = f"--tower {name}: not a plain vision transformer; try vit_base_patch16_clip_224"
    if timm.models.model_entrypoint(name).__module__ != "timm.models.vision_transformer":
        raise BadConfig(unfit)
    try:
        vit = timm.create_model(
            name, pretrained=False, img_size=image_size, num_classes=0, global_pool="avg", fc_norm=False
        )
    except (AssertionError, ValueError) as error:
        raise BadConfig(f"--tower {name} with --image-size {image_size}: {error}") from None
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise BadConfig(unfit)
    _require_tiles(image_size, vit.patch_embed.patch_size[0], name)
    return vit


def _require_tiles(image_size: int, patch: int, tower: str) -> None:
    if image_size % patch:
        raise BadConfig(
            f"--image-size {image_size} is not a multiple of the patch of --tower {tower} ({patch} pixels)"
        )


def set_pos_embed(vit: VisionTransformer, choice: PosEmbed) -> None:
    """Initialise the position embedding in place, and freeze it when it is sin-cos.

    Its size is what matters: patch embeddings have a root mean square of about 0.6 whatever the width, and
    beside them timm's 0.02 is so faint that small towers take long to see where anything is
    (bench/posembed.py).
    """
    assert vit.pos_embed is not None
    width, tokens = vit.embed_dim, vit.pos_embed.shape[1]
    with torch.no_grad():
        if choice.kind == "learned":
            std = width**-0.5 if choice.size == "width^-0.5" else float(choice.size or 0)
            nn.init.trunc_normal_(vit.pos_embed, std=std, a=-2 * std, b=2 * std)
            return
        rows, columns = vit.patch_embed.grid_size
        waves = sincos(rows, columns, width)
        if choice.size is not None:
            waves *= float(choice.size) / waves.square().mean().sqrt()
        vit.pos_embed.zero_()  # a class token has no place
        vit.pos_embed[0, tokens - rows * columns :] = waves
    vit.pos_embed.requires_grad_(False)


def sincos(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed 2-d sin-cos position embedding (Chen et al. 2021, MoCo v3): float32 [rows · columns, width].

    A quarter of the width each for sin and cos of column and row; root mean square √½.
    """
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles_x = x.reshape(-1, 1) * omega
    angles_y = y.reshape(-1, 1) * omega
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], 1).float()
