"""The image tower: its shape, its pooling and its position embedding."""

from __future__ import annotations

import pytest
import torch

from lift_cache.errors import BadConfig
from lift_trainer.config import TrainConfig
from lift_trainer.images import OPENAI_MEAN
from lift_trainer.towers import build_tower, sincos

SMALL = "vit:width=32,depth=2,heads=2,patch=8"


@pytest.mark.parametrize("name", [SMALL, "vit_tiny_patch16_224", "vit_base_patch16_clip_224"])
def test_a_tower_gives_unit_vectors_of_the_texts_width(name: str) -> None:
    tower = build_tower(name, 32, "learned:0.02", 24).eval()
    with torch.inference_mode():
        out = tower(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert out.shape == (2, 24) and out.dtype == torch.float32
    assert out.norm(dim=1) == pytest.approx(torch.ones(2), abs=1e-5)
    widths = [(layer.in_features, layer.out_features) for layer in tower.head[::2]]
    assert widths == [(tower.vit.embed_dim, 24), (24, 24)]
    assert tower.state_dict()["mean"].flatten().tolist() == pytest.approx(list(OPENAI_MEAN))


def test_the_pooled_state_is_the_mean_of_normed_patch_tokens_without_the_class_token() -> None:
    tower = build_tower("vit_tiny_patch16_224", 32, "learned:0.02", 8).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        tokens = tower.vit.forward_features((pixels.float() / 255 - tower.mean) / tower.std)
        assert tokens.shape[1] == 1 + 4
        assert tower.features(pixels) == pytest.approx(tokens[:, 1:].mean(1), abs=1e-5)
    assert tower.vit.norm.weight.shape == (192,)


@pytest.mark.parametrize(
    ("choice", "std"), [("learned:0.02", 0.02), ("learned:width^-0.5", 32**-0.5), ("learned:0.5", 0.5)]
)
def test_a_learned_position_embedding_starts_with_the_chosen_size(choice: str, std: float) -> None:
    position = build_tower("vit:width=32,depth=1,heads=2,patch=2", 32, choice, 8).vit.pos_embed
    assert position is not None and position.requires_grad
    assert position.std().item() == pytest.approx(std * 0.88, rel=0.05)  # cut off at two deviations


def test_the_sincos_embedding_is_fixed_tells_every_place_apart_and_can_be_rescaled() -> None:
    waves = sincos(4, 4, 32)
    assert waves.square().mean().sqrt().item() == pytest.approx(0.5**0.5)
    assert torch.cdist(waves, waves).fill_diagonal_(9).min() > 0.5
    position = build_tower(SMALL, 32, "sincos:0.1", 8).vit.pos_embed
    assert position is not None and not position.requires_grad
    assert position[0] == pytest.approx(waves * 0.1 / 0.5**0.5, abs=1e-6)
    with_class_token = build_tower("vit_tiny_patch16_224", 32, "sincos", 8).vit.pos_embed
    assert with_class_token is not None and not with_class_token[0, 0].any()


@pytest.mark.parametrize("name", [SMALL, "vit_tiny_patch16_224"])
def test_the_default_position_embedding_is_about_as_large_as_the_patches_it_is_added_to(name: str) -> None:
    """With timm's 0.02 small towers stayed at chance on swapped objects when they could learn them."""
    tower = build_tower(name, 64, TrainConfig.model_fields["pos_embed"].default, 8)
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    patches = tower.vit.patch_embed((pixels.float() / 255 - tower.mean) / tower.std)
    assert tower.vit.pos_embed is not None
    ratio = (tower.vit.pos_embed.square().mean() / patches.square().mean()).sqrt().item()
    assert 0.5 < ratio < 2


@pytest.mark.parametrize(
    ("tower", "size", "message"),
    [
        ("vit_bas_patch16", 224, "timm has no such model; try "),
        ("resnet50", 224, "not a plain vision transformer"),
        (SMALL, 30, r"--image-size 30 is not a multiple of the patch .* \(8 pixels\)"),
        ("vit_tiny_patch16_224", 40, "multiple of the patch"),
    ],
)
def test_a_tower_that_cannot_be_built_is_one_clear_line(tower: str, size: int, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        build_tower(tower, size, "learned:0.02", 8)
