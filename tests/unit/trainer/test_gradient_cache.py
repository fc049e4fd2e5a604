"""Gradient caching changes the memory of a step, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lift_cache.errors import BadConfig
from lift_trainer.gradient_cache import CachedPath, cached_backward
from lift_trainer.heads import ShareLockHead, unit_vectors
from lift_trainer.losses import InfoNCE, LossValue
from lift_trainer.text_towers import CachedTextTower
from lift_trainer.towers import ImageTower, build_tower
from tests.unit.trainer.two_ranks import CACHED

TOWER = "vit:width=16,depth=1,heads=2,patch=8"


class Model(nn.Module):
    def __init__(self, tower: ImageTower, text: nn.Module) -> None:
        super().__init__()
        self.tower, self.text, self.loss = tower, text, InfoNCE()

    def value(self, x_bd: torch.Tensor, y_bd: torch.Tensor) -> LossValue:
        return self.loss(x_bd, y_bd, torch.arange(len(x_bd)))


def model(head: str = "none", dropout: float = 0.0) -> Model:
    torch.manual_seed(0)
    made = Model(build_tower(TOWER, 16, "learned:0.5", 8), CachedTextTower(8, 8, head))  # type: ignore[arg-type]
    made.tower.vit.pos_drop = nn.Dropout(dropout)
    return made


def inputs(n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return pixels, unit_vectors(torch.randn(n, 8, generator=generator))


def gradients(made: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CACHED)
@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_loss_and_gradients_are_those_of_the_full_batch(case: str, chunk: int) -> None:
    expected, found = CACHED[case](), CACHED[case](chunk=chunk)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("trained", [True, False])
def test_a_tower_and_a_text_head_in_chunks_equal_the_full_batch(trained: bool) -> None:
    full, cached = (model("mlp" if trained else "none").double() for _ in range(2))
    pixels, vectors = inputs()
    vectors = vectors.double()
    value = full.value(full.tower(pixels), full.text(vectors))
    value.loss.backward()
    paths = [CachedPath(cached.tower, pixels), CachedPath(cached.text, vectors)]
    found = cached_backward(cached, paths, cached.value, 3)
    assert not found.loss.requires_grad and found.loss.item() == pytest.approx(value.loss.item(), abs=1e-12)
    expected, actual = gradients(full), gradients(cached)
    assert expected.keys() == actual.keys() and "loss.log_scale" in actual
    for name, gradient in expected.items():
        assert torch.allclose(gradient, actual[name], rtol=0, atol=1e-12), name


def test_dropout_draws_the_same_in_both_passes_and_the_stream_goes_on_as_after_one() -> None:
    made, (pixels, vectors) = model(dropout=0.5), inputs()
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def encode(chunk: torch.Tensor) -> torch.Tensor:
        out = made.tower(chunk)
        seen[torch.is_grad_enabled()].append(out.detach().clone())
        return out

    torch.manual_seed(5)
    cached_backward(made, [CachedPath(made.tower, pixels, encode)], lambda x: made.value(x, vectors), 3)
    after = torch.rand(4)
    assert len(seen[False]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[False], seen[True], strict=True))
    assert not torch.equal(seen[False][0], made.tower(pixels[:3]).detach())
    torch.manual_seed(5)
    with torch.no_grad():
        for chunk in pixels.split(3):
            made.tower(chunk)
    assert torch.equal(after, torch.rand(4))


def test_weights_under_an_open_autocast_get_their_gradient() -> None:
    """Weights cast to bf16 in the pass without gradient must not be taken from autocast's cache in the other."""
    pixels, vectors = inputs()
    found = []
    for surround in (True, False):
        made = model()

        def encode(chunk: torch.Tensor, tower: nn.Module = made.tower) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return tower(chunk)

        def rest(x_bd: torch.Tensor, made: Model = made) -> LossValue:
            with torch.autocast("cpu", enabled=False):
                return made.value(x_bd, vectors)

        with torch.autocast("cpu", torch.bfloat16, enabled=surround):
            cached_backward(made, [CachedPath(made.tower, pixels, encode)], rest, 3)
        found.append(gradients(made))
    assert found[0].keys() == found[1].keys() == {name for name, _ in made.named_parameters()}
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=0.1, atol=0.01), name


def test_a_frozen_path_runs_once() -> None:
    made, (pixels, vectors) = model(), inputs()
    made.tower.requires_grad_(False)
    runs: list[int] = []

    def encode(chunk: torch.Tensor) -> torch.Tensor:
        runs.append(len(chunk))
        return made.tower(chunk)

    cached_backward(made, [CachedPath(made.tower, pixels, encode)], lambda x: made.value(x, vectors), 3)
    assert runs == [3, 3, 1] and set(gradients(made)) == {"loss.log_scale"}


def test_a_batch_norm_in_train_mode_is_refused_and_one_in_evaluation_mode_is_not() -> None:
    made, (pixels, vectors) = model(), inputs()
    made.text.head = ShareLockHead(8, 8, hidden=16, dropout=0.0)
    made.text.trains = True
    paths = [CachedPath(made.tower, pixels), CachedPath(made.text, vectors)]
    with pytest.raises(
        BadConfig, match=r"cannot run head\.1 \(BatchNorm\) in chunks: .*; freeze it, or train"
    ):
        cached_backward(made, paths, made.value, 3)
    assert not gradients(made)
    # Outside the cached path it sees the whole batch.
    cached_backward(made, paths[:1], lambda x: made.value(x, made.text(vectors)), 3)
    assert "text.head.1.weight" in gradients(made)
    made.text.eval()
    cached_backward(made, paths, made.value, 3)
