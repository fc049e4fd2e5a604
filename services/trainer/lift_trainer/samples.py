"""The sample index: (image location, captions, keys) of every sample, built from headers and captions alone.

Sources are WebDataset tars (`key.jpg` + `key.json` or `key.txt`), here or in an object store, or CSV, TSV and
Parquet tables that name image files. The index is joined to a cache by caption key, and its digest says what was
trained on: sample names, image sizes, captions and their order, wherever the files lie.

    sources → parts, one per source (read once, kept; see `index_file`) → one index over all (kept as well)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from lift_cache.errors import BadConfig, BadSource, CacheDamaged
from lift_cache.keys import caption_keys
from lift_cache.sources import expand
from lift_trainer.index_file import (
    Card,
    IndexDirectory,
    Progress,
    Strings,
    distinct,
    numbers,
    short_hash,
)
from lift_trainer.rejects import Rejects
from lift_trainer.scan import TABLES, Fields, Part, images_are_as_indexed, scan_source
from lift_trainer.shards import LocalShard, RemoteShard, expand_remote, is_remote, read_local

WORTH_KEEPING = 16 << 20
"""Bytes of tars (tables count 64-fold) from which an index is kept; less is read again in no time."""

TABLE_WEIGHT = 64

MOST_FIELDS = 256
"""Caption fields that an index tells apart."""

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again without a new modification time: it is not kept."""


@dataclass(frozen=True)
class Source:
    """A tar, or a table and the folder of its images."""

    shard: LocalShard | RemoteShard
    folder: Path | None = None

    @property
    def shown(self) -> str:
        return self.shard.shown


