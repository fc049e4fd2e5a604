"""The text transform: what it does to vectors, what it is fitted to, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig
from lift_cache.keys import caption_keys
from lift_cache.recipe import Recipe
from lift_trainer.config import TransformSpec
from lift_trainer.job import prepare
from lift_trainer.transform import TextTransform, fit_transform
from tests.unit.trainer.conftest import World

N, D = 400, 24


class Array:
    """Text vectors in memory."""

    dimensions = D
    resolution = 2.0**-10

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def gather(self, captions: np.ndarray) -> np.ndarray:
        return self.vectors[captions]


@pytest.fixture
def text() -> Array:
    generator = np.random.default_rng(0)
    scales = np.geomspace(1, 0.05, D)
    return Array((generator.normal(size=(N, D)) * scales + 3.0).astype(np.float32))


KEYS = caption_keys([str(i) for i in range(N)])


def fit(spec: str, text: Array) -> TextTransform:
    return fit_transform(TransformSpec.parse(spec), text, KEYS)


def test_whitening_gives_every_kept_direction_the_same_variance(text: Array) -> None:
    transform = fit("whiten:8", text)
    unit = torch.nn.functional.normalize(torch.from_numpy(text.vectors), dim=-1)
    white = (unit - transform.mean_d) @ transform.projection_dk
    assert torch.cov(white.T, correction=0) == pytest.approx(torch.eye(8), abs=1e-3)
    out = transform(torch.from_numpy(text.vectors))
    assert out.shape == (N, 8) and out.dtype == torch.float32
    assert out.norm(dim=1) == pytest.approx(torch.ones(N), abs=1e-5)


def test_centring_removes_what_all_captions_share(text: Array) -> None:
    raw, centred = (fit(spec, text)(torch.from_numpy(text.vectors)) for spec in ("none", "center"))
    assert (raw @ raw.T).mean() > 0.9
    assert abs((centred @ centred.T).mean()) < 0.05


def test_shrink_runs_from_whitening_to_centring(text: Array) -> None:
    vectors = torch.from_numpy(text.vectors)

    def similarity(spec: str) -> torch.Tensor:
        out = fit(spec, text)(vectors)
        return out @ out.T

    white, half, flat, centred = map(
        similarity, ("whiten:24", "whiten:24,shrink=0.5", "whiten:24,shrink=1", "center")
    )
    assert flat == pytest.approx(centred, abs=1e-4)
    assert (half - white).abs().mean() > 0.01 < (half - flat).abs().mean()


def test_it_does_not_depend_on_the_order_of_the_data(text: Array) -> None:
    order = np.random.default_rng(1).permutation(N)
    a = fit("whiten:8", text)
    b = fit_transform(TransformSpec.parse("whiten:8"), Array(text.vectors[order]), KEYS[order])
    assert torch.equal(a.projection_dk, b.projection_dk) and torch.equal(a.mean_d, b.mean_d)


@pytest.mark.parametrize("spec", ["center", "whiten:3", "whiten:3,shrink=0.3"])
def test_evaluation_captions_in_the_cache_change_no_bit_of_it(
    world: World, recipe: Recipe, vectors: Callable[..., np.ndarray], spec: str
) -> None:
    more = [*world.captions, *(f"held-out caption {i}" for i in range(500))]
    wider = world.root / "wider"
    filled = np.concatenate([world.vectors, vectors(500, seed=9) + 2])
    # In another order too, so that no row keeps its place.
    order = np.random.default_rng(0).permutation(len(more))
    write_cache(wider, recipe, Encoding(dimensions=24), [more[i] for i in order], filled[order])
    for name, cache in (("a", world.cache), ("b", wider)):
        prepare(world.config(cache=str(cache), text_transform=spec)).transforms[0].save(world.root / name)
    assert (world.root / "a").read_bytes() == (world.root / "b").read_bytes()


def test_it_is_stored_and_read_back_exactly(text: Array, tmp_path: Path) -> None:
    for spec in ("none", "center", "whiten:5,shrink=0.25"):
        transform = fit(spec, text)
        transform.save(tmp_path / "t")
        loaded = TextTransform.load(tmp_path / "t")
        assert str(loaded.spec) == spec
        assert torch.equal(transform(torch.from_numpy(text.vectors)), loaded(torch.from_numpy(text.vectors)))


def test_too_few_captions_name_the_largest_safe_k(text: Array) -> None:
    with pytest.raises(
        BadConfig, match=r"k = 41 is too large, there are 400 distinct .* largest safe k is 24"
    ):
        fit("whiten:41", text)
    assert fit("whiten:24", text).output_dimensions(D) == 24  # the advice holds


def test_directions_that_are_only_rounding_are_not_whitened() -> None:
    generator = np.random.default_rng(0)
    flat = generator.normal(size=(N, 6)) @ generator.normal(size=(6, D)) + 1
    stored = flat.astype(np.float16)
    with pytest.raises(BadConfig, match="the captions span 7 directions; the largest safe k is 7"):
        fit("whiten:12", Array(stored))
    assert (
        fit("whiten:7", Array(stored)).output_dimensions(D) == 7
    )  # scaling to unit length bends six into seven
