"""Held-out scores while a run goes on: they change nothing of it, and the best checkpoint stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lift_cache.errors import BadConfig
from lift_trainer.job import prepare
from lift_trainer.loop import Outcome, train
from tests.unit.trainer.conftest import World, png, write_tar

pytestmark = pytest.mark.slow


@pytest.fixture
def held_out(world: World) -> Path:
    samples = [(f"{i:04d}", png(100 + i), {"caption": f"drawing number {i}"}) for i in range(12)]
    return write_tar(world.root / "held-out.tar", samples)


def run(world: World, name: str, **changes: object) -> Outcome:
    return train(prepare(world.config(name, **changes)))


def lines(world: World, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (world.root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes", [{}, {"captions": "all", "text_transform": "center", "mask": "caption+image"}]
)
def test_held_out_scores_do_not_change_a_bit_of_the_run(
    world: World, held_out: Path, changes: dict[str, object]
) -> None:
    plain = run(world, "plain", **changes)
    watched = run(
        world, "watched", eval_data=[str(held_out)], eval_every=3, evaluators=["retrieval"], **changes
    )
    expected = load_file(plain.checkpoint / "model.safetensors")
    found = load_file(watched.checkpoint / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    scored = [line for line in lines(world, "watched") if "held_out" in line]
    assert [line["step"] for line in scored] == [3, 6, 9, 12]
    for line in scored:
        assert {"loss", "r@1_image_to_text", "retrieval/r@10_text_to_image"} <= set(line["held_out"])  # type: ignore[call-overload]


def test_the_best_checkpoint_stays_and_is_named(world: World, held_out: Path) -> None:
    changes = {"eval_data": [str(held_out)], "eval_every": 1, "keep": 1, "checkpoint_every": 100, "steps": 9}
    run(world, "run", lr=0.05, **changes)
    scores = {
        line["step"]: line["held_out"]["loss"]  # type: ignore[index]
        for line in lines(world, "run")
        if "held_out" in line
    }
    best = min(scores, key=lambda step: (scores[step], step))
    said = json.loads((world.root / "run" / "best.json").read_text())
    assert said["metric"] == "loss" and said["best"]["step"] == best
    kept = {path.name for path in (world.root / "run" / "checkpoints").glob("step-*")}
    assert f"step-{best:06d}" in kept and "step-000009" in kept and len(kept) <= 2


def test_a_score_that_there_is_not_is_refused_with_those_there_are(world: World, held_out: Path) -> None:
    with pytest.raises(BadConfig, match=r"--best accuracy: .* there are loss"):
        run(world, "run", eval_data=[str(held_out)], best="accuracy")


def test_a_joint_run_is_watched_too(world: World, held_out: Path) -> None:
    pytest.importorskip("open_clip")
    joint = {
        "text_tower": "clip",
        "text_shape": "context=9,width=16,depth=1,heads=2",
        "cache": [],
        "steps": 3,
    }
    run(world, "joint", eval_data=[str(held_out)], eval_every=3, **joint)
    assert [line["step"] for line in lines(world, "joint") if "held_out" in line] == [3]
