"""The image tower: a vision transformer and a head into the text space.

    uint8 pixels → (x − mean) / std → ViT → pooled states → head → unit vector

The default is LIFT's: trained from scratch, pooled as the mean over patch tokens, head Linear–GELU–Linear.
The authors' tower is open_clip's ViT-B/16 with average pooling, which is timm's `vit_base_patch16_clip_224`:
a norm before the blocks, patches by a convolution without bias, the final norm before the pooling, and a
class token that attends but stays out of the average (tests/unit/trainer/test_open_clip.py compares the two).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import load_pretrained
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from lift_cache.errors import BadConfig
from lift_trainer.config import HeadName, Pooling, PosEmbed, Start, ViTShape
from lift_trainer.heads import build_head, unit_vectors
from lift_trainer.images import OPENAI_MEAN, OPENAI_STD


class ImageTower(nn.Module):
    """Images to unit vectors of the text's width. Pixel statistics are buffers, so every checkpoint holds them."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        dimensions: int,
        *,
        head: HeadName = "mlp",
        pooling: Pooling = "mean",
        frozen: bool = False,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        """
        Args:
            vit: without classifier; pools by itself what `pooling` says, but for `class+mean`.
            pooling: what the head sees: the mean over patch tokens, the class token, or both side by side
                (SAIL), class token first.
            frozen: the ViT keeps its weights and stays in evaluation mode; the head trains.

        Raises:
            BadConfig: head `none`, and the pooled states are not as wide as the text.
        """
        super().__init__()
        self.vit = vit
        self.pooling = pooling
        self.frozen = frozen
        self.width = vit.embed_dim * (2 if pooling == "class+mean" else 1)
        self.head = build_head(head, self.width, dimensions)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        if frozen:
            vit.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ImageTower:
        super().train(mode)
        if self.frozen:
            self.vit.eval()
        return self

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.vit.set_grad_checkpointing(True)

    def features(self, pixels_b3ss: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] → pooled states [B, width], before the head; of a frozen ViT without gradient.

        A frozen tower's features do not change and can be kept; `project` does the rest.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            scaled = (pixels_b3ss.float() / 255 - self.mean) / self.std
            if self.pooling != "class+mean":
                return self.vit(scaled)
            tokens_btw = self.vit.forward_features(scaled)
            patches_bw = tokens_btw[:, self.vit.num_prefix_tokens :].mean(1)
            return torch.cat([tokens_btw[:, 0], patches_bw], 1)

    def project(self, states_bw: torch.Tensor) -> torch.Tensor:
        """Pooled states [B, width] → unit vectors, float32 [B, D]."""
        return unit_vectors(self.head(states_bw))

    def forward(self, pixels_b3ss: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] → unit vectors, float32 [B, D]."""
        return self.project(self.features(pixels_b3ss))


def build_tower(
    tower: str,
    image_size: int,
    pos_embed: str,
    dimensions: int,
    *,
    start: Start = "scratch",
    weights: Path | None = None,
    pooling: Pooling = "mean",
    head: HeadName = "mlp",
    init: Literal["timm", "open_clip"] = "timm",
    fetch: bool = True,
) -> ImageTower:
    """Build a tower; what is not pretrained has fresh weights, from torch's global generator.

    Args:
        tower: a timm name, or `vit:width=…,depth=…,heads=…,patch=…`, which has no class token.
        image_size: side in pixels.
        pos_embed: see `PosEmbed`; a pretrained one is kept, interpolated to the image size.
        dimensions: width of the text vectors, after the transform.
        start: `pretrained` fetches timm's weights of that name and trains on from them; `frozen` fetches
            and keeps them. Either takes over the pixel statistics the weights were made with.
        weights: a file with those weights instead, as timm writes or publishes them (safetensors, pth).
        pooling, head: see `ImageTower`.
        init: distribution of fresh weights of the blocks: timm's (truncated normal, 0.02), or what
            open_clip's tower starts with, and so the authors' (see `init_as_open_clip`).
        fetch: False where a checkpoint's weights come next: pretrained ones are not looked for.

    Raises:
        BadConfig: timm has no such vision transformer or no such weights, the patches do not tile the
            image, there is no class token to pool, or no head where one is needed.
    """
    if start == "scratch" and weights is not None:
        raise BadConfig(f"weights {weights}: a tower from scratch takes none; make it pretrained or frozen")
    if tower.startswith("vit:"):
        if start != "scratch":
            raise BadConfig(f"--tower {tower}: only a timm name has pretrained weights")
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
        vit = _timm_vit(tower, image_size, start if fetch else "scratch", weights if fetch else None, pooling)
    if pooling != "mean" and vit.cls_token is None:
        raise BadConfig(f"--tower {tower} has no class token: pool the mean of its patches")
    if start == "scratch":
        if init == "open_clip":
            init_as_open_clip(vit)
        set_pos_embed(vit, PosEmbed.parse(pos_embed))
        return ImageTower(vit, dimensions, head=head, pooling=pooling)
    made_with: dict[str, Any] = dict(vit.pretrained_cfg)  # type: ignore[arg-type]
    return ImageTower(
        vit,
        dimensions,
        head=head,
        pooling=pooling,
        frozen=start == "frozen",
        mean=made_with["mean"],
        std=made_with["std"],
    )


def tower_width(tower: str, pooling: Pooling) -> int:
    """Width of a tower's pooled states. Raises BadConfig: timm has no such vision transformer."""
    if tower.startswith("vit:"):
        width = ViTShape.parse(tower).width
    else:
        _require_known(tower)
        with torch.device("meta"):
            width = timm.create_model(tower, pretrained=False).num_features  # type: ignore[assignment]
    return width * (2 if pooling == "class+mean" else 1)


