"""The losses against an independent reference in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lift_trainer.losses import Cosine, InfoNCE


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
