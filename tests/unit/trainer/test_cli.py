"""The command lines: one definition of every setting, and one clear line for every mistake."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lift_trainer.cli import eval_main, train_main
from tests.unit.trainer.conftest import World, png, write_tar


def call(main: object, argv: Sequence[str]) -> int:
    try:
        main(list(argv))  # type: ignore[operator]
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("main", [train_main, eval_main])
def test_help_shows_what_can_be_set(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert ("--text-transform" in shown and "--cache cache" in shown) or "retrieval" in shown


def test_train_and_evaluate_say_what_they_did_and_what_comes_next(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(train_main, world.flags(epochs=1)) == 0
    shown = capsys.readouterr().err
    assert "28 images, 35 captions, 35 distinct" in shown
    assert "loss " in shown and "images/s" in shown and "waiting for data" in shown
    last = shown.splitlines()[-1]
    assert (
        last.startswith("done: 3 steps") and f"next: lift-eval retrieval --run {world.root / 'run'}" in last
    )
    assert call(eval_main, ["retrieval", "--run", str(world.root / "run"), "--data", str(world.shard)]) == 0
    captured = capsys.readouterr()
    assert "retrieval · train · karpathy\n" in captured.out
    assert "r@10_image_to_text" in captured.out and "next: lift-report" in captured.err


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    settled = {"lr": 1e-3, "lr_scaling": "sqrt", "base_batch": 32, "warmup": "25%"}
    assert call(train_main, [*world.flags(**settled), "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert "12 steps of 8 images (4 epochs)" in shown and "learning rate 0.0005, warm-up 3 steps" in shown
    for line in (
        r"tower .* [\d,]+ parameters trained",
        r"compute   [\d.e-]+ GFLOPs an image \([\d.e-]+ forward, [\d.e-]+ backward\)",
        r"memory    about [\d.e-]+ GiB a device for 8 images: weights .*, optimiser .*, activations and gradients ",
        r"time      about \d+ seconds for 96 images: [\d,]+ images/s a device .* \(measured just now\)",
    ):
        assert re.search(f"^{line}", shown, re.MULTILINE), line
    if importlib.util.find_spec("open_clip"):
        assert re.search(r"; a joint text tower would add [\d.e-]+ at 77 tokens \(\+[\d,]+%\)", shown)
    assert not (world.root / "run").exists()


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = world.root / "run.yaml"
    flags = world.flags(steps=1)
    file.write_text(
        f"lr: 0.1\nclip: 0.5\nweight_decay: 0.1\nwarmup: 0\nbase_batch: 4\ndata: ['{world.shard}']\n"
    )
    monkeypatch.setenv("LIFT_LR", "0.2")
    monkeypatch.setenv("LIFT_CLIP", "0.25")
    without_data = [*flags[2:], "--config", str(file), "--lr", "0.3"]
    assert flags[0] == "--data"
    warmup = without_data.index("--warmup")
    assert call(train_main, without_data[:warmup] + without_data[warmup + 2 :]) == 0
    config = json.loads((world.root / "run" / "config.json").read_text())
    assert (config["lr"], config["clip"], config["weight_decay"], config["warmup"]) == (0.3, 0.25, 0.1, "0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--cache", "nowhere"], "nowhere"),
        (["--data", "nowhere.tar"], "no such file: nowhere.tar"),
        (
            ["--batch-size", "64"],
            "--batch-size is 64 and the data hold 28 images; use --batch-size 28 or less",
        ),
        (["--batch-size", "0"], "--batch-size: Input should be greater than 0"),
        (["--lr", "fast"], "--lr: Input should be a valid number"),
        (
            ["--text-transform", "whiten:9"],
            "there are 35 distinct training captions; the largest safe k is 3",
        ),
        (["--text-transform", "bleach"], "'bleach' is none of none, center, whiten:128"),
        (["--tower", "vit:width=9"], "not of the form vit:width=128,depth=4,heads=4,patch=8"),
        (["--tower", "resnet50"], "not a plain vision transformer"),
        (["--image-size", "17"], "not a multiple of the patch"),
        (["--pos-embed", "learned"], "is none of learned:0.02"),
        (["--warmup", "500"], "--warmup is 500 steps and the whole run 12"),
        (["--warmup", "soon"], "'soon' is none of"),
        (["--device", "tpu"], "--device tpu cannot be used"),
        (["--on-missing", "embed"], "--on-missing embed needs --server URL"),
        (["--head", "sharelock", "--gradient-cache", "4"], "--gradient-cache runs the image side in parts"),
        (["--caption-field", "words"], "no field 'words'; it has captions"),
        (["--loss", "triplet"], "triplet"),
        (["--learning-rate", "1"], "Unknown option"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: "),
    ],
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    world: World, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    flags = world.flags(max_bad=0)
    if changes[0] in flags:
        flags[flags.index(changes[0]) + 1] = changes[1]
    else:
        flags += changes
    assert call(train_main, flags) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1
    assert not (world.root / "run").exists()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("0", png(0), "a"), ("1", png(1), "b"), ("0", png(2), "c")], "key '0' comes twice"),
        ([("0", png(0), "a"), ("1", None, "b")], "bad.tar:1: no image (it has json)"),
        ([("0", png(0), "a"), ("1", png(1), "")], "bad.tar:1: the caption is empty"),
    ],
)
def test_samples_without_a_key_of_their_own_an_image_or_a_caption_are_one_clear_line(
    world: World,
    capsys: pytest.CaptureFixture[str],
    samples: list[tuple[str, bytes | None, str]],
    message: str,
) -> None:
    shard = write_tar(
        world.root / "bad.tar", [(key, image, {"caption": text}) for key, image, text in samples]
    )
    assert call(train_main, world.flags(data=[str(shard)], max_bad=0)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1
    assert not (world.root / "run").exists()


def test_a_row_that_names_no_image_is_one_clear_line(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.root / "0.png").write_bytes(png(0))
    with (world.root / "bad.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption"), ("0.png", "drawing number 0"), ("", "drawing number 1")]
        )
    assert call(train_main, world.flags(data=[str(world.root / "bad.csv")], max_bad=0)) == 2
    shown = capsys.readouterr().err
    assert "column 'image' names no image" in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1\n", "there is no setting 'learning_rate'"),
        ("just words\n", "no settings in it"),
        ("a: [1,\n", "--config"),
        ("!!python/object/apply:os.system ['true']\n", "--config"),
    ],
)
def test_a_config_file_is_checked_and_never_executed(
    world: World, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = world.root / "bad.yaml"
    file.write_text(content)
    assert call(train_main, [*world.flags(), "--config", str(file)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1


def test_a_file_cannot_be_a_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.root / "file").touch()
    assert call(train_main, world.flags("file")) == 2
    assert f"--run {world.root / 'file'} is a file; name a directory" in capsys.readouterr().err


def test_a_batch_of_nothing_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["retrieval", "--run", "r", "--data", str(world.shard), "--batch-size", "0"]
    assert call(eval_main, argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1


INTERRUPTING = """
import os, signal, sys
import lift_trainer.cli as cli