def _require_known(name: str) -> None:
    if not timm.is_model(name):
        near = (
            ", ".join(timm.list_models(f"*{name.split('_')[0]}*patch16*")[:3]) or "vit_base_patch16_clip_224"
        )
        raise BadConfig(
            f"--tower {name}: timm has no such model; try {near}, or vit:width=128,depth=4,heads=4,patch=8"
        )


def _timm_vit(
    name: str, image_size: int, start: Start, weights: Path | None, pooling: Pooling
) -> VisionTransformer:
    _require_known(name)
    unfit = f"--tower {name}: not a plain vision transformer; try vit_base_patch16_clip_224"
    if timm.models.model_entrypoint(name).__module__ != "timm.models.vision_transformer":
        raise BadConfig(unfit)
    if weights is not None and not weights.is_file():
        raise BadConfig(f"--tower {name}: there is no file {weights} with its weights")
    overlay = {"file": str(weights), "custom_load": weights.suffix == ".npz"} if weights else None
    try:
        vit = timm.create_model(
            name,
            pretrained=False,
            pretrained_cfg_overlay=overlay,
            img_size=image_size,
            num_classes=0,
            global_pool="token" if pooling == "class" else "avg",
            fc_norm=False,
        )
    except (AssertionError, ValueError) as error:
        if pooling == "class" and "class token" in str(error):
            raise BadConfig(f"--tower {name} has no class token: pool the mean of its patches") from None
        raise BadConfig(f"--tower {name} with --image-size {image_size}: {_one_line(error)}") from None
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise BadConfig(unfit)
    _require_tiles(image_size, vit.patch_embed.patch_size[0], name)
    if start != "scratch":
        _load_pretrained(vit, f"--tower {name}: no pretrained weights from {weights or 'the hub'}")
    return vit


def _load_pretrained(vit: VisionTransformer, refusal: str) -> None:
    """timm's weights into a tower. Raises BadConfig: none to be had, or not all of this tower's."""

    def require_all(module: nn.Module, keys: Any) -> None:
        # timm only logs what is missing: a wrong file would leave a frozen tower of noise.
        foreign = [key for key in keys.unexpected_keys if key.startswith("blocks.")]
        if keys.missing_keys or foreign:
            raise BadConfig(f"{refusal}: they are another model's ({[*keys.missing_keys, *foreign][0]})")

    check = vit.register_load_state_dict_post_hook(require_all)
    try:
        load_pretrained(vit, num_classes=0, filter_fn=checkpoint_filter_fn, strict=False)
    except BadConfig:
        raise
    except Exception as error:
        # timm, huggingface_hub, safetensors and torch each have errors of their own for this.
        raise BadConfig(f"{refusal}: {_one_line(error)}") from None
    finally:
        check.remove()


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _require_tiles(image_size: int, patch: int, tower: str) -> None:
    if image_size % patch:
        raise BadConfig(
            f"--image-size {image_size} is not a multiple of the patch of --tower {tower} ({patch} pixels)"
        )


def init_as_open_clip(vit: VisionTransformer) -> None:
    """Fresh weights as in open_clip's image tower, which leaves its layers as torch makes them.

    Attention: Xavier-uniform over the three input matrices at once, no biases yet; every other linear layer
    Kaiming-uniform, bounded by 1/√inputs, as are the MLP's biases; class token: normal, width^-0.5.
    """
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=vit.embed_dim**-0.5)
    blocks: list[Any] = list(vit.blocks)
    for block in blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.reset_parameters()
        nn.init.zeros_(block.attn.proj.bias)


def set_pos_embed(vit: VisionTransformer, choice: PosEmbed) -> None:
    """Initialise the position embedding in place, and freeze it when it is sin-cos.

    Its size is what matters: patch embeddings have a root mean square of about 0.6 whatever the width, and
    beside them timm's 0.02 is so faint that small towers take long to see where anything is
    (bench/posembed.py).
    """
    assert vit.pos_embed is not None
    width, tokens = vit.embed_dim, vit.pos_embed.shape[1]
    with torch.no_grad():
        if choice.size == "width^-0.5":  # to the letter: as CLIP's and open_clip's towers begin
            nn.init.normal_(vit.pos_embed, std=width**-0.5)
            return
        if choice.kind == "learned":
            std = float(choice.size or 0)
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
