"""Kept features of a frozen tower: computed once, those of their images and tower or refused, broken images named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lift_cache.errors import BadConfig, BadSource, CacheDamaged
from lift_trainer import features
from lift_trainer.batches import Batches
from lift_trainer.features import FeatureStore, keep_features
from lift_trainer.images import ImageStore, center_view
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.sampling import Sampler
from lift_trainer.text import TextVectors
from lift_trainer.towers import ImageTower, build_tower
from tests.unit.trainer.conftest import SIDE, TOWER, World, open_text, png, write_tar

CPU = torch.device("cpu")


@pytest.fixture
def tower() -> ImageTower:
    torch.manual_seed(3)
    vit = build_tower(TOWER, SIDE, "learned:0.5", 24).vit
    return ImageTower(vit, 24, head="linear", frozen=True)


@pytest.fixture
def index(world: World) -> Index:
    return build_index([str(world.shard)], Rejects(0))


@pytest.fixture
def broken(world: World) -> Index:
    """The world's captions; images 3, 4 and 27 cannot be read."""
    samples = [
        (f"{i:04d}", b"no image" if i in (3, 4, 27) else png(i, (20, 24)), {"caption": f"drawing number {i}"})
        for i in range(28)
    ]
    return build_index([str(write_tar(world.root / "broken.tar", samples))], Rejects(0))


def keep(index: Index, tower: ImageTower, folder: Path, **changes: Any) -> FeatureStore:
    settings: dict[str, Any] = {"image_size": SIDE, "device": CPU, "max_bad": 3, "batch_size": 5}
    return keep_features(folder, ImageStore(index, 10**6), tower, **settings | changes)


def test_row_i_is_what_the_tower_makes_of_the_central_view_of_image_i(
    world: World, index: Index, tower: ImageTower
) -> None:
    store = keep(index, tower, world.root / "features")
    everything = np.random.default_rng(0).permutation(28)
    views = [center_view(ImageStore(index, 10**6).pixels(int(i)), SIDE) for i in everything]
    with torch.inference_mode():
        expected = tower.features(torch.stack(views)).numpy()
    for one in (store, pickle.loads(pickle.dumps(store))):
        assert one.gather(everything).dtype == np.float32 and not one.broken
        np.testing.assert_allclose(one.gather(everything), expected, atol=1e-6)
    rows = np.load(world.root / "features" / "features.npy")
    assert rows.shape == (28, tower.width) == (28, store.width)


def test_features_are_computed_once_and_take_nothing_from_the_random_stream(
    world: World, index: Index, tower: ImageTower
) -> None:
    before = torch.get_rng_state()
    first = keep(index, tower.train(), world.root / "features").gather(np.arange(28))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_features", None)
        second = keep(index, tower, world.root / "features")
    np.testing.assert_array_equal(second.gather(np.arange(28)), first)
    assert not list((world.root / "features").glob(".*")), "no temporary file is left"


def test_features_of_something_else_are_refused_by_what_differs(
    world: World, index: Index, broken: Index, tower: ImageTower
) -> None:
    folder = world.root / "features"
    keep(index, tower, folder)
    with pytest.raises(BadSource, match=r"features: kept features of another sample index .* delete them"):
        keep(broken, tower, folder)
    with pytest.raises(BadSource, match=r"another precision \(fp32 there, bf16 in this run\)"):
        keep(index, tower, folder, precision="bf16")
    with pytest.raises(BadSource, match=r"another image size \(16 there, 32 in this run\)"):
        keep(index, tower, folder, image_size=32)
    other = ImageTower(tower.vit, 24, head="linear", frozen=True, mean=(0.5, 0.5, 0.5))
    with pytest.raises(BadSource, match="another mean of the pixels"):
        keep(index, other, folder)
    with torch.no_grad():
        tower.vit.norm.weight[0] += 1e-6
    with pytest.raises(BadSource, match="another image tower"):
        keep(index, tower, folder)


