"""Runs: that they learn, that they continue exactly, and what they refuse to continue."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheDamaged, CacheFull, CacheLocked, LiftError, UnsupportedFormat
from lift_cache.files import digest_file
from lift_trainer.batches import Batches, WorkerDied
from lift_trainer.checkpoint import find_checkpoint, require_checkpoint, save_checkpoint
from lift_trainer.images import ImageStore
from lift_trainer.job import prepare
from lift_trainer.lock import only_trainer
from lift_trainer.loop import Outcome, train
from lift_trainer.metrics import Metrics
from tests.unit.trainer.conftest import World, png, write_tar

pytestmark = pytest.mark.slow


def run(world: World, name: str = "run", **changes: object) -> Outcome:
    return train(prepare(world.config(name, **changes)))


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.checkpoint / "model.safetensors") | load_file(
        outcome.checkpoint / "optimizer.safetensors"
    )


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, kind: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a signal while it works on the step after `step`."""
    write = Metrics.write

    def and_signal(self: Metrics, **values: object) -> None:
        write(self, **values)  # type: ignore[arg-type]
        if values["step"] == step:
            os.kill(os.getpid(), kind)

    monkeypatch.setattr(Metrics, "write", and_signal)


def test_a_run_learns_its_pairs(world: World) -> None:
    outcome = run(world, epochs=40, precision="fp32", lr=3e-3)
    lines = [json.loads(line) for line in (world.root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert outcome.finished and len(lines) == 120
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]
    assert set(lines[0]) == {
        "step", "epoch", "samples", "loss", "temperature", "scale", "lr", "grad_norm",
        "images_per_s", "data_wait", "accuracy", "time_s", "masked", "positive", "negative", "memory_gib",
    }  # fmt: skip
    assert lines[5]["samples"] == 48 and lines[5]["epoch"] == 1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGINT, {"workers": 1, "cache_images": 0, "precision": "fp32", "text_transform": "center"}),
    ],
)
def test_a_run_stopped_in_mid_epoch_and_continued_twice_ends_bit_equal(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals, changes: dict[str, object]
) -> None:
    undisturbed = run(world, "whole", **changes)
    for step in (4, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, step, kind)
            stopped = run(world, "parts", **changes)
        assert stopped.signal == kind and stopped.step == step + 1 and not stopped.finished
    # The rest with other settings that must not matter.
    continued = run(world, "parts", **changes | {"workers": 0, "cache_images": 1.0, "log_every": 5})
    assert continued.finished
    expected, actual = weights(undisturbed), weights(continued)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    told = [
        {
            line["step"]: [line[name] for name in ("loss", "grad_norm", "lr", "accuracy", "temperature")]
            for line in map(json.loads, (world.root / name / "metrics.jsonl").read_text().splitlines())
        }
        for name in ("whole", "parts")
    ]
    assert list(told[1]) == [*range(1, 11), 12]
    assert all(told[0][step] == values for step, values in told[1].items()), "bit-equal losses"


def test_metrics_beyond_the_checkpoint_are_dropped_when_a_run_continues(world: World) -> None:
    run(world, steps=6, checkpoint_every=3)
    checkpoints = world.root / "run" / "checkpoints"
    (checkpoints / "step-000006" / "state.json").write_text("{")
    with (world.root / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    run(world, steps=6, checkpoint_every=3)
    lines = (world.root / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_left_as_it_is(world: World) -> None:
    first = run(world, steps=3)
    written = (first.checkpoint / "state.json").stat().st_mtime_ns
    second = run(world, steps=3)
    assert second.finished and (second.checkpoint / "state.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "text-transform.safetensors", "state.json"]
)
def test_a_torn_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    world: World, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    outcome = run(world, steps=6, checkpoint_every=3)
    torn = outcome.checkpoint / file
    torn.write_bytes(torn.read_bytes()[:-7])
    found = find_checkpoint(world.root / "run")
    assert found is not None and found.state.step == 3
    assert f"step-000006 is torn: {file}" in capsys.readouterr().err
    assert (world.root / "run" / "checkpoints" / "latest").read_text() == "step-000006\n"


def test_a_run_whose_checkpoints_are_all_torn_is_not_begun_anew_in_silence(world: World) -> None:
    outcome = run(world, steps=2)
    (outcome.checkpoint / "state.json").unlink()
    with pytest.raises(CacheDamaged, match=r"no whole checkpoint in .*; use another --run to start anew"):
        prepare(world.config(steps=2))


def test_a_torn_newer_checkpoint_pushes_out_no_good_one(world: World) -> None:
    run(world, steps=12, checkpoint_every=3, keep=4)
    checkpoints = world.root / "run" / "checkpoints"
    for name in ("step-000006", "step-000009", "step-000012"):
        (checkpoints / name / "state.json").write_text("{")
    train(prepare(world.config(steps=12, checkpoint_every=8, keep=2)))
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-000008", "step-000012"]


def test_a_stop_before_the_torn_ones_keeps_its_own_and_the_one_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(world, steps=9, checkpoint_every=3, keep=3)
    checkpoints = world.root / "run" / "checkpoints"
    for name in ("step-000006", "step-000009"):
        (checkpoints / name / "state.json").write_text("{")
    stop_after(monkeypatch, 4)
    stopped = run(world, steps=9, checkpoint_every=100, keep=2)
    assert stopped.step == 5
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-000003", "step-000005"]


def test_a_checkpoint_of_a_newer_version_is_said_to_be_newer(world: World) -> None:
    state = run(world, steps=2).checkpoint / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"version": 3, "more": 1}))
    with pytest.raises(UnsupportedFormat, match="checkpoint version 3; this software reads 2: update it"):
        prepare(world.config(steps=2))


