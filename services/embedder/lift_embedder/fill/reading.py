"""From source files to captions: read, checked, keyed, each once.

rows → usable captions → those of this shard → those that did not come before
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lift_cache.errors import BadCaption
from lift_cache.keys import KEY_BYTES, halves, key_of_normalised, normalise
from lift_cache.sources import BadRow, CaptionRow, iter_captions
from lift_embedder.fill.books import Books, Source
from lift_embedder.keyset import KeySet

CHUNK = 4096
"""Captions that are looked at together."""


class Chunk(NamedTuple):
    """Captions of one file: normalised texts, their places, and keys uint8 [n, 16]."""

    texts: list[str]
    wheres: list[str]
    keys: np.ndarray

    def where(self, mask: np.ndarray) -> Chunk:
        """Those that a mask (bool [n]) chooses."""
        chosen = np.flatnonzero(mask).tolist()
        return Chunk([self.texts[i] for i in chosen], [self.wheres[i] for i in chosen], self.keys[mask])


def unique_captions(
    source: Source, field: str | None, shard: tuple[int, int], seen: KeySet, books: Books
) -> Iterator[Chunk]:
    """The usable captions of a file that belong to a shard and were not seen before.

    A caption belongs to a shard by its key, so wherever it stands the same shard takes it; a row without a usable
    caption belongs to one by its number. Raises BadSource, and what `Books.left_out` raises.
    """
    number, shards = shard
    for usable in _usable(source, field, shard, books):
        ours = usable
        if shards > 1:
            ours = usable.where(halves(usable.keys)[0] % np.uint64(shards) == number)
        books.usable(source, ours.texts)
        unique = ours.where(seen.add(ours.keys))
        books.unique(len(unique.texts), at_least=seen.full)
        yield unique


def _usable(source: Source, field: str | None, shard: tuple[int, int], books: Books) -> Iterator[Chunk]:
    number, shards = shard
    texts: list[str] = []
    wheres: list[str] = []
    keys = bytearray()
    for row in iter_captions(source.path, field):
        books.row(source)
        try:
            if isinstance(row, BadRow):
                raise BadCaption(row.reason)
            text = normalise(row.caption)
        except BadCaption as error:
            if source.rows % shards == number:
                caption = row.caption if isinstance(row, CaptionRow) else None
                code = "unreadable_row" if isinstance(row, BadRow) else "invalid_caption"
                books.left_out(source, row.where, code, str(error), caption)
            continue
        texts.append(text)
        wheres.append(row.where)
        keys += key_of_normalised(text)
        if len(texts) == CHUNK:
            yield _chunk(texts, wheres, keys)
            texts, wheres, keys = [], [], bytearray()
    if texts:
        yield _chunk(texts, wheres, keys)


def _chunk(texts: list[str], wheres: list[str], keys: bytearray) -> Chunk:
    return Chunk(texts, wheres, np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES))


def lane_of(keys: np.ndarray, lanes: int) -> np.ndarray:
    """Which of several engines embeds each key (uint8 [n, 16]): int64 [n].

    By the other half of the key than shards go by, or all captions of a shard would go to one engine.
    """
    return (halves(keys)[1] % np.uint64(lanes)).astype(np.int64)
