"""A run as other libraries load it: each export is opened by its own library and compared with the run."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lift_cache.errors import BadConfig, LiftError
from lift_cache.recipe import Recipe
from lift_trainer.cli import eval_main, export_main, train_main
from lift_trainer.config import TextShape, TransformSpec
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.export import exporting
from lift_trainer.export.exporting import LAYOUTS, LayoutName, export
from lift_trainer.export.source import Source, TextSide, source_of
from lift_trainer.images import center_view, decode
from lift_trainer.text_towers import CachedTextTower, ClipTextTower
from lift_trainer.towers import build_tower
from lift_trainer.transform import TextTransform
from tests.unit.trainer.conftest import SIDE, World, png
from tests.unit.trainer.test_cli import call

pytestmark = pytest.mark.slow

NAMED, SIZE = "vit_xsmall_patch16_clip_224", 224
"""LIFT's tower in small: width 256, 10 blocks."""
SMALL, SMALL_SIZE = "test_vit", 160
"""timm's own for tests, with a class token: width 64, 6 blocks."""
TINY = "vit:width=16,depth=2,heads=2,patch=8"


def source(
    architecture: str = TINY,
    size: int = SIDE,
    *,
    head: str = "mlp",
    pooling: str = "mean",
    dimensions: int = 12,
    side: TextSide | None = None,
    **more: Any,
) -> Source:
    """A tower with every weight drawn, so that none is where a layout's own default would be."""
    torch.manual_seed(0)
    tower = build_tower(
        architecture,
        size,
        "learned:0.5",
        dimensions,
        head=head,  # type: ignore[arg-type]
        pooling=pooling,  # type: ignore[arg-type]
    )
    for name, value in tower.named_parameters():
        if value.ndim == 1:
            torch.nn.init.normal_(value, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.1)
    for name, buffer in tower.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
        elif name == "mean":
            buffer.add_(0.03)  # not everybody's statistics
    return Source("a tower", architecture, tower, (side or TextSide(),), **more)


