"""The losses against an independent reference in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lift_trainer.losses import Cosine, Extra, InfoNCE, LossValue, Mask, build_loss
from tests.unit.trainer.reference import LOSSES, Problem, gradients


def batch(n: int = 6, d: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, d, generator=generator), dim=-1) for _ in range(2))
    return x, y, torch.tensor([0, 1, 2, 1, 4, 0])


def reference(x: np.ndarray, y: np.ndarray, captions: list[int], scale: float, mask: bool) -> float:
    """InfoNCE written out term by term."""
    n, total = len(x), 0.0
    for i in range(n):
        for rows in (True, False):
            terms = []
            for j in range(n):
                if mask and j != i and captions[i] == captions[j]:
                    continue
                terms.append(math.exp(scale * float(x[i] @ y[j] if rows else x[j] @ y[i])))
            total += -math.log(math.exp(scale * float(x[i] @ y[i])) / sum(terms))
    return total / (2 * n)


@pytest.mark.parametrize("mask", ["none", "caption"])
def test_infonce_is_the_formula_in_both_directions(mask: str) -> None:
    x, y, captions = batch()
    loss = InfoNCE("caption" if mask == "caption" else "none").double()
    value = loss(x.double(), y.double(), captions).loss.item()
    expected = reference(
        x.double().numpy(), y.double().numpy(), captions.tolist(), 1 / 0.07, mask == "caption"
    )
    assert value == pytest.approx(expected, abs=1e-6)


def test_equal_captions_are_no_negatives_under_the_mask_and_others_are_untouched() -> None:
    x, y, _ = batch()
    same, distinct = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    assert InfoNCE("caption")(x, y, same).loss.item() == 0.0
    assert torch.equal(InfoNCE("caption")(x, y, distinct).loss, InfoNCE("none")(x, y, distinct).loss)


def test_the_scale_starts_at_the_papers_value_and_stays_between_1_and_100() -> None:
    loss = InfoNCE()
    assert loss.scale == pytest.approx(1 / 0.07)
    for value, expected in ((10.0, 100.0), (-3.0, 1.0)):
        loss.log_scale.data.fill_(value)
        loss.clamp_()
        assert loss.scale == pytest.approx(expected)


def test_cosine_is_zero_for_aligned_pairs_and_learns_no_temperature() -> None:
    x, y, captions = batch()
    assert Cosine()(x, x, captions).loss.item() == pytest.approx(0, abs=1e-6)
    assert Cosine()(x, y, captions).loss.item() == pytest.approx(1 - (x * y).sum(1).mean().item())
    assert not list(Cosine().parameters())


def test_accuracy_counts_images_whose_own_text_is_nearest() -> None:
    x, _, captions = batch()
    assert InfoNCE()(x, x, captions).accuracy.item() == 1.0
    assert InfoNCE()(x, x.roll(1, 0), captions).accuracy.item() == 0.0


MASKS: list[Mask] = ["none", "caption", "caption+image"]


def computed(
    problem: Problem, name: str, mask: Mask, flat: bool
) -> tuple[LossValue, dict[str, torch.Tensor]]:
    """The loss in float64, and its gradients."""
    loss = build_loss(name, mask, scale=problem.scale, bias=problem.bias).double()  # type: ignore[arg-type]
    if not isinstance(loss, Cosine):
        loss.log_scale.data.fill_(math.log(problem.scale))  # float32 had rounded it
    x, y, extra = (
        torch.from_numpy(values.copy()).requires_grad_() for values in (problem.x, problem.y, problem.extra)
    )
    captions = torch.from_numpy(problem.captions)
    value = loss(
        x,
        y[:, 0] if flat else y,
        captions[:, 0] if flat else captions,
        torch.from_numpy(problem.images),
        Extra(extra, torch.from_numpy(problem.extra_captions), torch.from_numpy(problem.known))
        if len(problem.extra)
        else None,
    )
    value.loss.backward()
    found = {"x": x, "y": y, "extra": extra} | dict(loss.named_parameters())
    return value, {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in found.items()}


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["infonce", "siglip", "cosine"])
def test_every_loss_and_its_gradients_are_the_formula(name: str, mask: Mask, texts: int, extra: int) -> None:
    problem = Problem.make(texts=texts, extra=0 if name == "cosine" else extra)
    expected, slopes = LOSSES[name](problem, mask), gradients(LOSSES[name], problem, mask)
    for flat in [False, True] if texts == 1 else [False]:
        value, found = computed(problem, name, mask, flat)
        assert value.loss.item() == pytest.approx(expected, abs=1e-6)
        for parameter, gradient in found.items():
            assert gradient.numpy() == pytest.approx(slopes[parameter], abs=1e-6), parameter


@pytest.mark.parametrize("name", ["infonce", "siglip", "cosine"])
def test_what_is_watched_beside_the_loss_counts_what_it_says(name: str) -> None:
    problem = Problem.make(texts=3, extra=5)
    value, _ = computed(problem, name, "none" if name == "cosine" else "caption+image", flat=False)
    dots = np.einsum("id,jqd->ijq", problem.x, problem.y)
    pairs = [(i, j, q) for i in range(6) for j, q in problem.texts() if i != j]
    assert value.negative.item() == pytest.approx(np.mean([dots[pair] for pair in pairs]))
    own = [np.mean([dots[i, i, q] for j, q in problem.texts() if j == i]) for i in range(6)]
    assert value.positive.item() == pytest.approx(np.mean(own))
    best = [max(problem.texts(), key=lambda text: dots[i, text[0], text[1]])[0] == i for i in range(6)]
    if name == "cosine":
        assert value.accuracy.item() == pytest.approx(np.mean(best))
        assert value.masked.item() == 0
        return
    hidden = sum(problem.hidden("caption+image", *pair) for pair in pairs)
    further = sum(caption in problem.known[i] for i in range(6) for caption in problem.extra_captions)
    assert hidden and further
    assert value.masked.item() == pytest.approx((hidden + further) / (len(pairs) + 30))


def test_several_texts_of_which_each_image_has_one_are_the_plain_loss() -> None:
    x, y, captions = batch()
    padded = torch.stack([torch.zeros_like(y), y, torch.zeros_like(y)], 1)
    numbers = torch.stack([torch.full_like(captions, -1), captions, torch.full_like(captions, -1)], 1)
    for name in ("infonce", "siglip", "cosine"):
        for mask in MASKS:
            loss = build_loss(name, mask)  # type: ignore[arg-type]
            plain, several = (
                loss(x, texts, given, torch.arange(6)) for texts, given in ((y, captions), (padded, numbers))
            )
            for one, other in zip(plain, several, strict=True):
                assert one.item() == pytest.approx(other.item(), abs=1e-6)


def test_an_image_whose_texts_are_all_masked_has_a_finite_gradient() -> None:
    x, y, _ = batch()
    x.requires_grad_()
    value = InfoNCE("caption")(x, y[:, None], torch.zeros(6, 1, dtype=torch.int64))
    value.loss.backward()
    assert value.loss.item() == 0 and x.grad is not None and not x.grad.any() and value.masked.item() == 1


def test_a_fixed_scale_is_kept_and_not_trained() -> None:
    loss = build_loss("infonce", "none", scale=math.exp(2.6592), learn_scale=False)
    assert isinstance(loss, InfoNCE) and not loss.log_scale.requires_grad
    loss.clamp_()
    assert math.log(loss.scale) == pytest.approx(2.6592)
    siglip = build_loss("siglip", "none", scale=20, bias=-10)
    assert siglip.scale == pytest.approx(20) and {n for n, _ in siglip.named_parameters()} == {
        "log_scale",
        "bias",
    }