@dataclass(frozen=True)
class Index:
    """n samples, m (sample, caption) pairs, u distinct captions. Its arrays may be maps of a file."""

    sources: Sequence[Source]
    file: np.ndarray
    """int32 [n]: which of `sources` names the image."""
    offset: np.ndarray
    """int64 [n]: first byte of the image in its file."""
    size: np.ndarray
    """int64 [n]: bytes of the image."""
    names: Strings
    """n sample keys of tars, or image paths of tables."""
    first: np.ndarray
    """int64 [n + 1]: pairs of sample i are first[i] … first[i + 1] − 1."""
    pairs: np.ndarray
    """int64 [m]: distinct caption of each pair."""
    captions: Strings
    """u normalised captions, in the order in which they first appear."""
    keys: np.ndarray
    """uint8 [u, 16]: their keys."""
    field_of_pair: np.ndarray
    """uint8 [m]: which of the caption fields asked for each pair is from."""
    known_digest: str | None = field(default=None, repr=False, compare=False)
    """The digest, where it was computed before."""

    def __len__(self) -> int:
        return len(self.file)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-128 over names, image sizes and captions in order, and their fields; 32 hex digits."""
        if self.known_digest:
            return self.known_digest
        digest = hashlib.blake2b(digest_size=16)
        for piece in self.names.joined(b"\0"):
            digest.update(piece)
        arrays = [self.size, self.first, self.pairs, self.keys]
        if self.field_of_pair.any():
            arrays.append(self.field_of_pair)
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def where(self, sample: int) -> str:
        """`train-000.tar:0001`, or the image's path. Never raises: it stands in messages."""
        source = self.sources[self.file[sample]]
        try:
            name = self.names[sample]
        except CacheDamaged:
            name = f"sample {sample}"
        return str(source.folder / name) if source.folder else f"{source.shown}:{name}"

    def shard(self, sample: int) -> str:
        """The tar that holds the image, or the image's own path."""
        source = self.sources[self.file[sample]]
        return str(source.folder / self.names[sample]) if source.folder else source.shown

    def image_bytes(self, sample: int) -> bytes:
        """Encoded image. Raises OSError."""
        source, offset, size = (
            self.sources[self.file[sample]],
            int(self.offset[sample]),
            int(self.size[sample]),
        )
        if source.folder:
            data = read_local(source.folder / self.names[sample], offset, size)
        else:
            data = source.shard.read(offset, size)
        if len(data) != size:
            raise OSError("the file is cut short")
        return data

    def byte_ranges(self, samples: range) -> Iterator[tuple[LocalShard | RemoteShard, int, int]]:
        """Where the images of consecutive samples lie in tars: shard, first byte, bytes. Tables have none."""
        files = self.file[samples.start : samples.stop]
        edges = np.flatnonzero(np.diff(files)) + samples.start + 1
        for first, last in pairwise([samples.start, *edges.tolist(), samples.stop]):
            source, start = self.sources[self.file[first]], int(self.offset[first])
            if source.folder is None:
                yield source.shard, start, int(self.offset[last - 1] + self.size[last - 1]) - start

    @cached_property
    def image_bytes_in_all(self) -> int:
        return int(self.size.sum())

    @property
    def is_remote(self) -> bool:
        """Whether images come from an object store."""
        return any(isinstance(source.shard, RemoteShard) for source in self.sources)

    def caption_counts(self, samples: np.ndarray) -> np.ndarray:
        """int64 [k]."""
        return self.first[samples + 1] - self.first[samples]

    @cached_property
    def most_captions(self) -> int:
        """Of any one sample."""
        return int(np.diff(self.first).max(initial=0))

    def pairs_of(self, samples: np.ndarray) -> np.ndarray:
        """Pairs of each sample in order: int64 [k, c], −1 where it has fewer than c captions."""
        counts = self.caption_counts(samples)
        position = np.arange(counts.max(initial=0))
        return np.where(position < counts[:, None], self.first[samples][:, None] + position, -1)

    def take(self, samples: np.ndarray) -> Index:
        """The index of some of its samples (int64 [k], ascending), with the caption numbers it had."""
        stays = np.zeros(len(self), bool)
        stays[samples] = True
        return self._keep(stays[self._sample_of_pair()])

    def keep_captions(self, keep: np.ndarray) -> Index:
        """The index without the captions where `keep` (bool [u]) is false, and without samples that lose all."""
        index = self._keep(keep[self.pairs])
        return replace(
            index,
            pairs=(np.cumsum(keep) - 1)[index.pairs],
            captions=self.captions.take(keep),
            keys=self.keys[keep],
        )

    def _sample_of_pair(self) -> np.ndarray:
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    def _keep(self, pair_kept: np.ndarray) -> Index:
        counts = np.bincount(self._sample_of_pair()[pair_kept], minlength=len(self))
        stays = counts > 0
        return replace(
            self,
            file=self.file[stays],
            offset=self.offset[stays],
            size=self.size[stays],
            names=self.names.take(stays),
            first=np.concatenate([[0], np.cumsum(counts[stays])]),
            pairs=self.pairs[pair_kept],
            field_of_pair=self.field_of_pair[pair_kept],
            known_digest=None,
        )


def captions_only(captions: Sequence[str]) -> Index:
    """An index of texts without images, to open their vectors. Distinct captions, normalised."""
    nothing = np.empty(0, np.int64)
    return Index(
        sources=[],
        file=nothing.astype(np.int32),
        offset=nothing,
        size=nothing,
        names=Strings.of([]),
        first=np.zeros(1, np.int64),
        pairs=nothing,
        captions=Strings.of(captions),
        keys=caption_keys(captions),
        field_of_pair=nothing.astype(np.uint8),
    )


def build_index(
    sources: Sequence[str],
    rejects: Rejects,
    *,
    caption_fields: Sequence[str] = (),
    images: Path | None = None,
    image_field: str = "image",
) -> Index:
    """Open the index of all sources; what of it was read before, and has not changed, is not read again.

    Args:
        sources: tars or tables: paths, globs, `{000..010}` braces, folders; tars also as s3://bucket/name.
        rejects: takes the samples that have no image or no usable caption.
        caption_fields: fields of the samples' JSON or columns that hold captions, at most 256. Of several a sample
            has at least one, and the index keeps apart what is from which. None: the usual names are tried.
        images, image_field: for tables: the folder and the column that lead to an image.

    Raises:
        BadConfig: a caption field comes twice.
        BadSource: no such file, an unknown kind, a damaged one, none with a usable sample or a caption field that
            is asked for, too many bad ones.
        ServerUnavailable: an object store does not answer.
    """
    fields = Fields(tuple(caption_fields), images, image_field)
    if len(set(caption_fields)) < len(caption_fields) or len(caption_fields) > MOST_FIELDS:
        raise BadConfig(
            f"--caption-field {', '.join(caption_fields)}: name each field once, at most {MOST_FIELDS}"
        )
    index = _Building(_sources(sources, images), fields, rejects).index()
    for number, name in enumerate(caption_fields):
        if not (index.field_of_pair == number).any():
            raise BadSource(f"--caption-field {name}: no sample of {', '.join(sources)} has a caption in it")
    return index