def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = nn.utils.clip_grad_norm_
    norms = iter([None, None, None, torch.tensor(torch.inf)])
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda *given: (clip(*given), next(norms))[1] or torch.tensor(1.0)
    )
    with pytest.raises(LiftError, match=r"gradient norm is inf at step 4; .* before is .*step-000003; try"):
        run(world, checkpoint_every=1)
    found = find_checkpoint(world.root / "run")
    assert found is not None and found.state.step == 3


@pytest.mark.parametrize("room", [300, 3000])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(world: World, room: int) -> None:
    run(world, steps=8, checkpoint_every=2)
    job = prepare(world.config(steps=8, checkpoint_every=2))
    assert job.checkpoint is not None
    before = sorted(path.name for path in (world.root / "run").rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    optimizer = torch.optim.AdamW(job.model.parameters())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(CacheFull, match="no space left under"):
            state = job.checkpoint.state.model_copy(update={"step": 9})
            save_checkpoint(
                world.root / "run", state, job.model, optimizer, job.transforms, 2, job.checkpoint
            )
        with (
            pytest.raises(CacheFull, match="no space left under"),
            Metrics(world.root / "run", 8, 9, tensorboard=False) as metrics,
        ):
            for step in range(room):
                metrics.write(step=step, epoch=0, samples=0, loss=0.0, temperature=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (world.root / "run").rglob("*")) == before


def test_two_trainers_of_one_run_do_not_meet(world: World) -> None:
    (world.root / "run").mkdir()
    with only_trainer(world.root / "run"), pytest.raises(CacheLocked, match="trained by another lift-train"):
        run(world, steps=2)
    stale = prepare(world.config(steps=2))
    run(world, steps=2)
    with pytest.raises(CacheLocked, match="run the same command again"):
        train(stale)


def test_a_worker_that_is_killed_costs_no_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Metrics.write

    def and_kill(self: Metrics, **values: object) -> None:
        write(self, **values)  # type: ignore[arg-type]
        if values["step"] == 2:
            for worker in multiprocessing.active_children():
                worker.kill()

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", and_kill)
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        with pytest.raises(LiftError, match=r"died after step \d+ .* with fewer --workers .*; saved as"):
            run(world, epochs=40, workers=1, cache_images=0)
    found = find_checkpoint(world.root / "run")
    assert found is not None and found.state.step >= 2


def test_a_worker_that_dies_over_an_image_is_noticed_at_once_and_the_image_named(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a decoder that crashes would do it; the trainer is inside of a step then."""
    pixels, fatal = ImageStore.pixels, 17

    def crashing(self: ImageStore, sample: int) -> torch.Tensor:
        if sample == fatal and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGSEGV)
        return pixels(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "pixels", crashing)
        began = time.monotonic()
        with pytest.raises(
            LiftError,
            match=r"died after step \d+ \(process \d+ was killed by SIGSEGV while it read .*:0017; .* saved",
        ):
            run(world, workers=1, cache_images=0)
        assert time.monotonic() - began < 30
    assert f"while it read {world.shard}:0017" in capfd.readouterr().err
    outcome = run(world, workers=0, cache_images=0)
    expected = run(world, "whole", workers=0, cache_images=0)
    assert all(torch.equal(a, weights(expected)[name]) for name, a in weights(outcome).items())


def test_the_death_of_a_worker_is_said_while_the_trainer_computes(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    job = prepare(world.config())
    batches = Batches(ImageStore(job.index, 10**6), job.texts, job.sampler, 0, 16, 0)
    arriving = batches.stream(0, 200, 1, torch.device("cpu"))
    next(arriving)
    for worker in multiprocessing.active_children():
        worker.kill()
    said, end = "", time.monotonic() + 20
    while "died" not in said and time.monotonic() < end:  # no batch is asked for
        time.sleep(0.05)
        said += capfd.readouterr().err
    assert "a process that reads images died: process" in said and "killed by SIGKILL" in said
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="killed by SIGKILL"):
        next(arriving)
    assert time.monotonic() - began < 2, "the batches in the queue are not waited for"


def test_a_checkpoint_says_of_what_it_was_made(world: World) -> None:
    outcome = run(world, steps=2, text_transform="center")
    state = require_checkpoint(world.root / "run").state
    assert state.index_digest == prepare(world.config("other")).index.digest
    assert state.snapshot and state.recipe and state.config.text_transform == "center"
    assert (outcome.checkpoint / "text-transform.safetensors").exists()
    made_by = state.libraries["lift-trainer"]
    in_checkout = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=7", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made_by.startswith("0.") and (in_checkout.returncode != 0 or in_checkout.stdout.strip() in made_by)


@pytest.mark.parametrize("damage", ["empty", "zeros", "flipped", "missing", "other"])
def test_a_checkpoint_damaged_in_any_way_is_named_in_one_line_and_passed_over(
    world: World, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    outcome = run(world, steps=6, checkpoint_every=3)
    file = outcome.checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        whole = file.with_name("optimizer.safetensors").read_bytes()
        file.write_bytes({"empty": b"", "zeros": bytes(len(data)), "flipped": data, "other": whole}[damage])
    capsys.readouterr()
    found = find_checkpoint(world.root / "run")
    said = capsys.readouterr().err
    assert found is not None and found.state.step == 3
    assert (
        said.count("\n") == 1
        and "step-000006 is torn: model.safetensors" in said
        and "the one before" in said
    )
    continued = run(world, steps=6, checkpoint_every=3)
    again = run(world, "whole", steps=6, checkpoint_every=3)
    assert all(torch.equal(a, weights(again)[name]) for name, a in weights(continued).items())


def test_only_the_newest_checkpoints_are_kept(world: World) -> None:
    run(world, steps=8, checkpoint_every=2, keep=2)
    names = sorted(path.name for path in (world.root / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-000006", "step-000008"]


def test_another_configuration_snapshot_or_data_is_refused_by_name(world: World) -> None:
    run(world, steps=2)
    for changes, message in (
        ({"batch_size": 4}, "was begun with --batch-size = 8 and is now given 4"),
        ({"text_transform": "center"}, "--text-transform = none and is now given center"),
        ({"seed": 1}, "--seed = 0"),
        ({"steps": 3}, "--steps = 2"),
    ):
        with pytest.raises(BadConfig, match=message):
            prepare(world.config(**{"steps": 2} | changes))
    samples = [(f"{i:04d}", png(i), {"caption": f"drawing number {i}"}) for i in range(28)]
    other = write_tar(world.root / "other.tar", samples)
    with pytest.raises(BadConfig, match=r"begun with the digest of --data = .* and is now given"):
        prepare(world.config(steps=2, data=[str(other)]))
    snapshot = write_cache(
        world.root / "cache2", world.recipe, Encoding(dimensions=24), world.captions, world.vectors + 0.1
    )
    with pytest.raises(BadConfig, match=r"begun with the snapshot of --cache = .* and is now given"):
        prepare(world.config(steps=2, cache=f"{world.root / 'cache2'}@{snapshot.id}"))
    other_recipe = world.recipe.model_copy(update={"pooling": "mean"})
    snapshot = write_cache(
        world.root / "cache3", other_recipe, Encoding(dimensions=24), world.captions, world.vectors
    )
    with pytest.raises(
        BadConfig, match=r"begun with pooling in the recipe of --cache = last and is now given mean; give"
    ):
        prepare(world.config(steps=2, cache=f"{world.root / 'cache3'}@{snapshot.id}"))


@pytest.mark.parametrize(
    ("file", "name", "stored", "said"),
    [
        ("model", "tower.head.0.weight", torch.zeros(24, 15), r"\[24, 15\] there and \[24, 16\]"),
        ("model", "tower.vit.cls_token", torch.zeros(1, 1, 16), r"\[1, 1, 16\] there and absent"),
        ("optimizer", "tower.head.0.weight/exp_avg", torch.zeros(15), r"\[15\] there and \[24, 16\]"),
    ],
)
def test_weights_of_other_shapes_than_the_settings_make_are_one_clear_line(
    world: World, file: str, name: str, stored: torch.Tensor, said: str
) -> None:
    """As after an update of timm that builds the tower of that name in another way."""
    checkpoint = run(world, steps=4, checkpoint_every=2).checkpoint.with_name("step-000002")
    shutil.rmtree(checkpoint.with_name("step-000004"))
    path = checkpoint / f"{file}.safetensors"
    save_file(load_file(path) | {name: stored}, path)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][path.name] = digest_file(path)
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(BadConfig, match=rf"{file}\.safetensors: {name} is {said} .* timm 1\.") as caught:
        run(world, steps=4)
    assert "\n" not in str(caught.value)


def test_a_broken_image_is_named_once_and_remembered_across_a_restart(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        (f"{i:04d}", b"broken" if i == 9 else png(i), {"caption": f"drawing number {i}"}) for i in range(28)
    ]
    shard = write_tar(world.root / "hurt.tar", samples)
    for cache_images in (0, 1.0):
        name = f"run{cache_images}"
        with monkeypatch.context() as patch:
            stop_after(patch, 7)
            run(world, name, data=[str(shard)], cache_images=cache_images)
        assert capsys.readouterr().err.count(f"left out {shard}:0009: cannot identify image file") == 1
        run(world, name, data=[str(shard)], cache_images=cache_images)
        assert "left out" not in capsys.readouterr().err
        found = find_checkpoint(world.root / name)
        assert found is not None and list(found.state.bad) == [f"{shard}:0009"]
    with pytest.raises(LiftError, match=r"hurt\.tar:0009: .* --max-bad is? ?0"):
        run(world, "strict", data=[str(shard)], cache_images=0, max_bad=0)


def test_one_broken_image_too_many_costs_no_step_and_is_met_again_until_it_is_allowed(world: World) -> None:
    broken = {1: "0001", 9: "0009", 17: "0017"}
    samples = [
        (f"{i:04d}", b"broken" if i in broken else png(i), {"caption": f"drawing number {i}"})
        for i in range(28)
    ]
    shard = write_tar(world.root / "hurt.tar", samples)
    changes = {"data": [str(shard)], "cache_images": 0, "batch_size": 2, "epochs": 1}
    for _ in range(2):
        with pytest.raises(
            LiftError, match=r"3 broken samples, more than --max-bad 2: .*; saved as .*step-\d+$"
        ):
            run(world, max_bad=2, **changes)
        found = find_checkpoint(world.root / "run")
        assert found is not None and found.state.step >= 1 and len(found.state.bad) == 2
    continued, whole = run(world, max_bad=3, **changes), run(world, "whole", max_bad=3, **changes)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(continued).items())


def test_a_loss_that_is_no_number_stops_the_run_with_advice(world: World) -> None:
    with pytest.raises(
        LiftError, match=r"the loss is nan at step \d+; the checkpoint before is .*; try a lower --lr"
    ):
        run(world, lr=1e30, epochs=4, clip=1e30, checkpoint_every=1, precision="fp32")
    found = find_checkpoint(world.root / "run")
    assert found is None or all(
        t.isfinite().all() for t in load_file(found.path / "model.safetensors").values()
    )


def test_the_cosine_loss_and_the_caption_mask_train_too(world: World) -> None:
    assert run(world, "cosine", loss="cosine", steps=3).finished
    assert run(world, "mask", mask="caption", steps=3).finished
    assert run(world, "hash", text_control="ngram-hash", cache=[], steps=3).finished


def test_tensorboard_files_are_written(world: World) -> None:
    run(world, steps=2, tensorboard=True)
    assert list((world.root / "run" / "tensorboard").glob("events.out.*"))
