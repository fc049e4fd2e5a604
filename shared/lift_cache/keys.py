"""Caption keys: the name under which a caption's embedding is stored, whatever encoder made it.

caption → Unicode NFC → every whitespace run to one space → stripped → BLAKE2b-128 of the UTF-8 bytes.

The normalised text is also the text that is embedded, so two captions share a key exactly when they would
share a vector. The key does not depend on the encoder: one sample index serves every encoder compared.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from lift_cache.errors import BadCaption

TEXT_VERSION = 1
"""Version of the normalisation; part of every recipe, because changing it changes vectors."""

KEY_BYTES = 16


def normalise(caption: object) -> str:
    """Return the text that is embedded and hashed.

    Raises:
        BadCaption: not a string, nothing but whitespace, or not encodable as UTF-8 (a lone surrogate).
    """
    if not isinstance(caption, str):
        raise BadCaption(f"a caption must be text, not {type(caption).__name__}")
    text = " ".join(unicodedata.normalize("NFC", caption).split())
    if not text:
        raise BadCaption("the caption is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadCaption(f"the caption is not valid UTF-8 (lone surrogate at {error.start})") from None
    return text


def key_of_normalised(text: str) -> bytes:
    """Key of text that `normalise` returned; 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def caption_key(caption: str) -> bytes:
    """Key of one caption; 16 bytes. Raises BadCaption as `normalise` does."""
    return key_of_normalised(normalise(caption))


def caption_keys(captions: Sequence[str]) -> np.ndarray:
    """Keys of many captions: uint8 [n, 16]. Raises BadCaption naming the position of the first bad one."""
    _, keys, bad = keyed(captions)
    for i, reason in bad.items():
        raise BadCaption(f"caption {i}: {reason}")
    return keys


def keyed(captions: Sequence[object]) -> tuple[list[str], np.ndarray, dict[int, str]]:
    """Many captions at once, some of which may be unusable.

    Returns:
        Normalised texts and keys uint8 [n, 16], empty and zeros where unusable; position → reason for those.
    """
    texts, keys, bad = [], bytearray(), {}
    for i, caption in enumerate(captions):
        try:
            text = normalise(caption)
            key = key_of_normalised(text)
        except BadCaption as error:
            bad[i] = str(error)
            text, key = "", bytes(KEY_BYTES)
        texts.append(text)
        keys += key
    return texts, np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES), bad


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Positions of the first row of each distinct key (uint8 [n, 16]), in ascending order of key: int64 [m]."""
    order = sort_order(keys)
    ordered = keys[order].view(np.uint64)
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return order[new]


def sort_order(keys: np.ndarray) -> np.ndarray:
    """Positions that put keys (uint8 [n, 16]) in ascending byte order: int64 [n]. Stable."""
    high, low = halves(keys)
    # Keys of several segments, one after the other, are runs in order, which this sort finds and merges.
    order = np.argsort(high, kind="stable")
    high, low = high[order], low[order]
    if ((high[1:] == high[:-1]) & (low[1:] < low[:-1])).any():
        return np.lexsort(halves(keys)[::-1])
    return order


def halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split keys (uint8 [n, 16]) into two native uint64 [n] whose order is the byte order of the keys."""
    pair = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return pair[:, 0], pair[:, 1]
