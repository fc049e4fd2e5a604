"""The files that LIFT's authors released: random weights of that layout, beside open_clip with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, BadSource, LiftError, MissingCaptions, RecipeMismatch
from lift_cache.recipe import Recipe
from lift_trainer.cli import eval_main
from lift_trainer.evaluators import means
from lift_trainer.evaluators.released import IMAGENET_MEAN, IMAGENET_STD, ReleasedModel
from lift_trainer.images import OPENAI_MEAN, OPENAI_STD, ImageStore, center_view
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index
from tests.unit.trainer.conftest import Embedder, png, write_tar

open_clip = pytest.importorskip("open_clip")

SIDE, WIDTH, DIMENSIONS, CONTEXT = 64, 128, 24, 9


class Lift(nn.Module):
    """The authors' LIFT: open_clip's ViT with average pooling and no matrix, then Linear–GELU–Linear."""

    def __init__(self, *, width: int = WIDTH, layers: int = 2, side: int = SIDE, hidden: bool = True) -> None:
        super().__init__()
        from open_clip.transformer import VisionTransformer

        self.visual = VisionTransformer(
            side, 16, width, layers, width // 64, 4.0, output_dim=DIMENSIONS, pool_type="avg"
        )
        self.visual.proj = None
        self.mlp_projector = nn.Module()
        more = [nn.GELU(), nn.Linear(DIMENSIONS, DIMENSIONS)] if hidden else []
        self.mlp_projector.projector = nn.Sequential(nn.Linear(width, DIMENSIONS), *more)
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def encode_image(self, scaled: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.mlp_projector.projector(self.visual(scaled)), dim=-1)  # type: ignore[operator]


def clip(side: int = SIDE) -> Any:
    return open_clip.CLIP(
        DIMENSIONS,
        {"image_size": side, "layers": 2, "width": WIDTH, "patch_size": 16},
        {"context_length": CONTEXT, "width": 64, "heads": 1, "layers": 2},
    )


def randomised(model: nn.Module) -> nn.Module:
    """No weight at a value that another could have by chance: not 0, not 1."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def views(side: int = SIDE, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(1))


def scaled(pixels: torch.Tensor, mean: Any = OPENAI_MEAN, std: Any = OPENAI_STD) -> torch.Tensor:
    return (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]) -> Path:
    where = tmp_path / "cache"
    write_cache(where, recipe, Encoding(dtype="float32", dimensions=DIMENSIONS), ["one", "two"], vectors(2))
    return where


@pytest.mark.parametrize("hidden", [True, False], ids=["mlp", "linear"])
def test_a_lift_file_makes_the_vectors_that_their_code_makes(
    tmp_path: Path, cache: Path, hidden: bool
) -> None:
    theirs = randomised(Lift(hidden=hidden))
    path = tmp_path / "lift.pt"
    torch.save(theirs.state_dict(), path)
    ours = ReleasedModel.open(path, "cpu", cache=str(cache))
    expected = theirs.encode_image(scaled(views()))  # type: ignore[operator]
    assert ours.image_size == SIDE and ours.subject.name == "lift"
    assert (ours.embed_images(views()) - expected).abs().max() < 1e-5
    assert (ours.features(views()) - theirs.visual(scaled(views()))).abs().max() < 1e-5  # type: ignore[operator]
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the images differ by more than the bound


def test_a_clip_file_makes_the_vectors_of_open_clip_on_both_sides(tmp_path: Path) -> None:
    theirs = randomised(clip())
    path = tmp_path / "clip.safetensors"
    save_file(theirs.state_dict(), path)
    ours = ReleasedModel.open(path, "cpu")
    captions = ["a red circle left of a blue square that is far too long", "two", "a red circle"]
    tokens = open_clip.tokenize(captions, context_length=CONTEXT)
    images, texts = (
        theirs.encode_image(scaled(views()), normalize=True),
        theirs.encode_text(tokens, normalize=True),
    )
    assert (ours.embed_images(views()) - images).abs().max() < 1e-5
    assert (ours.embed_texts(captions) - texts).abs().max() < 1e-5
    assert ours.subject.recipe is None and ours.mean_text() is None and ours.mean_image() is None


