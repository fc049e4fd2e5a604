"""Files with captions and vectors that other software wrote: Parquet, .npz, and the LIFT authors' layout.

Everything streams. Rows come as they are; what is wrong with one of them is for the importer to say.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lift_cache.errors import BadSource
from lift_cache.sources import CAPTION_FIELDS

VECTOR_FIELDS = ("embedding", "embeddings", "vector", "vectors", "emb")
NAME_FIELDS = ("key", "image", "filename", "file_name", "name")
"""Tried in this order when no field is named."""

BATCH_ROWS = 1_024


class BrokenFile(BadSource):
    """A file that is not what its name says, or is cut short."""


@dataclass(frozen=True)
class VectorRows:
    """n rows of one file.

    captions: n values, or names of images where captions come from a metadata file · values float32, the
    vectors end to end · lengths int64 [n] · tokens int32 [n] and truncated bool [n] where the file has them ·
    numbers int64 [n], of the rows in the file `path`, counted from 1.
    """

    captions: list[object]
    values: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray | None
    truncated: np.ndarray | None
    path: Path
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, row: int) -> str:
        return f"{self.path}:{self.numbers[row]}"

    def take(self, keep: np.ndarray) -> VectorRows:
        """The rows where `keep` (bool [n]) is true."""
        return VectorRows(
            [caption for caption, kept in zip(self.captions, keep.tolist(), strict=True) if kept],
            self.values if keep.all() else self.values[np.repeat(keep, self.lengths)],
            self.lengths[keep],
            None if self.tokens is None else self.tokens[keep],
            None if self.truncated is None else self.truncated[keep],
            self.path,
            self.numbers[keep],
        )


def count_rows(path: Path) -> int:
    """Rows of a Parquet or .npz file, without reading them. Raises BrokenFile."""
    if path.suffix.lower() == ".npz":
        with _opened_npz(path) as archive:
            return max(
                (header.shape[0] for header in _headers(path, archive).values() if header.shape), default=0
            )
    with opened_parquet(path) as file:
        return file.metadata.num_rows


def vector_rows(path: Path, caption_field: str | None, vector_field: str | None) -> Iterator[VectorRows]:
    """The rows of one file.

    Raises:
        BadSource: of no known kind, or without such columns; names those that there are.
        BrokenFile
    """
    if path.suffix.lower() == ".npz":
        return _npz_rows(path, caption_field, vector_field)
    if path.suffix.lower() == ".parquet":
        return parquet_rows(
            path, caption_field, vector_field, first_choice=CAPTION_FIELDS, flag="--caption-field"
        )
    raise BadSource(f"{path}: vectors are imported from .parquet and .npz files, not {path.suffix or 'this'}")


# Parquet


def opened_parquet(path: Path) -> pq.ParquetFile:
    """Raises BrokenFile."""
    try:
        # Buffered ahead, as is the default, a file would be held whole while its rows are read.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise BrokenFile(f"{path}: not readable as Parquet ({_first_line(error)})") from None


def parquet_rows(
    path: Path, field: str | None, vector_field: str | None, *, first_choice: Sequence[str], flag: str
) -> Iterator[VectorRows]:
    """Rows of a Parquet file; `field` is the text column (`first_choice` when None), named by `flag`."""
    with opened_parquet(path) as file:
        names = file.schema_arrow.names
        text = choose(path, names, field, first_choice, flag)
        vector = choose(path, names, vector_field, VECTOR_FIELDS, "--vector-field")
        if not _is_vector(file.schema_arrow.field(vector).type):
            kind = file.schema_arrow.field(vector).type
            raise BadSource(
                f"{path}: column {vector!r} is {kind}, not lists of floats; name another with --vector-field"
            )
        extra = [name for name in ("tokens", "truncated") if name in names and name not in (text, vector)]
        first = 1
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[text, vector, *extra]):
                values, lengths = _ragged(batch.column(vector))
                yield VectorRows(
                    texts(batch.column(text)),
                    values,
                    lengths,
                    _optional(batch, "tokens", extra, np.int32),
                    _optional(batch, "truncated", extra, np.bool_),
                    path,
                    np.arange(first, first + len(batch)),
                )
                first += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise BrokenFile(f"{path}: broken Parquet ({_first_line(error)})") from None


def choose(path: Path, names: Sequence[str], field: str | None, wanted: Sequence[str], flag: str) -> str:
    """The column to read. Raises BadSource naming what there is."""
    candidates = [field] if field else wanted
    found = next((name for name in candidates if name in names), None)
    if found is None:
        raise BadSource(
            f"{path}: no column {' or '.join(map(repr, candidates))}; it has {', '.join(names) or 'none'}: "
            f"name one with {flag}"
        )
    return found


def texts(column: pa.Array) -> list[object]:
    """Text values; by way of bytes, as one string that is not UTF-8 would fail its whole batch."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)
    if not is_text:
        return column.to_pylist()
    return [
        value if value is None else value.decode(errors="surrogateescape")
        for value in column.cast(pa.large_binary()).to_pylist()
    ]


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_floating(kind.value_type)