def pixels(size: int, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def normalised(one: Source, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (one.mean, one.std))
    return (images.float() / 255 - mean) / std


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that transformers copies from a folder goes to a place of the test."""
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Path:
    assert call(train_main, world.flags(epochs=1, text_transform="whiten:3")) == 0
    capsys.readouterr()
    return world.root / "run"


# ------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("to", ["timm", "huggingface", "onnx"])
def test_the_code_on_the_card_gives_the_runs_own_vectors(
    to: LayoutName, run: Path, tmp_path: Path, remote_code: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / to
    assert call(export_main, [str(run), "--to", to, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "largest difference" in captured.out and captured.err == ""
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    image = Image.open(io.BytesIO(png(7)))
    names: dict[str, Any] = {"image": image}
    with torch.inference_mode():
        exec(code[0].replace("FOLDER", str(out)), names)
        expected = TrainedRun.open(run, "cpu").embed_images(decode(png(7), 10**6)[None])
    found = torch.as_tensor(names["vectors"])
    assert (found - expected).abs().max() < (1e-4 if to == "onnx" else 1e-5)


@pytest.mark.parametrize("to", ["timm", "huggingface", "onnx"])
def test_an_export_says_what_made_its_texts_and_carries_their_transform(
    to: LayoutName, run: Path, world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call(export_main, [str(run), "--to", to, "--out", str(out), "--name", "Squares"]) == 0
    trained = TrainedRun.open(run, "cpu")
    said = json.loads((out / "lift.json").read_text())
    card = (out / "README.md").read_text()
    assert said["texts"][0]["fingerprint"] == world.recipe.fingerprint and world.recipe.fingerprint in card
    assert Recipe.model_validate(said["texts"][0]["recipe"]) == world.recipe
    assert said["texts"][0]["snapshot"] == trained.checkpoint.state.snapshot
    assert torch.equal(torch.tensor(said["image"]["mean"]), trained.model.tower.mean.flatten())
    assert said["training"]["step"] == 3 and said["training"]["settings"]["lr"] == 1e-3
    assert said["check"]["largest_difference"] <= said["check"]["tolerance"]
    assert card.startswith("---\nlibrary_name: ") and "# Squares" in card and "whiten:3" in card
    assert str(tmp_path) not in card + json.dumps(said), (
        "where things lay on this machine is nobody's business"
    )

    vectors = torch.from_numpy(world.vectors[:5])
    names: dict[str, Any] = {"vectors": vectors}
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(code.replace("FOLDER", str(out)), names)
    assert torch.allclose(names["texts"], trained.transform(vectors), atol=1e-6)
    loaded = TextTransform.load(out / "text-transform.safetensors")
    assert torch.equal(loaded(vectors), trained.transform(vectors))


def test_scores_of_the_exported_checkpoint_are_on_its_card(run: Path, world: World, tmp_path: Path) -> None:
    assert call(eval_main, ["retrieval", "--run", str(run), "--data", str(world.shard)]) == 0
    (result,) = (run / "eval").glob("retrieval-*.json")
    written = json.loads(result.read_text())
    (run / "eval" / "retrieval-old-karpathy.json").write_text(
        json.dumps(
            written | {"name": "old", "subject": written["subject"] | {"step": 2}}
        )  # an older checkpoint's
    )
    trained = source_of(TrainedRun.open(run, "cpu"), "run")
    export(trained, "timm", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "retrieval · train · karpathy" in card and "r@10_mean" in card and "· old ·" not in card


def test_mistakes_are_one_clear_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")

    def refused(*argv: str) -> str:
        assert call(export_main, list(argv)) == 2
        shown = said_by(capsys)
        assert shown.startswith("error: ") and shown.count("\n") == 1
        assert not Path(out).exists() and not list(tmp_path.glob(".tmp-*"))
        return shown

    assert "no checkpoint in" in refused(str(tmp_path / "none"), "--to", "timm", "--out", out)
    assert "tflite" in refused(str(run), "--to", "tflite", "--out", out)
    assert f"--out {run} exists" in refused(str(run), "--to", "timm", "--out", str(run))
    shown = refused(str(run), "--to", "open_clip", "--out", out)
    assert "it builds a tower by its timm name" in shown and "use --to timm" in shown

    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(exporting, "version", absent)
    shown = refused(str(run), "--to", "onnx", "--out", out)
    assert "needs onnxruntime, which is not installed: pip install 'lift-trainer[export]'" in shown


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_what_does_not_come_back_as_it_was_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    one, honest = source(), LAYOUTS["timm"]

    def load(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        encode = honest.load(folder)
        return lambda images: encode(images) + wrong

    monkeypatch.setitem(LAYOUTS, "timm", dataclasses.replace(honest, load=load))
    with pytest.raises(LiftError, match=r"differ by (1\.0e-03|nan) from the run's, more than 1e-05"):
        export(one, "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- every head and pooling


@pytest.mark.parametrize(
    ("architecture", "head", "pooling"),
    [
        (TINY, "mlp", "mean"),
        (TINY, "linear", "mean"),
        (TINY, "sharelock", "mean"),
        (SMALL, "linear", "class"),
        (SMALL, "mlp", "class"),
        (SMALL, "gated", "class+mean"),
        (SMALL, "linear", "class+mean"),
        (SMALL, "none", "mean"),
        (SMALL, "none", "class+mean"),
        (NAMED, "mlp", "mean"),
    ],
)
def test_timm_and_transformers_load_every_head_and_pooling(
    architecture: str, head: str, pooling: str, tmp_path: Path, remote_code: None
) -> None:
    from transformers import AutoModel, AutoModelForImageClassification

    size = SIDE if architecture == TINY else 32
    dimensions = {"none": 128 if pooling == "class+mean" else 64}.get(head, 12)
    one = source(architecture, size, head=head, pooling=pooling, dimensions=dimensions)
    for to in ("timm", "huggingface"):
        assert export(one, to, tmp_path / to).largest_difference < 1e-5  # type: ignore[arg-type]
    folder, images = tmp_path / "huggingface", pixels(size)
    with_code = (folder / "modeling_lift.py").exists()
    assert with_code == (head not in ("none", "linear") or pooling == "class+mean")
    assert ("runs code of this folder" in (folder / "README.md").read_text()) == with_code
    auto = AutoModelForImageClassification if head == "linear" and not with_code else AutoModel
    model = auto.from_pretrained(folder, **({"trust_remote_code": True} if with_code else {})).eval()
    with torch.inference_mode():
        given = model(normalised(one, images))
        found = given["image_embeds" if with_code else "logits" if head == "linear" else "pooler_output"]
        found = torch.nn.functional.normalize(found, dim=-1)
        assert (found - one.tower(images)).abs().max() < 1e-5


def test_transformers_prepares_images_as_evaluation_does(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    for head in ("linear", "mlp"):
        one = source(head=head)
        export(one, "huggingface", tmp_path / head)
        processor = CLIPImageProcessor.from_pretrained(tmp_path / head)
        for shape in ((41, 58), (58, 41), (SIDE, SIDE)):
            found = processor(Image.open(io.BytesIO(png(3, shape))), return_tensors="pt")["pixel_values"][0]
            expected = normalised(one, center_view(decode(png(3, shape), 10**6), SIDE))
            assert (found - expected).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------- open_clip


@pytest.mark.parametrize(
    ("architecture", "size", "head", "pooling", "dimensions"),
    [
        (NAMED, SIZE, "mlp", "mean", 12),
        (SMALL, SMALL_SIZE, "linear", "class", 12),
        (SMALL, SMALL_SIZE, "none", "mean", 64),
    ],
)
def test_open_clip_makes_the_whole_model_from_its_folder(
    architecture: str, size: int, head: str, pooling: str, dimensions: int, tmp_path: Path
) -> None:
    one = source(architecture, size, head=head, pooling=pooling, dimensions=dimensions, logit_scale=2.5)
    assert export(one, "open_clip", tmp_path / "out").largest_difference < 1e-5
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    picture = png(5, (size, size))
    with torch.inference_mode():
        found = model.eval().encode_image(prepare(Image.open(io.BytesIO(picture)))[None], normalize=True)
        expected = one.tower(decode(picture, 10**6)[None])
    assert (found - expected).abs().max() < 1e-5
    assert model.logit_scale.item() == 2.5
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a red circle"])
    with pytest.raises(IndexError):  # the placeholder's
        model.encode_text(tokens)


def test_open_clip_gets_a_trained_text_tower_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    texts = ClipTextTower(12, TextShape(context=9, width=16, depth=2, heads=2))
    one = source(
        SMALL, SMALL_SIZE, head="linear", side=TextSide(tower=texts), logit_scale=2.0, logit_bias=-10.0
    )
    export(one, "open_clip", tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    captions = ["a red circle", "two"]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(captions)
    assert tokens.shape == (2, 9)
    images = pixels(SMALL_SIZE, 2)
    with torch.inference_mode():
        assert torch.allclose(model.encode_text(tokens, normalize=True), texts(tokens), atol=1e-6)
        ours = one.tower(images) @ texts(tokens).T * np.exp(2.0) - 10
        theirs, _ = model.get_logits(normalised(one, images), tokens)
    assert torch.allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (lambda: source(NAMED, 32), "builds vit_xsmall_patch16_clip_224 for 224 pixels"),
        (lambda: source(NAMED, SIZE, head="gated"), "it has no gated head"),
        (lambda: source(NAMED, SIZE, pooling="class+mean"), "side by side"),
    ],
)
def test_open_clip_is_refused_what_it_cannot_say(
    one: Callable[[], Source], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadConfig, match=f"^--to open_clip: .*{message}.*use --to timm$"):
        export(one(), "open_clip", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize(
    ("head", "pooling"), [("mlp", "mean"), ("gated", "class+mean"), ("sharelock", "class")]
)
def test_onnx_takes_bytes_and_any_number_of_images(head: str, pooling: str, tmp_path: Path) -> None:
    one = source(SMALL, 32, head=head, pooling=pooling)
    assert export(one, "onnx", tmp_path / "out").largest_difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [3, 32, 32])
    assert (made.name, made.type, made.shape[1:]) == ("vectors", "tensor(float)", [12])
    for count in (1, 2, 7):
        images = pixels(32, count)
        (found,) = session.run(None, {"pixels": images.numpy()})
        with torch.inference_mode():
            assert np.abs(found - one.tower(images).numpy()).max() < 1e-4
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_an_onnx_file_says_what_it_is_and_not_where_it_was_made(tmp_path: Path) -> None:
    export(source(side=TextSide(TextTransform(TransformSpec("none")))), "onnx", tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    said = json.loads({entry.key: entry.value for entry in onnx.load(file).metadata_props}["lift"])
    assert said["image"]["dimensions"] == 12 and said["texts"][0]["transform"] == "none"
    content = file.read_bytes()
    assert b"site-packages" not in content and str(Path(exporting.__file__).parent).encode() not in content


# ---------------------------------------------------------------------------------------------- text sides


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (
            {"text_tower": "clip", "text_shape": "context=9,width=16,depth=1,heads=2", "dimensions": 12},
            "clip",
        ),
        ({"text_head": "linear", "dimensions": 12}, "head"),
    ],
)
def test_a_runs_trained_text_side_is_exported_with_it(
    settings: dict[str, object], kind: str, world: World, tmp_path: Path
) -> None:
    assert call(train_main, world.flags(steps=2, warmup="0", **settings)) == 0
    run, out = world.root / "run", tmp_path / "out"
    assert call(export_main, [str(run), "--to", "timm", "--out", str(out)]) == 0
    (text,) = json.loads((out / "lift.json").read_text())["texts"]
    assert text["tower"]["kind"] == kind and (text["recipe"] is None) == (kind == "clip")
    weights = load_file(out / "text-tower.safetensors")
    trained = TrainedRun.open(run, "cpu").model.texts[0].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in trained.items())


def test_trained_text_heads_travel_along(tmp_path: Path) -> None:
    torch.manual_seed(2)
    center = TextTransform(TransformSpec("center"), torch.randn(6))
    sides = tuple(TextSide(center, tower=CachedTextTower(6, 12, "linear")) for _ in range(2))
    torch.manual_seed(0)
    one = Source("two caches", TINY, build_tower(TINY, SIDE, "learned:0.5", 12), sides)
    export(one, "timm", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "lift.json").read_text())
    files = ("text-tower.safetensors", "text-tower-2.safetensors")
    for file, side, text in zip(files, sides, said["texts"], strict=True):
        assert text["tower"] == {"kind": "head", "file": file, "head": "linear"}
        weights = load_file(tmp_path / "out" / text["tower"]["file"])
        assert side.tower is not None
        assert weights.keys() == side.tower.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in side.tower.state_dict().items())
        assert torch.equal(
            TextTransform.load(tmp_path / "out" / text["transform_file"]).mean_d, center.mean_d
        )
