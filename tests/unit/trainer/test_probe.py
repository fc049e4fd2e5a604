"""Probes on given states beside scikit-learn, loops and Newton's method; and from images to a result."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lift_cache.errors import BadSource
from lift_trainer.evaluators.classification import rank_classes
from lift_trainer.evaluators.labelled import Labelled
from lift_trainer.evaluators.probe import (
    UNCHOSEN,
    Probe,
    choose_linear,
    fit_linear,
    held_out,
    knn_votes,
    standardised,
)
from lift_trainer.evaluators.result import Result
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.job import prepare
from lift_trainer.loop import train as run_training
from lift_trainer.rejects import Rejects
from tests.unit.trainer.conftest import World, png
from tests.unit.trainer.test_zeroshot import Named, plain

CLASSES = 4


def clusters(n: int, seed: int, spread: float = 1.2, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """States around a centre per class, and classes."""
    centres = np.random.default_rng(99).standard_normal((CLASSES, width))
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    return centres[labels] + spread * generator.standard_normal((n, width)), labels


def votes(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    tensors = (torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(test))
    return knn_votes(*tensors, k, CLASSES).numpy()


@pytest.mark.parametrize("k", [1, 7, 20, 500])
def test_votes_are_those_of_dinos_protocol(k: int) -> None:
    (train, labels), (test, _) = clusters(120, 0), clusters(30, 1)
    found = votes(train, labels, test, k)
    for state, got in zip(test, found, strict=True):
        cosines = [float(state @ other / np.linalg.norm(state) / np.linalg.norm(other)) for other in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        expected = [
            sum(math.exp(cosines[i] / 0.07) for i in nearest if labels[i] == c) for c in range(CLASSES)
        ]
        shares = np.array(expected) / sum(expected)
        assert np.abs(got / got.sum() - shares).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 9])
def test_knn_accuracy_is_that_of_scikit_learn(k: int) -> None:
    neighbours = pytest.importorskip("sklearn.neighbors")
    (train, labels), (test, truth) = clusters(200, 0), clusters(80, 1)
    theirs = neighbours.KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = theirs.fit(train, labels).score(test, truth)
    ranked = rank_classes(torch.from_numpy(votes(train, labels, test, k)), torch.from_numpy(truth))
    assert ranked.top(1).mean() == pytest.approx(expected, abs=1e-9) and 0.3 < expected < 1


def test_equal_training_images_share_the_last_places_and_their_order_does_not_matter() -> None:
    train = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 2])
    found = votes(train, labels, np.array([[1.0, 0.0]]), 1)[0]
    assert found / found.sum() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    turned = votes(train[::-1].copy(), labels[::-1].copy(), np.array([[1.0, 0.0]]), 1)[0]
    assert turned == pytest.approx(found)
    tie = votes(train[:2], labels[:2], np.array([[1.0, 0.0]]), 1)
    assert rank_classes(torch.from_numpy(tie), torch.tensor([0])).top(1).tolist() == [0.0]


def test_states_that_are_no_numbers_are_never_right() -> None:
    (train, labels), (test, truth) = clusters(20, 0), clusters(8, 1)
    test[0], train[3] = np.nan, np.nan
    ranked = rank_classes(torch.from_numpy(votes(train, labels, test, 5)), torch.from_numpy(truth))
    assert ranked.top(1)[0] == 0.0


# ---------------------------------------------------------------------------------------------- linear


def newton(x: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [c, D] and bias [c] at the minimum, by the second derivatives."""
    n, width = x.shape
    design = np.hstack([x, np.ones((n, 1))])
    target = np.eye(CLASSES)[labels]
    theta = np.zeros((CLASSES, width + 1))
    penalty = np.tile(np.append(np.full(width, strength), 0.0), CLASSES)
    for _ in range(50):
        logits = design @ theta.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = ((p - target).T @ design / n).ravel() + penalty * theta.ravel()
        hessian = np.diag(penalty)
        for row in range(n):
            spread = np.diag(p[row]) - np.outer(p[row], p[row])
            hessian += np.kron(spread, np.outer(design[row], design[row])) / n
        theta -= (np.linalg.pinv(hessian) @ gradient).reshape(theta.shape)
    return theta[:, :-1], theta[:, -1]


