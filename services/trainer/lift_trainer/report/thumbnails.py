"""Pictures of the gallery, read from their shards by byte range and drawn anew before they go into a page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lift_cache.errors import BadSource
from lift_cache.sources import IMAGE_EXTENSIONS, read_member, scan_tar
from lift_trainer.formats import BROKEN, eight_bit, open_image

THUMBNAIL = 160
"""Longest side in pixels; twice what the page shows, for dense screens."""
LOSSLESS = 96
"""Drawings up to this side stay as sharp as they are (PNG); larger ones become JPEG."""


class ImageRef(NamedTuple):
    """Where an image lies."""

    shard: Path
    """A tar, or the image file itself."""
    sample: str
    """Key in the tar."""


def data_uris(images: Iterable[ImageRef]) -> dict[ImageRef, str]:
    """`data:` URI of each image. Raises `BadSource`: no such shard or sample, or an image that does not decode."""
    by_shard: dict[Path, list[ImageRef]] = {}
    for image in dict.fromkeys(images):
        by_shard.setdefault(image.shard, []).append(image)
    uris = {}
    for shard, wanted in by_shard.items():
        for image, data in _bytes(shard, wanted):
            try:
                uris[image] = thumbnail(data)
            except (*BROKEN, Image.DecompressionBombError) as error:
                raise BadSource(f"{shard}:{image.sample}: not a readable image ({error})") from error
    return uris


def thumbnail(data: bytes) -> str:
    """`data:` URI of a small copy."""
    kind, drawn = redrawn(data)
    return f"data:image/{kind};base64,{base64.b64encode(drawn).decode()}"


def redrawn(data: bytes) -> tuple[str, bytes]:
    """A small, newly encoded copy (png or jpeg): nothing of the file but its pixels gets into a page.

    Raises:
        One of `BROKEN`, DecompressionBombError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = eight_bit(open_image(data))
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    drawn = picture.convert("RGBA")
    flat = Image.new("RGB", drawn.size, "white")
    flat.paste(drawn, mask=drawn)
    kind, options = ("png", {"optimize": True}) if max(flat.size) <= LOSSLESS else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    flat.save(buffer, kind, **options)
    return kind, buffer.getvalue()


def _bytes(shard: Path, wanted: list[ImageRef]) -> Iterable[tuple[ImageRef, bytes]]:
    if shard.suffix != ".tar":  # the image file that a table named
        try:
            data = shard.read_bytes()
        except OSError as error:
            raise BadSource(f"{shard}: {error.strerror}; run lift-report where lift-eval ran") from None
        yield from ((image, data) for image in wanted)
        return
    if not shard.is_file():
        raise BadSource(f"{shard}: no such shard; run lift-report where lift-eval ran")
    keys = {image.sample for image in wanted}
    found = {sample.key: sample.members for sample in scan_tar(shard) if sample.key in keys}
    with shard.open("rb") as file:
        for image in wanted:
            members = found.get(image.sample, {})
            member = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
            if member is None:
                raise BadSource(f"{shard}: no image with key '{image.sample}'; evaluate the run again")
            yield image, read_member(file, member)
