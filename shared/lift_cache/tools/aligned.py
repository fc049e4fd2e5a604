"""Vectors in the order of the images: one Arrow file per image shard, for storage that is read in sequence.

Row i is sample i of the shard, numbered as the trainer numbers samples: those with an image and at least one
usable caption, in the order of the tar.

    name      string                                    the sample's key in the tar
    keys      list<fixed_size_binary[16]>               its captions' keys, in the order of the captions
    vectors   list<fixed_size_list<dtype, dimensions>>  their vectors as stored; null where the cache has none

The offsets of the lists are the trainer's `first`, their values its (sample, caption) pairs. Every record
batch but the last has `batch_samples` rows, so that a sample's batch is a division. The schema's metadata says
of what the file was made (`Card`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import BadCaption, BadConfig, BadSource, MissingCaptions
from lift_cache.keys import KEY_BYTES, key_of_normalised, normalise
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.segment import binary_array
from lift_cache.sources import IMAGE_EXTENSIONS, sample_captions, scan_tar

BATCH_BYTES = 64 << 20
"""Vectors of a record batch: what is held in memory."""

NAMED_MISSING = 3

_CARD = "lift.aligned"


class Card(BaseModel):
    """Of what a file was made; equal cards, equal files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    shard: str
    members: str
    """`members_digest` of the shard."""
    samples: int
    pairs: int
    missing: int
    """Pairs without a vector."""
    batch_samples: int
    snapshot: str
    recipe: Recipe
    fingerprint: str
    encoding: Encoding


@dataclass(frozen=True)
class ShardSamples:
    """n samples and m (sample, caption) pairs of one shard.

    names: n keys · sizes int64 [n], bytes of the images · first int64 [n + 1], pairs of sample i are
    first[i] … first[i + 1] − 1 · keys uint8 [m, 16] · captions: m normalised texts · left_out: places of
    samples and captions that cannot be used, each with its reason.
    """

    names: list[str]
    sizes: np.ndarray
    first: np.ndarray
    keys: np.ndarray
    captions: list[str]
    left_out: dict[str, str]

    @property
    def members_digest(self) -> str:
        return members_digest(self.names, self.sizes, self.first, self.keys)


def members_digest(names: Sequence[str], sizes: np.ndarray, first: np.ndarray, keys: np.ndarray) -> str:
    """What identifies the samples of a shard: names, image sizes and captions, in order.

    Args:
        names: n sample keys.
        sizes: int64 [n], bytes of the images.
        first: int64 [n + 1], where each sample's captions begin, from 0.
        keys: uint8 [m, 16], of every caption in order.

    Returns:
        BLAKE2b-128, 32 hex digits.
    """
    digest = hashlib.blake2b("\0".join(names).encode(errors="surrogateescape"), digest_size=16)
    for array, dtype in ((sizes, "<i8"), (first, "<i8"), (keys, "u1")):
        digest.update(np.ascontiguousarray(array, dtype).tobytes())
    return digest.hexdigest()


