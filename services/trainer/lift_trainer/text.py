"""Text vectors of an index: from caches by key, from the embedder when a cache lacks some, tokens, or a control.

Controls answer "would anything else have done as well?": `permuted` deals the cached vectors to the wrong
captions, so that nothing can be learned from the pairing; `ngram-hash` and `word-hash` are bags of hashed word
1- to 3-grams and of hashed words, with no language model in them.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lift_cache.client import EmbeddingClient
from lift_cache.errors import (
    BadCaption,
    BadSource,
    CacheDamaged,
    EncodingMismatch,
    MissingCaptions,
    RecipeMismatch,
)
from lift_cache.files import publish, room_for, temporary_name
from lift_cache.keys import caption_keys
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.tools.common import progress
from lift_trainer.index_file import Strings
from lift_trainer.samples import Index
from lift_trainer.sampling import PERMUTE, permutation
from lift_trainer.tensors import write_tensors
from lift_trainer.text_towers import Tokenizer

HASH_DIMENSIONS = 512
HASHED: dict[str, int] = {"ngram-hash": 3, "word-hash": 1}
"""Controls that need no cache → longest n-gram, in words."""
LENGTHS = 256
"""Vectors whose mean length stands for that of all."""

COUNTED = 100_000
"""Captions that stand for all when those longer than a context are counted (some seconds)."""
EMBEDDED = 4096
"""Captions asked of a server between two steps of the progress bar."""

TOKENIZED = 4096
"""Captions whose tokens are held while they are counted."""

Control = Literal["none", "permuted", "ngram-hash", "word-hash"]
OnMissing = Literal["error", "skip", "embed"]


class TextVectors(Protocol):
    """Vectors of the distinct captions of one index, by number; pickles cheaply into worker processes."""

    @property
    def dimensions(self) -> int: ...

    @property
    def resolution(self) -> float:
        """Relative rounding step of the stored values."""
        ...

    def gather(self, captions: np.ndarray) -> np.ndarray:
        """Caption numbers int64 [n] → vectors [n, dimensions], float16 or float32, not normalised; or tokens."""
        ...


@dataclass(frozen=True)
class CachedText:
    """Rows of a snapshot, and overlay vectors for captions that came from the embedder."""

    reader: CacheReader
    rows: np.ndarray
    """int64 [u]: row of the snapshot, or −1 − row of the overlay."""
    overlay: np.ndarray
    """float32 [v, D]."""

    @property
    def dimensions(self) -> int:
        return self.reader.dimensions

    @property
    def resolution(self) -> float:
        some = self.gather(np.arange(min(len(self.rows), LENGTHS))).astype(np.float32)
        return self.reader.encoding.resolution(float(np.linalg.norm(some, axis=1).mean()))

    def gather(self, captions: np.ndarray) -> np.ndarray:
        rows = self.rows[captions]
        if not len(self.overlay):
            return self._decoded(rows)
        out = np.empty((len(rows), self.dimensions), np.float32)
        cached = rows >= 0
        out[cached] = self._decoded(rows[cached])
        out[~cached] = self.overlay[-1 - rows[~cached]]
        return out

    def _decoded(self, rows: np.ndarray) -> np.ndarray:
        stored = self.reader.gather(rows)
        return self.reader.encoding.decode(stored) if stored.dtype == np.int8 else stored


@dataclass(frozen=True)
class PermutedText:
    """The same vectors, dealt to other captions."""

    inner: TextVectors
    order: np.ndarray
    """int64 [u]."""

    @property
    def dimensions(self) -> int:
        return self.inner.dimensions

    @property
    def resolution(self) -> float:
        return self.inner.resolution

    def gather(self, captions: np.ndarray) -> np.ndarray:
        return self.inner.gather(self.order[captions])


@dataclass(frozen=True)
class HashedText:
    """Signed hashing of words and n-grams of words (Weinberger et al. 2009), unit length."""

    vectors: np.ndarray
    """float32 [u, 512]."""
    dimensions: int = HASH_DIMENSIONS
    resolution: float = float(np.finfo(np.float32).eps)

    @classmethod
    def of(cls, captions: Sequence[str], longest: int = HASHED["ngram-hash"]) -> HashedText:
        """
        Args:
            longest: n-gram, in words.
        """
        vectors = np.zeros((len(captions), HASH_DIMENSIONS), np.float32)
        for number, caption in enumerate(captions):
            row = vectors[number]
            words = re.findall(r"\w+", caption.casefold()) or [caption]
            for length in range(1, longest + 1):
                for start in range(len(words) - length + 1):
                    gram = " ".join(words[start : start + length])
                    word = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "little")
                    row[word % HASH_DIMENSIONS] += 1.0 if word >> 63 else -1.0
            if not row.any():  # every gram met its opposite
                row[0] = 1.0
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return cls(vectors)

    def gather(self, captions: np.ndarray) -> np.ndarray:
        return self.vectors[captions]


class TokenText:
    """Tokens of the distinct captions, for a text tower that is trained; made when they are gathered."""

    resolution = 0.0

    def __init__(self, captions: Strings, context: int) -> None:
        """
        Args:
            captions: the distinct captions of an index.
            context: tokens of each text, with start and end.

        Raises:
            BadConfig: open_clip, whose tokenizer this is, is not installed.
        """
        self._captions, self._tokenizer = captions, Tokenizer(context)

    @property
    def dimensions(self) -> int:
        """Tokens of each text."""
        return self._tokenizer.context

    def gather(self, captions: np.ndarray) -> np.ndarray:
        """Caption numbers int64 [n] → tokens, int64 [n, context]."""
        return self._tokenizer([*self._captions.take(captions)]).ids.numpy()

    def truncated(self, most: int = COUNTED) -> tuple[int, int]:
        """How many captions are longer than the context, and of how many: all, or so many at even distances."""
        total = len(self._captions)
        looked_at = np.unique(np.linspace(0, total - 1, num=min(most, total)).astype(np.int64))
        longer = 0
        for start in range(0, len(looked_at), TOKENIZED):
            tokens = self._tokenizer([*self._captions.take(looked_at[start : start + TOKENIZED])])
            longer += int((tokens.lengths > self.dimensions).sum())
        return longer, len(looked_at)


def true_texts(control: Control) -> Control:
    """What a run on a control is evaluated with: permuted vectors go back to their captions."""
    return "none" if control == "permuted" else control


@dataclass(frozen=True)
class TextOrigin:
    """Where the vectors came from; part of every checkpoint, compared when a run is continued."""

    control: Control
    snapshot: str | None
    recipe: Recipe | None
    overlay: str | None
    """Digest of the vectors that came from the embedder."""


def open_texts(
    index: Index,
    *,
    caches: Sequence[str],
    control: Control = "none",
    on_missing: OnMissing = "error",
    server: str | None = None,
    overlay: Path,
    seed: int = 0,
) -> tuple[tuple[TextVectors, ...], Index, tuple[TextOrigin, ...]]:
    """Join an index to the vectors of several caches: other encoders, or other facets of the same captions.

    Args:
        caches: at least one, but for `HASHED` controls, which are a text of their own and take none.
        on_missing: `skip` leaves out captions that any of the caches lacks.
        overlay: file that keeps what `on_missing="embed"` fetches for the first cache; those of the next have
            their number before the suffix (`overlay-1.safetensors`). What one embedder makes fits one recipe.

    Returns:
        Per cache its vectors and their origin, all of one index, which is smaller under `on_missing="skip"`.

    Raises:
        MissingCaptions: the snapshot lacks captions, and they were not to be skipped or embedded.
        RecipeMismatch, EncodingMismatch: the embedder makes other vectors than the cache holds.
        BadSource: the overlay is of another recipe or cache.
        CacheNotFound, CacheDamaged, CacheFull, UnsupportedFormat, ServerUnavailable.
    """
    if control in HASHED:
        hashed = HashedText.of(index.captions, HASHED[control])
        return (hashed,), index, (TextOrigin(control, None, None, None),)
    readers = [CacheReader(cache) for cache in caches]
    rows = [reader.lookup(index.keys) for reader in readers]
    lacking = [found < 0 for found in rows]
    if on_missing == "skip" and np.any(lacking):
        index = _skip(index, readers, lacking)
        rows = [reader.lookup(index.keys) for reader in readers]
    texts: list[TextVectors] = []
    origins = []
    for number, (reader, found) in enumerate(zip(readers, rows, strict=True)):
        vectors, digest = np.empty((0, reader.dimensions), np.float32), None
        missing = np.flatnonzero(found < 0)
        if len(missing):
            if on_missing == "error":
                raise MissingCaptions(
                    f"{_missing(index, missing)} are not in snapshot {reader.snapshot_id} of {reader.path}; "
                    "fill the cache with this data (lift-embed fill) and snapshot it, or use --on-missing skip "
                    "or embed"
                )
            assert server is not None, "the configuration requires a server for on_missing=embed"
            kept = overlay.with_stem(f"{overlay.stem}-{number}") if number else overlay
            try:
                vectors = _embed(reader, [index.captions[i] for i in missing], server, kept)
            except RecipeMismatch as error:
                error.args = (
                    f"{error} (--server makes vectors of one recipe; fill other caches beforehand: lift-embed fill)",
                )
                raise
            found[missing] = -1 - np.arange(len(missing))
            digest = hashlib.blake2b(vectors.tobytes(), digest_size=16).hexdigest()
        text: TextVectors = CachedText(reader, found, vectors)
        if control == "permuted":
            text = PermutedText(text, permutation(len(index.captions), seed, PERMUTE))
        texts.append(text)
        origins.append(TextOrigin(control, reader.snapshot_id, reader.recipe, digest))
    return tuple(texts), index, tuple(origins)


def _skip(index: Index, readers: Sequence[CacheReader], lacking: Sequence[np.ndarray]) -> Index:
    """The index without captions that any cache lacks (bool [u] each). Raises MissingCaptions: none is left."""
    any_lacks = np.logical_or.reduce(lacking)
    one = len(readers) == 1
    where = "the cache" if one else "all the caches"
    print(f"left out {_missing(index, np.flatnonzero(any_lacks))}: not in {where}", file=sys.stderr)
    index = index.keep_captions(~any_lacks)
    if not len(index):
        empty = next((reader for reader, found in zip(readers, lacking, strict=True) if found.all()), None)
        raise MissingCaptions(
            f"none of the captions is in {empty.path}; is it the cache of this data?"
            if empty
            else f"no caption is in all of {', '.join(str(reader.path) for reader in readers)}; are they caches "
            "of the same data?"
        )
    return index


def _missing(index: Index, missing: np.ndarray) -> str:
    shown = ", ".join(repr(index.captions[i][:60]) for i in missing[:2].tolist())
    more = ", …" if len(missing) > 2 else ""
    return f"{len(missing):,} of {len(index.captions):,} captions ({shown}{more})"


def _embed(reader: CacheReader, captions: list[str], server: str, overlay: Path) -> np.ndarray:
    """Vectors of captions that the cache lacks, float32 [n, D]: from the overlay file, else from the server."""
    keys, vectors = _load_overlay(overlay, reader)
    known = {bytes(key): row for row, key in enumerate(keys)}
    wanted = caption_keys(captions)
    absent = [i for i, key in enumerate(wanted) if bytes(key) not in known]
    if absent:
        with EmbeddingClient(server, priority="bulk") as client:
            info = client.info()
            reader.recipe.require_same(info.recipe, here=str(reader.path), there=client.url)
            if info.encoding.dimensions != reader.dimensions:
                raise EncodingMismatch(
                    f"{client.url} answers {info.encoding.dimensions} dimensions and {reader.path} keeps "
                    f"{reader.dimensions}; serve from a cache with the same encoding"
                )
            fetched = []
            with progress(len(absent), "captions embedded") as advance:
                for start in range(0, len(absent), EMBEDDED):
                    some = [captions[i] for i in absent[start : start + EMBEDDED]]
                    answered = client.embed(some, on_error="return")
                    for i, error in answered.errors.items():
                        raise BadCaption(
                            f"{client.url} has no vector for {some[i][:60]!r} ({error.message}); "
                            "leave such captions out with --on-missing skip"
                        )
                    fetched.append(answered.vectors)
                    advance(len(some))
        known |= {bytes(wanted[i]): len(keys) + n for n, i in enumerate(absent)}
        keys = np.concatenate([keys, wanted[absent]])
        vectors = np.concatenate([vectors, *fetched])
        _save_overlay(overlay, keys, vectors, reader.recipe)
        print(f"embedded {len(absent):,} captions at {client.url}, kept in {overlay}", file=sys.stderr)
    return vectors[[known[bytes(key)] for key in wanted]]


def _save_overlay(overlay: Path, keys: np.ndarray, vectors: np.ndarray, recipe: Recipe) -> None:
    """Raises CacheFull, OSError; the file before stays."""
    temporary = temporary_name(overlay)
    with room_for(overlay.parent):
        overlay.parent.mkdir(parents=True, exist_ok=True)
        try:
            tensors = {"keys": torch.from_numpy(keys), "vectors": torch.from_numpy(vectors)}
            write_tensors(temporary, tensors, {"recipe": recipe.fingerprint})
            publish(temporary, overlay)
        finally:
            temporary.unlink(missing_ok=True)


def _load_overlay(overlay: Path, reader: CacheReader) -> tuple[np.ndarray, np.ndarray]:
    if not overlay.exists():
        return np.empty((0, 16), np.uint8), np.empty((0, reader.dimensions), np.float32)
    try:
        with safe_open(overlay, "np") as file:
            keys, vectors = file.get_tensor("keys"), file.get_tensor("vectors")
            recipe = (file.metadata() or {})["recipe"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CacheDamaged(
            f"{overlay} cannot be read ({error}); delete it, and its captions are embedded again"
        ) from None
    if recipe != reader.recipe.fingerprint:
        raise BadSource(
            f"{overlay} holds vectors of recipe {recipe[:12]} and {reader.path} those of "
            f"{reader.recipe.fingerprint[:12]}; delete it, or use another --run"
        )
    if vectors.shape != (len(keys), reader.dimensions):
        raise BadSource(f"{overlay} belongs to another cache; delete it, or use another --run")
    return keys, vectors