def test_lifts_texts_come_from_the_cache_at_unit_length_and_no_others_are_made_up(
    tmp_path: Path, cache: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]
) -> None:
    path = tmp_path / "lift.pt"
    torch.save(randomised(Lift()).state_dict(), path)
    ours = ReleasedModel.open(path, "cpu", cache=str(cache))
    found = ours.embed_texts(["two", "one", "  two "])
    expected = vectors(2)[[1, 0, 1]]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(found.numpy() - expected).max() < 1e-6
    assert ours.subject.recipe == recipe.fingerprint and ours.subject.snapshot
    with pytest.raises(MissingCaptions, match=r"\('three'\) are not in snapshot"):
        ours.embed_texts(["three"])


def test_lifts_texts_from_a_server_are_kept_and_of_the_caches_recipe(
    tmp_path: Path, cache: Path, recipe: Recipe, vectors: Callable[..., np.ndarray], embedder: Embedder
) -> None:
    path = tmp_path / "lift.pt"
    torch.save(randomised(Lift()).state_dict(), path)
    for _ in range(2):
        ours = ReleasedModel.open(path, "cpu", cache=str(cache), server=embedder.url)
        found = ours.embed_texts(["one", "three", "two"])
        assert (found[1] - DIMENSIONS**-0.5).abs().max() < 1e-6  # the fake one says a constant
        assert embedder.embedded == ["three"]
    alone = ReleasedModel.open(path, "cpu", server=embedder.url)
    assert alone.subject.recipe == recipe.fingerprint and alone.subject.snapshot is None
    assert torch.allclose(alone.embed_texts(["three"]), found[1:2])
    other = tmp_path / "other"
    mean = recipe.model_copy(update={"pooling": "mean"})
    write_cache(other, mean, Encoding(dtype="float32", dimensions=DIMENSIONS), ["one"], vectors(1))
    with pytest.raises(RecipeMismatch, match=r"pooling is 'mean' in .*other and 'last' in http"):
        ReleasedModel.open(path, "cpu", cache=str(other), server=embedder.url).embed_texts(["four"])


def test_a_checkpoint_as_their_training_saves_it_is_read_too(tmp_path: Path) -> None:
    theirs = randomised(clip())
    inside = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    optimizer = torch.optim.AdamW(theirs.parameters()).state_dict()
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": inside, "optimizer": optimizer}, tmp_path / "epoch_3.pt"
    )
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    whole, bare = (ReleasedModel.open(tmp_path / name, "cpu") for name in ("epoch_3.pt", "bare.pt"))
    assert torch.equal(whole.embed_images(views()), bare.embed_images(views()))


def test_the_older_name_of_the_head_is_known(tmp_path: Path, cache: Path) -> None:
    state = randomised(Lift()).state_dict()
    torch.save(state, tmp_path / "new.pt")
    older = {name.replace("mlp_projector", "text_decoder"): value for name, value in state.items()}
    torch.save(older, tmp_path / "old.pt")
    new, old = (ReleasedModel.open(tmp_path / name, "cpu", cache=str(cache)) for name in ("new.pt", "old.pt"))
    assert torch.equal(new.embed_images(views()), old.embed_images(views()))


