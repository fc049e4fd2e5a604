"""What a source says about its samples: a tar by its headers and captions, a table by its rows.

A `Part` is the sample index of one source, as arrays; image bytes stay where they are.
"""

from __future__ import annotations

import csv
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift_cache.errors import BadCaption, BadSource
from lift_cache.keys import KEY_BYTES, key_of_normalised, normalise
from lift_cache.sources import CAPTION_FIELDS, IMAGE_EXTENSIONS, TarSample, sample_captions, scan_tar
from lift_trainer.index_file import Column, binary, distinct, numbers

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

TABLES = (".csv", ".tsv", ".parquet")


class Recorder(Protocol):
    """Takes what is left out: a place that begins with the source's path, and the reason."""

    def add(self, where: str, reason: str) -> None: ...


@dataclass(frozen=True)
class Fields:
    """Where a source has its captions and images."""

    captions: tuple[str, ...] = ()
    """Names, of which a sample has at least one. None: the first of `CAPTION_FIELDS` that it has."""
    images: Path | None = None
    """For tables: the folder that image paths start from. None: the table's own."""
    image_field: str = "image"


class Part(NamedTuple):
    """n samples, m (sample, caption) pairs, s distinct captions of one source."""

    names: pa.Array
    """large_binary [n]: sample keys in a tar, image paths in a table."""
    offset: np.ndarray
    """int64 [n]: first byte of the image in its file."""
    size: np.ndarray
    """int64 [n]: bytes of the image."""
    first: np.ndarray
    """int64 [n + 1]: pairs of sample i are first[i] … first[i + 1] − 1."""
    pairs: np.ndarray
    """int64 [m]: distinct caption of each pair."""
    captions: pa.Array
    """large_binary [s]: normalised captions, UTF-8, in the order in which they first appear."""
    keys: np.ndarray
    """uint8 [s, 16]."""
    fields: np.ndarray
    """uint8 [m]: which of the caption fields each pair is from."""

    @classmethod
    def of(cls, columns: Mapping[str, pa.Array]) -> Part:
        """From the columns of an index file."""
        texts = ("names", "captions")
        return cls(**{f: columns[f] if f in texts else numbers(columns[f]) for f in cls._fields})

    def columns(self) -> dict[str, Column]:
        return self._asdict()


def scan_source(path: Path, shown: str, fields: Fields, rejects: Recorder) -> Part:
    """Read one source.

    Args:
        path: the file.
        shown: what to call it in messages.

    Raises:
        BadSource: of an unknown kind, damaged, without what `fields` names, or more rejects than allowed. A
            part without samples is none of these.
    """
    suffix = path.suffix.lower()
    if suffix == ".tar":
        samples: Iterable[_Sample] = _from_tar(path, shown, fields.captions, rejects)
    elif suffix in TABLES:
        samples = _from_table(path, shown, fields, rejects)
    else:
        raise BadSource(
            f"{shown}: images come from .tar, .csv, .tsv or .parquet files, not {suffix or 'this'}"
        )
    builder = _Builder(shown, rejects)
    for sample in samples:
        builder.add(sample)
    return builder.build()


