"""Intervals of scores and differences of two encoders, against plain loops."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lift_cache.errors import BadSource
from lift_trainer.evaluators.compare import differences, paired
from lift_trainer.evaluators.intervals import DRAWS, intervals
from lift_trainer.evaluators.items import Items, mean
from lift_trainer.evaluators.result import Result, Subject, scored


def by_hand(items: Items) -> tuple[float, float]:
    """The same draws of images, each scored by a loop over its items."""
    images = sorted(set(items.image))
    rng = np.random.default_rng(len(images))
    group = items.group or (0,) * len(items.value)
    scores = []
    for drawn in rng.integers(0, len(images), (DRAWS, len(images))).tolist():
        by_group: dict[int, list[float]] = {}
        for place in drawn:
            for image, value, g in zip(items.image, items.value, group, strict=True):
                if image == images[place]:
                    by_group.setdefault(g, []).append(value)
        scores.append(statistics.fmean(statistics.fmean(values) for values in by_group.values()))
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(low), float(high)


@settings(max_examples=6, deadline=None)
@given(
    items=st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from((0.0, 1.0, 0.25)), st.integers(-1, 2)),
        min_size=2,
        max_size=9,
    ).filter(lambda items: len({image for image, _, _ in items}) > 1),
    grouped=st.booleans(),
)
def test_an_interval_is_that_of_the_scores_of_resampled_images(
    items: list[tuple[int, float, int]], grouped: bool
) -> None:
    image, value, group = zip(*items, strict=True)
    some = Items(image=image, value=value, group=group if grouped else None)
    found = intervals({"score": some})["score"]
    assert (found.low, found.high) == pytest.approx(by_hand(some), abs=1e-9)


def test_the_score_of_groups_is_the_mean_of_their_means() -> None:
    some = Items(image=(0, 1, 2, 3), value=(1, 0, 0, 1), group=(7, 7, 7, -2))
    assert mean(some) == pytest.approx((1 / 3 + 1) / 2, abs=1e-12)
    assert mean(some.model_copy(update={"group": None})) == 0.5


def test_many_items_of_one_image_are_not_more_evidence_than_one() -> None:
    value = np.random.default_rng(0).random(200) < 0.4
    one = intervals({"score": Items.of(np.arange(200), value)})["score"]
    ten = intervals({"score": Items.of(np.repeat(np.arange(200), 10), np.repeat(value, 10))})["score"]
    assert one == pytest.approx(ten)
    apart = intervals({"score": Items.of(np.arange(2000), np.repeat(value, 10))})["score"]
    assert apart.high - apart.low < 0.5 * (one.high - one.low)
    normal = 1.96 * (value.mean() * (1 - value.mean()) / 200) ** 0.5
    assert one.high - value.mean() == pytest.approx(normal, rel=0.15)


def test_an_interval_does_not_depend_on_the_scores_beside_it() -> None:
    generator = np.random.default_rng(0)
    image = np.arange(300)
    items = {name: Items.of(image, generator.random(300) < 0.5) for name in "abc"}
    together = intervals(items)
    assert (
        {name: intervals({name: some})[name] for name, some in items.items()} == together == intervals(items)
    )


def test_one_image_has_no_interval_and_no_items_no_score() -> None:
    items = {"one": Items(image=(3, 3), value=(1, 0)), "none": Items(image=(), value=())}
    assert intervals(items) == {}
    assert {name: (score.value, score.low) for name, score in scored(items).items()} == {"one": (0.5, None)}


def test_items_that_are_no_numbers_or_not_of_one_length_are_refused() -> None:
    with pytest.raises(ValidationError):
        Items(image=(0,), value=(float("nan"),))
    with pytest.raises(ValidationError, match="not of one length"):
        Items(image=(0, 1), value=(1.0,))


# ---------------------------------------------------------------------------------------------- comparison


def result(subject: str, value: np.ndarray, image: np.ndarray, **changes: object) -> Result:
    items = {"accuracy": Items.of(image, value)}
    fields = {
        "task": "sugarcrepe",
        "protocol": "two-way",
        "name": "coco",
        "data": "d" * 32,
        "subject": Subject(name=subject, checkpoint=subject),
        "scores": scored(items),
        "items": items,
    }
    return Result.model_validate(fields | changes)


def test_a_difference_is_marked_only_where_its_interval_excludes_nothing() -> None:
    generator = np.random.default_rng(0)
    image = np.arange(400)
    first = generator.random(400) < 0.5
    better = first | (generator.random(400) < 0.1)
    (found,) = differences(result("a", first, image), result("b", better, image))
    assert found.difference == pytest.approx(better.mean() - first.mean(), abs=1e-12)
    assert found.low is not None and found.high is not None and 0 < found.low < found.difference < found.high
    assert found.marked
    # Paired: the interval is far narrower than that of two scores apart.
    own = scored({"a": Items.of(image, first)})["a"]
    assert own.high is not None and own.low is not None
    assert found.high - found.low < 0.75 * (own.high - own.low)
    other = generator.permutation(first)  # as good, on other items
    (found,) = differences(result("a", first, image), result("b", other, image))
    assert found.difference == 0 and not found.marked
    (back,) = differences(result("b", better, image), result("a", first, image))
    assert back.difference == pytest.approx(first.mean() - better.mean(), abs=1e-12) and back.marked


def test_results_on_other_data_or_by_another_protocol_are_refused_by_name() -> None:
    value, image = np.array([True, False]), np.arange(2)
    ours = result("a", value, image)
    for field, other in (("data", "e" * 32), ("protocol", "lift"), ("task", "shapes")):
        with pytest.raises(
            BadSource, match=f"a and b cannot be compared on sugarcrepe coco: their {field} differ"
        ):
            differences(ours, result("b", value, image, **{field: other}))
    fewer = result("b", value, image, data="e" * 32, left_out={"x.jpg": "broken"})
    with pytest.raises(BadSource, match="0 and 1 images were left out"):
        differences(ours, fewer)


def test_results_are_paired_by_task_and_data() -> None:
    value, image = np.array([True, False]), np.arange(2)
    ours, theirs = result("a", value, image), result("b", value, image)
    also = result("b", value, image, name="other")
    assert paired([ours], [also, theirs]) == [(ours, theirs)]
    with pytest.raises(BadSource, match="their protocol differ: two-way and lift"):
        paired([ours], [result("b", value, image, protocol="lift")])
    with pytest.raises(BadSource, match="a and b have no task on the same data in common"):
        paired([ours], [also])


def test_results_of_another_version_say_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("results")
    for content, said in (
        ("{}", "task: Field required; evaluate again"),
        ("[", "not JSON"),
        ("[]", "evaluate again"),
    ):
        (folder / "x.json").write_text(content)
        with pytest.raises(BadSource, match=said):
            Result.read(folder / "x.json")