def test_the_reference_looks_at_224_of_256_pixels_with_imagenets_statistics(tmp_path: Path) -> None:
    """Pillow and torchvision, as the authors' evaluation has them; the two round a few pixels differently."""
    from PIL import Image
    from torchvision import transforms

    theirs = randomised(clip(224))
    path = tmp_path / "clip.pt"
    torch.save(theirs.state_dict(), path)
    ours, plain = (ReleasedModel.open(path, "cpu", pixel_stats=stats) for stats in ("reference", "training"))  # type: ignore[arg-type]
    assert (ours.image_size, plain.image_size) == (256, 224)
    assert (ours.subject.name, plain.subject.name) == ("clip, reference pixels", "clip")
    assert ours.directory != plain.directory  # the results of one are not those of the other
    image = views(407, 1)[0, :, :301]
    prepare = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    prepared = prepare(Image.fromarray(image.permute(1, 2, 0).numpy()))
    view = center_view(image, ours.image_size)
    cut = view[:, 16:240, 16:240]
    assert (cut.int() - prepared.int()).abs().max() <= 2 and (cut != prepared).float().mean() < 0.01
    expected = theirs.encode_image(scaled(cut[None], IMAGENET_MEAN, IMAGENET_STD), normalize=True)  # type: ignore[operator]
    assert (ours.embed_images(view[None]) - expected).abs().max() < 1e-5
    assert (plain.embed_images(center_view(image, 224)[None]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual.trunk.cls_token": torch.ones(1)}, "visual.trunk.cls_token has no place in it"),
        ({"visual.ln_pre.bias": None}, "visual.ln_pre.bias is missing"),
        ({"visual.conv1.weight": None}, "no visual.conv1.weight as in open_clip's ViTs, its first is"),
        ({"visual.ln_post.weight": torch.ones(7)}, r"visual.ln_post.weight is \[7\], expected \[128\]"),
        (
            {"mlp_projector.projector.4.weight": torch.ones(2, 2)},
            "mlp_projector.projector.4.weight has no place",
        ),
        ({"mlp_projector.projector.0.bias": None}, "mlp_projector.projector.0.bias is missing"),
        ({"logit_scale": "2.6"}, "'logit_scale' is no tensor but str"),
    ],
)
def test_a_file_of_another_layout_is_refused_by_the_first_name_that_does_not_fit(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    state: dict[str, Any] = {**randomised(Lift()).state_dict(), **change}
    path = tmp_path / "other.pt"
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    with pytest.raises(BadSource, match=said) as refused:
        ReleasedModel.open(path, "cpu", server="http://nowhere")
    assert "\n" not in str(refused.value)


class Runs:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return print, ("never",)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_holds_no_weights_is_one_clear_line_and_runs_nothing(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    with pytest.raises(BadSource, match="No such file"):
        ReleasedModel.open(path, "cpu")
    path.write_bytes(b"not weights")
    with pytest.raises(BadSource, match=name) as refused:
        ReleasedModel.open(path, "cpu")
    torch.save({"state_dict": Runs()}, path)
    with pytest.raises(BadSource, match=name):
        ReleasedModel.open(path, "cpu")
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)
    assert "never" not in capsys.readouterr().out


def test_texts_that_do_not_belong_to_the_file_are_refused(
    tmp_path: Path, cache: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]
) -> None:
    lift = tmp_path / "lift.pt"
    torch.save(randomised(Lift()).state_dict(), lift)
    with pytest.raises(BadConfig, match=r"lift.pt is a LIFT, whose texts are embedded elsewhere"):
        ReleasedModel.open(lift, "cpu")
    narrow = tmp_path / "narrow"
    write_cache(narrow, recipe, Encoding(dimensions=16), ["one"], vectors(1)[:, :16])
    with pytest.raises(BadConfig, match=r"makes vectors of 24 dimensions, and those of .*narrow.* have 16"):
        ReleasedModel.open(lift, "cpu", cache=str(narrow))


def test_weights_that_make_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    state = randomised(clip()).state_dict()
    state["visual.ln_post.bias"] += torch.nan
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(LiftError, match=r"clip.pt: it makes image vectors that are not finite"):
        ReleasedModel.open(tmp_path / "clip.pt", "cpu").embed_images(views())


