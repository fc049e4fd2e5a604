"""Two-way choices between a caption and one that differs in one thing."""

from __future__ import annotations

import pytest

from lift_cache.errors import BadSource
from lift_trainer.evaluators.result import Result
from lift_trainer.evaluators.shapes import open_shapes
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.job import prepare
from lift_trainer.loop import train
from tests.unit.trainer.conftest import World, png, write_tar


@pytest.fixture
def trained(world: World) -> TrainedRun:
    train(prepare(world.config(epochs=30, precision="fp32", lr=3e-3)))
    return TrainedRun.open(world.root / "run")


def test_a_trained_tower_prefers_its_captions_and_a_tie_is_wrong(world: World, trained: TrainedRun) -> None:
    samples = [
        (
            str(i),
            png(i),
            {
                "captions": [f"drawing number {i}"],
                "negatives": {
                    "swap_obj": f"drawing number {(i + 9) % 28}",
                    "swap_att": f"drawing  number {i}",
                },
            },
        )
        for i in range(28)
    ]
    samples.append(("plain", png(0), {"captions": ["drawing number 0"]}))
    shard = write_tar(world.root / "negatives.tar", samples)
    result = open_shapes([str(shard)], "test").evaluate(trained)
    scores = result.scores
    assert scores["swap_obj"].value > 0.8
    assert scores["swap_att"].value == 0.0
    assert {name: score.items for name, score in scores.items()} == {
        "swap_att": 28,
        "swap_obj": 28,
        "mean": 56,
        "item_mean": 56,
    }
    assert result.details["ties"]["swap_att"] == result.details["equal_captions"]["swap_att"] == 28
    assert scores["swap_att"].blind == 0.0 and scores["swap_obj"].blind is not None
    assert Result.read(result.write(world.root / "run" / "eval")) == result
    shown = result.details["pairs"]
    assert len(shown) == 2 * 28
    for pair in shown:
        number = int(pair["image"]["sample"])
        assert pair["image"]["shard"] == str(shard)
        assert result.items[pair["score"]].image[pair["item"]] == number
        assert pair["captions"][0] == f"drawing number {number}"


def test_shards_without_negatives_are_refused(world: World) -> None:
    with pytest.raises(BadSource, match="no sample has negatives"):
        open_shapes([str(world.shard)], "test")
