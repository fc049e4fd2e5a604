"""Decoding, and what happens to an image that cannot be decoded."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lift_cache.errors import BadSource
from lift_trainer.images import BadImage, ImageStore, center_view, decode
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from tests.unit.trainer.conftest import World, png, write_tar

LIMIT = 10**6


def bomb() -> bytes:
    """A few bytes that claim to be 100,000 × 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def saved(image: Image.Image, kind: str = "png") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def index_with(tmp_path: Path, images: dict[int, bytes], n: int = 12) -> Index:
    samples = [(str(i), images.get(i, png(i)), {"caption": f"caption {i}"}) for i in range(n)]
    return build_index([str(write_tar(tmp_path / "a.tar", samples))], Rejects(0))


def test_transparency_becomes_white_and_every_mode_becomes_rgb() -> None:
    for mode in ("RGBA", "LA", "L", "P", "1", "CMYK", "I;16"):
        out = io.BytesIO()
        Image.new(mode, (4, 4)).save(out, "tiff" if mode == "CMYK" else "png")
        pixels = decode(out.getvalue(), LIMIT)
        assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.uint8
        assert pixels.max() == (255 if mode in ("RGBA", "LA", "CMYK") else 0)


def test_sixteen_bit_grey_keeps_its_gradient() -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    pixels = decode(saved(Image.fromarray(grey)), LIMIT)
    assert torch.equal(pixels[1].flatten(), torch.arange(256, dtype=torch.uint8))


def test_large_images_are_cropped_as_they_arrive_and_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(index_with(tmp_path, {5: png(5, (40, 60))}), LIMIT)
    together = store.train_views(np.arange(12), 0, 0, 16, 0)[1]
    monkeypatch.setattr("lift_trainer.images.AT_ONCE", 2000)
    assert torch.equal(store.train_views(np.arange(12), 0, 0, 16, 0)[1], together)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify"),
        (b"GIF89a but no more", "."),
        (png(0)[:200], "."),
        (saved(Image.new("L", (100_000, 1))), "100000 × 1 pixels, thinner than 1 : 200"),
        (saved(Image.new("F", (4, 4)), "tiff"), "32-bit grey"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file, none of JPEG"),
        (bomb(), "100000 × 100000 pixels, more than --max-pixels 1000000"),
    ],
)
def test_what_is_no_usable_image_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data, LIMIT)


@pytest.mark.parametrize("preload", [False, True])
def test_the_next_readable_sample_takes_the_place_of_a_broken_one(tmp_path: Path, preload: bool) -> None:
    index = index_with(tmp_path, {3: b"broken", 4: bomb()})
    store, whole = ImageStore(index, LIMIT), ImageStore(index, LIMIT)
    if preload:
        assert store.preload(1 << 20)
        assert set(store.broken) == {3, 4}
    used, views, bad = store.train_views(np.array([7, 3, 11]), 0, 0, 16, max_bad=2)
    assert used.tolist() == [7, 5, 11] and set(bad) == {3, 4}
    assert torch.equal(views, whole.train_views(np.array([7, 5, 11]), 0, 0, 16, max_bad=0)[1])


def test_too_many_broken_images_end_the_run_by_name(tmp_path: Path) -> None:
    store = ImageStore(index_with(tmp_path, dict.fromkeys(range(12), b"broken")), LIMIT)
    with pytest.raises(BadSource, match=r"a\.tar:2: cannot identify .*; 4 broken images .* --max-bad is 3"):
        store.train_views(np.array([2]), 0, 0, 16, max_bad=3)
    with pytest.raises(BadSource, match="12 broken images"):
        store.train_views(np.array([2]), 0, 0, 16, max_bad=100)


def test_images_are_kept_in_memory_only_when_all_fit(world: World) -> None:
    store = ImageStore(build_index([str(world.shard)], Rejects(0)), LIMIT)
    from_file = store.pixels(7)
    assert not store.preload(28 * 16 * 16 * 3 - 1) and not store.in_memory
    assert store.preload(28 * 16 * 16 * 3) and store.in_memory
    assert torch.equal(store.pixels(7), from_file)


def test_a_crop_is_never_mirrored() -> None:
    """Captions say left and right."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ramp)).save(out, "png")

    class OneImage(ImageStore):
        def pixels(self, sample: int) -> torch.Tensor:
            return decode(out.getvalue(), LIMIT)

    views = OneImage(None, LIMIT).train_views(np.arange(64), 0, 0, 32, 0)[1].float()  # type: ignore[arg-type]
    assert (views[..., -1].mean((1, 2)) > views[..., 0].mean((1, 2)) + 100).all()
    assert len({view.numpy().tobytes() for view in views}) > 10


def test_evaluation_looks_at_the_centre_of_the_image() -> None:
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 20:60] = 200
    assert center_view(image, 20).shape == (3, 20, 20)
    assert center_view(image, 20)[:, :, 2:-2].float().mean() == pytest.approx(200, abs=2)
