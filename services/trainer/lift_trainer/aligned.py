"""Text vectors beside the images: the files of `lift-cache export aligned`, one per image shard.

Row i of a file is sample i of its shard, so that whoever reads images in runs reads vectors in runs too: from
disks and network file systems on which a cache, read by key, would be slow. Nothing but the order differs: the
vectors are those of the snapshot that the files were exported from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lift_cache.encoding import Encoding
from lift_cache.errors import BadSource, CacheDamaged, MissingCaptions
from lift_cache.keys import KEY_BYTES
from lift_cache.recipe import Recipe
from lift_cache.tools.aligned import Card, members_digest, read_card
from lift_trainer.samples import Index
from lift_trainer.text import LENGTHS, OnMissing, TextOrigin

OPEN_FILES = 512
"""Files of a process that stay mapped."""


class _Batch(NamedTuple):
    """p pairs of one record batch, mapped."""

    keys: np.ndarray
    """uint8 [p, 16]."""
    vectors: np.ndarray
    """[p, D] as stored."""
    null: np.ndarray | None
    """bool [p]: the cache had no vector; None: it had all."""


@dataclass(frozen=True)
class AlignedText:
    """Vectors of an index's captions, by number, or by pair: those of the images that are being read."""

    paths: Sequence[Path]
    stamps: Sequence[int]
    """When each file was last changed, in ns."""
    batch_starts: Sequence[np.ndarray]
    """int64 [batches + 1] per file: first pair of each record batch, and their number."""
    starts: np.ndarray
    """int64 [files + 1]: first of all pairs of each file, and of all."""
    rows: np.ndarray
    """int64 [m]: where each (sample, caption) pair of the index is among the pairs of all files."""
    first: np.ndarray
    """int64 [u]: the pair with which each caption comes first."""
    keys: np.ndarray
    """uint8 [u, 16]."""
    pairs: np.ndarray
    """int64 [m]: caption of each pair."""
    encoding: Encoding

    @property
    def dimensions(self) -> int:
        return self.encoding.dimensions

    @property
    def resolution(self) -> float:
        some = self.gather(np.arange(min(len(self.first), LENGTHS))).astype(np.float32)
        return self.encoding.resolution(float(np.linalg.norm(some, axis=1).mean()))

    def gather(self, captions: np.ndarray) -> np.ndarray:
        """Caption numbers int64 [n] → vectors [n, D], float16 or float32. Raises CacheDamaged."""
        return self.gather_pairs(self.first[captions])

    def gather_pairs(self, pairs: np.ndarray) -> np.ndarray:
        """Pair numbers int64 [n] → vectors [n, D], float16 or float32, each from beside its own image.

        Raises:
            CacheDamaged: a file is gone or was replaced, or has another caption there.
        """
        rows, wanted = self.rows[pairs], self.keys[self.pairs[pairs]]
        out = np.empty((len(rows), self.dimensions), self.encoding.numpy_dtype)
        file_of = np.searchsorted(self.starts, rows, side="right") - 1
        for file in np.unique(file_of).tolist():
            here = np.flatnonzero(file_of == file)
            self._gather_from(file, rows[here] - self.starts[file], here, wanted, out)
        return self.encoding.decode(out) if out.dtype == np.int8 else out

    def _gather_from(
        self, file: int, rows: np.ndarray, here: np.ndarray, wanted: np.ndarray, out: np.ndarray
    ) -> None:
        path, edges = self.paths[file], self.batch_starts[file]
        batches = _opened(path, self.stamps[file])
        batch_of = np.searchsorted(edges, rows, side="right") - 1
        for number in np.unique(batch_of).tolist():
            places = np.flatnonzero(batch_of == number)
            row = rows[places] - edges[number]
            whole = number < len(batches) and len(batches[number].keys) == edges[number + 1] - edges[number]
            if not whole or (batches[number].keys[row] != wanted[here[places]]).any():
                raise CacheDamaged(
                    f"{path} is not what it was when the run began, or damaged; export it again "
                    "(lift-cache export aligned)"
                )
            out[here[places]] = batches[number].vectors[row]


