"""Recall@K and two-way accuracy from given features, beside torchmetrics' hit rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lift_trainer.evaluators.items import mean
from lift_trainer.evaluators.retrieval import CUTOFFS, Protocol, Texts, rank_texts, score_items
from lift_trainer.evaluators.sugarcrepe import TASKS, open_sugarcrepe
from tests.unit.trainer.encoders import Known
from tests.unit.trainer.test_hard_negatives import IMAGES, published, write_sugarcrepe

pytestmark = pytest.mark.slow

theirs = pytest.importorskip("torchmetrics.retrieval")


def hit_rate(scores_qm: np.ndarray, right_qm: np.ndarray, k: int) -> float:
    """Share of the queries with a right item among the first K."""
    query = torch.arange(len(scores_qm))[:, None].expand(scores_qm.shape)
    # By itself it averages in float32, which is no closer than 1e-8.
    metric = theirs.RetrievalHitRate(
        top_k=min(k, scores_qm.shape[1]), aggregation=lambda hits, dim: hits.double().mean(dim)
    )
    return float(metric(torch.from_numpy(scores_qm), torch.from_numpy(right_qm), indexes=query))


def recalls(
    x: np.ndarray, y: np.ndarray, captions: list[list[str]], protocol: Protocol
) -> tuple[dict[str, float], dict[str, float]]:
    """Ours and theirs; y has a vector per distinct caption."""
    texts = Texts.of(captions, protocol)
    ranks = rank_texts(torch.from_numpy(x), torch.from_numpy(y), texts)
    ours = {name: mean(items) for name, items in score_items(ranks, texts).items()}
    scores = x @ y[texts.caption_of_text].T
    right = np.zeros(scores.shape, bool)
    right[tuple(texts.right)] = True
    peer = {}
    for k in CUTOFFS:
        found = hit_rate(scores, right, k), hit_rate(scores.T.copy(), right.T.copy(), k)
        peer |= {
            f"r@{k}_image_to_text": found[0],
            f"r@{k}_text_to_image": found[1],
            f"r@{k}_mean": sum(found) / 2,
        }
    return ours, peer


def features(
    captions: list[list[str]], protocol: Protocol, noise: float = 0.6
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of images, and of captions near to (the last of) theirs."""
    generator = np.random.default_rng(len(captions))
    x = generator.standard_normal((len(captions), 12))
    near = {text: x[i] for i, own in enumerate(captions) for text in own}
    y = np.stack([near[text] for text in Texts.of(captions, protocol).captions])
    y = y + noise * generator.standard_normal(y.shape) * np.linalg.norm(y, axis=1, keepdims=True)
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (x, y)]
    return unit[0], unit[1]


@pytest.mark.parametrize("protocol", ["karpathy", "lift", "any-caption"])
@pytest.mark.parametrize("images", [1, 2, 60])
def test_recalls_are_torchmetrics_hit_rates(images: int, protocol: Protocol) -> None:
    captions = [[f"{i} {j}" for j in range(1 + i % 7)] for i in range(images)]
    ours, peer = recalls(*features(captions, protocol), captions, protocol)
    assert ours == pytest.approx(peer, abs=1e-9)
    assert images < 60 or 0 < ours["r@1_mean"] < 1


def test_a_caption_of_several_images_is_right_for_each_where_the_protocol_says_so() -> None:
    captions = [[f"{i // 3}", f"only {i}"] for i in range(45)]
    ours, peer = recalls(*features(captions, "any-caption"), captions, "any-caption")
    assert ours == pytest.approx(peer, abs=1e-9)


def test_where_it_differs_ties_are_why_and_ours_is_the_lower() -> None:
    """torchmetrics sorts, so that a tie falls as the sort has it; here a tie is wrong."""
    captions = [[f"{i}"] for i in range(30)]
    x, y = features(captions, "lift")
    y[1::2] = y[::2]  # each caption ties with a wrong one
    ours, peer = recalls(x, y, captions, "lift")
    assert ours["r@1_image_to_text"] == 0.0 < peer["r@1_image_to_text"]
    assert all(ours[name] <= peer[name] for name in ours)


def test_two_way_choices_are_the_first_of_two(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    items = published(generator)
    texts = [
        item[f] for some in items.values() for item in some.values() for f in ("caption", "negative_caption")
    ]
    vectors = generator.standard_normal((len(texts), 8)).astype(np.float32)
    encoder = Known(
        generator.standard_normal((IMAGES, 8)).astype(np.float32), dict(zip(texts, vectors, strict=True))
    )
    result = open_sugarcrepe(*write_sugarcrepe(tmp_path, items), "coco").evaluate(encoder)
    for task in TASKS:
        pairs = [
            [
                encoder.images[int(item["filename"][:-4])] @ encoder.texts[item[f]]
                for f in ("caption", "negative_caption")
            ]
            for item in json.loads((tmp_path / "data" / f"{task}.json").read_text()).values()
        ]
        scores = np.array(pairs)
        right = np.tile([True, False], (len(scores), 1))
        assert result.scores[task].value == pytest.approx(hit_rate(scores, right, 1), abs=1e-9)
