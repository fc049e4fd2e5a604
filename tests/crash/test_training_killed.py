"""A run that is killed at any moments, and continued by the same command, ends with the weights of an undisturbed one.

Runs the installed lift-train in processes of its own: kill -9 while it starts, trains or writes a checkpoint, or
SIGTERM and SIGINT, which it answers with a checkpoint. LIFT_CRASH_ROUNDS sets the number of kills (default 6).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

if not (Path(sys.executable).parent / "lift-train").exists():
    pytest.skip("needs the trainer's environment", allow_module_level=True)

import torch
from safetensors.torch import load_file

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.keys import normalise
from lift_cache.recipe import Recipe
from lift_cache.sources import iter_captions

ROUNDS = int(os.environ.get("LIFT_CRASH_ROUNDS", "6"))
STEPS = 120
COMMANDS = Path(sys.executable).parent

# One thread: which of several adds first is not theirs to choose, but how the sum is split is by their number.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]) -> Callable[[str], list[str]]:
    """lift-train on generated shapes for a run of a given name: mid-epoch checkpoints, a worker process."""
    made = [str(COMMANDS / "lift-data"), "shapes", str(tmp_path / "data"), "--train", "2000"]
    subprocess.run(made, check=True, capture_output=True, env=ENVIRONMENT)
    shards = sorted((tmp_path / "data").glob("train-*.tar"))
    texts = sorted({normalise(row.caption) for shard in shards for row in iter_captions(shard)})  # type: ignore[union-attr]
    encoding = Encoding(dtype="float16", dimensions=recipe.dimensions)
    write_cache(tmp_path / "cache", recipe, encoding, texts, vectors(len(texts)))
    flags = {
        "--data": str(tmp_path / "data" / "train-*.tar"),
        "--cache": str(tmp_path / "cache"),
        "--tower": "vit:width=16,depth=1,heads=2,patch=8",
        "--text-transform": "center",
        "--image-size": "32",
        "--batch-size": "96",
        "--steps": str(STEPS),
        "--warmup": "5",
        "--checkpoint-every": "7",
        "--log-every": "1",
        "--workers": "1",
        "--cache-images": "0",
        "--device": "cpu",
    }
    words = [str(COMMANDS / "lift-train"), *(word for flag in flags.items() for word in flag)]
    return lambda run: [*words, "--no-tensorboard", "--run", str(tmp_path / run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everything that training changes."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    return load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")


def losses(run: Path) -> list[str]:
    """Lines of metrics without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert lines and all(line.endswith("}") for line in lines)
    return [line.partition('"images_per_s"')[0] for line in lines]


def disturb(
    child: subprocess.Popen[str], run: Path, whole_s: float, training_s: float, chance: random.Random
) -> int:
    """Stop a child while it starts, trains or writes a checkpoint; its exit status."""
    phase = chance.choices(["starting", "training", "writing"], [1, 3, 2])[0]
    kind = chance.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [6, 1, 1])[0]
    launched = time.time()

    def reached() -> bool:
        if phase == "starting":
            return time.time() - launched > later
        if phase == "writing":
            return bool(list(run.glob("checkpoints/.tmp-*")))
        # The metrics of an attempt before are cut off at its checkpoint when training begins.
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_mtime > launched

    later = chance.uniform(0, whole_s - training_s)
    while child.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(
        {"starting": 0, "writing": chance.uniform(0, 0.03), "training": chance.uniform(0, training_s)}[phase]
    )
    child.send_signal(kind)
    return child.wait(timeout=300)


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    tmp_path: Path, command: Callable[[str], list[str]]
) -> None:
    began = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True, env=ENVIRONMENT)
    whole_s = time.monotonic() - began
    training_s = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])["time_s"]
    expected, expected_losses = weights(tmp_path / "whole"), losses(tmp_path / "whole")

    seed = int(os.environ.get("LIFT_CRASH_SEED", "0"))
    chance, run, disturbed, finished = random.Random(seed), tmp_path / "parts", 0, 0
    while disturbed < ROUNDS or not finished:
        with (tmp_path / "said").open("w") as said:
            child = subprocess.Popen(command("parts"), stdout=said, stderr=said, text=True, env=ENVIRONMENT)
            again = disturbed < ROUNDS
            status = disturb(child, run, whole_s, training_s, chance) if again else child.wait(timeout=600)
        text = (tmp_path / "said").read_text()
        # Before and after the trainer listens for them, a signal ends the process as it does any other.
        stopped = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
        assert status in stopped | {0, 128 + signal.SIGTERM, 128 + signal.SIGINT}, text
        # A worker that outlives kill -9 may say that nobody listens any more.
        assert status == -signal.SIGKILL or "Traceback" not in text, text
        assert "torn" not in text, text
        disturbed += status != 0
        if status == 0:
            finished += 1
            actual = weights(run)
            assert expected.keys() == actual.keys()
            different = [name for name in expected if not torch.equal(expected[name], actual[name])]
            assert not different, (
                f"after {disturbed} kills (LIFT_CRASH_SEED={seed}) these differ: {different}"
            )
            assert losses(run) == expected_losses
            shutil.rmtree(run)
    print(f"{disturbed} kills, {finished} runs brought to their end, undisturbed {whole_s:.1f} s")
