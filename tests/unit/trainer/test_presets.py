"""Presets: each says what it follows, resolves to a configuration, and trains, stops and goes on exactly."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, MissingCaptions
from lift_trainer.commands import presets
from lift_trainer.commands import train as lift_train
from lift_trainer.config import TrainConfig
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.job import prepare
from lift_trainer.loop import Outcome, train
from lift_trainer.metrics import Metrics
from lift_trainer.optim import CosineSchedule
from tests.unit.trainer.conftest import World

pytestmark = pytest.mark.slow

TINY, SIDE = "vit_tiny_patch16_224", 32
JOINT = ("clip", "lit")
NAMES = ("clip", "lift", "lift-cosine", "lit", "recommended", "sail", "sharelock")


def settings(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(presets()[name].read_text()))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights as timm publishes them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(TINY, pretrained=False, num_classes=0).state_dict(), path)
    return path


def in_small(world: World, name: str, published: Path, run: str, **changes: object) -> TrainConfig:
    """A preset with a small tower and small batches; what makes the method is as it is."""
    small: dict[str, object] = {"tower": TINY, "image_size": SIDE, "batch_size": 8, "steps": 6, "warmup": "2"}
    whole = settings(name)
    if whole.get("start") == "frozen":
        small["weights"] = published
    if name in JOINT:
        small["text_shape"] = "context=9,width=16,depth=1,heads=2"
    if name == "clip":
        small["dimensions"] = 16
    if name == "sail":
        small["dimensions"] = 12
    if name == "lift" or name == "lift-cosine":
        small["precision"] = "fp32"
    return world.config(run, **(whole | small | changes))


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_file(outcome.checkpoint / "model.safetensors")


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    write = Metrics.write

    def and_signal(self: Metrics, **values: Any) -> None:
        write(self, **values)
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", and_signal)


def test_there_are_the_published_methods() -> None:
    assert tuple(sorted(presets())) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_opens_with_its_command_its_paper_and_its_deviations(name: str) -> None:
    first, *lines = presets()[name].read_text().splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    assert first.startswith(f"# lift-train --preset {name} ") and f"--run runs/{name}" in first
    assert "arXiv 2" in head or name == "recommended"
    assert "Deviations" in head
    config = TrainConfig.model_validate({"data": ["x.tar"], "cache": "cache"} | settings(name))
    assert config.batch_size >= 16_384


def test_the_presets_are_the_published_methods() -> None:
    """What is trained, from what, by which loss: what makes one method another."""
    frozen, image = {"start": "frozen"}, {"tower": "vit_base_patch16_clip_224", "image_size": 224}
    cached = {"text_tower": "cached", "text_head": "none", "text_transform": "none", "text_negatives": 0}
    lift = image | cached | {"start": "scratch", "pooling": "mean", "head": "mlp", "init": "open_clip",
        "pos_embed": "learned:width^-0.5", "loss": "infonce", "mask": "none", "scale": None, "learn_scale": True,
        "optimizer": "adamw", "spared": "1d", "precision": "bf16"}  # fmt: skip
    sharelock = frozen | {"head": "none", "text_head": "sharelock", "loss": "infonce", "optimizer": "adam"}
    sail = frozen | {
        "pooling": "class+mean",
        "head": "gated",
        "text_head": "gated",
        "captions": "all",
        "loss": "siglip",
    }
    for name, method in {
        "lift": lift,
        "lift-cosine": lift | {"loss": "cosine"},
        "recommended": lift | {"text_transform": "center", "mask": "caption+image", "init": "timm", "spared": None,
                               "pos_embed": "learned:0.5"},
        "clip": lift | {"text_tower": "clip", "pooling": "class", "head": "linear"},
        "lit": frozen | {"text_tower": "clip", "head": "none", "loss": "infonce", "learn_scale": True},
        "sharelock": sharelock | {"keep_features": True},
        "sail": sail | {"keep_features": True, "learn_scale": True},
    }.items():  # fmt: skip
        config = TrainConfig.model_validate({"data": ["x.tar"], "cache": "cache"} | settings(name))
        assert {field: getattr(config, field) for field in method} == method, name


def test_the_presets_hold_the_published_numbers() -> None:
    lift, sharelock, sail = (settings(name) for name in ("lift", "sharelock", "sail"))
    assert (lift["lr"], lift["weight_decay"], lift["betas"], lift["eps"]) == (1e-3, 0.2, [0.9, 0.98], 1e-6)
    assert (lift["warmup"], lift["batch_size"], lift["clip"]) == (500, 16_384, 1.0)
    assert sharelock["scale"] == pytest.approx(math.exp(2.6592), abs=1e-6) and not sharelock["learn_scale"]
    assert (sharelock["lr"], sharelock["weight_decay"]) == (1e-3, 1e-4)
    assert (sharelock["steps"], sharelock["warmup"]) == (5000, 150)
    assert (sail["scale"], sail["bias"], sail["dimensions"]) == (20, -10, 1024)
    assert (sail["optimizer"], sail["lr"], sail["weight_decay"]) == ("lion", 1e-5, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_stops_and_goes_on_bit_equal_and_can_be_evaluated(
    world: World, published: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name in JOINT:
        pytest.importorskip("open_clip")
    whole = train(prepare(in_small(world, name, published, "whole")))
    assert whole.finished
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        stopped = train(prepare(in_small(world, name, published, "parts")))
    assert stopped.step == 3
    # Pretrained weights are in the checkpoint now; the file may be gone.
    gone = {"weights": world.root / "gone.safetensors"} if settings(name).get("start") == "frozen" else {}
    parts = train(prepare(in_small(world, name, published, "parts", **gone)))
    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    trained = TrainedRun.open(world.root / "whole", "cpu")
    y_nd = trained.embed_texts(world.captions[:3])
    x_nd = trained.embed_images(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    assert y_nd.shape == (3, x_nd.shape[1])
    assert y_nd.norm(dim=1) == pytest.approx(torch.ones(3), abs=1e-4)


def test_a_frozen_tower_does_not_change_and_everything_else_does(world: World, published: Path) -> None:
    before = prepare(in_small(world, "sharelock", published, "run")).model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    after = weights(train(prepare(in_small(world, "sharelock", published, "run"))))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if name.startswith("tower.")] and "loss.log_scale" not in changed
    assert {name for name in after if name.startswith("texts.")} == changed


def test_what_a_flag_says_stands_above_the_file_and_the_file_above_the_preset(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    file = world.root / "mine.yaml"
    file.write_text("batch_size: 4\nlr: 0.5\nwarmup: 1\n")
    flags = ["--data", str(world.shard), "--cache", str(world.cache), "--run", str(world.root / "run")]
    lift_train(
        ["--preset", "lift-cosine", "--config", str(file), "--lr", "0.25", "--tower",
         "vit:width=16,depth=1,heads=2,patch=8", "--image-size", "16", "--device", "cpu", "--dry-run", *flags]
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "steps of 4 images" in said and "learning rate 0.25," in said and "cosine, mask none" in said
    assert not (world.root / "run").exists()


def test_everything_can_come_from_the_environment(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {
        "LIFT_PRESET": "lift-cosine",
        "LIFT_DATA": str(world.shard),
        "LIFT_CACHE": f"{world.cache}{os.pathsep}{world.cache}",
        "LIFT_RUN": str(world.root / "run"),
        "LIFT_TOWER": "vit:width=16,depth=1,heads=2,patch=8",
        "LIFT_IMAGE_SIZE": "16",
        "LIFT_BATCH_SIZE": "4",
        "LIFT_WARMUP": "1",
        "LIFT_DEVICE": "cpu",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    lift_train(["--dry-run"])
    said = capsys.readouterr().err
    assert "steps of 4 images" in said and said.count("tests/tiny, snapshot") == 2


def test_an_unknown_preset_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        lift_train(["--preset", "blip"])
    assert ended.value.code == 2
    assert "--preset blip: there is none of that name, but clip, lift" in capsys.readouterr().err


def test_a_record_repeats_its_run_to_the_bit(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(prepare(world.config("whole", steps=5, text_transform="center", mask="caption")))
    again = ["--from-record", str(world.root / "whole"), "--run", str(world.root / "again")]
    lift_train(again)
    capsys.readouterr()
    repeated = load_file(world.root / "again" / "checkpoints" / whole.checkpoint.name / "model.safetensors")
    assert all(torch.equal(value, repeated[name]) for name, value in weights(whole).items())
    state = json.loads((whole.checkpoint / "state.json").read_text())
    state["index_digest"] = "0" * 32
    (whole.checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit) as ended:
        lift_train([*again[:-1], str(world.root / "third")])
    assert ended.value.code == 2
    assert "the recorded run was begun with the digest of --data = 000" in capsys.readouterr().err


def test_two_caches_give_every_image_two_positives(world: World) -> None:
    both = {"cache": [str(world.cache), str(world.cache)], "steps": 4, "precision": "fp32"}
    outcome = train(prepare(world.config("both", **both)))
    # The same vectors twice: each positive is weighted by a half, and negatives of the row count twice.
    assert outcome.finished and len(prepare(world.config("both", **both)).transforms) == 2
    with pytest.raises(BadConfig, match="a number of --cache = 2 and is now given 1"):
        prepare(world.config("both", **both | {"cache": str(world.cache)}))


def test_caches_of_different_widths_need_a_head_or_a_transform_to_meet(world: World) -> None:
    wide = world.recipe.model_copy(update={"dimensions": 32})
    drawn = torch.randn(len(world.captions), 32, generator=torch.Generator().manual_seed(0)).numpy()
    write_cache(world.root / "wide", wide, Encoding(dimensions=32), world.captions, drawn)
    both = {"cache": [str(world.cache), str(world.root / "wide")], "steps": 2, "warmup": "0"}
    with pytest.raises(
        BadConfig, match=r"do not meet: .*cache \(.*\) 24, .*wide \(--text-head none\) 32; put a"
    ):
        prepare(world.config(**both))
    assert train(prepare(world.config("whitened", **both, text_transform="whiten:3"))).finished
    assert train(prepare(world.config("heads", **both, text_head="linear", dimensions=8))).finished


def test_sides_that_do_not_meet_are_refused(world: World, published: Path) -> None:
    frozen = {"tower": TINY, "image_size": SIDE, "start": "frozen", "weights": published}
    with pytest.raises(
        BadConfig, match=r"images and texts do not meet: the image tower .* 192, .*cache .* 24"
    ):
        prepare(world.config(**frozen, head="none"))
    with pytest.raises(BadConfig, match="--dimensions is missing"):
        prepare(world.config(**frozen, text_head="linear"))
    assert prepare(world.config(**frozen, head="none", text_head="linear")).model.tower.width == 192


@pytest.mark.parametrize("changes", [{}, {"mask": "caption+image", "text_negatives": 6, "captions": "all"}])
def test_gradient_caching_takes_the_same_steps(world: World, changes: dict[str, object]) -> None:
    whole = train(prepare(world.config("whole", steps=4, precision="fp32", **changes)))
    chunks = train(prepare(world.config("chunks", steps=4, precision="fp32", gradient_cache=3, **changes)))
    expected, found = weights(whole), weights(chunks)
    assert all(torch.allclose(expected[name], found[name], atol=2e-5) for name in expected)


def test_gradient_caching_of_a_joint_run_takes_the_same_steps(world: World, published: Path) -> None:
    pytest.importorskip("open_clip")
    plain = {"precision": "fp32", "steps": 3}
    whole = train(prepare(in_small(world, "clip", published, "whole", **plain)))
    chunks = train(prepare(in_small(world, "clip", published, "chunks", gradient_cache=3, **plain)))
    expected, found = weights(whole), weights(chunks)
    assert all(torch.allclose(expected[name], found[name], atol=2e-4) for name in expected)


def test_gradient_checkpointing_changes_nothing(world: World) -> None:
    plain = {"tower": TINY, "image_size": SIDE, "steps": 2, "precision": "fp32"}
    whole = train(prepare(world.config("whole", **plain)))
    less = train(prepare(world.config("less", **plain, gradient_checkpointing=True)))
    assert all(torch.equal(value, weights(less)[name]) for name, value in weights(whole).items())


def test_compiled_towers_take_the_same_steps_and_checkpoints_know_nothing_of_it(
    world: World, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the graphs that torch.compile takes, run as they are: to generate code would take minutes."""
    pytest.importorskip("open_clip")
    compiled, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(self) or compile(self, backend="eager")
    )
    short = {"steps": 3, "precision": "fp32"}
    plain = train(prepare(in_small(world, "clip", published, "plain", **short)))
    graphs = train(prepare(in_small(world, "clip", published, "graphs", **short, compile=True)))
    assert len(compiled) == 2, "the image tower and the text tower"
    expected, found = weights(plain), weights(graphs)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[key], found[key], atol=1e-6) for key in expected)


def test_the_schedule_of_a_preset_ends_at_zero() -> None:
    assert CosineSchedule(1e-3, 150, 5000).lr(4999) < 1e-9


def test_captions_that_a_cache_lacks_are_refused_also_by_a_second_cache(world: World, tmp_path: Path) -> None:
    write_cache(
        tmp_path / "less", world.recipe, Encoding(dimensions=24), world.captions[:5], world.vectors[:5]
    )
    with pytest.raises(MissingCaptions, match="are not in snapshot"):
        prepare(world.config(cache=[str(world.cache), str(tmp_path / "less")]))
