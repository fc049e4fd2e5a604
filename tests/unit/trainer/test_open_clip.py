"""Beside open_clip, with its weights copied: the tower, the losses, the schedule and what decays."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import nn

from lift_trainer.commands import presets
from lift_trainer.heads import unit_vectors
from lift_trainer.images import OPENAI_MEAN, OPENAI_STD
from lift_trainer.losses import InfoNCE, SigLIP
from lift_trainer.model import LiftModel
from lift_trainer.optim import CosineSchedule, decay_groups
from lift_trainer.text_towers import ClipTextTower, TextShape
from lift_trainer.towers import ImageTower, build_tower

pytestmark = pytest.mark.slow

open_clip = pytest.importorskip("open_clip")

LIFT = "vit_base_patch16_clip_224"
SMALL, SMALL_SHAPE = "vit_xsmall_patch16_clip_224", {"width": 256, "layers": 10, "heads": 4}
"""The same in small."""


def reference_tower(side: int, width: int = 768, layers: int = 12, heads: int = 12) -> nn.Module:
    """open_clip's image tower, pooling the mean of its patches, without its projection."""
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    tower = VisionTransformer(side, 16, width, layers, heads, 4.0, output_dim=width, pool_type="avg")
    tower.proj = None
    return tower.eval()


def copy_weights(theirs: nn.Module, ours: ImageTower) -> None:
    """Every parameter of open_clip's tower into its place in timm's; a leftover on either side raises."""
    names = {
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1.weight": "patch_embed.proj.weight",
        "ln_pre.": "norm_pre.",
        "ln_post.": "norm.",
        "transformer.resblocks.": "blocks.",
        ".ln_1.": ".norm1.",
        ".ln_2.": ".norm2.",
        ".attn.in_proj_": ".attn.qkv.",
        ".attn.out_proj.": ".attn.proj.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
    }
    copied = {}
    for name, value in theirs.state_dict().items():
        place = name
        for old, new in names.items():
            place = place.replace(old, new)
        copied[place] = value.view(ours.vit.state_dict()[place].shape)
    ours.vit.load_state_dict(copied)


def test_the_lift_tower_is_open_clips_with_average_pooling() -> None:
    theirs, ours = reference_tower(224), build_tower(LIFT, 224, "learned:0.5", 32).eval()
    copy_weights(theirs, ours)
    assert ours.vit.patch_embed.proj.bias is None
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    with torch.inference_mode():
        expected = theirs((pixels / 255 - mean) / std)
        found = ours.features(pixels)
    assert expected.shape == found.shape == (2, 768) and expected.abs().mean() > 0.1
    assert (expected - found).abs().max() < 1e-5


def test_the_lift_tower_trains_as_open_clips() -> None:
    """The gradient of every weight, in float64."""
    theirs, expected = (reference_tower(32, **SMALL_SHAPE).double() for _ in range(2))
    ours, holder = (build_tower(SMALL, 32, "learned:0.5", 32).double() for _ in range(2))
    copy_weights(theirs, ours)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours.features(pixels).square().sum().backward()
    theirs((pixels.float() / 255 - ours.mean) / ours.std).square().sum().backward()
    for weight, trained in zip(expected.parameters(), theirs.parameters(), strict=True):
        assert trained.grad is not None
        weight.data = trained.grad
    copy_weights(expected, holder)  # gradients, in timm's places
    for (name, weight), gradient in zip(ours.vit.named_parameters(), holder.vit.parameters(), strict=True):
        assert weight.grad is not None and gradient.abs().max() > 1e-6
        assert torch.allclose(weight.grad, gradient.detach(), rtol=1e-9, atol=1e-9), name


def test_fresh_weights_of_open_clips_kind_are_distributed_as_its_own() -> None:
    theirs = reference_tower(64, **SMALL_SHAPE)
    lift = yaml.safe_load(presets()["lift"].read_text())
    ours, holder = (
        build_tower(SMALL, 64, lift["pos_embed"], 8, init=init)  # type: ignore[arg-type]
        for init in (lift["init"], "timm")
    )
    copy_weights(theirs, holder)
    for (name, mine), other in zip(ours.vit.named_parameters(), holder.vit.parameters(), strict=True):
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.15, abs=1e-9), name
        if name not in ("cls_token", "pos_embed"):  # uniform on both sides, or constant
            assert mine.max().item() == pytest.approx(other.max().item(), rel=0.05, abs=1e-9), name


