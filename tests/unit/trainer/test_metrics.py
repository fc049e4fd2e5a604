"""What a run tells: one line per logged step wherever it is read, across restarts, and from one rank only."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lift_cache.errors import BadConfig
from lift_trainer import metrics as module
from lift_trainer.metrics import GIB, Metrics, memory_gib

SCORES = {"loss": 3.25, "r@1_image_to_text": 0.5, "retrieval/r@10_text_to_image": 0.75}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_any_numbers_are_told_and_what_differs_between_equal_runs_comes_last(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, 9, tensorboard=False) as metrics:
        metrics.images += 8
        metrics.write(step=1, epoch=0, loss=2.5, scale=20.0, masked=0.25, positive=0.5, negative=-0.125)
        metrics.write(step=2, loss=2.0)
    first, second = lines(tmp_path)
    assert list(first) == [
        "step", "epoch", "loss", "temperature", "scale", "masked", "positive", "negative",
        "images_per_s", "data_wait", "memory_gib", "time_s",
    ]  # fmt: skip
    assert first["temperature"] == 0.05 and isinstance(first["epoch"], int)
    assert first["images_per_s"] > 0 == second["images_per_s"]
    assert 0.01 < first["memory_gib"] < 100


def test_held_out_scores_are_lines_of_their_own_and_dropped_like_others(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, 9, tensorboard=False) as metrics:
        for step in (1, 2, 3):
            metrics.write(step=step, loss=1.0)
            metrics.held_out(step, SCORES)
    with Metrics(tmp_path, 2, 9, tensorboard=False) as metrics:
        metrics.held_out(3, SCORES)
    found = lines(tmp_path)
    assert [(line["step"], "held_out" in line) for line in found] == [
        (1, False), (1, True), (2, False), (2, True), (3, True),
    ]  # fmt: skip
    assert found[-1] == {"step": 3, "held_out": SCORES}


def test_a_number_that_is_not_finite_is_null_so_that_every_reader_can_read_the_line(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, 9, tensorboard=False) as metrics:
        metrics.write(step=1, loss=1.0, grad_norm=math.inf)
        metrics.held_out(1, {"loss": math.nan})
    first, second = lines(tmp_path)
    assert first["grad_norm"] is None and second["held_out"] == {"loss": None}


def test_time_aside_counts_to_no_rate(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, 9, tensorboard=False) as metrics:
        metrics.images += 1000
        with metrics.waiting():
            time.sleep(0.02)
        with metrics.aside():
            time.sleep(0.5)
        metrics.write(step=1, loss=1.0)
    (line,) = lines(tmp_path)
    assert line["images_per_s"] > 1000 / 0.4 and line["data_wait"] > 0.02 / 0.4
    assert line["time_s"] >= 0.5


def test_only_rank_0_writes_and_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "rank", lambda: 1)
    with Metrics(tmp_path / "run", 0, 9, tensorboard=True, wandb="lift") as metrics:
        metrics.write(step=1, loss=1.0)
        metrics.held_out(1, SCORES)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_the_progress_line_is_written_over_and_held_out_scores_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell() -> str:
        with Metrics(tmp_path, 0, 9, tensorboard=False) as metrics:
            metrics.write(step=1, epoch=0, loss=2.5, scale=20.0)
            metrics.held_out(1, SCORES)
        return capsys.readouterr().err

    plain = tell().splitlines()
    assert plain[0].startswith("step 1/9 · epoch 0 · loss 2.5000 · temperature 0.0500 · 0 images/s · waiting")
    assert plain[1].startswith("step 1/9 held out · loss 3.2500 · r@1_image_to_text 0.5000")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress, stays = tell().split("\r\x1b[2K")[1:]
    assert "\n" not in progress and "held out" in stays and stays.index("\n") < len(stays)


def test_tensorboard_shows_both_and_a_continued_run_takes_back_what_was_cut_off(tmp_path: Path) -> None:
    for start in (0, 2):
        with Metrics(tmp_path, start, 9, tensorboard=True) as metrics:
            for step in range(start + 1, 5):
                metrics.write(step=step, loss=float(10 * start + step))
                metrics.held_out(step, SCORES)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0),
    ]  # fmt: skip
    assert board.Scalars("held_out/retrieval/r@10_text_to_image")[-1].value == 0.75
    assert "memory_gib" in board.Tags()["scalars"]


def test_memory_on_the_cpu_is_what_the_process_holds() -> None:
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(GIB // 16)  # a quarter of a GiB
    assert memory_gib(torch.device("cpu")) - before == pytest.approx(0.25, abs=0.05)
    del held


# ------------------------------------------------------------------------------------------ W&B


class FakeRun:
    """As much of W&B's run as is used, with its rule that steps never go back."""

    def __init__(self, step: int, fails_at: int) -> None:
        self.step, self.fails_at = step, fails_at
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished: int | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= self.step, "W&B would drop it with a warning"
        if step == self.fails_at:
            raise ConnectionError("the service is gone\nfor good")
        self.step = step
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the module wandb: the runs that were begun, and with what."""
    fake = SimpleNamespace(runs=[], began=[], step=0, fails_at=-1, Settings=lambda **values: values)

    def init(**settings: object) -> FakeRun:
        fake.began.append(settings)
        fake.runs.append(FakeRun(fake.step, fake.fails_at))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_continued_run_is_one_run_at_wandb(tmp_path: Path, fake: SimpleNamespace) -> None:
    run = tmp_path / "lift"
    with Metrics(run, 0, 9, tensorboard=False, wandb="papers", settings={"lr": 0.1}) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write(step=step, loss=1.0)
        metrics.held_out(4, SCORES)
    fake.step = 5  # what it has; the checkpoint was that of step 2
    with (
        pytest.raises(KeyboardInterrupt),
        Metrics(run, 2, 9, tensorboard=False, wandb="papers") as metrics,
    ):
        for step in (3, 4, 5, 6):
            metrics.write(step=step, loss=1.0)
        raise KeyboardInterrupt
    first, second = fake.began
    assert first["id"] == second["id"] == (run / "wandb-id").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("papers", "lift", "allow")
    assert first["config"] == {"lr": 0.1}
    assert [step for step, _ in fake.runs[0].logged] == [1, 2, 3, 4, 4]
    assert fake.runs[0].logged[-1][1] == {f"held_out/{name}": value for name, value in SCORES.items()}
    assert [step for step, _ in fake.runs[1].logged] == [5, 6]
    assert (fake.runs[0].finished, fake.runs[1].finished) == (0, 1)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]


def test_training_goes_on_when_wandb_does_not(
    tmp_path: Path, fake: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails_at = 2
    with Metrics(tmp_path, 0, 9, tensorboard=False, wandb="papers") as metrics:
        for step in (1, 2, 3):
            metrics.write(step=step, loss=1.0)
    assert (
        capsys.readouterr().err.count("W&B takes no more metrics (the service is gone); training goes on")
        == 1
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("there", [None, SimpleNamespace()], ids=["nothing", "a folder of that name"])
def test_wandb_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: object
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", there)  # type: ignore[arg-type]
    with pytest.raises(
        BadConfig,
        match=r"^--wandb papers: wandb is not installed; pip install 'lift-trainer\[wandb\]', or leave",
    ):
        Metrics(tmp_path, 0, 9, tensorboard=False, wandb="papers")


def test_a_wandb_that_refuses_is_one_line(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: object) -> None:
        raise RuntimeError("no API key configured\nsee the manual")

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(BadConfig, match=r"^--wandb papers: no API key configured; run `wandb login`.*$"):
        Metrics(tmp_path, 0, 9, tensorboard=False, wandb="papers")


def test_the_real_wandb_takes_it_all_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 2):
        with Metrics(tmp_path, start, 9, tensorboard=False, wandb="papers", settings={"lr": 0.1}) as metrics:
            for step in range(start + 1, start + 4):
                metrics.write(step=step, loss=1.0)
                metrics.held_out(step, SCORES)
    kept = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 2
    assert {path.name for path in kept} == {f"run-{(tmp_path / 'wandb-id').read_text().strip()}.wandb"}
    assert "W&B takes no more" not in capsys.readouterr().err
    # Written by a process of its own, so given a moment.
    wanted, end = b"held_out/retrieval/r@10_text_to_image", time.monotonic() + 20
    while not all(wanted in path.read_bytes() for path in kept) and time.monotonic() < end:
        time.sleep(0.1)
    assert [path.read_bytes().count(wanted) > 0 for path in kept] == [True, True]
