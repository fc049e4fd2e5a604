"""Retrieval by each protocol against a count of its own, and what a result holds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import LiftError, MissingCaptions, RecipeMismatch
from lift_trainer.checkpoint import Checkpoint
from lift_trainer.evaluators.captioned import Captioned, open_captioned
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.items import mean
from lift_trainer.evaluators.result import Result
from lift_trainer.evaluators.retrieval import (
    CUTOFFS,
    FIRST,
    Protocol,
    Retrieval,
    Texts,
    chance_recall,
    rank_texts,
    score_items,
)
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index
from tests.unit.trainer.conftest import World, png, write_tar

PROTOCOLS: tuple[Protocol, ...] = ("karpathy", "lift", "any-caption")

# ---------------------------------------------------------------------------------------------- scores


def place_of_best(scores: Sequence[float], right: Sequence[bool]) -> int:
    """Place of the best right item in a sorted list, after every wrong one that is not below it.

    What cannot be compared is not below anything, and nothing is below it.
    """
    mine = [score for score, ok in zip(scores, right, strict=True) if ok]
    best = math.nan if any(map(math.isnan, mine)) else max(mine)
    return 1 + sum(not ok and not score < best for score, ok in zip(scores, right, strict=True))


def reference(
    x: np.ndarray, vector: dict[str, np.ndarray], captions: list[list[str]], protocol: Protocol
) -> dict[str, float]:
    """R@K by plain loops in float64, protocol as its authors describe it."""
    used = [texts[: FIRST[protocol]] for texts in captions]
    if protocol == "any-caption":
        distinct = sorted({text for own in used for text in own})
        texts = [(text, {i for i, own in enumerate(used) if text in own}) for text in distinct]
    else:
        texts = [(text, {i}) for i, own in enumerate(used) for text in own]
    cosine = [[float(np.dot(image, vector[text])) for text, _ in texts] for image in x.astype(np.float64)]
    to_text = [place_of_best(row, [i in right for _, right in texts]) for i, row in enumerate(cosine)]
    to_image = [
        place_of_best([row[t] for row in cosine], [i in right for i in range(len(x))])
        for t, (_, right) in enumerate(texts)
    ]
    scores = {}
    for k in CUTOFFS:
        scores[f"r@{k}_image_to_text"] = sum(r <= k for r in to_text) / len(to_text)
        scores[f"r@{k}_text_to_image"] = sum(r <= k for r in to_image) / len(to_image)
        scores[f"r@{k}_mean"] = (scores[f"r@{k}_image_to_text"] + scores[f"r@{k}_text_to_image"]) / 2
    return scores


def scores_of(
    x: np.ndarray, vector: dict[str, np.ndarray], captions: list[list[str]], protocol: Protocol
) -> dict[str, float]:
    texts = Texts.of(captions, protocol)
    y = np.stack([vector[caption] for caption in texts.captions])
    ranks = rank_texts(torch.from_numpy(x), torch.from_numpy(y), texts)
    return {name: mean(items) for name, items in score_items(ranks, texts).items()}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), protocol=st.sampled_from(PROTOCOLS))
def test_scores_equal_a_count_by_hand_with_ties_twins_and_missing_numbers(
    data: st.DataObject, protocol: Protocol
) -> None:
    captions = data.draw(
        st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7), min_size=1, max_size=14)
    )
    # Small integers: sums are exact in either precision, and ties are frequent.
    seed = data.draw(st.integers(0, 1 << 16))
    generator = np.random.default_rng(seed)
    x = generator.integers(-2, 3, (len(captions), 3)).astype(np.float32)
    vector = {text: generator.integers(-2, 3, 3).astype(np.float32) for text in "abcdefgh"}
    if data.draw(st.booleans()):
        x[generator.integers(len(x))] = np.nan
    found = scores_of(x, vector, captions, protocol)
    assert found == pytest.approx(reference(x, vector, captions, protocol), abs=1e-9)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_of_real_vectors_equal_a_count_in_float64(protocol: Protocol) -> None:
    generator = np.random.default_rng(0)
    captions = [[f"image {i} caption {j}" for j in range(generator.integers(1, 8))] for i in range(60)]
    x = generator.normal(size=(60, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    vector = {
        text: x[i] + generator.normal(size=16).astype(np.float32)
        for i, own in enumerate(captions)
        for text in own
    }
    found = scores_of(x, vector, captions, protocol)
    assert found == pytest.approx(reference(x, vector, captions, protocol), abs=1e-9)
    assert 0 < found["r@1_mean"] < found["r@5_mean"] < found["r@10_mean"]


def test_an_encoder_that_says_the_same_for_everything_scores_nothing() -> None:
    same = np.ones((20, 4), np.float32)
    captions = [[f"caption {i}"] for i in range(20)]
    vector = {text: same[0] for (text,) in captions}
    for protocol in PROTOCOLS:
        assert set(scores_of(same, vector, captions, protocol).values()) == {0.0}


def test_only_an_images_own_captions_count_and_equal_ones_of_others_are_counted() -> None:
    captions = [["a dog", "a cat"], ["a dog"], ["a dog", "a dog"]]
    vector = {"a dog": np.array([1, 0], np.float32), "a cat": np.array([0, 1], np.float32)}
    x = np.array([[1, 0], [0.5, 0.2], [0.4, 0.2]], np.float32)
    texts = Texts.of(captions, "karpathy")
    assert len(texts.caption_of_text) == 5 and texts.equal_pairs == 1 + 2 + 2
    # "a dog" of every other image ties with each image's own.
    found = scores_of(x, vector, captions, "karpathy")
    assert found["r@1_image_to_text"] == 0.0
    assert found["r@1_text_to_image"] == 1 / 5  # of the dogs, the first image's
    assert scores_of(x, vector, captions, "any-caption")["r@1_image_to_text"] == 1.0


def test_protocols_take_the_captions_that_they_name() -> None:
    captions = [[f"{i} {j}" for j in range(8)] for i in range(3)]
    assert len(Texts.of(captions, "karpathy").captions) == 15
    assert list(Texts.of(captions, "lift").captions) == ["0 0", "1 0", "2 0"]
    assert len(Texts.of(captions, "any-caption").captions) == 24


def test_chance_is_what_random_order_scores() -> None:
    assert chance_recall(np.ones(5, int), 191) == pytest.approx({1: 1 / 191, 5: 5 / 191, 10: 10 / 191})
    generator = np.random.default_rng(0)
    hits = np.mean([(generator.permutation(20)[:3] < 5).any() for _ in range(20_000)])
    assert chance_recall(np.array([3]), 20)[5] == pytest.approx(hits, abs=0.01)
    assert chance_recall(np.array([1, 1]), 4)[5] == 1.0


# ---------------------------------------------------------------------------------------------- end to end


@pytest.fixture
def trained(world: World) -> World:
    train(prepare(world.config(epochs=1)))
    return world


def evaluate(
    world: World, shard: Path | None = None, protocol: Protocol = "any-caption", **options: object
) -> Result:
    captioned = open_captioned([str(shard or world.shard)], Rejects(100))
    trained = TrainedRun.open(world.root / "run", **options)  # type: ignore[arg-type]
    return Retrieval("test", captioned, protocol).evaluate(trained)


def test_a_result_holds_scores_chance_items_and_a_gallery_drawn_by_seed(trained: World) -> None:
    result = evaluate(trained)
    path = result.write(trained.root / "run" / "eval")
    assert path.name == "retrieval-test-any-caption.json" and Result.read(path) == result
    assert (result.details["images"], result.details["captions"]) == (28, 35)
    score = result.scores["r@1_mean"]
    assert score.chance == pytest.approx((1 / 28 + (21 / 35 + 7 * 2 / 35) / 28) / 2, abs=0.01)
    assert score.low is not None and score.high is not None and score.low <= score.value <= score.high
    assert len(result.items["r@5_image_to_text"].value) == 28
    assert len(result.items["r@5_text_to_image"].value) == 35 == result.scores["r@5_text_to_image"].items
    assert result.subject.recipe == trained.recipe.fingerprint and result.subject.step == 3
    gallery = json.loads(path.read_text())["details"]["gallery"]
    assert len(gallery) == 12
    for shown in gallery:
        scores = [image["score"] for image in shown["images"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        number = int(shown["caption"].split()[-1])
        assert all(image["right"] == (image["sample"] == f"{number:04d}") for image in shown["images"])
    assert evaluate(trained) == result


def test_scores_and_features_do_not_depend_on_the_batch_size(trained: World) -> None:
    whole = evaluate(trained, protocol="karpathy", batch_size=256)
    index = build_index([str(trained.shard)], Rejects(0))

    def vectors(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        encoder = TrainedRun.open(trained.root / "run", batch_size=size)
        by = encoder.features
        return encode(index, encoder, Rejects(0))[0], encode(index, encoder, Rejects(0), by=by)[0]

    expected = vectors(256)
    for size in (1, 5, 27):
        for found, wanted in zip(vectors(size), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=0, atol=1e-5)
        parts = evaluate(trained, protocol="karpathy", batch_size=size)
        near = sum(whole.details["near_ties"].values())
        assert near == 0  # otherwise such queries could differ
        for name, score in whole.scores.items():
            assert parts.scores[name].value == pytest.approx(score.value, abs=1e-4)


def test_equal_captions_of_other_images_count_as_right_where_the_protocol_says_so(trained: World) -> None:
    shard = write_tar(
        trained.root / "twins.tar",
        [(str(i), png(i), {"caption": f"drawing number {i // 2}"}) for i in range(8)],
    )
    result = evaluate(trained, shard)
    assert (result.details["images"], result.details["captions"]) == (8, 4)
    assert result.scores["r@10_text_to_image"].value == 1.0
    result = evaluate(trained, shard, "karpathy")
    assert result.details["equal_caption_pairs"] == 4 and result.details["texts"] == 8
    assert result.details["ties"]["image_to_text"] == 8
    assert result.scores["r@1_image_to_text"].value == 0.0


def test_a_broken_image_is_left_out_and_the_score_says_over_how_many_it_stands(trained: World) -> None:
    samples = [(str(i), png(i) if i else b"broken", {"caption": f"drawing number {i}"}) for i in range(6)]
    shard = write_tar(trained.root / "test-000.tar", samples)
    result = evaluate(trained, shard)
    assert result.scores["r@1_image_to_text"].items == 5 and list(result.left_out) == [f"{shard}:0"]
    shown = {image["sample"] for shown in result.details["gallery"] for image in shown["images"]}
    assert shown == {"1", "2", "3", "4", "5"}


def test_texts_of_another_recipe_or_not_in_the_cache_are_refused(trained: World) -> None:
    other = trained.recipe.model_copy(update={"pooling": "mean"})
    write_cache(trained.root / "other", other, Encoding(dimensions=24), trained.captions, trained.vectors)
    with pytest.raises(RecipeMismatch, match="pooling is 'last' in the training run and 'mean' in"):
        evaluate(trained, cache=str(trained.root / "other"))
    shard = write_tar(trained.root / "new.tar", [("0", png(0), {"caption": "never embedded"})])
    with pytest.raises(MissingCaptions, match=r"1 of 1 captions \('never embedded'\) are not in snapshot"):
        evaluate(trained, shard)


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
        evaluate(trained)


def test_a_copied_run_is_evaluated_where_it_lies_now(trained: World) -> None:
    copy = trained.root / "copy"
    shutil.copytree(trained.root / "run", copy)
    assert TrainedRun.open(copy).run == copy


def test_one_image_with_one_caption_finds_it() -> None:
    class OneImage:
        names = ("only",)

        def __len__(self) -> int:
            return 1

    assert Captioned(OneImage(), [["a"]]).captions  # type: ignore[arg-type]
    assert scores_of(np.ones((1, 2), np.float32), {"a": np.ones(2, np.float32)}, [["a"]], "karpathy") == {
        f"r@{k}_{which}": 1.0 for k in CUTOFFS for which in ("image_to_text", "text_to_image", "mean")
    }