@pytest.mark.parametrize("name", ["infonce", "siglip"])
def test_the_losses_and_their_gradients_are_open_clips(name: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    torch.manual_seed(0)
    scale, bias = torch.tensor(2.3).double(), torch.tensor(-7.0).double()
    vectors = [unit_vectors(torch.randn(16, 8, dtype=torch.float64)) for _ in range(2)]
    ours = (InfoNCE("none") if name == "infonce" else SigLIP("none", bias=-7.0)).double()
    ours.log_scale.data.copy_(scale)
    theirs = ClipLoss() if name == "infonce" else SigLipLoss()
    x, y = (values.clone().requires_grad_() for values in vectors)
    value = ours(x, y, torch.arange(16)).loss
    value.backward()
    u, v, log_scale, b = (values.clone().requires_grad_() for values in (*vectors, scale, bias))
    expected = theirs(u, v, log_scale.exp(), *([] if name == "infonce" else [b]))
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    for mine, other in ((x, u), (y, v), (ours.log_scale, log_scale)):
        assert torch.allclose(mine.grad, other.grad, rtol=0, atol=1e-12)
    if isinstance(ours, SigLIP):
        assert torch.allclose(ours.bias.grad, b.grad, rtol=0, atol=1e-12)


def test_the_schedule_is_open_clips() -> None:
    from open_clip_train.scheduler import cosine_lr

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs, ours = cosine_lr(optimizer, 1e-3, 5, 20), CosineSchedule(1e-3, 5, 20)
    assert [ours.lr(step) for step in range(20)] == pytest.approx([theirs(step) for step in range(20)], abs=0)


def test_what_is_spared_from_decay_is_what_open_clip_spares() -> None:
    """open_clip's own rule by name and number of dimensions, and its `no_weight_decay` for timm's optimisers."""
    model = LiftModel(build_tower(LIFT, 32, "learned:0.5", 8), [], InfoNCE())
    model.add_module("text", ClipTextTower(8, TextShape(context=5, width=16, depth=1, heads=2)))
    theirs = open_clip.CLIP(
        8,
        {"image_size": 32, "layers": 12, "width": 768, "patch_size": 16},
        {"context_length": 5, "width": 16, "heads": 2, "layers": 1},
    )

    def shapes(parameters: list[nn.Parameter]) -> list[tuple[int, ...]]:
        return sorted(tuple(p.squeeze().shape) for p in parameters)

    def spared(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    ours_own = {"tower.head.0.weight", "tower.head.2.weight", "tower.head.0.bias", "tower.head.2.bias"}
    head = {id(p) for name, p in model.named_parameters() if name in ours_own}
    for rule in ("1d", "1d+positions"):
        _, free = decay_groups(model, 0.2, rule)  # type: ignore[arg-type]
        expected = [
            p
            for name, p in theirs.named_parameters()
            if spared(name, p) or (rule == "1d+positions" and name.endswith("positional_embedding"))
        ]
        assert shapes([p for p in free["params"] if id(p) not in head]) == shapes(expected)


def test_the_text_tower_is_open_clips_own() -> None:
    torch.manual_seed(0)
    ours = ClipTextTower(8, TextShape(context=9, width=16, depth=2, heads=2)).eval()
    theirs = open_clip.CLIP(
        8,
        {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        {"context_length": 9, "width": 16, "heads": 2, "layers": 2},
    ).eval()
    assert not theirs.load_state_dict(ours.transformer.state_dict(), strict=False).unexpected_keys
    tokens = open_clip.tokenize(["a red circle", "two"], context_length=9)
    with torch.inference_mode():
        assert torch.allclose(ours(tokens), theirs.encode_text(tokens, normalize=True), atol=1e-6)