def test_the_command_scores_released_files_side_by_side(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(randomised(Lift()).state_dict(), tmp_path / "lift.pt")
    torch.save(randomised(clip()).state_dict(), tmp_path / "clip.pt")
    shard = write_tar(
        tmp_path / "test-000.tar", [(str(i), png(i), {"caption": c}) for i, c in enumerate(["one", "two"])]
    )
    files = [str(tmp_path / name) for name in ("lift.pt", "clip.pt")]
    flags = ["retrieval", "--data", str(shard), "--device", "cpu"]
    eval_main([*flags, "--checkpoint", *files, "--cache", str(cache), "--pixel-stats", "reference"])
    shown = capsys.readouterr()
    assert "lift, reference pixels" in shown.out and "clip, reference pixels" in shown.out
    assert (tmp_path / "lift.pt.reference.eval" / "retrieval-test-karpathy.json").is_file()
    for wrong, said in (
        ([], "nothing to evaluate; name a training run by --run, or a released file by --checkpoint"),
        (
            ["--checkpoint", "nowhere.pt"],
            "--checkpoint nowhere.pt: no such file; a training run is given by --run",
        ),
        (
            ["--run", "x", "--pixel-stats", "reference"],
            "--pixel-stats reference is for files given by --checkpoint",
        ),
        (["--run", "x", "--train-data", str(shard)], "--train-data is for files given by --checkpoint"),
        (["--checkpoint", files[1], "--train-data", "none.tar"], "no such file: none.tar"),
        (["--checkpoint", files[0]], "lift.pt is a LIFT, whose texts are embedded elsewhere"),
    ):
        with pytest.raises(SystemExit) as ended:
            eval_main([*flags, *wrong])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_training_data_give_a_released_file_its_blind_score_and_are_encoded_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(randomised(Lift()).state_dict(), tmp_path / "lift.pt")
    samples = [
        (str(i), png(i), {"captions": [own], "negatives": {"swap_obj": false}})
        for i, (own, false) in enumerate([("one", "two"), ("two", "one")])
    ]
    shard = write_tar(tmp_path / "test-000.tar", samples)
    training = write_tar(
        tmp_path / "train.tar", [(str(i), png(50 + i), {"caption": "one"}) for i in range(3)]
    )

    def score(*flags: str) -> Any:
        files = ["--checkpoint", str(tmp_path / "lift.pt"), "--cache", str(cache), "--device", "cpu"]
        eval_main(["shapes", "--data", str(shard), "--json", *files, *flags])
        return json.loads(capsys.readouterr().out)[0]["scores"]["swap_obj"]

    assert score()["blind"] is None
    model = ReleasedModel.open(
        tmp_path / "lift.pt", "cpu", cache=str(cache), train_data=[str(training)], batch_size=2
    )
    mean = model.mean_image()
    index = build_index([str(training)], Rejects(0))
    pixels = torch.stack([center_view(ImageStore(index, 10**6).pixels(i), SIDE) for i in range(3)])
    assert mean is not None and (mean - model.embed_images(pixels).mean(0)).abs().max() < 1e-6
    text = model.mean_text()
    one, two = model.embed_texts(["one", "two"])
    assert text is not None and torch.equal(text, one)
    prefers = float(mean @ one > mean @ two), float(mean @ two > mean @ one)
    assert score("--train-data", str(training))["blind"] == sum(prefers) / 2
    monkeypatch.setattr(means, "encode", None)  # not again
    assert score("--train-data", str(training))["blind"] == 0.5


@pytest.mark.slow
def test_the_published_shapes_load(tmp_path: Path, cache: Path) -> None:
    """ViT-B/16 at 224 with average pooling, and CLIP with 323 tokens, as their configurations say."""
    torch.save(Lift(width=768, layers=12, side=224).state_dict(), tmp_path / "lift.pt")
    vit = ReleasedModel.open(tmp_path / "lift.pt", "cpu", cache=str(cache)).model.tower.vit
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (768, 12, 12)  # type: ignore[attr-defined]
    text = {"context_length": 323, "width": 512, "heads": 8, "layers": 12}
    theirs = open_clip.CLIP(
        512, {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}, text
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours = ReleasedModel.open(tmp_path / "clip.pt", "cpu")
    with torch.inference_mode():
        expected = theirs.encode_image(scaled(views(224, 1)), normalize=True)
        tokens = open_clip.tokenize(["a red circle " * 200], context_length=323)
        texts = theirs.encode_text(tokens, normalize=True)
    assert (ours.embed_images(views(224, 1)) - expected).abs().max() < 1e-5
    assert (ours.embed_texts(["a red circle " * 200]) - texts).abs().max() < 1e-5
