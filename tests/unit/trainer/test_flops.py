"""What a step costs: FLOPs by PyTorch's counter, memory by the sizes of what is alive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lift_trainer import flops
from lift_trainer.config import TextShape
from lift_trainer.flops import (
    Flops,
    StepShape,
    contrast_flops,
    image_flops,
    joint_text_flops,
    plan_step,
    step_memory,
    text_flops,
)
from lift_trainer.losses import InfoNCE
from lift_trainer.text_towers import CachedTextTower, ClipTextTower
from lift_trainer.towers import ImageTower, build_tower

MIB = 2**20
SMALL = TextShape(context=9, width=16, depth=2, heads=2)


def vit(dimensions: int = 8, **more: object) -> ImageTower:
    return build_tower("vit:width=32,depth=2,heads=2,patch=8", 32, "learned:0.5", dimensions, **more)  # type: ignore[arg-type]


def vit_b16(dimensions: int, head: str = "mlp") -> ImageTower:
    with torch.device("meta"):
        return build_tower("vit_base_patch16_clip_224", 224, "learned:0.5", dimensions, head=head)  # type: ignore[arg-type]


def transformer(tokens: int, width: int, depth: int) -> int:
    """Forward FLOPs: 12·width² multiply-adds a token and block, and 2·tokens·width in attention."""
    return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)


class TestFlops:
    def test_vit_b16_is_what_the_formula_says(self) -> None:
        patches = 2 * 196 * (16 * 16 * 3) * 768
        head = 2 * (768 * 4096 + 4096 * 4096)
        counted = image_flops(vit_b16(4096), 224)
        assert counted.forward == patches + transformer(197, 768, 12) + head
        # Twice the forward pass, but for the patches: pixels have no gradient.
        assert counted.backward == 2 * counted.forward - patches

    def test_clips_text_tower_is_what_the_formula_says_at_every_length(self) -> None:
        pytest.importorskip("open_clip")
        for context in (16, 323):
            with torch.device("meta"):
                counted = text_flops(ClipTextTower(512, TextShape(context=context)))
            assert counted.forward == transformer(context, 512, 12) + 2 * 512 * 512
            assert counted.backward == 2 * counted.forward
            assert joint_text_flops(TextShape(context=context), 512) == counted

    def test_cached_vectors_cost_their_head_and_nothing_without_one(self) -> None:
        assert text_flops(CachedTextTower(8, 8, "none")) == Flops(0, 0)
        # Both matrices learn, but the vectors from the cache have no gradient.
        assert text_flops(CachedTextTower(6, 8, "mlp")) == Flops(2 * (6 * 8 + 64), 2 * (6 * 8 + 2 * 64))

    def test_a_frozen_tower_has_no_backward_pass_and_kept_features_no_forward_pass_either(self) -> None:
        trained, frozen = vit(), vit()
        frozen.vit.requires_grad_(False)
        frozen.frozen = True
        head = image_flops(frozen, 32, features=True)
        assert image_flops(frozen, 32).forward == image_flops(trained, 32).forward
        assert image_flops(frozen, 32).backward == head.backward
        assert head.forward == 2 * (32 * 8 + 8 * 8)

    def test_gradient_checkpointing_repeats_the_blocks_but_for_their_last_product(self) -> None:
        tower = vit()
        plain = image_flops(tower, 32)
        tower.checkpoint_gradients()
        again = image_flops(tower, 32)
        assert again.forward == plain.forward
        last = 2 * 16 * (4 * 32) * 32  # of each block: nothing in the backward pass needs its result
        assert again.backward == plain.backward + transformer(16, 32, 2) - 2 * last

    def test_the_cosines_are_those_that_the_loss_computes(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        batch, dimensions = 6, 4
        x = F.normalize(torch.randn(batch, dimensions), dim=1).requires_grad_()
        y = F.normalize(torch.randn(batch, dimensions), dim=1).requires_grad_()
        with FlopCounterMode(display=False) as counted:
            logits = InfoNCE()(x, y, torch.arange(batch))
            forward = counted.get_total_flops()
            logits.loss.backward()
        expected = contrast_flops(batch, dimensions, texts_train=True)
        assert counted.get_total_flops() - forward == expected.backward * batch
        watched = 4 * batch * dimensions  # mean cosines, for the log
        assert expected.forward * batch <= forward <= expected.forward * batch + watched


@pytest.mark.slow
class TestMemory:
    def test_the_estimate_is_what_a_real_step_holds_at_its_peak(self) -> None:
        tower, text = vit(), CachedTextTower(6, 8, "mlp")
        estimate = step_memory(tower, [text], StepShape(batch=8, image_size=32), precision="fp32")
        state = [*tower.parameters(), *tower.buffers(), *text.parameters(), *text.buffers()]
        assert estimate.weights == sum(t.numel() * t.element_size() for t in state)
        assert estimate.optimiser == 8 * sum(p.numel() for p in state if p.requires_grad)
        with flops._LiveBytes() as live:
            for tensor in state:
                live._see(tensor.untyped_storage())
            weights = live.now
            pixels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
            x, y = tower(pixels), text(torch.zeros(8, 6))
            InfoNCE()(x, y, torch.arange(8)).loss.backward()
        assert live.peak - weights == pytest.approx(estimate.step, rel=0.02)

    def test_activations_grow_with_the_batch_and_are_smaller_in_bf16_or_recomputed(self) -> None:
        def step(batch: int, tower: ImageTower, **more: str) -> int:
            shape = StepShape(batch=batch, image_size=224)
            return step_memory(tower, [CachedTextTower(64, 64, "none")], shape, **more).step  # type: ignore[arg-type]

        tower = vit_b16(64)
        one, two = step(64, tower), step(128, tower)
        assert two == pytest.approx(2 * one, rel=0.1)
        assert step(64, tower, precision="fp32") > 1.5 * one
        tower.checkpoint_gradients()
        assert step(64, tower) < 0.4 * one

    def test_a_text_tower_that_is_trained_along_needs_more_and_the_more_the_longer_its_captions(self) -> None:
        pytest.importorskip("open_clip")
        shape = StepShape(batch=256, image_size=224)
        sizes = [step_memory(vit_b16(512, "linear"), [CachedTextTower(512, 512, "none")], shape).peak]
        for context in (16, 323):
            with torch.device("meta"):
                text = ClipTextTower(512, TextShape(context=context))
            sizes.append(step_memory(vit_b16(512, "linear"), [text], shape).peak)
        assert sizes == sorted(sizes) and sizes[-1] > 1.5 * sizes[0]

    def test_kept_features_need_the_head_alone(self) -> None:
        tower = vit_b16(64)
        shape = StepShape(batch=256, image_size=224, features=True)
        tower.vit.requires_grad_(False)
        tower.frozen = True
        assert step_memory(tower, [CachedTextTower(64, 64, "none")], shape).step < 10 * MIB

    def test_texts_of_other_ranks_count_in_the_logits(self) -> None:
        text = [CachedTextTower(8, 8, "none")]
        alone = step_memory(vit(), text, StepShape(batch=64, image_size=32))
        ranked = step_memory(vit(), text, StepShape(batch=64, image_size=32, others=64 * 1023))
        assert ranked.step - alone.step > 2 * 4 * 64 * 64 * 1023

    def test_lion_keeps_one_state_where_adam_keeps_two(self) -> None:
        shape, text = StepShape(batch=2, image_size=32), [CachedTextTower(8, 8, "none")]
        lion = step_memory(vit(), text, shape, optimizer="lion").optimiser
        assert 2 * lion == step_memory(vit(), text, shape, optimizer="adamw").optimiser


@pytest.mark.slow
class TestPlan:
    def test_a_batch_far_beyond_this_machine_is_planned(self) -> None:
        plan = plan_step(
            vit_b16(4096), [CachedTextTower(4096, 4096, "none")], StepShape(batch=16_384, image_size=224)
        )
        assert plan.memory.peak > 2**39
        assert plan.parameters == plan.trained > 100e6
        assert plan.contrast == contrast_flops(16_384, 4096, texts_train=False)
        assert plan.lines()[0].startswith("compute   106 GFLOPs an image (35.3 forward, 70.2 backward)")

    def test_it_says_what_a_joint_text_tower_would_add_or_takes(self) -> None:
        pytest.importorskip("open_clip")
        shape = StepShape(batch=4, image_size=32)
        cached = plan_step(vit(), [CachedTextTower(8, 8, "none")], shape, joint=SMALL)
        joint = plan_step(vit(), [ClipTextTower(8, SMALL)], shape)
        assert cached.joint == joint.joint == joint.text and cached.text == Flops()
        assert "; a joint text tower would add" in cached.lines()[0]
        assert "of which the text tower" in joint.lines()[0] and "at 9 tokens" in joint.lines()[0]

    def test_several_caches_and_captions_are_so_many_texts(self) -> None:
        texts = [CachedTextTower(6, 8, "linear"), CachedTextTower(5, 8, "linear")]
        plan = plan_step(vit(), texts, StepShape(batch=4, image_size=32, captions=3, others=7))
        assert plan.text.forward == 3 * 2 * (6 * 8 + 5 * 8)
        assert plan.contrast == contrast_flops(4 * 3 * 2 + 7, 8, texts_train=True)

    def test_sharelock_trains_its_text_head_alone(self) -> None:
        tower = vit(32, head="none")
        tower.vit.requires_grad_(False)
        tower.frozen = True
        text = CachedTextTower(6, 32, "sharelock")
        plan = plan_step(tower, [text], StepShape(batch=64, image_size=32, features=True))
        assert plan.image == Flops() and plan.text.step > 0
        assert plan.contrast.forward == plan.contrast.backward == 2 * 64 * 32
        assert plan.trained == sum(p.numel() for p in text.parameters())

    def test_planning_leaves_the_model_and_the_random_stream_as_they_were(self) -> None:
        tower, text = vit(), CachedTextTower(6, 8, "sharelock")
        before = {k: v.clone() for k, v in [*tower.state_dict().items(), *text.state_dict().items()]}
        modes = [m.training for m in [*tower.modules(), *text.modules()]]
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        plan_step(tower, [text], StepShape(batch=4, image_size=32))
        assert torch.equal(torch.rand(3), expected)
        after = dict([*tower.state_dict().items(), *text.state_dict().items()])
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert modes == [m.training for m in [*tower.modules(), *text.modules()]]
        assert all(p.grad is None for p in [*tower.parameters(), *text.parameters()])
