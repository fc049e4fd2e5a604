"""Two-way choices between a caption and one that differs in one thing: shapes and SugarCrepe."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache.errors import BadSource
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.result import Result
from lift_trainer.evaluators.shapes import open_shapes
from lift_trainer.evaluators.sugarcrepe import TASKS, open_sugarcrepe
from lift_trainer.evaluators.tasks import ShapesTask
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index
from tests.unit.trainer.conftest import World, png, write_tar
from tests.unit.trainer.encoders import Known, numbered

IMAGES = 12


@pytest.fixture
def begun(world: World) -> World:
    train(prepare(world.config(epochs=1)))
    return world


# ---------------------------------------------------------------------------------------------- shapes


def with_negatives(root: Path, name: str = "negatives.tar") -> Path:
    samples: list[tuple[str, bytes | None, object]] = [
        (
            str(i),
            png(i),
            {
                "captions": [f"drawing number {i}"],
                "negatives": {
                    "swap_obj": f"drawing number {(i + 9) % 28}",
                    "swap_att": f"drawing  number {i}",
                },
            },
        )
        for i in range(28)
    ]
    return write_tar(root / name, [*samples, ("plain", png(0), {"captions": ["drawing number 0"]})])


@pytest.mark.slow
def test_a_trained_tower_prefers_its_captions_and_a_tie_is_wrong(world: World) -> None:
    train(prepare(world.config(epochs=30, precision="fp32", lr=3e-3, log_every=100)))
    shard = with_negatives(world.root)
    result = open_shapes([str(shard)], "test").evaluate(TrainedRun.open(world.root / "run"))
    scores = result.scores
    assert scores["swap_obj"].value > 0.8
    assert scores["swap_att"].value == 0.0
    assert scores["mean"].value == scores["item_mean"].value == pytest.approx(scores["swap_obj"].value / 2)
    assert {name: score.items for name, score in scores.items()} == {
        "swap_att": 28,
        "swap_obj": 28,
        "mean": 56,
        "item_mean": 56,
    }
    assert result.details["ties"]["swap_att"] == result.details["equal_captions"]["swap_att"] == 28
    blind = scores["swap_obj"].blind
    assert blind is not None and blind < scores["swap_obj"].value and scores["swap_att"].blind == 0.0
    assert Result.read(result.write(world.root / "run" / "eval")) == result


def test_the_mean_of_the_training_images_is_computed_once_and_kept(
    begun: World, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = open_shapes([str(with_negatives(begun.root))], "test")
    encoder = TrainedRun.open(begun.root / "run")
    first = shapes.evaluate(encoder)
    assert first.scores["swap_obj"].blind is not None
    mean, text = encoder.mean_image(), encoder.mean_text()
    assert mean is not None and text is not None and mean.shape == text.shape == (24,)
    begun.shard.rename(begun.root / "elsewhere.tar")
    assert shapes.evaluate(TrainedRun.open(begun.root / "run")) == first
    for kept in (begun.root / "run" / "eval").glob("mean-*"):
        kept.unlink()
    again = shapes.evaluate(TrainedRun.open(begun.root / "run"))
    assert again.scores["swap_obj"].blind is None
    assert "no mean over the training images: no such file" in capsys.readouterr().err


def test_the_mean_is_that_of_the_checkpoint_and_of_the_training_images(begun: World) -> None:
    encoder = TrainedRun.open(begun.root / "run")
    x_nd, _ = encode(build_index([str(begun.shard)], Rejects(0)), encoder, Rejects(0))
    mean = encoder.mean_image()
    assert mean is not None
    assert mean.numpy() == pytest.approx(x_nd.double().mean(0).numpy(), abs=1e-7)


def test_choices_do_not_depend_on_the_batch_size(begun: World) -> None:
    shapes = open_shapes([str(with_negatives(begun.root))], "test")
    whole, *parts = (
        shapes.evaluate(TrainedRun.open(begun.root / "run", "cpu", batch_size=size)) for size in (256, 1, 7)
    )
    assert 0 < whole.scores["swap_obj"].value < 1
    for part in parts:
        for name, score in whole.scores.items():
            near = whole.details["near_ties"].get(name, 0)
            assert abs(part.scores[name].value - score.value) <= 1e-4 + near / score.items, name


def test_both_held_out_splits_of_a_folder_are_evaluated(world: World) -> None:
    with_negatives(world.root, "test-000.tar")
    with_negatives(world.root, "unseen-000.tar")
    opened = ShapesTask(data=[str(world.root)]).open()
    assert [(evaluator.task, evaluator.name) for evaluator in opened] == [
        ("shapes", "test"),
        ("shapes", "unseen"),
    ]


def test_shards_without_negatives_are_refused(world: World) -> None:
    with pytest.raises(BadSource, match="no sample has negatives"):
        open_shapes([str(world.shard)], "test")


@pytest.mark.parametrize(
    "negatives", [["a dog"], "a dog", {"swap_att": 3}, {"swap_att": " "}, {"swap_att": ["a dog"]}]
)
def test_negatives_of_another_shape_are_refused_by_their_place(tmp_path: Path, negatives: object) -> None:
    shard = write_tar(tmp_path / "odd.tar", [("0", png(0), {"captions": ["a cat"], "negatives": negatives})])
    with pytest.raises(BadSource, match=r"odd\.tar:0: its negatives are not one false caption by task"):
        open_shapes([str(shard)], "test")


def test_shards_with_captions_as_text_have_no_negatives(tmp_path: Path) -> None:
    shard = tmp_path / "plain.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (("0.png", png(0)), ("0.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(BadSource, match="no sample has negatives"):
        open_shapes([str(shard)], "test")


# ---------------------------------------------------------------------------------------------- SugarCrepe


def items_of(generator: np.random.Generator, task: str, count: int) -> dict[str, dict[str, str]]:
    """As published: index → filename, caption, negative_caption."""
    return {
        str(i): {
            "filename": f"{generator.integers(IMAGES):012}.jpg",
            "caption": f"{task} {i}",
            "negative_caption": f"not {task} {i}",
        }
        for i in range(count)
    }


def write_sugarcrepe(root: Path, items: dict[str, dict[str, dict[str, str]]]) -> tuple[Path, Path]:
    data, images = root / "data", root / "val2017"
    data.mkdir()
    images.mkdir()
    for task, some in items.items():
        (data / f"{task}.json").write_text(json.dumps(some))
    for i in range(IMAGES):
        (images / f"{i:012}.jpg").write_bytes(numbered(i))
    return data, images


def published(generator: np.random.Generator) -> dict[str, dict[str, dict[str, str]]]:
    return {task: items_of(generator, task, 3 + 4 * n) for n, task in enumerate(TASKS)}


def known(
    items: dict[str, dict[str, dict[str, str]]], generator: np.random.Generator, **options: Any
) -> Known:
    texts = [
        item[field]
        for some in items.values()
        for item in some.values()
        for field in ("caption", "negative_caption")
    ]
    # Small integers: exact in float32, and often tied.
    vectors = generator.integers(-2, 3, (len(texts), 3)).astype(np.float32)
    images = generator.integers(-2, 3, (IMAGES, 3)).astype(np.float32)
    return Known(images, dict(zip(texts, vectors, strict=True)), **options)


def by_hand(encoder: Known, some: dict[str, dict[str, str]], blind: bool = False) -> list[bool]:
    right = []
    for item in some.values():
        x = encoder.mean if blind else encoder.images[int(item["filename"][:-4])]
        assert x is not None
        own, other = (
            float(np.dot(x.astype(np.float64), encoder.texts[item[field]].astype(np.float64)))
            for field in ("caption", "negative_caption")
        )
        right.append(own > other)
    return right


@pytest.mark.parametrize("seed", range(8))
def test_sugarcrepe_equals_a_count_by_hand_with_ties(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    items = published(generator)
    encoder = known(items, generator, mean=np.array([1, 0, -1], np.float32))
    result = open_sugarcrepe(*write_sugarcrepe(tmp_path, items), "coco").evaluate(encoder)
    right = {task: by_hand(encoder, some) for task, some in items.items()}
    blind = {task: by_hand(encoder, some, blind=True) for task, some in items.items()}
    for task in TASKS:
        assert result.scores[task].value == pytest.approx(np.mean(right[task]), abs=1e-9)
        assert result.scores[task].blind == pytest.approx(np.mean(blind[task]), abs=1e-9)
        assert result.scores[task].items == len(items[task])
    means = [np.mean(right[task]) for task in TASKS]
    assert result.scores["mean"].value == pytest.approx(np.mean(means), abs=1e-9)
    every = [value for task in TASKS for value in right[task]]
    assert result.scores["item_mean"].value == pytest.approx(np.mean(every), abs=1e-9)
    assert result.scores["mean"].blind == pytest.approx(
        np.mean([np.mean(blind[task]) for task in TASKS]), abs=1e-9
    )
    assert sum(result.details["ties"].values()) > 0


def test_vectors_that_are_no_numbers_are_wrong(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    items = published(generator)
    encoder = known(items, generator)
    encoder.images[:] = np.nan
    result = open_sugarcrepe(*write_sugarcrepe(tmp_path, items), "coco").evaluate(encoder)
    assert {score.value for score in result.scores.values()} == {0.0}
    assert {score.blind for score in result.scores.values()} == {None}


def test_a_missing_image_is_named_and_the_scores_say_over_how_many_items_they_stand(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    items = published(generator)
    data, images = write_sugarcrepe(tmp_path, items)
    (images / f"{3:012}.jpg").unlink()
    (images / f"{4:012}.jpg").write_bytes(b"broken")
    result = open_sugarcrepe(data, images, "coco").evaluate(known(items, generator))
    gone = {f"{3:012}.jpg", f"{4:012}.jpg"}
    assert {Path(place).name for place in result.left_out} == gone
    assert result.left_out[str(images / f"{3:012}.jpg")] == "No such file or directory"
    left = [item for some in items.values() for item in some.values() if item["filename"] not in gone]
    assert result.scores["item_mean"].items == len(left)
    assert sum(result.details["of"].values()) == sum(map(len, items.values())) > len(left)
    with pytest.raises(BadSource, match="2 broken samples, more than --max-bad 1"):
        open_sugarcrepe(data, images, "coco", max_bad=1).evaluate(known(items, generator))


def test_a_task_of_which_no_image_is_there_is_refused_as_the_mean_would_be_of_six(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    items = published(generator)
    items["swap_obj"] = {key: item | {"filename": "gone.jpg"} for key, item in items["swap_obj"].items()}
    encoder = known(items, generator)
    data, images = write_sugarcrepe(tmp_path, items)
    (images / "gone.jpg").unlink(missing_ok=True)
    with pytest.raises(BadSource, match="no item of swap_obj is left"):
        open_sugarcrepe(data, images, "coco").evaluate(encoder)


def test_captions_that_are_equal_after_normalisation_are_counted_and_wrong(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    items = published(generator)
    items["add_obj"]["0"] |= {"caption": "a  dog", "negative_caption": "a dog "}
    encoder = known(items, generator)
    encoder.texts = {**encoder.texts, "a dog": np.ones(3, np.float32)}
    result = open_sugarcrepe(*write_sugarcrepe(tmp_path, items), "coco").evaluate(encoder)
    assert result.details["equal_captions"]["add_obj"] == 1
    assert result.items["add_obj"].value[0] == 0.0


def test_a_choice_that_another_device_could_turn_around_is_counted(tmp_path: Path) -> None:
    items = published(np.random.default_rng(3))
    encoder = known(items, np.random.default_rng(3))
    items["add_att"]["0"] |= {"caption": "near", "negative_caption": "nearly"}
    items["add_att"]["1"] |= {"caption": "far", "negative_caption": "nearly"}
    items["add_att"] = {key: item | {"filename": f"{0:012}.jpg"} for key, item in items["add_att"].items()}
    x = encoder.images[0] = np.array([1, 0, 0], np.float32)
    unit = {"near": x * (0.5 + 2e-6), "nearly": x * 0.5, "far": x * 0.6}
    encoder.texts = {**encoder.texts, **{text: v.astype(np.float32) for text, v in unit.items()}}
    result = open_sugarcrepe(*write_sugarcrepe(tmp_path, items), "coco").evaluate(encoder)
    assert result.items["add_att"].value[:2] == (1.0, 1.0)
    assert result.details["near_ties"]["add_att"] == result.details["ties"]["add_att"] + 1


def test_files_of_another_shape_are_one_clear_line(tmp_path: Path) -> None:
    items = published(np.random.default_rng(0))
    data, images = write_sugarcrepe(tmp_path, items)

    def refusal() -> str:
        with pytest.raises(BadSource) as refused:
            open_sugarcrepe(data, images, "coco")
        assert "\n" not in str(refused.value)
        return str(refused.value)

    file = data / "swap_obj.json"
    file.write_text(json.dumps({"0": {"filename": "a.jpg", "caption": "a"}}))
    assert (
        f"{file} is not a task of SugarCrepe" in refusal()
        and "0.negative_caption: Field required" in refusal()
    )
    file.write_text("[]")
    assert "valid dictionary" in refusal()
    file.write_text("{}")
    assert refusal() == f"{file}: no item in it"
    file.write_text("{")
    assert refusal() == f"{file}: not JSON"
    file.write_text(json.dumps({"0": {"filename": "a.jpg", "caption": " ", "negative_caption": "b"}}))
    assert f"{file}: item 0: the caption is empty" in refusal()
    file.unlink()
    assert refusal() == f"{file}: No such file or directory"
    with pytest.raises(BadSource, match="no such folder; --images names the folder of COCO val2017"):
        open_sugarcrepe(data, tmp_path / "none", "coco")