@pytest.mark.parametrize("strength", [1.0, 1e-2])
def test_the_minimum_is_newtons(strength: float) -> None:
    x, labels = clusters(60, 0)
    found = fit_linear(torch.from_numpy(x), torch.from_numpy(labels), CLASSES, strength)
    weight, bias = newton(x, labels, strength)
    assert found.gradient < 1e-6
    assert np.abs(found.weight.numpy() - weight).max() < 1e-5
    shifted = found.bias.numpy() - found.bias.numpy().mean()  # a constant on all classes says nothing
    assert np.abs(shifted - (bias - bias.mean())).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_the_linear_probe_is_scikit_learns_logistic_regression(strength: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    (x, labels), (test, truth) = clusters(120, 0), clusters(80, 1)
    theirs = linear.LogisticRegression(C=1 / (len(x) * strength), tol=1e-10, max_iter=10_000).fit(x, labels)
    ours = fit_linear(torch.from_numpy(x), torch.from_numpy(labels), CLASSES, strength)
    scores = ours(torch.from_numpy(test))
    assert np.abs(scores.softmax(1).numpy() - theirs.predict_proba(test)).max() < 1e-5
    found = rank_classes(scores, torch.from_numpy(truth)).top(1).mean()
    assert found == pytest.approx(theirs.score(test, truth), abs=1e-9) and 0.3 < found < 1


def test_a_probe_of_states_that_are_no_numbers_is_wrong_and_ends() -> None:
    x, labels = (torch.from_numpy(array) for array in clusters(20, 0))
    x[3] = torch.nan
    with torch.no_grad():  # as while a model is trained
        chosen = choose_linear(*standardised(x), labels, CLASSES)
        assert rank_classes(chosen.linear(x), labels).top(1).sum() == 0
        assert choose_linear(*standardised(x[4:]), labels[4:], CLASSES).linear.gradient < 1e-6


def test_where_it_begins_does_not_change_where_it_ends() -> None:
    x, labels = (torch.from_numpy(array) for array in clusters(60, 0))
    cold = fit_linear(x, labels, CLASSES, 1e-2)
    warm = fit_linear(x, labels, CLASSES, 1e-2, fit_linear(x, labels, CLASSES, 10.0))
    assert (cold.weight - warm.weight).abs().max() < 1e-5


def test_the_strength_is_chosen_on_a_fifth_of_each_class_that_is_not_fitted() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2])
    apart = held_out(labels)
    assert [int(apart[labels == label].sum()) for label in range(3)] == [2, 1, 0]
    assert (held_out(labels) == apart).all()
    # Pure noise beside many columns: whoever fits it hard does worse.
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 60)))
    truth = torch.from_numpy(np.arange(40) % CLASSES)
    chosen = choose_linear(x, truth, CLASSES)
    best = max(chosen.tried.values())
    assert chosen.tried[f"{chosen.strength:g}"] == best
    strongest = max(float(strength) for strength, score in chosen.tried.items() if score == best)
    assert chosen.strength == strongest
    again = choose_linear(x, truth, CLASSES)
    assert torch.equal(again.linear.weight, chosen.linear.weight)


def test_one_image_per_class_is_fitted_without_a_choice() -> None:
    x = torch.eye(CLASSES, dtype=torch.float64)
    chosen = choose_linear(x, torch.arange(CLASSES), CLASSES)
    assert chosen.tried == {} and chosen.strength == UNCHOSEN
    assert rank_classes(chosen.linear(x), torch.arange(CLASSES)).top(1).mean() == 1.0


def test_states_are_standardised_by_the_training_images_and_a_constant_says_nothing() -> None:
    train, test = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[4.0, 7.0]])
    first, second = standardised(train, test)
    assert first.tolist() == [[-1.0, 0.0], [1.0, 0.0]] and second.tolist() == [[2.0, 0.0]]
    assert first.dtype == torch.float64


# ---------------------------------------------------------------------------------------------- from end to end


def test_probes_do_not_depend_on_the_batch_size(world: World) -> None:
    run_training(prepare(world.config(epochs=4, precision="fp32")))
    for part, offset in (("train", 0), ("test", 50)):
        for number in range(24):
            where = world.root / part / f"class {number % CLASSES}"
            where.mkdir(parents=True, exist_ok=True)
            (where / f"{number}.png").write_bytes(png(offset + number))
    opened = [Labelled.open([str(world.root / part)], Rejects(0)) for part in ("train", "test")]
    probe = Probe("drawings", *opened, 5, Rejects(0))
    whole, *parts = (
        probe.evaluate(TrainedRun.open(world.root / "run", "cpu", batch_size=size)) for size in (256, 1, 7)
    )
    assert {score.items for score in whole.scores.values()} == {24}
    for part in parts:
        assert part.details["strength"] == whole.details["strength"]
        for name, score in whole.scores.items():
            assert part.scores[name].value == pytest.approx(score.value, abs=1e-4)


def folder(root: Path, classes: dict[str, list[int]]) -> Path:
    for name, reds in classes.items():
        (root / name).mkdir(parents=True)
        for number, red in enumerate(reds):
            (root / name / f"{number}.png").write_bytes(plain(red) if red >= 0 else b"broken")
    return root


def test_a_result_holds_both_probes_and_counts_the_test_images(tmp_path: Path) -> None:
    train = folder(tmp_path / "train", {"bird": [0, 0], "cat": [10, 10, 10], "dog": [20, 20, -1]})
    test = folder(tmp_path / "test", {"cat": [10, 20], "dog": [20]})
    rejects = Rejects(1)
    opened = [Labelled.open([str(data)], rejects) for data in (train, test)]
    result = Probe("pets", opened[0], opened[1], 2, rejects).evaluate(Named(["bird", "cat", "dog"]))
    assert (result.task, result.protocol) == ("probe", "knn2")
    assert {name: (score.value, score.items) for name, score in result.scores.items()} == {
        "knn": (pytest.approx(2 / 3), 3),
        "linear": (pytest.approx(2 / 3), 3),
    }
    assert result.scores["knn"].chance == pytest.approx(1 / 3)
    assert result.details["train"] == 7 and list(result.left_out) == [str(train / "dog" / "2.png")]
    assert Result.read(result.write(tmp_path / "eval")) == result
    with pytest.raises(BadSource, match="class 'bird' of the test images has no training image"):
        Probe("pets", opened[1], opened[0], 2, rejects)
