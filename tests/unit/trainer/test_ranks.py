"""Several processes under torchrun are one run: the same batches, the same steps, one voice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lift_trainer.checkpoint import find_checkpoint
from lift_trainer.job import prepare
from lift_trainer.loop import train
from tests.unit.trainer.conftest import World, png, write_tar

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MAIN = "import sys; from lift_trainer.cli import train_main; train_main(sys.argv[1:])"


def command(ranks: int, words: list[str]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, "--no-python", "--", *words]


def torchrun(ranks: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, words), check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


def lift_train(flags: list[str]) -> list[str]:
    return [sys.executable, "-c", MAIN, *flags]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def test_one_two_and_four_ranks_take_the_same_steps_also_when_their_number_changes(world: World) -> None:
    """In mid-run from one to two to four, with a mask and further negatives."""
    changes = {"precision": "fp32", "mask": "caption+image", "text_negatives": 8, "text_transform": "center"}
    steps = {"steps": 6, "checkpoint_every": 2, "keep": 3}
    alone = train(prepare(world.config("alone", **steps, **changes)))
    shutil.copytree(world.root / "alone", world.root / "several")
    flags = world.flags("several", **steps, **changes)

    def forget(*newest: int) -> None:
        """As if their checkpoints had been cut off."""
        for step in newest:
            (world.root / "several" / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{")

    forget(4, 6)
    two = torchrun(2, lift_train(flags))
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("data      28 images") == 1 and "done: 6 steps" in two.stderr
    assert "at step 2" in two.stderr
    forget(6)
    four = torchrun(4, lift_train(flags))
    assert four.returncode == 0, four.stderr
    assert "at step 4" in four.stderr
    expected = load_file(alone.checkpoint / "model.safetensors")
    for name, value in weights(world.root / "several", 6).items():
        assert torch.allclose(value, expected[name], atol=2e-5), name
    ours, theirs = (
        [json.loads(line) for line in (world.root / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("alone", "several")
    )
    assert [line["step"] for line in theirs] == [1, 2, 3, 4, 5, 6]
    for field in ("loss", "accuracy", "masked", "positive", "negative", "grad_norm"):
        assert [line[field] for line in theirs] == pytest.approx([line[field] for line in ours], abs=1e-4), (
            field
        )


def test_several_ranks_that_are_told_to_stop_save_a_checkpoint_and_go_on_from_there(world: World) -> None:
    changes = {"precision": "fp32", "steps": 400, "checkpoint_every": 1000, "lr": 1e-4}
    flags, run = world.flags("run", **changes), world.root / "run"
    with subprocess.Popen(
        command(2, lift_train(flags)), stderr=subprocess.DEVNULL, env=ENVIRONMENT
    ) as started:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=120) != 0
    stopped = find_checkpoint(run)
    assert stopped is not None and 0 < stopped.state.step < 400
    again = torchrun(2, lift_train(flags))
    assert again.returncode == 0 and f"at step {stopped.state.step}" in again.stderr, again.stderr
    assert find_checkpoint(run).state.step == 400  # type: ignore[union-attr]


def test_what_ends_several_ranks_in_mid_run_is_said_once_and_costs_no_step(world: World) -> None:
    """Held-out data are read by one of them alone; a loss that is no number is everybody's."""
    samples = [(f"{i:04d}", b"" if i == 2 else png(i), {"caption": f"drawing number {i}"}) for i in range(12)]
    held_out = str(write_tar(world.root / "hurt.tar", samples))
    flags = world.flags(eval_data=[held_out], eval_every=2, max_bad=0, steps=4)
    ended = torchrun(2, lift_train(flags))
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "hurt.tar:0002" in said[0] and "saved as" in said[0], ended.stderr
    found = find_checkpoint(world.root / "run")
    assert found is not None and found.state.step == 2
    samples = [(f"{i:04d}", b"" if i == 2 else png(i), {"caption": f"drawing number {i}"}) for i in range(28)]
    hurt = str(write_tar(world.root / "images.tar", samples))
    ended = torchrun(
        2, lift_train(world.flags("hurt", data=[hurt], max_bad=0, cache_images=0.0, batch_size=2))
    )
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "images.tar:0002" in said[0], ended.stderr
    found = find_checkpoint(world.root / "hurt")
    assert found is not None and f"saved as {found.path}" in said[0]
    exploding = {"lr": 1e30, "clip": 1e30, "precision": "fp32", "checkpoint_every": 1}
    ended = torchrun(2, lift_train(world.flags("exploding", **exploding)))
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "the checkpoint before is" in said[0], ended.stderr


def test_gradient_caching_works_under_two_ranks(world: World) -> None:
    changes = {"precision": "fp32", "steps": 3}
    alone = train(prepare(world.config("alone", **changes)))
    two = torchrun(2, lift_train(world.flags("two", gradient_cache=2, **changes)))
    assert two.returncode == 0, two.stderr
    expected = load_file(alone.checkpoint / "model.safetensors")
    assert all(torch.allclose(v, expected[n], atol=2e-5) for n, v in weights(world.root / "two", 3).items())


def test_ranks_with_different_data_are_refused_in_one_line(world: World) -> None:
    write_tar(
        world.root / "d0.tar", [(f"{i}", png(i), {"caption": f"drawing number {i}"}) for i in range(16)]
    )
    write_tar(
        world.root / "d1.tar", [(f"{i}", png(i), {"caption": f"drawing number {i}"}) for i in range(15)]
    )
    flags = world.flags(steps=2)
    flags[flags.index(str(world.shard))] = "DATA"
    words = " ".join(f"'{word}'" for word in lift_train(flags)).replace("'DATA'", f"{world.root}/d$RANK.tar")
    ended = torchrun(2, ["sh", "-c", words])
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if "rank 1 has" in line]
    assert (
        len(said) == 1
        and "the digest of --data" in said[0]
        and "Traceback" not in ended.stderr.split("torch/")[0]
    )
    assert not (world.root / "run" / "checkpoints").exists()


def test_a_dry_run_of_several_ranks_plans_once_and_writes_nothing(world: World) -> None:
    ended = torchrun(2, [*lift_train(world.flags()), "--dry-run"])
    assert ended.returncode == 0 and ended.stderr.count("\ntime      about") == 1, ended.stderr
    assert "GiB a device for 4 images" in ended.stderr and not (world.root / "run").exists()


def test_a_users_error_is_said_once_by_all_ranks_together(world: World) -> None:
    ended = torchrun(2, lift_train(world.flags(cache=str(world.root / "nowhere"))))
    assert ended.returncode != 0 and ended.stderr.count("nowhere") == 1


def test_a_batch_that_cannot_be_shared_out_is_refused(world: World) -> None:
    ended = torchrun(2, lift_train(world.flags(batch_size=7)))
    assert ended.returncode != 0
    assert ended.stderr.count("--batch-size is 7 for all processes together and there are 2") == 1
