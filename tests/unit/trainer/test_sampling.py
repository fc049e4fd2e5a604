"""Order, captions and crops are functions of (seed, epoch, step), whatever the workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lift_cache.errors import BadConfig
from lift_trainer.batches import Batch, Batches
from lift_trainer.images import ImageStore
from lift_trainer.job import prepare
from lift_trainer.sampling import Sampler, choose_caption, crop_boxes, epoch_order, uniform
from tests.unit.trainer.conftest import World


def test_an_epoch_shows_every_sample_once_and_epochs_differ() -> None:
    orders = [epoch_order(0, epoch, 1000) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(1, 0, 1000))


def test_the_order_is_fixed_for_all_versions() -> None:
    assert epoch_order(7, 3, 8).tolist() == [0, 3, 7, 1, 6, 4, 2, 5]


def test_a_batch_depends_on_its_step_alone() -> None:
    sampler = Sampler(seed=3, samples=100, batch_size=32)
    assert sampler.steps_per_epoch == 3
    later = sampler.batch(7).tolist()
    assert Sampler(3, 100, 32).batch(7).tolist() == later
    epoch = np.concatenate([sampler.batch(step) for step in (3, 4, 5)])
    assert len(set(epoch.tolist())) == 96


def test_batches_are_the_same_with_any_workers_parts_and_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(world.config())

    def stream(workers: int = 0, preload: bool = False) -> list[Batch]:
        store = ImageStore(job.index, 10**6)
        assert store.preload(1 << 20) if preload else not store.in_memory
        made = Batches(store, job.text, job.sampler, seed=0, image_size=16, max_bad=0)
        return list(made.stream(1, 6, workers, torch.device("cpu")))

    expected = stream()
    assert len(expected) == 5
    others = [stream(workers=2), stream(preload=True)]
    monkeypatch.setattr("lift_trainer.batches.PART", 3)
    others.append(stream(workers=1))
    for other in others:
        for a, b in zip(expected, other, strict=True):
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.captions, b.captions)
            assert torch.equal(a.text, b.text)


def test_all_captions_of_an_image_are_used_equally_often() -> None:
    samples = np.arange(30_000)
    chosen = choose_caption(0, 0, samples, np.full(len(samples), 3))
    assert np.bincount(chosen) == pytest.approx([10_000] * 3, rel=0.05)
    assert not np.array_equal(chosen, choose_caption(0, 1, samples, np.full(len(samples), 3)))


def test_crops_stay_inside_and_keep_nine_tenths_of_the_area() -> None:
    n = 5000
    sizes = np.stack([np.full(n, 60), np.full(n, 80)], 1)
    top, left, height, width = crop_boxes(0, 0, np.arange(n), sizes).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 60).all() and (left + width <= 80).all()
    area = height * width / 4800
    assert area.min() > 0.88 and area.max() <= 1.0
    assert 0.9 < area.mean() < 0.97
    # An image far from any allowed aspect ratio gets the largest central box.
    assert crop_boxes(0, 0, np.arange(1), np.array([[10, 100]])).tolist() == [[0, 43, 10, 13]]


def test_the_hash_is_uniform_and_its_streams_are_independent() -> None:
    a, b = uniform(0, 1, np.arange(20_000)), uniform(0, 2, np.arange(20_000))
    assert a.mean() == pytest.approx(0.5, abs=0.01) and a.var() == pytest.approx(1 / 12, rel=0.03)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_a_batch_larger_than_the_data_is_one_clear_line() -> None:
    with pytest.raises(
        BadConfig, match=r"--batch-size is 64 and the data hold 28 images; use --batch-size 28"
    ):
        Sampler(0, 28, 64)
