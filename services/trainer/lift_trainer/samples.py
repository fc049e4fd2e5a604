"""The sample index: (image location, captions, keys) of every sample, built from headers and captions alone.

Sources are WebDataset tars (`key.jpg` + `key.json` or `key.txt`), or CSV, TSV and Parquet tables that name
image files. The index is joined to a cache by caption key, and its digest says what was trained on: sample
names, image sizes, captions and their order, wherever the files lie.
"""

from __future__ import annotations

import csv
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift_cache.errors import BadCaption, BadSource
from lift_cache.keys import caption_keys, normalise
from lift_cache.sources import (
    CAPTION_FIELDS,
    IMAGE_EXTENSIONS,
    expand,
    sample_captions,
    scan_tar,
)
from lift_trainer.rejects import Rejects

if TYPE_CHECKING:
    from _csv import Reader as CsvReader


@dataclass(frozen=True)
class Index:
    """n samples, m (sample, caption) pairs, u distinct captions."""

    files: list[Path]
    file: np.ndarray
    """int32 [n]: which of `files` holds the image."""
    offset: np.ndarray
    """int64 [n]: first byte of the image in its file."""
    size: np.ndarray
    """int64 [n]: bytes of the image."""
    names: list[str]
    first: np.ndarray
    """int64 [n + 1]: pairs of sample i are first[i] … first[i + 1] − 1."""
    pairs: np.ndarray
    """int64 [m]: distinct caption of each pair."""
    captions: list[str]
    """u normalised captions, in the order in which they first appear."""
    keys: np.ndarray
    """uint8 [u, 16]: their keys."""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-128 over names, image sizes and captions in order; 32 hex digits."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\0".join(self.names).encode(errors="surrogateescape"))
        for array in (self.size, self.first, self.pairs, self.keys):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def where(self, sample: int) -> str:
        """`train-000.tar:0001`, or the image's path."""
        path = self.files[self.file[sample]]
        return f"{path}:{self.names[sample]}" if path.suffix == ".tar" else str(path)

    def image_bytes(self, sample: int) -> bytes:
        """Encoded image. Raises OSError."""
        offset, size = int(self.offset[sample]), int(self.size[sample])
        data = _opened(self.files[self.file[sample]]).read(offset, size)
        if len(data) != size:
            raise OSError("the file is cut short")
        return data

    def caption_counts(self, samples: np.ndarray) -> np.ndarray:
        """int64 [k]."""
        return self.first[samples + 1] - self.first[samples]

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
            captions=[caption for caption, kept in zip(self.captions, keep, strict=True) if kept],
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
            names=[name for name, kept in zip(self.names, stays, strict=True) if kept],
            first=np.concatenate([[0], np.cumsum(counts[stays])]),
            pairs=self.pairs[pair_kept],
        )


def captions_only(captions: Sequence[str]) -> Index:
    """An index of texts without images, to open their vectors. Distinct captions, normalised."""
    nothing = np.empty(0, np.int64)
    return Index(
        files=[],
        file=nothing,
        offset=nothing,
        size=nothing,
        names=[],
        first=np.zeros(1, np.int64),
        pairs=nothing,
        captions=list(captions),
        keys=caption_keys(captions),
    )


class _OpenFile:
    """A descriptor read by position only, so that processes forked from one another may share it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


_opened = lru_cache(maxsize=64)(_OpenFile)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What a source says about one image."""

    name: str
    path: Path
    offset: int
    size: int
    captions: list[object]