asked = []

def interrupt(event, args):
    if not asked and event in ("import", "open") and sys.argv[2] in str(args[0]):
        asked.append(event)
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
getattr(cli, sys.argv[1])(sys.argv[3:])
"""
"""Sends Ctrl-C to itself when a module of this name is imported, or a file of this name opened."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "when", "argv"),
    [
        ("train_main", "cyclopts", ["--data", "a.tar", "--cache", "c"]),
        ("train_main", "torch", ["--data", "a.tar", "--cache", "c"]),
        ("eval_main", "numpy", ["retrieval", "--run", "run", "--data", "a.tar"]),
        ("eval_main", "state.json", ["retrieval", "--run", "run", "--data", "a.tar"]),
        ("data_main", "train-000.tar", ["shapes", "out", "--train", "2000"]),
        ("report_main", "pyarrow", ["run"]),
        ("report_main", "config.json", ["run"]),
    ],
)
def test_an_early_ctrl_c_is_one_line_and_leaves_nothing(
    tmp_path: Path, entry: str, when: str, argv: list[str]
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "retrieval-a.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTING, entry, when, *argv],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 130
    assert ended.stderr.startswith("interrupted: ") and ended.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_cache_the_advice_names_the_flag(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(train_main, ["--data", str(world.shard)]) == 2
    assert capsys.readouterr().err.startswith("error: --cache is missing")


def test_evaluating_what_was_not_trained_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0", png(0), {"caption": "a"})])
    assert call(eval_main, ["retrieval", "--run", str(tmp_path / "none"), "--data", str(shard)]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