def shard_samples(shard: Path, caption_field: str | None) -> ShardSamples:
    """The samples of a WebDataset tar as the trainer numbers them, from headers and captions alone.

    Raises:
        BadSource: not a tar, cut short, or no sample with an image and a caption in it.
    """
    if shard.suffix.lower() != ".tar":
        raise BadSource(
            f"{shard}: image shards are plain .tar files; with other sources train by --text cache"
        )
    names: list[str] = []
    sizes: list[int] = []
    first, captions = [0], []
    left_out: dict[str, str] = {}
    samples = scan_tar(shard)
    with shard.open("rb") as file:
        for sample in samples:
            where = f"{shard}:{sample.key}"
            image = next((sample.members[ext] for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
            if image is None:
                left_out[where] = f"no image (it has {', '.join(sample.members)})"
                continue
            try:
                _, values = sample_captions(file, sample, caption_field)
            except BadCaption as error:
                left_out[where] = str(error)
                continue
            good = []
            for position, value in enumerate(values):
                try:
                    good.append(normalise(value))
                except BadCaption as error:
                    left_out[f"{where}[{position}]"] = str(error)
            if good:
                names.append(sample.key)
                sizes.append(image.size)
                captions += good
                first.append(len(captions))
    if not names:
        reason = next(iter(left_out.values()), "it is empty")
        raise BadSource(f"{shard}: no sample with an image and a caption in it ({reason})")
    keys = np.frombuffer(b"".join(map(key_of_normalised, captions)), np.uint8).reshape(-1, KEY_BYTES)
    return ShardSamples(names, np.array(sizes, np.int64), np.array(first, np.int64), keys, captions, left_out)


def aligned_schema(card: Card) -> pa.Schema:
    dtype = pa.from_numpy_dtype(card.encoding.numpy_dtype)
    return pa.schema(
        [
            ("name", pa.string()),
            ("keys", pa.list_(pa.binary(KEY_BYTES))),
            ("vectors", pa.list_(pa.list_(dtype, card.encoding.dimensions))),
        ],
        metadata={_CARD: card.model_dump_json()},
    )


def read_card(path: Path) -> Card | None:
    """The card of an aligned file; None where the file is not a whole one. Raises OSError."""
    try:
        with pa.memory_map(str(path), "r") as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
        return Card.model_validate_json(metadata[_CARD.encode()])
    except (pa.ArrowException, KeyError, ValidationError):
        return None


@dataclass(frozen=True)
class AlignedFile:
    """What became of one shard."""

    path: Path
    card: Card
    written: bool
    """False: it was there already."""
    left_out: dict[str, str]


def write_aligned(
    reader: CacheReader,
    shard: Path,
    directory: Path,
    *,
    caption_field: str | None = None,
    on_missing: Literal["error", "null"] = "error",
) -> AlignedFile:
    """Write the vectors of one shard to `directory/<shard's stem>.arrow`, unless the same is there.

    Raises:
        MissingCaptions: captions of the shard are not in the snapshot, and on_missing is "error".
        BadSource: as `shard_samples`.
        BadConfig: a file of that name is there and is not an aligned export.
        CacheFull, CacheDamaged.
    """
    samples = shard_samples(shard, caption_field)
    rows = reader.lookup(samples.keys)
    missing = np.flatnonzero(rows < 0)
    if len(missing) and on_missing == "error":
        texts = dict.fromkeys(samples.captions[i] for i in missing.tolist())
        shown = ", ".join(repr(text[:60]) for text in list(texts)[:NAMED_MISSING])
        raise MissingCaptions(
            f"{shard}: {len(texts):,} of its captions ({shown}{', …' if len(texts) > NAMED_MISSING else ''}) are not "
            f"in snapshot {reader.snapshot_id} of {reader.path}; fill the cache with this shard (lift-embed fill) "
            "and snapshot it, or leave them null with --on-missing null"
        )
    row_bytes = reader.dimensions * reader.encoding.numpy_dtype.itemsize
    most_captions = int(np.diff(samples.first).max())
    card = Card(
        shard=shard.name,
        members=samples.members_digest,
        samples=len(samples.names),
        pairs=len(samples.keys),
        missing=len(missing),
        batch_samples=max(1, BATCH_BYTES // (row_bytes * most_captions)),
        snapshot=reader.snapshot_id,
        recipe=reader.recipe,
        fingerprint=reader.recipe.fingerprint,
        encoding=reader.encoding,
    )
    final = directory / f"{shard.stem}.arrow"
    if final.exists():
        there = read_card(final)
        if there is None:
            raise BadConfig(
                f"{final} is there and is not an aligned export; choose another --out, or delete it"
            )
        if there == card:
            return AlignedFile(final, card, False, samples.left_out)
    files.require_room(directory, len(samples.keys) * (row_bytes + KEY_BYTES), f"{final.name}")
    temporary = files.temporary_name(final)
    schema = aligned_schema(card)
    with files.room_for(directory):
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for start in range(0, card.samples, card.batch_samples):
                    stop = min(start + card.batch_samples, card.samples)
                    writer.write_batch(_batch(reader, samples, rows, start, stop, schema))
            files.publish(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
    return AlignedFile(final, card, True, samples.left_out)


def _batch(
    reader: CacheReader, samples: ShardSamples, rows: np.ndarray, start: int, stop: int, schema: pa.Schema
) -> pa.RecordBatch:
    begin, end = int(samples.first[start]), int(samples.first[stop])
    offsets = pa.array((samples.first[start : stop + 1] - begin).astype(np.int32))
    present = rows[begin:end] >= 0
    vectors = np.zeros((end - begin, reader.dimensions), reader.encoding.numpy_dtype)
    # Each row once and in the order of the cache, which is the order of its files.
    wanted, which = np.unique(rows[begin:end][present], return_inverse=True)
    vectors[present] = reader.gather(wanted, check=True)[which]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([name.encode(errors="backslashreplace").decode() for name in samples.names[start:stop]]),
            pa.ListArray.from_arrays(offsets, binary_array(samples.keys[begin:end])),
            pa.ListArray.from_arrays(
                offsets,
                pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.reshape(-1)),
                    reader.dimensions,
                    mask=None if present.all() else pa.array(~present),
                ),
            ),
        ],
        schema=schema,
    )