@dataclass
class _Builder:
    rejects: Rejects
    files: dict[Path, int] = field(default_factory=dict)
    locations: list[tuple[int, int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    first: list[int] = field(default_factory=lambda: [0])
    pairs: list[int] = field(default_factory=list)
    captions: dict[str, int] = field(default_factory=dict)

    def add(self, sample: _Sample) -> None:
        where = f"{sample.path}:{sample.name}"
        good = []
        for position, caption in enumerate(sample.captions):
            try:
                good.append(normalise(caption))
            except BadCaption as error:
                self.rejects.add(f"{where}[{position}]" if len(sample.captions) > 1 else where, str(error))
        if not good:
            return
        self.locations.append(
            (self.files.setdefault(sample.path, len(self.files)), sample.offset, sample.size)
        )
        self.names.append(sample.name)
        self.pairs.extend(self.captions.setdefault(caption, len(self.captions)) for caption in good)
        self.first.append(len(self.pairs))

    def build(self) -> Index:
        file, offset, size = np.array(self.locations, np.int64).reshape(-1, 3).T
        captions = list(self.captions)
        return Index(
            files=list(self.files),
            file=file.astype(np.int32),
            offset=offset.copy(),
            size=size.copy(),
            names=self.names,
            first=np.array(self.first, np.int64),
            pairs=np.array(self.pairs, np.int64),
            captions=captions,
            keys=caption_keys(captions),
        )


def build_index(
    sources: Sequence[str],
    rejects: Rejects,
    *,
    caption_field: str | None = None,
    images: Path | None = None,
    image_field: str = "image",
) -> Index:
    """Read the headers and captions of all sources; image bytes stay where they are.

    Args:
        sources: tars or tables: paths, globs, `{000..010}` braces, folders.
        rejects: takes the samples that have no image or no usable caption.
        images, image_field: for tables: the folder and the column that lead to an image.

    Raises:
        BadSource: no such file, an unknown kind, a damaged one, none with a usable sample, too many bad ones.
    """
    builder = _Builder(rejects)
    for path in expand(sources):
        before = len(builder.names)
        suffix = path.suffix.lower()
        if suffix == ".tar":
            samples: Iterable[_Sample] = _from_tar(path, caption_field, rejects)
        elif suffix in (".csv", ".tsv", ".parquet"):
            samples = _from_table(path, images or path.parent, image_field, caption_field, rejects)
        else:
            raise BadSource(
                f"{path}: images come from .tar, .csv, .tsv or .parquet files, not {suffix or 'this'}"
            )
        for sample in samples:
            builder.add(sample)
        if len(builder.names) == before:
            first = next(iter(f"; the first: {where}: {why}" for where, why in rejects.named.items()), "")
            raise BadSource(f"{path}: no sample with an image and a caption in it{first}")
    return builder.build()


def _from_tar(path: Path, caption_field: str | None, rejects: Rejects) -> Iterator[_Sample]:
    with path.open("rb") as file:
        for sample in scan_tar(path):
            image = next((sample.members[ext] for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
            if image is None:
                rejects.add(f"{path}:{sample.key}", f"no image (it has {', '.join(sample.members)})")
                continue
            try:
                _, captions = sample_captions(file, sample, caption_field)
            except BadCaption as error:
                rejects.add(f"{path}:{sample.key}", str(error))
                continue
            yield _Sample(sample.key, path, image.offset, image.size, captions)


def _from_table(
    path: Path, folder: Path, image_field: str, caption_field: str | None, rejects: Rejects
) -> Iterator[_Sample]:
    """Rows that name the same image become one sample with several captions, at the place of the first."""
    captions_of: dict[str, list[object]] = {}
    for number, image, captions in _table_rows(path, image_field, caption_field, rejects):
        if isinstance(image, str) and image:
            captions_of.setdefault(image, []).extend(captions)
        else:
            rejects.add(f"{path}:{number}", f"column {image_field!r} names no image")
    root = folder.resolve()
    for name, captions in captions_of.items():
        image_path = folder / name
        try:
            inside, size = image_path.resolve().is_relative_to(root), _file_size(image_path)
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, links in a circle
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            rejects.add(f"{path}:{name[:80]!r}", f"names no image ({reason})")
            continue
        if not inside:
            rejects.add(f"{path}:{name}", f"points outside {folder}; give the folder with --images")
        elif size is None:
            rejects.add(f"{path}:{name}", f"no such image in {folder}; give the folder with --images")
        else:
            yield _Sample(name, image_path, 0, size, captions)


def _file_size(path: Path) -> int | None:
    """Bytes of a file, None where there is none. Raises OSError, ValueError."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _table_rows(
    path: Path, image_field: str, caption_field: str | None, rejects: Rejects
) -> Iterator[tuple[int, object, list[object]]]:
    """(row or line counted from 1, image, captions); text that is not UTF-8 has surrogates in it.

    Raises:
        BadSource: not readable, no such column, too many broken rows.
    """
    try:
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
                caption = _column(path, table.schema_arrow.names, image_field, caption_field)
                number = 0
                for batch in table.iter_batches(columns=[image_field, caption]):
                    for image, value in zip(
                        _values(batch[image_field]), _values(batch[caption]), strict=True
                    ):
                        number += 1
                        yield number, image, value if isinstance(value, list) else [value]
            return
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
            reader = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = [name.strip() for name in next(reader, [])]
            caption = _column(path, header, image_field, caption_field)
            columns = header.index(image_field), header.index(caption)
            for number, record in _csv_records(path, reader, len(header), rejects):
                yield number, record[columns[0]], [record[columns[1]]]
    except (csv.Error, pa.ArrowException, OSError) as error:
        raise BadSource(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); is it whole, and UTF-8?"
        ) from None


def _csv_records(
    path: Path, reader: CsvReader, fields: int, rejects: Rejects
) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of the rows that are as long as the header; the others are named and left out."""
    while True:
        first = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An unclosed quote swallows lines up to the csv module's field limit: say which, start afresh.
            rejects.add(f"{path}:{first}-{reader.line_num}", f"broken quoting ({error})")
            continue
        if record and len(record) != fields:
            rejects.add(f"{path}:{first}", f"{len(record)} fields where the header has {fields}")
        elif record:
            yield first, record


def _values(column: pa.Array) -> list[object]:
    """Python values; text by way of bytes, as one string that is not UTF-8 would fail its whole batch."""

    def text(value: object) -> object:
        if isinstance(value, list):
            return [text(item) for item in value]
        return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value

    return [text(value) for value in column.cast(_as_bytes(column.type)).to_pylist()]


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return pa.large_binary() if is_text else kind


def _column(path: Path, names: Sequence[str], image_field: str, caption_field: str | None) -> str:
    """The caption column. Raises BadSource naming what there is."""
    wanted = [caption_field] if caption_field else list(CAPTION_FIELDS)
    caption = next((name for name in wanted if name in names), None)
    if not names:
        raise BadSource(f"{path}: empty; a header line is needed")
    if image_field not in names:
        raise BadSource(
            f"{path}: no column {image_field!r}, it has {', '.join(names)}; name the one with images by --image-field"
        )
    if caption is None:
        raise BadSource(
            f"{path}: no column {' or '.join(map(repr, wanted))}, it has {', '.join(names)}; name it by --caption-field"
        )
    return caption