def _sources(names: Sequence[str], images: Path | None) -> list[Source]:
    found: list[Source] = []
    for name in names:
        if is_remote(name):
            found += [Source(shard) for shard in expand_remote(name)]
            continue
        for path in expand([name]):
            is_table = path.suffix.lower() in TABLES
            found.append(Source(LocalShard(path), (images or path.parent) if is_table else None))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Scanned:
    """A part, where it is kept if it is, and what was left out: what follows the source's name, and why."""

    part: Part
    path: Path | None
    left_out: list[tuple[str, str]]


class _Recorder:
    """Rejects of one source, handed on at once and kept beside its part."""

    def __init__(self, rejects: Rejects, shown: str) -> None:
        self._rejects, self._shown = rejects, shown
        self.left_out: list[tuple[str, str]] = []

    def add(self, where: str, reason: str) -> None:
        self._rejects.add(where, reason)
        place = where.encode(errors="backslashreplace").decode()
        self.left_out.append((place.removeprefix(self._shown), reason))


class _Building:
    """One call of `build_index`."""

    def __init__(self, sources: list[Source], fields: Fields, rejects: Rejects) -> None:
        self.sources, self.fields, self.rejects = sources, fields, rejects
        self.stamps = [source.shard.stamp() for source in sources]
        weight = sum(
            size * (TABLE_WEIGHT if source.folder else 1)
            for source, (size, _) in zip(sources, self.stamps, strict=True)
        )
        self.directory = IndexDirectory.default() if weight >= WORTH_KEEPING else None
        self.identities = [self._identity(source) for source in sources]
        self.marks = [short_hash(size, changed)[:16] for size, changed in self.stamps]
        self.name = short_hash(self.identities, self.marks)

    def index(self) -> Index:
        if self.directory is None:
            return self._build()
        found = self._kept()
        if found is None:
            with self.directory.building(self.name):
                found = self._kept()
                if found is None:
                    found = self._build()
        return found

    def _identity(self, source: Source) -> str:
        """What leads to other samples of the same bytes is part of it."""
        if source.folder is None:
            return short_hash("tar", source.shard.identity, self.fields.captions)
        how = (self.fields.captions, self.fields.image_field, str(source.folder.absolute()))
        return short_hash("table", source.shard.identity, *how)

    # ---- an index that was made before

    def _kept(self) -> Index | None:
        """The whole index as it was made before, None when there is none or something of it has changed."""
        if self.directory is None:
            return None
        found = self.directory.read(self.directory.index_path(self.name))
        if found is None:
            return None
        card, columns = found
        parts = [self.directory.part_path(*which) for which in zip(self.identities, self.marks, strict=True)]
        if not all(path.exists() for path in parts):
            return None
        captions = Strings("captions", parts, numbers(columns["caption_starts"]))
        starts = numbers(columns["starts"])
        index = Index(
            sources=self.sources,
            file=numbers(columns["file"]),
            offset=numbers(columns["offset"]),
            size=numbers(columns["size"]),
            names=Strings("names", parts, starts),
            first=numbers(columns["first"]),
            pairs=numbers(columns["pairs"]),
            captions=captions.take(numbers(columns["caption_at"])),
            keys=numbers(columns["keys"]),
            field_of_pair=numbers(columns["field_of_pair"]),
            known_digest=card["index_digest"],
        )
        for number, source in enumerate(self.sources):
            here = slice(*starts[number : number + 2].tolist())
            if source.folder and not images_are_as_indexed(
                source.folder, Strings("names", [parts[number]], np.array([0, here.stop - here.start])),
                index.size[here],
            ):  # fmt: skip
                return None
        for number, place, reason in card["left_out"]:
            self.rejects.add(f"{self.sources[number].shown}{place}", reason)
        self.directory.used(self.name)
        return index

    # ---- a new one

    def _build(self) -> Index:
        progress, scanned, samples = Progress(), [], 0
        for number, source in enumerate(self.sources):
            done = f"reading samples: {number:,} of {len(self.sources):,} files, {samples:,} samples"
            progress(done)
            one = self._kept_part(number) or self._scan(number)
            if not len(one.part.size):
                named = self.rejects.named.items()
                first = next((f"; the first: {where}: {why}" for where, why in named), "")
                raise BadSource(f"{source.shown}: no sample with an image and a caption in it{first}")
            samples += len(one.part.size)
            scanned.append(one)
        progress.end()
        return self._join(scanned)

    def _kept_part(self, number: int) -> _Scanned | None:
        if self.directory is None:
            return None
        path = self.directory.part_path(self.identities[number], self.marks[number])
        found = self.directory.read(path)
        if found is None:
            return None
        card, columns = found
        part, source = Part.of(columns), self.sources[number]
        if source.folder:
            names = Strings("names", [part.names], np.array([0, len(part.names)]))
            if not images_are_as_indexed(source.folder, names, part.size):
                return None
        for place, reason in card["left_out"]:
            self.rejects.add(f"{source.shown}{place}", reason)
        return _Scanned(part, path, card["left_out"])

    def _scan(self, number: int) -> _Scanned:
        source, stamp = self.sources[number], self.stamps[number]
        recorder = _Recorder(self.rejects, source.shown)
        with source.shard.here() as path:
            part = scan_source(path, source.shown, self.fields, recorder)
        settled = stamp == source.shard.stamp() and stamp[1] < time.time_ns() - SETTLED_NS
        # An image that was missing from a table may have been put there before the next run.
        whole = len(part.size) and not (source.folder and recorder.left_out)
        kept = None
        if self.directory and settled and whole:
            card: Card = {"source": source.shown, "left_out": recorder.left_out}
            identity, mark = self.identities[number], self.marks[number]
            kept = self.directory.write_part(identity, mark, part.columns(), card)
        return _Scanned(part, kept, recorder.left_out)

    def _join(self, scanned: list[_Scanned]) -> Index:
        parts = [one.part for one in scanned]
        starts = np.cumsum([0, *(len(part.size) for part in parts)])
        pair_starts = np.cumsum([0, *(len(part.pairs) for part in parts)])
        caption_starts = np.cumsum([0, *(len(part.keys) for part in parts)])
        number, caption_at = distinct(np.concatenate([part.keys for part in parts]))
        texts: list[pa.Array | Path] = [one.path or one.part.captions for one in scanned]
        names: list[pa.Array | Path] = [one.path or one.part.names for one in scanned]
        columns = {
            "file": np.repeat(np.arange(len(parts), dtype=np.int32), np.diff(starts)),
            "offset": np.concatenate([part.offset for part in parts]),
            "size": np.concatenate([part.size for part in parts]),
            "first": np.concatenate(
                [[0], *(part.first[1:] + base for part, base in zip(parts, pair_starts, strict=False))]
            ),
            "pairs": np.concatenate(
                [number[part.pairs + base] for part, base in zip(parts, caption_starts, strict=False)]
            ),
            "keys": np.concatenate([part.keys for part in parts])[caption_at],
            "field_of_pair": np.concatenate([part.fields for part in parts]),
        }
        index = Index(
            sources=self.sources,
            names=Strings("names", names, starts),
            captions=Strings("captions", texts, caption_starts).take(caption_at),
            **columns,
        )
        if self.directory and all(one.path for one in scanned):
            card: Card = {
                "index_digest": index.digest,
                "left_out": [
                    (number, *place) for number, one in enumerate(scanned) for place in one.left_out
                ],
            }
            also = {"caption_at": caption_at, "starts": starts, "caption_starts": caption_starts}
            self.directory.write_index(self.name, {**columns, **also}, card)
        return index
