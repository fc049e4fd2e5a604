"""Which image files are opened, and how: the same for training, evaluation and the report."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow would try all it knows, and some run other programs (EPS runs Ghostscript)."""

BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    OverflowError,
    MemoryError,
    LookupError,
    TypeError,
)
"""What Pillow's decoders raise on broken bytes, as far as its documentation and fuzzing tell."""


def open_image(data: bytes) -> Image.Image:
    """Read an image's header. Raises one of `BROKEN`."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own text holds a memory address
        raise UnidentifiedImageError(f"cannot identify image file, none of {', '.join(FORMATS)}") from None


def eight_bit(image: Image.Image) -> Image.Image:
    """The image itself, or its 16-bit grey brought to 8 bits, where Pillow would clip at 255.

    Raises one of `BROKEN`; ValueError: 32-bit values, whose range nothing tells.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey values; store it with 8 or 16 bits")
    return image
