"""Retrieval scores against a brute-force count, and what a result file holds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, LiftError, MissingCaptions, RecipeMismatch
from lift_trainer.checkpoint import Checkpoint
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.retrieval import chance_recall, evaluate_retrieval, rank, recall
from tests.unit.trainer.conftest import World, png, write_tar


def brute_force(scores: np.ndarray, right: np.ndarray) -> list[int]:
    """Rank of the best right item; a wrong item that ties stands before it."""
    out = []
    for row, ok in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], ok[j]))
        out.append(1 + next(place for place, j in enumerate(order) if ok[j]))
    return out


def test_ranks_equal_a_brute_force_count_with_many_captions_and_ties() -> None:
    generator = np.random.default_rng(0)
    n, u = 30, 50
    x, y = (
        generator.integers(-2, 3, (n, 3)).astype(np.float32),
        generator.integers(-2, 3, (u, 3)).astype(np.float32),
    )
    right = generator.random((n, u)) < 0.05
    right[np.arange(n), np.arange(n)] = right[np.arange(u) % n, np.arange(u)] = True
    ranks = rank(torch.from_numpy(x), torch.from_numpy(y), np.stack(np.nonzero(right)))
    # A right item that ties with wrong ones comes after all of them.
    expected = [1 + int(((row >= row[ok].max()) & ~ok).sum()) for row, ok in zip(x @ y.T, right, strict=True)]
    assert ranks.image_to_text.tolist() == expected == brute_force(x @ y.T, right)
    assert ranks.text_to_image.tolist() == brute_force(y @ x.T, right.T)


def test_an_encoder_that_says_the_same_for_everything_scores_nothing() -> None:
    same = torch.ones(20, 4)
    ranks = rank(same, same, np.stack([np.arange(20)] * 2))
    assert recall(ranks.image_to_text)["r@10"] == 0.0


def test_vectors_that_are_no_numbers_score_nothing() -> None:
    nan = torch.full((20, 4), torch.nan)
    ranks = rank(nan, torch.ones(20, 4), np.stack([np.arange(20)] * 2))
    assert recall(ranks.image_to_text)["r@10"] == recall(ranks.text_to_image)["r@10"] == 0.0


def test_chance_is_what_random_order_scores() -> None:
    assert chance_recall(np.ones(5, int), 191) == pytest.approx(
        {"r@1": 1 / 191, "r@5": 5 / 191, "r@10": 10 / 191}
    )
    generator = np.random.default_rng(0)
    hits = np.mean([(generator.permutation(20)[:3] < 5).any() for _ in range(20_000)])
    assert chance_recall(np.array([3]), 20)["r@5"] == pytest.approx(hits, abs=0.01)
    assert chance_recall(np.array([1, 1]), 4)["r@5"] == 1.0


@pytest.fixture
def trained(world: World) -> World:
    train(prepare(world.config(epochs=1)))
    return world


def test_a_result_holds_scores_chance_ranks_and_a_gallery_drawn_by_seed(trained: World) -> None:
    result, path = evaluate_retrieval(trained.root / "run", [str(trained.shard)])
    assert path.name == "retrieval-train.json"
    written = json.loads(path.read_text())
    assert (written["items"], written["captions"], written["pairs"]) == (28, 35, 35)
    assert written["chance"]["r@1"] == pytest.approx((1 / 28 + (21 / 35 + 7 * 2 / 35) / 28) / 2, abs=0.01)
    assert set(written["image_to_text"]) == {"r@1", "r@5", "r@10"}
    assert len(written["ranks"]["image_to_text"]) == 28 and len(written["ranks"]["text_to_image"]) == 35
    assert written["recipe"] == trained.recipe.fingerprint
    assert len(written["gallery"]) == 12
    for shown in written["gallery"]:
        scores = [image["score"] for image in shown["images"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        number = int(shown["caption"].split()[-1])
        assert all(image["right"] == (image["sample"] == f"{number:04d}") for image in shown["images"])
    assert evaluate_retrieval(trained.root / "run", [str(trained.shard)])[0].gallery == result.gallery
    assert "image to text" in result.table() and "chance" in result.table()


def test_equal_captions_of_other_images_count_as_right(trained: World) -> None:
    shard = write_tar(
        trained.root / "twins.tar",
        [(str(i), png(i), {"caption": f"drawing number {i // 2}"}) for i in range(8)],
    )
    result, _ = evaluate_retrieval(trained.root / "run", [str(shard)])
    assert (result.items, result.captions, result.pairs) == (8, 4, 8)
    assert result.text_to_image["r@10"] == 1.0


def test_a_broken_image_is_left_out_and_the_score_says_over_how_many_it_stands(trained: World) -> None:
    samples = [(str(i), png(i) if i else b"broken", {"caption": f"drawing number {i}"}) for i in range(6)]
    shard = write_tar(trained.root / "test-000.tar", samples)
    result, path = evaluate_retrieval(trained.root / "run", [str(shard)])
    assert path.name == "retrieval-test.json"
    assert result.items == 5 and list(result.left_out) == [f"{shard}:0"]
    assert {image["sample"] for shown in result.gallery for image in shown["images"]} == {
        "1",
        "2",
        "3",
        "4",
        "5",
    }


def test_texts_of_another_recipe_or_not_in_the_cache_are_refused(trained: World) -> None:
    other = trained.recipe.model_copy(update={"pooling": "mean"})
    write_cache(trained.root / "other", other, Encoding(dimensions=24), trained.captions, trained.vectors)
    with pytest.raises(RecipeMismatch, match="pooling is 'last' in the training run and 'mean' in"):
        evaluate_retrieval(trained.root / "run", [str(trained.shard)], cache=str(trained.root / "other"))
    shard = write_tar(trained.root / "new.tar", [("0", png(0), {"caption": "never embedded"})])
    with pytest.raises(MissingCaptions, match=r"1 of 1 captions \('never embedded'\) are not in snapshot"):
        evaluate_retrieval(trained.root / "run", [str(shard)])


def test_a_checkpoint_that_makes_no_numbers_is_refused_by_name(
    trained: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Checkpoint.load_model

    def poisoned(self: Checkpoint, model: torch.nn.Module) -> None:
        load(self, model)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)

    monkeypatch.setattr(Checkpoint, "load_model", poisoned)
    with pytest.raises(LiftError, match="step-000003: it makes image vectors that are not finite"):
        evaluate_retrieval(trained.root / "run", [str(trained.shard)])


def test_a_copied_run_is_evaluated_where_it_lies_now(trained: World) -> None:
    copy = trained.root / "copy"
    shutil.copytree(trained.root / "run", copy)
    assert TrainedRun.open(copy).run == copy


def test_a_name_cannot_lead_out_of_the_run(trained: World) -> None:
    with pytest.raises(BadConfig, match="--name 'a/b' becomes part of a file name"):
        evaluate_retrieval(trained.root / "run", [str(trained.shard)], name="a/b")
