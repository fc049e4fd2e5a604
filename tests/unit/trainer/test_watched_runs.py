"""Held-out scores while a run goes on: they change nothing of it, and the best checkpoint stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lift_cache.errors import BadConfig, BadSource, CacheDamaged
from lift_trainer.checkpoint import find_checkpoint
from lift_trainer.heldout import HeldOut, Scores
from lift_trainer.job import prepare
from lift_trainer.loop import Outcome, train
from lift_trainer.model import LiftModel
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


def test_held_out_data_that_cannot_be_read_any_more_cost_no_step(
    world: World, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, changes = HeldOut.scores, {"eval_data": [str(held_out)], "eval_every": 3, "checkpoint_every": 100}
    scored: list[int] = []

    def lost(self: HeldOut, model: LiftModel) -> Scores:
        scored.append(1)
        if len(scored) == 2:
            raise CacheDamaged("the cache is gone")
        return score(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "scores", lost)
        with pytest.raises(CacheDamaged, match=r"^the cache is gone; saved as .*step-000006$"):
            run(world, "parts", **changes)
    found = find_checkpoint(world.root / "parts")
    assert found is not None and found.state.step == 6
    continued, whole = run(world, "parts", **changes), run(world, "whole", **changes)
    expected = load_file(whole.checkpoint / "model.safetensors")
    assert all(
        torch.equal(v, expected[n]) for n, v in load_file(continued.checkpoint / "model.safetensors").items()
    )


def test_too_many_broken_held_out_images_are_named_and_the_run_goes_on_when_they_are_allowed(
    world: World,
) -> None:
    samples = [(f"{i:04d}", b"" if i == 2 else png(i), {"caption": f"drawing number {i}"}) for i in range(12)]
    shard = write_tar(world.root / "hurt.tar", samples)
    changes = {"eval_data": [str(shard)], "eval_every": 5, "max_bad": 0}
    for _ in range(2):  # the same command meets it at the next scoring again
        with pytest.raises(BadSource, match=r"hurt\.tar:0002: .* more than --max-bad 0: .*; saved as"):
            run(world, "run", **changes)
    assert run(world, "run", **changes | {"max_bad": 1}).finished


def test_held_out_loss_is_that_of_the_batch_whatever_further_negatives_a_run_has(
    world: World, held_out: Path
) -> None:
    """They are drawn from the training captions, and a score must not depend on what was trained on."""
    changes = {"eval_data": [str(held_out)], "steps": 1, "lr": 1e-30, "warmup": "0", "weight_decay": 0.0}
    run(world, "without", **changes)
    run(world, "with", text_negatives=8, **changes)
    ours, theirs = (
        next(line["held_out"] for line in lines(world, name) if "held_out" in line)
        for name in ("without", "with")
    )
    assert ours == pytest.approx(theirs, abs=1e-6)
    trained = [lines(world, name)[0]["loss"] for name in ("without", "with")]
    assert trained[1] > trained[0]  # type: ignore[operator]
