"""Two-way choices between a caption and one that differs in one thing."""

from __future__ import annotations

import pytest

from lift_cache.errors import BadSource
from lift_trainer.evaluation import TrainedRun
from lift_trainer.hard_negatives import evaluate_hard_negatives
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
    scores = evaluate_hard_negatives(trained, [str(shard)])
    assert scores["swap_obj"].accuracy > 0.8
    assert scores["swap_att"].accuracy == 0.0
    assert {score.items for score in scores.values()} == {28}


def test_shards_without_negatives_are_refused(world: World, trained: TrainedRun) -> None:
    with pytest.raises(BadSource, match="no sample has negatives"):
        evaluate_hard_negatives(trained, [str(world.shard)])