def open_aligned(
    index: Index, directory: Path, *, on_missing: OnMissing = "error", recipe: Recipe | None = None
) -> tuple[AlignedText, Index, TextOrigin]:
    """Join an index to the aligned files of its shards.

    Args:
        directory: where `lift-cache export aligned` wrote them, one `<shard's stem>.arrow` for each.
        on_missing: captions whose vector is null there: an error, or left out (`skip`).
        recipe: what the vectors must be made by, where that is known.

    Returns:
        The vectors, the index (smaller under `skip`), and their origin.

    Raises:
        BadSource: a shard without a file, a file of another shard, of other samples or captions, of another number
            of rows, of another snapshot than the files before, or that is none; a source that is no tar.
        RecipeMismatch, EncodingMismatch: two files of different vectors, or not those of `recipe`.
        MissingCaptions: null vectors that were not to be skipped, or nothing else.
    """
    paths: list[Path] = []
    stamps: list[int] = []
    batch_starts, null, card = [], [], None
    edges = np.searchsorted(index.file, np.arange(len(index.sources) + 1))
    for source, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        path, its = _file_of(index, source, directory)
        _refuse_other_samples(index, source, slice(start, stop), path, its)
        _refuse_other_vectors(path, its, paths[0] if paths else None, card, recipe)
        stamp = path.stat().st_mtime_ns
        batches = _opened(path, stamp)
        counts = [len(batch.keys) for batch in batches]
        if sum(counts) != its.pairs:
            raise BadSource(f"{path} has {sum(counts):,} rows and says {its.pairs:,}; export it again")
        paths.append(path)
        stamps.append(stamp)
        batch_starts.append(np.cumsum([0, *counts]))
        null += [np.zeros(len(b.keys), bool) if b.null is None else b.null for b in batches]
        card = card or its
    assert card is not None, "an index has a source"
    missing, rows = np.concatenate(null), np.arange(len(index.pairs))
    if missing.any():
        lost = np.zeros(len(index.keys), bool)
        lost[index.pairs[missing]] = True
        shown = ", ".join(repr(index.captions[i][:60]) for i in np.flatnonzero(lost)[:2].tolist())
        what = f"{int(lost.sum()):,} of {len(lost):,} captions ({shown}{', …' if lost.sum() > 2 else ''})"
        if on_missing != "skip" or lost.all():
            raise MissingCaptions(
                f"{what} have no vector in {directory}; fill the cache with this data (lift-embed fill), snapshot "
                "it and export it again" + ("" if lost.all() else ", or use --on-missing skip")
            )
        print(f"left out {what}: no vector in {directory}", file=sys.stderr)
        rows = rows[~lost[index.pairs]]
        index = index.keep_captions(~lost)
    first = np.empty(len(index.keys), np.int64)
    first[index.pairs[::-1]] = np.arange(len(index.pairs))[::-1]
    text = AlignedText(
        paths=paths,
        stamps=stamps,
        batch_starts=batch_starts,
        starts=np.cumsum([0, *(int(starts[-1]) for starts in batch_starts)]),
        rows=rows,
        first=first,
        keys=index.keys,
        pairs=index.pairs,
        encoding=card.encoding,
    )
    return text, index, TextOrigin("none", card.snapshot, card.recipe, None)


def _file_of(index: Index, source: int, directory: Path) -> tuple[Path, Card]:
    """Raises BadSource."""
    shard = index.sources[source]
    if shard.folder is not None:
        raise BadSource(
            f"{shard.shown}: only tars have aligned exports; train on a table by its cache (--text cache)"
        )
    path = directory / f"{Path(shard.shown).stem}.arrow"
    try:
        card = read_card(path)
    except FileNotFoundError:
        raise BadSource(
            f"{path}: no such file; make it with lift-cache export aligned CACHE {shard.shown} --out {directory}"
        ) from None
    except OSError as error:
        raise BadSource(f"{path}: cannot be read ({error.strerror or error})") from None
    if card is None:
        raise BadSource(f"{path} is not an aligned export, or not a whole one; export it again")
    return path, card


def _refuse_other_samples(index: Index, source: int, samples: slice, path: Path, card: Card) -> None:
    """Raises BadSource: the file is of another shard, or of other samples, captions or numbers of them."""
    shard = index.sources[source].shown
    if card.shard != Path(shard).name:
        raise BadSource(f"{path} was exported for {card.shard}, not for {shard}; export it again")
    first = index.first[samples.start : samples.stop + 1]
    count, pairs = samples.stop - samples.start, int(first[-1] - first[0])
    if (card.samples, card.pairs) != (count, pairs):
        raise BadSource(
            f"{path} has {card.samples:,} samples and {card.pairs:,} captions, and {shard} {count:,} and {pairs:,}; "
            "export it again, with the same --caption-field"
        )
    keys = index.keys[index.pairs[first[0] : first[-1]]]
    if card.members != members_digest(
        index.names[samples], index.size[samples], first - first[0], keys
    ):  # fmt: skip
        raise BadSource(
            f"{path} was exported for other samples or captions than {shard} has now; export it again, with the "
            "same --caption-field"
        )


def _refuse_other_vectors(
    path: Path, card: Card, before: Path | None, first: Card | None, recipe: Recipe | None
) -> None:
    """Raises RecipeMismatch, EncodingMismatch, BadSource."""
    if recipe is not None:
        recipe.require_same(card.recipe, here="the run", there=str(path))
    if first is None:
        return
    first.recipe.require_same(card.recipe, here=str(before), there=str(path))
    first.encoding.require_same(card.encoding, here=str(before), there=str(path))
    if first.snapshot != card.snapshot:
        raise BadSource(
            f"{before} is from snapshot {first.snapshot} and {path} from {card.snapshot}; export all shards again"
        )


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: Path, stamp: int) -> list[_Batch]:
    """The record batches of a file in the state of a stamp, mapped. Raises CacheDamaged."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            return [_mapped(reader.get_batch(number)) for number in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = str(error).partition("\n")[0]
        raise CacheDamaged(f"{path} cannot be read ({what}); export it again") from None


def _mapped(batch: pa.RecordBatch) -> _Batch:
    keys: Any = batch.column("keys").values
    vectors: Any = batch.column("vectors").values
    width = vectors.type.list_size
    return _Batch(
        keys=np.frombuffer(keys.buffers()[1], np.uint8)[: len(keys) * KEY_BYTES].reshape(-1, KEY_BYTES),
        vectors=vectors.values.to_numpy(zero_copy_only=True).reshape(-1, width),
        null=np.asarray(vectors.is_null()) if vectors.null_count else None,
    )
