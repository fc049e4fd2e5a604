"""What scenes in several wordings promise: every caption is true, every false one differs in one thing."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lift_cache.sources import read_member, scan_tar
from lift_trainer.data import paraphrases, shapes
from lift_trainer.data.paraphrases import CONTEXTS, HELD_OUT, TRAINED, long_caption, short_caption
from lift_trainer.data.shards import DatasetWriter

SCENES = shapes.all_scenes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paraphrases")
    paraphrases.build(DatasetWriter(folder), size=32, seed=0, train=300)
    return folder


def samples(folder: Path, split: str) -> list[tuple[bytes, dict[str, Any]]]:
    path = folder / f"{split}-000.tar"
    with path.open("rb") as file:
        return [
            (read_member(file, one.members["png"]), json.loads(read_member(file, one.members["json"])))
            for one in scan_tar(path)
        ]


def test_they_come_out_byte_for_byte_the_same(made: Path, tmp_path: Path) -> None:
    paraphrases.build(DatasetWriter(tmp_path), size=32, seed=0, train=300)
    for path in made.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_no_caption_says_two_scenes_and_each_says_all_of_its_own() -> None:
    captions = [*paraphrases.all_captions()]
    assert len(captions) == len(set(captions)) == 576 * (4 + len(CONTEXTS))
    for scene in SCENES:
        words = {*scene.first, *scene.second, *scene.relation.split()}
        told = [short_caption(scene, wording) for wording in (*TRAINED, HELD_OUT)]
        for caption in (*told, *(long_caption(scene, context) for context in CONTEXTS)):
            assert words <= set(re.findall(r"\w+", caption))


def test_the_new_wording_is_never_in_training_and_training_has_all_others(made: Path) -> None:
    train = samples(made, "train")
    assert all(len(record["captions"]) == len(set(record["captions"])) == 3 for _, record in train)
    trained = {caption for _, record in train for caption in (*record["captions"], record["long"])}
    assert not any(caption.startswith("there is") for caption in trained)
    for split in ("test", "unseen"):
        assert all(
            record["captions"][0].startswith("there is") for _, record in samples(made, f"{split}-new")
        )
        assert not {record["captions"][0] for _, record in samples(made, f"{split}-new")} & trained


def test_every_wording_of_training_is_asked_about(made: Path) -> None:
    starts = {record["captions"][0].split()[0] for _, record in samples(made, "test-seen")}
    assert {"a", "the"} < starts and starts - {"a", "the"} <= set(shapes.COLOURS)


@pytest.mark.parametrize("split", ["test", "unseen"])
def test_variants_ask_the_same_about_the_same_pictures_in_captions_that_a_cache_can_hold(
    made: Path, split: str
) -> None:
    seen, new, long = (samples(made, f"{split}-{variant}") for variant in paraphrases.VARIANTS)
    assert [png for png, _ in seen] == [png for png, _ in new] == [png for png, _ in long]
    known = set((made / "captions.txt").read_text().splitlines())
    for _, record in (*seen, *new, *long):
        assert {record["captions"][0], *record["negatives"].values()} <= known


@pytest.mark.parametrize("variant", paraphrases.VARIANTS)
def test_a_false_caption_differs_from_the_true_one_in_one_thing(made: Path, variant: str) -> None:
    kinds = {
        "att": set(shapes.COLOURS),
        "obj": set(shapes.SHAPES),
        "rel": {"left", "right", "of", "above", "below"},
    }
    for _, record in samples(made, f"test-{variant}"):
        true = re.findall(r"\w+", record["captions"][0])
        for task, caption in record["negatives"].items():
            false = re.findall(r"\w+", caption)
            how, what = task.split("_")
            if how == "swap":
                assert sorted(false) == sorted(true) and false != true
            else:  # only words of one kind go, and only words of that kind come
                both = set(true) & set(false)
                assert {*true, *false} - both <= kinds[what], (true, false)
                assert {*true} != {*false}


def test_long_captions_are_true_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    for context in CONTEXTS:
        pictures = paraphrases.draw(SCENES, [context] * len(SCENES), 32, rng).astype(float)
        for scene, picture in zip(SCENES, pictures, strict=True):
            corner = picture[0, 0]
            low, high = paraphrases.BACKGROUNDS[context.background]
            assert np.ptp(corner) == 0 and low - 1 <= corner[0] <= high + 1
            middles = []
            for thing in (scene.first, scene.second):
                near = np.abs(picture - shapes.COLOURS[thing.colour]).max(-1) < 40
                assert near.sum() >= 12, scene
                middles.append(np.argwhere(near).mean(0)[::-1] + 0.5)
            dx, dy = middles[0] - middles[1]
            x, y = shapes.RELATIONS[scene.relation]
            assert dx * x + dy * y > 3 * abs(dx * y + dy * x), scene
            assert ((middles[0] + middles[1])[1] / 2 < 16) == (context.place == "above"), scene
            assert f"The background is {context.background}" in long_caption(scene, context)


def test_pictures_are_whole() -> None:
    contexts = [CONTEXTS[i % len(CONTEXTS)] for i in range(len(SCENES))]
    pictures = paraphrases.draw(SCENES, contexts, 64, np.random.default_rng(1)).astype(int)
    edges = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]], 1)
    assert (np.ptp(edges, axis=(1, 2)) <= 60).mean() > 0.97  # a tip may touch the edge


def test_background_and_place_say_nothing_about_the_scene(made: Path) -> None:
    contexts: dict[str, set[str]] = {}
    for _, record in samples(made, "unseen-long"):
        background, rest = record["captions"][0].split(".", 1)
        contexts.setdefault(rest, set()).add(background)
    assert len({one for some in contexts.values() for one in some}) == len(CONTEXTS)
    png = samples(made, "unseen-long")[0][0]
    assert Image.open(io.BytesIO(png)).size == (32, 32)
