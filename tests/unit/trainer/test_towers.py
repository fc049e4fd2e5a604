"""The image tower: its shape, its pooling and its position embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

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
    widths = [(layer.in_features, layer.out_features) for layer in (tower.head[0], tower.head[2])]
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
    ("choice", "std"),
    # A number is cut off at two deviations, as a truncated normal; CLIP's own choice is not.
    [("learned:0.02", 0.88 * 0.02), ("learned:width^-0.5", 32**-0.5), ("learned:0.5", 0.88 * 0.5)],
)
def test_a_learned_position_embedding_starts_with_the_chosen_size(choice: str, std: float) -> None:
    position = build_tower("vit:width=32,depth=1,heads=2,patch=2", 32, choice, 8).vit.pos_embed
    assert position is not None and position.requires_grad
    assert position.std().item() == pytest.approx(std, rel=0.05)


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


TINY, DEEPER = "vit_tiny_patch16_224", "vit_small_patch16_224"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a whole classifier, as timm publishes them."""
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(timm.create_model(TINY).state_dict(), file)
    return file


def pixels(side: int = 32, n: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)


def test_a_pretrained_tower_has_its_weights_its_pixel_statistics_and_its_positions(published: Path) -> None:
    weights = load_file(published)
    tower = build_tower(TINY, 224, "learned:0.5", 8, start="pretrained", weights=published)
    held = tower.vit.state_dict()
    assert all(torch.equal(held[name], weights[name]) for name in held) and "pos_embed" in held
    assert tower.mean.flatten().tolist() == tower.std.flatten().tolist() == [0.5, 0.5, 0.5]
    assert all(p.requires_grad for p in tower.parameters())
    smaller = build_tower(TINY, 64, "learned:0.5", 8, start="pretrained", weights=published)
    assert smaller.vit.pos_embed is not None and smaller.vit.pos_embed.shape == (1, 17, 192)


def test_a_frozen_tower_keeps_its_weights_and_stays_in_evaluation_mode(published: Path) -> None:
    tower = build_tower(TINY, 32, "learned:0.5", 8, start="frozen", weights=published).train()
    assert not tower.vit.training and tower.head.training
    assert {name.split(".")[0] for name, p in tower.named_parameters() if p.requires_grad} == {"head"}
    given = pixels()
    states = tower.features(given)
    assert not states.requires_grad
    assert torch.equal(tower.project(states), tower(given))
    tower(given).sum().backward()
    assert tower.head[0].weight.grad is not None and all(p.grad is None for p in tower.vit.parameters())


def test_sails_features_are_the_class_token_beside_the_mean_patch(published: Path) -> None:
    tower = build_tower(
        TINY, 32, "learned:0.5", 8, start="frozen", weights=published, pooling="class+mean", head="gated"
    )
    given = pixels()
    with torch.inference_mode():
        tokens = tower.vit.forward_features((given.float() / 255 - tower.mean) / tower.std)
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
        assert torch.equal(tower.features(given), expected) and expected.shape == (2, 384)
        assert tower(given).shape == (2, 8)
        alone = build_tower(
            TINY, 32, "learned:0.5", 192, start="frozen", weights=published, pooling="class", head="none"
        )
        assert torch.allclose(alone.features(given), tokens[:, 0], atol=1e-6)
        assert alone(given).shape == (2, 192)


def test_recomputed_activations_change_no_gradient() -> None:
    tower, given = build_tower(SMALL, 32, "learned:0.5", 8), pixels()
    found = []
    for _ in range(2):
        tower.zero_grad()
        tower(given).square()[:, 0].sum().backward()
        found.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
        tower.checkpoint_gradients()
    assert len(found[0]) == len(list(tower.parameters())) and all(map(torch.equal, *found))


def test_register_tokens_are_no_patches() -> None:
    tower = build_tower("vit_small_patch14_reg4_dinov2", 28, "learned:0.5", 8, pooling="class+mean").eval()
    given = pixels(28)
    with torch.inference_mode():
        tokens = tower.vit.forward_features((given.float() / 255 - tower.mean) / tower.std)
        assert tokens.shape[1] == 1 + 4 + 4
        assert torch.equal(tower.features(given)[:, 384:], tokens[:, 5:].mean(1))


def test_what_cannot_be_had_pretrained_or_pooled_is_one_clear_line(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(published.read_bytes()[:-9])
    other = tmp_path / "other.safetensors"
    save_file({"stem.weight": torch.zeros(2)}, other)
    for name, more, message in (
        (SMALL, {"start": "frozen"}, "only a timm name has pretrained weights"),
        (SMALL, {"pooling": "class"}, "has no class token"),
        ("vit_base_patch16_siglip_224", {"pooling": "class+mean"}, "has no class token"),
        ("vit_base_patch16_siglip_224", {"pooling": "class"}, "has no class token"),
        (TINY, {"weights": published}, "a tower from scratch takes none"),
        (TINY, {"start": "frozen", "weights": tmp_path / "none"}, "there is no file .*none with its weights"),
        (TINY, {"start": "frozen", "weights": torn}, "no pretrained weights from .*torn.safetensors: "),
        (TINY, {"start": "frozen", "weights": other}, "other.safetensors: they are another model's"),
        (DEEPER, {"start": "frozen", "weights": published}, "no pretrained weights from "),
        (TINY, {"head": "none"}, "192 dimensions on one side and 8 on the other"),
    ):
        side = 224 if "siglip" in name else 32
        with pytest.raises(BadConfig, match=message) as raised:
            build_tower(name, side, "learned:0.5", 8, **more)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