def images_are_as_indexed(folder: Path, names: Iterable[str], sizes: np.ndarray) -> bool:
    """Whether the images of a table (int64 [n] bytes each) still have the sizes that were read."""
    prefix = f"{folder}/"
    try:
        return all(
            os.stat(prefix + name).st_size == size  # noqa: PTH116  # 10⁷ paths would take minutes
            for name, size in zip(names, sizes.tolist(), strict=True)
        )
    except (OSError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class _Sample:
    """What a source says about one image."""

    name: str
    offset: int
    size: int
    captions: list[_Caption]


_Caption = tuple[object, int]
"""What a field holds, and which field that is."""


class _Builder:
    """Samples as they come, in bytes and arrays: about 16 bytes and its texts for each."""

    def __init__(self, shown: str, rejects: Recorder) -> None:
        self._shown, self._rejects = shown, rejects
        self._names, self._name_ends = bytearray(), array("q")
        self._captions, self._caption_ends, self._keys = bytearray(), array("q"), bytearray()
        self._offset, self._size, self._first = array("q"), array("q"), array("q", [0])
        self._fields = bytearray()

    def add(self, sample: _Sample) -> None:
        before = len(self._caption_ends)
        for position, (caption, field) in enumerate(sample.captions):
            try:
                text = normalise(caption)
            except BadCaption as error:
                where = f"{self._shown}:{sample.name}"
                several = len(sample.captions) > 1
                self._rejects.add(f"{where}[{position}]" if several else where, str(error))
                continue
            self._captions += text.encode()
            self._caption_ends.append(len(self._captions))
            self._keys += key_of_normalised(text)
            self._fields.append(field)
        if len(self._caption_ends) == before:
            return
        self._names += sample.name.encode(errors="surrogateescape")
        self._name_ends.append(len(self._names))
        self._offset.append(sample.offset)
        self._size.append(sample.size)
        self._first.append(len(self._caption_ends))

    def build(self) -> Part:
        keys = np.frombuffer(bytes(self._keys), np.uint8).reshape(-1, KEY_BYTES)
        pairs, first_seen = distinct(keys)
        captions = binary(self._captions, np.frombuffer(self._caption_ends, np.int64))
        if len(first_seen) < len(keys):
            captions, keys = captions.take(pa.array(first_seen)), keys[first_seen]
        return Part(
            names=binary(self._names, np.frombuffer(self._name_ends, np.int64)),
            offset=np.frombuffer(self._offset, np.int64),
            size=np.frombuffer(self._size, np.int64),
            first=np.frombuffer(self._first, np.int64),
            pairs=pairs,
            captions=captions,
            keys=keys,
            fields=np.frombuffer(bytes(self._fields), np.uint8),
        )


def _from_tar(path: Path, shown: str, fields: tuple[str, ...], rejects: Recorder) -> Iterator[_Sample]:
    with path.open("rb") as file:
        for sample in scan_tar(path):
            image = next((sample.members[ext] for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
            if image is None:
                rejects.add(f"{shown}:{sample.key}", f"no image (it has {', '.join(sample.members)})")
                continue
            try:
                captions = _captions_of(file, sample, fields)
            except BadCaption as error:
                rejects.add(f"{shown}:{sample.key}", str(error))
                continue
            yield _Sample(sample.key, image.offset, image.size, captions)


def _captions_of(file: BinaryIO, sample: TarSample, fields: tuple[str, ...]) -> list[_Caption]:
    """Raises BadCaption: the sample has none of the fields."""
    if len(fields) < 2:
        return [(caption, 0) for caption in sample_captions(file, sample, fields[0] if fields else None)[1]]
    found: list[_Caption] = []
    failure: BadCaption | None = None
    for number, field in enumerate(fields):
        try:
            captions = sample_captions(file, sample, field)[1]
        except BadCaption as error:
            failure = failure or error
            continue
        found += [(caption, number) for caption in captions if not _is_nothing(caption)]
    if not found:
        raise failure or BadCaption(f"nothing in any of its fields {', '.join(fields)}")
    return found


def _is_nothing(caption: object) -> bool:
    """Of several fields, one that is null or empty is one that the sample lacks."""
    return caption is None or (isinstance(caption, str) and not caption.strip())


def _from_table(path: Path, shown: str, fields: Fields, rejects: Recorder) -> Iterator[_Sample]:
    """Rows that name the same image become one sample with several captions, at the place of the first."""
    captions_of: dict[str, list[_Caption]] = {}
    folder = fields.images or path.parent
    for number, image, captions in _table_rows(path, fields.image_field, fields.captions, rejects):
        if isinstance(image, str) and image:
            captions_of.setdefault(image, []).extend(captions)
        else:
            rejects.add(f"{path}:{number}", f"column {fields.image_field!r} names no image")
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
        elif not captions and len(fields.captions) > 1:
            rejects.add(f"{path}:{name}", f"nothing in any of its fields {', '.join(fields.captions)}")
        else:
            yield _Sample(name, 0, size, captions)


def _file_size(path: Path) -> int | None:
    """Bytes of a file, None where there is none. Raises OSError, ValueError."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _table_rows(
    path: Path, image_field: str, fields: tuple[str, ...], rejects: Recorder
) -> Iterator[tuple[int, object, list[_Caption]]]:
    """(row or line counted from 1, image, captions); text that is not UTF-8 has surrogates in it.

    Raises:
        BadSource: not readable, no such column, too many broken rows.
    """
    try:
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
                columns = _columns(path, table.schema_arrow.names, image_field, fields)
                number = 0
                for batch in table.iter_batches(columns=[image_field, *columns]):
                    texts = [_values(batch[column]) for column in columns]
                    for image, *values in zip(_values(batch[image_field]), *texts, strict=True):
                        number += 1
                        yield number, image, _row_captions(zip(columns.values(), values, strict=True), fields)
            return
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
            reader = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = [name.strip() for name in next(reader, [])]
            columns = _columns(path, header, image_field, fields)
            place = {column: header.index(column) for column in (image_field, *columns)}
            for number, record in _csv_records(path, reader, len(header), rejects):
                values = [record[place[column]] for column in columns]
                captions = _row_captions(zip(columns.values(), values, strict=True), fields)
                yield number, record[place[image_field]], captions
    except (csv.Error, pa.ArrowException, OSError) as error:
        raise BadSource(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); is it whole, and UTF-8?"
        ) from None


def _csv_records(
    path: Path, reader: CsvReader, fields: int, rejects: Recorder
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


def _row_captions(values: Iterable[tuple[int, object]], fields: tuple[str, ...]) -> list[_Caption]:
    """Captions of a row, from each field's number and value: of one field as they are, of several those there are."""
    found: list[_Caption] = [
        (caption, number)
        for number, value in values
        for caption in (value if isinstance(value, list) else [value])
    ]
    return found if len(fields) < 2 else [one for one in found if not _is_nothing(one[0])]


def _columns(path: Path, names: Sequence[str], image_field: str, fields: tuple[str, ...]) -> dict[str, int]:
    """The caption columns and the number of the field that each is. Raises BadSource naming what there is."""
    wanted = fields or CAPTION_FIELDS
    found = {name: number for number, name in enumerate(wanted) if name in names}
    if not fields:
        found = dict.fromkeys([*found][:1], 0)
    if not names:
        raise BadSource(f"{path}: empty; a header line is needed")
    if image_field not in names:
        raise BadSource(
            f"{path}: no column {image_field!r}, it has {', '.join(names)}; name the one with images by --image-field"
        )
    if not found:
        raise BadSource(
            f"{path}: no column {' or '.join(map(repr, wanted))}, it has {', '.join(names)}; name it by --caption-field"
        )
    return found
