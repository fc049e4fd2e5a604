"""The optimiser and its schedule are the paper's."""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim.lion import Lion

from lift_cache.errors import BadConfig
from lift_trainer.config import Span
from lift_trainer.losses import InfoNCE
from lift_trainer.model import LiftModel
from lift_trainer.optim import CosineSchedule, build_optimizer, decay_groups, decays, scaled_lr
from lift_trainer.towers import build_tower


def test_weight_decay_spares_1d_parameters_the_temperature_and_the_class_token() -> None:
    model = LiftModel(build_tower("vit_tiny_patch16_224", 32, "learned:0.02", 8), [], InfoNCE())
    decayed, spared = build_optimizer(model, 1e-3, 0.2).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    assert decayed["betas"] == (0.9, 0.98) and decayed["eps"] == 1e-6
    names = {id(p): name for name, p in model.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert {
        "loss.log_scale",
        "tower.vit.cls_token",
        "tower.vit.norm.weight",
        "tower.head.0.bias",
    } <= spared_names
    assert all(p.squeeze().ndim <= 1 and not decays(p) for p in spared["params"])
    assert all(name.endswith(("weight", "pos_embed")) for p in decayed["params"] for name in [names[id(p)]])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_a_frozen_position_embedding_is_not_given_to_the_optimiser() -> None:
    model = LiftModel(build_tower("vit:width=16,depth=1,heads=2,patch=8", 16, "sincos", 8), [], InfoNCE())
    given = {id(p) for group in build_optimizer(model, 1e-3, 0.2).param_groups for p in group["params"]}
    assert id(model.tower.vit.pos_embed) not in given


def test_the_schedule_warms_up_linearly_and_then_follows_half_a_cosine() -> None:
    schedule = CosineSchedule(peak=2.0, warmup=4, total=12)
    assert [schedule.lr(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule.lr(4) == 2.0
    assert schedule.lr(8) == pytest.approx(1.0)
    assert schedule.lr(11) == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert CosineSchedule(1.0, 0, 10).lr(0) == 1.0


@pytest.mark.parametrize(
    ("text", "steps"), [("500", 500), ("50000s", 196), ("50_000samples", 196), ("5%", 50), ("0", 0)]
)
def test_warmup_is_given_in_steps_samples_or_per_cent(text: str, steps: int) -> None:
    assert Span.parse(text).in_steps(batch_size=256, total_steps=1000) == steps


def test_a_warmup_longer_than_the_run_is_refused_with_advice() -> None:
    with pytest.raises(BadConfig, match=r"--warmup is 500 steps and the whole run 90; .* --warmup 5%"):
        Span.parse("500").in_steps(256, 90)


def test_the_learning_rate_scales_from_the_base_batch() -> None:
    assert scaled_lr(1e-3, "none", 256, 1024) == 1e-3
    assert scaled_lr(1e-3, "sqrt", 256, 1024) == pytest.approx(5e-4)
    assert scaled_lr(1e-3, "linear", 256, 1024) == pytest.approx(2.5e-4)


def tiny() -> LiftModel:
    return LiftModel(build_tower("vit_tiny_patch16_224", 32, "learned:0.02", 8), [], InfoNCE())


def test_position_embeddings_can_be_spared_too_or_nothing_at_all() -> None:
    model = tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    paper, spared, nothing = (decay_groups(model, 0.2, rule) for rule in ("1d", "1d+positions", "nothing"))  # type: ignore[arg-type]
    free = [{names[id(p)] for p in groups[1]["params"]} for groups in (paper, spared, nothing)]
    assert free[1] - free[0] == {"tower.vit.pos_embed"} and free[0] < free[1] and not free[2]


def test_each_optimiser_steps_with_its_papers_constants_and_one_without_a_spared_group_too() -> None:
    for name, kind, betas in (
        ("adamw", torch.optim.AdamW, (0.9, 0.98)),
        ("adam", torch.optim.Adam, (0.9, 0.999)),
        ("lion", Lion, (0.9, 0.99)),
    ):
        model = tiny()
        optimizer = build_optimizer(model, 1e-3, 0.1, name=name)  # type: ignore[arg-type]
        assert isinstance(optimizer, kind) and optimizer.param_groups[0]["betas"] == betas
        assert optimizer.param_groups[1]["weight_decay"] == 0 and bool(
            optimizer.param_groups[1]["params"]
        ) == (name != "adam")
        before = {n: p.clone() for n, p in model.named_parameters()}
        torch.stack([p.square().sum() for p in model.parameters()]).sum().backward()
        optimizer.step()
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.grad.any())


def test_lion_moves_by_the_sign_of_the_mixed_gradient() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    holder = torch.nn.ParameterList([parameter])
    optimizer = build_optimizer(holder, 0.1, 0.5, name="lion")
    parameter.grad = torch.tensor([[0.3, -7.0], [1e-4, -1e-4]])
    optimizer.step()
    decayed = torch.tensor([[1.0, -2.0], [3.0, 4.0]]) * (1 - 0.1 * 0.5)
    assert torch.allclose(parameter.data, decayed - 0.1 * torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


def test_fused_kernels_are_used_where_torch_has_them() -> None:
    assert build_optimizer(tiny(), 1e-3, 0.2).defaults["fused"] is True
    elsewhere = torch.nn.Linear(2, 2, device="meta")
    assert build_optimizer(elsewhere, 1e-3, 0.2).defaults["fused"] is False