def _ragged(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Values end to end, float32, and the length of each list; a null list has length 0, a null value is NaN."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # beyond float32: infinite, and refused as such
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return values, lengths.astype(np.int64)


def _optional(batch: pa.RecordBatch, name: str, extra: Sequence[str], dtype: type) -> np.ndarray | None:
    if name not in extra:
        return None
    kind = batch.column(name).type
    right = pa.types.is_boolean(kind) if dtype is np.bool_ else pa.types.is_integer(kind)
    if not right:
        return None
    return (
        batch.column(name)
        .fill_null(False if dtype is np.bool_ else 0)
        .to_numpy(zero_copy_only=False)
        .astype(dtype)
    )


# .npz


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def _opened_npz(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise BrokenFile(f"{path}: not readable as .npz ({_first_line(error)})") from None


def _header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return _Header(*read(file))


def _headers(path: Path, archive: zipfile.ZipFile) -> dict[str, _Header]:
    found = {}
    try:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as file:
                    found[name.removesuffix(".npy")] = _header(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BrokenFile(f"{path}: broken .npz ({_first_line(error)})") from None
    return found


def _npz_rows(path: Path, caption_field: str | None, vector_field: str | None) -> Iterator[VectorRows]:
    with _opened_npz(path) as archive:
        headers = _headers(path, archive)
        caption = choose(path, list(headers), caption_field, CAPTION_FIELDS, "--caption-field")
        vector = choose(path, list(headers), vector_field, VECTOR_FIELDS, "--vector-field")
        _require_arrays(path, caption, headers[caption], vector, headers[vector])
        extra = {
            name: dtype
            for name, dtype in (("tokens", np.int32), ("truncated", np.bool_))
            if name in headers
            and headers[name].shape == headers[caption].shape
            and headers[name].dtype.kind in "iub"
        }
        columns = [_array_batches(archive, name) for name in (caption, vector, *extra)]
        first = 1
        try:
            for captions, vectors, *others in zip(*columns, strict=True):
                by_name = dict(zip(extra, others, strict=True))
                n, dimensions = vectors.shape
                yield VectorRows(
                    [
                        t.decode(errors="surrogateescape") if isinstance(t, bytes) else t
                        for t in captions.tolist()
                    ],
                    vectors.astype(np.float32).reshape(-1),
                    np.full(n, dimensions, np.int64),
                    by_name["tokens"].astype(np.int32) if "tokens" in by_name else None,
                    by_name["truncated"].astype(bool) if "truncated" in by_name else None,
                    path,
                    np.arange(first, first + n),
                )
                first += n
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BrokenFile(f"{path}: broken .npz ({_first_line(error)})") from None


def _require_arrays(path: Path, caption: str, captions: _Header, vector: str, vectors: _Header) -> None:
    if captions.dtype.hasobject:
        raise BadSource(
            f"{path}: {caption!r} holds Python objects, which are not opened; save it as np.array(captions, dtype=str)"
        )
    if captions.dtype.kind not in "US" or len(captions.shape) != 1:
        raise BadSource(
            f"{path}: {caption!r} is {captions.dtype} {list(captions.shape)}, not a list of texts"
        )
    if vectors.dtype.kind != "f" or len(vectors.shape) != 2 or vectors.fortran:
        order = " in Fortran order" if vectors.fortran else ""
        raise BadSource(
            f"{path}: {vector!r} is {vectors.dtype} {list(vectors.shape)}{order}, not floats [n, dimensions] row by row"
        )
    if captions.shape[0] != vectors.shape[0]:
        raise BadSource(f"{path}: {captions.shape[0]:,} captions and {vectors.shape[0]:,} vectors")


def _array_batches(archive: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """The rows of an array, `BATCH_ROWS` at a time, whatever its size."""
    with archive.open(f"{name}.npy") as file:
        header = _header(file)
        row_bytes = header.dtype.itemsize * int(np.prod(header.shape[1:], dtype=np.int64))
        for start in range(0, header.shape[0], BATCH_ROWS):
            rows = min(BATCH_ROWS, header.shape[0] - start)
            data = file.read(rows * row_bytes)
            if len(data) != rows * row_bytes:
                raise EOFError(f"{name!r} is cut short")
            yield np.frombuffer(data, header.dtype).reshape(rows, *header.shape[1:])


# The layout of the LIFT authors' code


def vector_folders(sources: Sequence[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """Folders that hold Parquet files, each with these, numbered ones in the order of their numbers.

    The authors write `<folder>/<shard>/<number>.parquet`: 100 rows of an image's file name (`key`) and its
    caption's vector (`embedding`).
    """
    for source in sources:
        if not source.is_dir():
            raise BadSource(f"{source}: with --metadata, sources are folders of Parquet files")
        here = [path for path in source.iterdir() if path.suffix == ".parquet"]
        if here:
            yield source, sorted(here, key=_by_number)
        yield from vector_folders(sorted(path for path in source.iterdir() if path.is_dir()))


def _by_number(path: Path) -> tuple[int, int | str]:
    return (0, int(path.stem)) if path.stem.isdecimal() else (1, path.stem)


class NamedCaptions:
    """The captions of a metadata Parquet by the name of their image.

    Takes about 300 bytes of memory for each row, so metadata of many images is best kept in one file for each
    folder, as the authors do.

    Attributes:
        path: the file.
        names, captions: of every row; None for a caption whose name stands in several rows with different ones.
        used_by: the folder whose vector a row's caption has got, by row.
    """

    def __init__(self, path: Path, name_field: str | None, caption_field: str | None) -> None:
        """Raises BadSource."""
        self.path = path
        self.names: list[str] = []
        self.captions: list[object] = []
        self.used_by: dict[int, str] = {}
        with opened_parquet(path) as file:
            columns = file.schema_arrow.names
            name = choose(path, columns, name_field, NAME_FIELDS, "--metadata-name-field")
            caption = choose(path, columns, caption_field, CAPTION_FIELDS, "--caption-field")
            try:
                for batch in file.iter_batches(batch_size=65_536, columns=[name, caption]):
                    self.names += map(str, texts(batch.column(name)))
                    self.captions += texts(batch.column(caption))
            except (OSError, pa.ArrowException) as error:
                raise BrokenFile(f"{path}: broken Parquet ({_first_line(error)})") from None
        self._row: dict[str, int] = {}
        for row, one in enumerate(self.names):
            known = self._row.setdefault(one, row)
            if self.captions[known] != self.captions[row]:
                self.captions[known] = None

    def find(self, folder: str, name: str) -> int | None:
        """The row of an image: by its name, by `folder/name`, or by either without the extension.

        Raises:
            BadSource: the row has a vector of another folder already, so that names do not tell images apart.
        """
        stem, dot, _ = name.rpartition(".")
        tried = (name, f"{folder}/{name}", *((stem, f"{folder}/{stem}") if dot else ()))
        row = next((self._row[one] for one in tried if one in self._row), None)
        if row is not None and self.used_by.setdefault(row, folder) != folder:
            raise BadSource(
                f"{self.path}: {name!r} is in the folders {self.used_by[row]} and {folder}; give --metadata as "
                "a folder with one Parquet file for each of them, named after it"
            )
        return row

    def unused(self) -> Iterator[tuple[int, str]]:
        """Rows (counted from 1) and names of captions that have got no vector."""
        for row, name in enumerate(self.names):
            if self._row[name] not in self.used_by:
                yield row + 1, name


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