def test_a_tower_that_trains_has_no_features_to_keep(world: World, index: Index) -> None:
    with pytest.raises(BadConfig, match="of a frozen tower only"):
        keep(index, build_tower(TOWER, SIDE, "learned:0.5", 24), world.root / "features")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "card"])
def test_damaged_features_are_refused_and_say_what_to_do(
    world: World, index: Index, tower: ImageTower, damage: str
) -> None:
    folder = world.root / "features"
    keep(index, tower, folder)
    rows = folder / "features.npy"
    data = bytearray(rows.read_bytes())
    data[-7] ^= 1
    match damage:
        case "flipped":
            rows.write_bytes(data)
        case "cut":
            rows.write_bytes(data[:-100])
        case "gone":
            rows.unlink()
        case "card":
            (folder / "features.json").write_text("{")
    with pytest.raises(CacheDamaged, match=r"features\.(npy|json) .*delete .*computed again"):
        keep(index, tower, folder)


def test_an_interrupted_computation_is_begun_again(
    world: World, index: Index, tower: ImageTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, compute = world.root / "features", features._features
    calls: list[int] = []

    def interrupted(*given: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*given)

    with monkeypatch.context() as patch:
        patch.setattr(features, "_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keep(index, tower, folder)
    assert not list(folder.iterdir())
    expected = keep(index, tower, world.root / "whole").gather(np.arange(28))
    np.testing.assert_array_equal(keep(index, tower, folder).gather(np.arange(28)), expected)


def test_broken_images_are_named_kept_in_mind_and_bounded(
    world: World, broken: Index, tower: ImageTower
) -> None:
    with pytest.raises(BadSource, match=r"broken\.tar:0003: .*; 3 broken images, --max-bad is 2"):
        keep(broken, tower, world.root / "features", max_bad=2)
    assert not list((world.root / "features").iterdir())
    store = keep(broken, tower, world.root / "features")
    again = keep(broken, tower, world.root / "features")
    assert list(store.broken) == [3, 4, 27] and again.broken == store.broken
    assert not store.gather(np.array([3, 4, 27])).any()


def test_batches_of_features_have_the_images_and_captions_of_batches_of_pixels(
    world: World, broken: Index, tower: ImageTower
) -> None:
    store = keep(broken, tower, world.root / "features")
    text: TextVectors = open_text(broken, cache=str(world.cache), overlay=world.root / "o")[0]
    images = ImageStore(broken, 10**6)

    def stream(kept: FeatureStore | None, workers: int = 0) -> list[Any]:
        made = Batches(images, (text,), Sampler(0, 28, 8), 0, SIDE, max_bad=3, features=kept)
        return list(made.stream(0, 6, workers, CPU))

    for pixels, kept, worked in zip(stream(None), stream(store), stream(store, 1), strict=True):
        assert kept.pixels.dtype == torch.float32 and kept.pixels.shape == (8, store.width)
        assert torch.equal(kept.images, pixels.images) and kept.bad == pixels.bad
        assert torch.equal(kept.captions, pixels.captions) and torch.equal(kept.texts[0], pixels.texts[0])
        assert torch.equal(kept.pixels, torch.from_numpy(store.gather(kept.images.numpy())))
        assert torch.equal(worked.pixels, kept.pixels)
    limit = Batches(images, (text,), Sampler(0, 28, 28), 0, SIDE, max_bad=2, features=store)
    with pytest.raises(BadSource, match="3 broken images in one batch, --max-bad is 2"):
        next(limit.stream(0, 1, 0, CPU))


def test_an_unreadable_card_is_not_taken_for_none(world: World, index: Index, tower: ImageTower) -> None:
    folder = world.root / "features"
    keep(index, tower, folder)
    card = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**card, "format": 2}))
    with pytest.raises(CacheDamaged, match=r"features\.json cannot be read"):
        keep(index, tower, folder)
