"""`lift-eval`: tasks, suites and comparisons of several runs, and what a repeated evaluation costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from lift_cache.recipe import Recipe
from lift_trainer.cli import eval_main
from lift_trainer.evaluators.result import Result
from lift_trainer.job import prepare
from lift_trainer.loop import train
from tests.unit.trainer.conftest import Embedder, World, png, write_tar


@pytest.fixture
def trained(world: World) -> World:
    train(prepare(world.config("a", epochs=1)))
    shutil.copytree(world.root / "a", world.root / "b")
    return world


def lift_eval(*argv: object) -> int:
    try:
        eval_main([str(argument) for argument in argv])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def runs(world: World, names: Sequence[str] = ("a", "b")) -> list[Path]:
    return [world.root / name for name in names]


def suite(world: World, tasks: object) -> Path:
    path = world.root / "suite.yaml"
    path.write_text(yaml.safe_dump(tasks))
    return path


def test_a_suite_evaluates_every_task_for_every_run(
    trained: World, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [
        {"task": "retrieval", "data": str(trained.shard)},
        {"task": "retrieval", "data": [str(trained.shard)], "protocol": "lift", "name": "first"},
    ]
    assert lift_eval("suite", suite(trained, tasks), "--run", *runs(trained)) == 0
    shown = capsys.readouterr()
    for run in runs(trained):
        assert {path.name for path in (run / "eval").iterdir()} == {
            "retrieval-train-karpathy.json",
            "retrieval-first-lift.json",
        }
        for path in (run / "eval").iterdir():
            assert f"written to {path}" in shown.err
    first, second = shown.out.strip().split("\n\n")
    assert first.startswith("retrieval · first · lift\n") and second.startswith(
        "retrieval · train · karpathy\n"
    )
    assert second.splitlines()[1].split() == ["a", "b", "chance", "items"]
    assert {line.split()[0]: line.split()[-1] for line in second.splitlines()[2:5]} == {
        "r@1_image_to_text": "28",
        "r@1_text_to_image": "35",
        "r@1_mean": "63",
    }
    assert f"next: lift-report {trained.root / 'a'} {trained.root / 'b'}" in shown.err


def test_json_is_the_results_and_nothing_else(trained: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert lift_eval("retrieval", "--data", trained.shard, "--run", *runs(trained), "--json") == 0
    found = [Result.model_validate(one) for one in json.loads(capsys.readouterr().out)]
    assert [result.subject.name for result in found] == ["a", "b"]
    assert found[0] == Result.read(trained.root / "a" / "eval" / "retrieval-train-karpathy.json")


def test_runs_are_compared_item_by_item(trained: World, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(trained.root / "b")
    train(prepare(trained.config("b", epochs=20, precision="fp32", lr=3e-3, log_every=100)))
    assert lift_eval("retrieval", "--data", trained.shard, "--run", *runs(trained)) == 0
    capsys.readouterr()
    assert lift_eval("compare", *runs(trained), "--json") == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["first"], said["second"], said["protocol"]) == ("a", "b", "karpathy")
    scores = {one["score"]: one for one in said["scores"]}
    found = scores["r@10_mean"]
    assert found["difference"] == pytest.approx(found["second"] - found["first"], abs=1e-12)
    assert found["marked"] == (found["low"] > 0 or found["high"] < 0)
    assert found["marked"] and found["difference"] > 0  # 20 epochs against one
    assert lift_eval("compare", *runs(trained)) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("r@10_mean"))
    assert line.endswith("*")


def test_a_repeated_evaluation_embeds_nothing(trained: World, recipe: Recipe) -> None:
    shard = write_tar(
        trained.root / "new.tar",
        [(str(i), png(i), {"captions": [f"new {i}", f"drawing number {i}"]}) for i in range(3)],
    )
    embedder = Embedder(recipe)
    argv = ["retrieval", "--data", shard, "--run", trained.root / "a", "--server", embedder.url]
    try:
        assert lift_eval(*argv) == 0
        assert sorted(embedder.embedded) == ["new 0", "new 1", "new 2"]
        before = (trained.root / "a" / "eval" / "retrieval-new-karpathy.json").read_bytes()
        assert lift_eval(*argv) == 0
        assert len(embedder.embedded) == 3
    finally:
        embedder.close()
    assert lift_eval(*argv) == 0  # without any server
    assert (trained.root / "a" / "eval" / "retrieval-new-karpathy.json").read_bytes() == before


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert lift_eval(*argv) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert lines[-1].startswith("error: ") and said.out == ""
    return lines[-1]


def test_an_embedder_of_another_recipe_is_refused_by_field(
    trained: World, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(trained.root / "new.tar", [("0", png(0), {"caption": "new"})])
    embedder = Embedder(recipe.model_copy(update={"max_tokens": 78}))
    try:
        said = refusal(
            capsys, "retrieval", "--data", shard, "--run", trained.root / "a", "--server", embedder.url
        )
    finally:
        embedder.close()
    assert "max_tokens is 77 in" in said and "and 78 in http" in said and not embedder.embedded


def test_mistakes_are_one_clear_line(trained: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.root / "a"
    assert "--run" in refusal(capsys, "retrieval", "--data", trained.shard)
    none = trained.root / "none"
    assert f"no checkpoint in {none}" in refusal(
        capsys, "retrieval", "--run", run, none, "--data", trained.shard
    )
    assert not (run / "eval").exists()  # nothing was computed before
    said = refusal(capsys, "retrieval", "--run", run, "--data", trained.shard, "--name", "a/b")
    assert "--name" in said
    for tasks, what in (
        ([], "no list of tasks"),
        ({"task": "retrieval"}, "no list of tasks"),
        ([{"task": "telepathy"}], "task 1: no line `task:` with one of retrieval, shapes, sugarcrepe"),
        ([{"task": ["retrieval"]}], "task 1: no line `task:` with one of retrieval"),
        ([{"task": "retrieval"}], "task 1 (retrieval): data: Field required"),
        ([{"task": "retrieval", "data": []}], "task 1 (retrieval): data: List should have at least 1 item"),
        ([{"task": "retrieval", "data": "a.tar", "colour": 1}], "colour: Extra inputs are not permitted"),
        (
            [{"task": "retrieval", "data": "a.tar", "protocol": "best"}],
            "protocol: Input should be 'karpathy'",
        ),
    ):
        assert what in refusal(capsys, "suite", suite(trained, tasks), "--run", run)
    twice = [{"task": "retrieval", "data": str(trained.shard)}] * 2
    assert "name them apart" in refusal(capsys, "suite", suite(trained, twice), "--run", run)
    assert "at least two" in refusal(capsys, "compare", run)
    assert f"{run} has no evaluation" in refusal(capsys, "compare", run, trained.root / "b")
    assert f"{none}: no such run or result; name runs" in refusal(capsys, "compare", none, run)
    said = refusal(capsys, "suite", none, "--run", run)
    assert f"suite {none}: No such file or directory; give a YAML file with a list of tasks" in said
    (run / "eval").write_text("no folder")
    said = refusal(capsys, "retrieval", "--data", trained.shard, "--run", run)
    assert f"{run / 'eval'}: results cannot be written there" in said and "written to" not in said
    (run / "eval").unlink()
    assert lift_eval("retrieval", "--data", trained.shard, "--run", run) == 0
    shutil.copytree(run, trained.root / "c")
    (trained.root / "c" / "eval" / "retrieval-train-karpathy.json").unlink()
    lift = ["retrieval", "--data", trained.shard, "--run", trained.root / "c", "--protocol", "lift"]
    assert lift_eval(*lift) == 0
    assert "their protocol differ: karpathy and lift" in refusal(capsys, "compare", run, trained.root / "c")


def test_help_of_every_task_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("retrieval", "shapes", "sugarcrepe", "suite", "compare"):
        assert lift_eval(task, "--help") == 0
        assert f"lift-eval {task} " in capsys.readouterr().out
