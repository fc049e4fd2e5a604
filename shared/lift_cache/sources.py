"""Where captions come from: WebDataset tars, Parquet, CSV/TSV, JSON Lines and plain text.

Everything streams. A row that cannot be used comes out as a `BadRow` and the stream goes on; what makes a
whole file unusable (cut short, no such field, nothing in it) raises `BadSource`. Nothing is ever extracted.
"""

from __future__ import annotations

import csv
import glob
import gzip
import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lift_cache.errors import BadCaption, BadSource

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""What counts as a sample's image in a tar: the first of these that it has."""

CAPTION_FIELDS = ("caption", "captions", "text", "title")
"""Tried in this order when no field is named."""

MAX_TEXT_BYTES = 16 << 20
"""Longest line, JSON member or text member that is read into memory."""

KINDS = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "tsv",
    ".tsv.gz": "tsv",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".txt": "text",
    ".txt.gz": "text",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A byte range of a tar file."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TarSample:
    """One WebDataset sample: files that share `key`, by extension (lower case, without the dot)."""

    key: str
    members: dict[str, TarMember]


@dataclass(frozen=True, slots=True)
class CaptionRow:
    caption: str
    where: str
    """`train-000.tar:0001.json[2]`, `a.csv:17` (lines and rows are counted from 1)."""


@dataclass(frozen=True, slots=True)
class BadRow:
    where: str
    reason: str


# ---------------------------------------------------------------------------------------------- which files


def expand(sources: Sequence[str]) -> list[Path]:
    """Files behind `sources`: paths, globs, `{000..010}` and `{a,b}` braces, and folders.

    Each file once, in the order given, folders and globs sorted. Raises `BadSource` when one of them matches
    nothing, when a file is of no known kind, or when a folder mixes kinds (a README.txt among tars).
    """
    paths = [path for source in sources for path in _expand_one(source)]
    for path in paths:
        _kind(path)
    return list(dict.fromkeys(paths))


def _expand_one(source: str) -> Iterator[Path]:
    names = [source] if Path(source).exists() else _braces(source)
    for name in names:
        path = Path(name)
        if path.is_dir():
            yield from _folder(path)
        elif path.exists():
            yield path
        else:
            # Not Path.glob, which refuses absolute patterns.
            matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []  # noqa: PTH207
            if not matches:
                raise BadSource(f"no such file: {name}" + ("" if name == source else f" (from {source})"))
            yield from (match for match in map(Path, matches) if match.is_file())


def _braces(pattern: str) -> Iterator[str]:
    """Shell braces, lazily: a range of a billion shards stops at the first one that is missing."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        yield pattern
        return
    first, last, listed = found.groups()
    if listed is None:
        width = len(first) if first.startswith("0") else 0
        choices: Iterable[str] = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    else:
        choices = listed.split(",")
    for choice in choices:
        yield from _braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _folder(folder: Path) -> list[Path]:
    by_kind: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        kind = KINDS.get(_suffix(path))
        if kind and path.is_file() and not path.name.startswith("."):
            by_kind.setdefault(kind, []).append(path)
    if not by_kind:
        raise BadSource(f"{folder}: no file in this folder holds captions (known: {_known()})")
    if len(by_kind) > 1:
        kinds = ", ".join(f"{len(paths)} {kind}" for kind, paths in sorted(by_kind.items()))
        raise BadSource(
            f"{folder}: this folder mixes kinds ({kinds}); name the files, such as {folder}/*.tar"
        )
    return next(iter(by_kind.values()))


def _suffix(path: Path) -> str:
    """`.csv.gz` of `my.data.csv.gz`, `.tar` of `train.2.tar`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _kind(path: Path) -> str:
    kind = KINDS.get(_suffix(path))
    if kind is None:
        raise BadSource(f"{path}: not a known kind of file (known: {_known()})")
    return kind


def _known() -> str:
    return " ".join(suffix for suffix in KINDS if not suffix.endswith(".gz")) + ", text kinds also as .gz"


# ---------------------------------------------------------------------------------------------- captions


def iter_captions(path: Path, field: str | None = None) -> Iterator[CaptionRow | BadRow]:
    """The captions of one file, in order, in bounded memory.

    `field` names the column or JSON field (default: the first of `CAPTION_FIELDS` that is there); a list of
    texts in it gives one row each. Plain text has no fields. Raises `BadSource` when the file does not exist,
    is broken or empty, or when `field` is nowhere in it; what was read until then has already come out.
    """
    read = {
        "tar": _tar_captions,
        "parquet": _parquet_captions,
        "csv": _csv_captions,
        "tsv": _csv_captions,
        "jsonl": _jsonl_captions,
        "text": _text_captions,
    }[_kind(path)]
    empty = True
    try:
        for row in read(path, field):
            empty = False
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadSource(f"{path}: broken gzip data ({error}); fetch or compress it again") from error
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror or error}") from error
    if empty:
        raise BadSource(f"{path}: there is no caption in it")


def captions_of(sample_bytes: bytes, ext: str, field: str | None) -> list[object]:
    """Captions in one member of a WebDataset sample: all of a `txt`, or a field of a `json`.

    Raises `BadCaption` when the bytes are not UTF-8, not JSON or have no such field. What the field holds is
    not judged here: an item may be None or a number.
    """
    try:
        text = sample_bytes.decode()
    except UnicodeDecodeError as error:
        raise BadCaption(f"not UTF-8 (byte {error.start})") from None
    return [text.strip("\r\n")] if ext == "txt" else _field_of(text, field)


def sample_captions(file: BinaryIO, sample: TarSample, field: str | None) -> tuple[str, list[object]]:
    """The extension that holds the captions of `sample`, and these: a field of its JSON, else its text file.

    `file` is the tar, opened for reading. Raises `BadCaption` when there are none.
    """
    failure = BadCaption(f"has no json or txt (it has {', '.join(sample.members)})")
    for ext in ("json", "txt"):
        member = sample.members.get(ext)
        if member is None:
            continue
        if member.size > MAX_TEXT_BYTES:
            raise BadCaption(f"{ext} of {member.size:,} bytes; at most {MAX_TEXT_BYTES:,} are read")
        try:
            return ext, captions_of(read_member(file, member), ext, field)
        except BadCaption as error:
            failure = error
        if field is not None:  # asked for by name: the text file is not an answer
            break
    raise failure


def _field_of(text: str, field: str | None) -> list[object]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise BadCaption("not JSON") from None
    if not isinstance(record, dict):
        raise BadCaption(f"not a JSON object but {type(record).__name__}")
    name = _choose(field, record)
    if name is None:
        raise BadCaption(_no_field(field, record))
    value = record[name]
    if isinstance(value, list):
        if not value:
            raise BadCaption(f"field '{name}' is an empty list")
        return value
    return [value]


def _choose(field: str | None, names: Iterable[str]) -> str | None:
    return next((name for name in ([field] if field else CAPTION_FIELDS) if name in names), None)


def _no_field(field: str | None, names: Iterable[str]) -> str:
    asked = f"no field '{field}'" if field else f"no field {', '.join(CAPTION_FIELDS)}"
    shown = list(itertools.islice(names, 20))
    return f"{asked}; it has {', '.join(map(str, shown)) or 'none'}"


def _rows(values: Sequence[object], where: str) -> Iterator[CaptionRow | BadRow]:
    for index, value in enumerate(values):
        at = where if len(values) == 1 else f"{where}[{index}]"
        yield _row(value, at)


def _row(value: object, where: str) -> CaptionRow | BadRow:
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if not isinstance(value, str):
        return BadRow(where, "no caption (null)" if value is None else f"not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return BadRow(where, f"not UTF-8 (character {error.start})")
    return CaptionRow(value, where)


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their end. Raises `BadSource` on one too long to be text."""
    with _open(path) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_TEXT_BYTES)
            if not line:
                return
            if len(line) == MAX_TEXT_BYTES:
                raise BadSource(f"{path}:{number}: a line of {MAX_TEXT_BYTES:,} bytes or more; is this text?")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield line.rstrip(b"\r\n")


def _text_captions(path: Path, field: str | None) -> Iterator[CaptionRow | BadRow]:
    """One caption a line; blank lines separate and are no captions."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _row(line, f"{path}:{number}")


def _jsonl_captions(path: Path, field: str | None) -> Iterator[CaptionRow | BadRow]:
    failure, usable = None, False
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = captions_of(line, "json", field)
        except BadCaption as error:
            failure = failure or error
            yield BadRow(where, str(error))
        else:
            usable = True
            yield from _rows(values, where)
    if failure and not usable:
        raise BadSource(f"{path}: no line has captions; the first: {failure}")


def _csv_captions(path: Path, field: str | None) -> Iterator[CaptionRow | BadRow]:
    text = (f"{line.decode(errors='surrogateescape')}\n" for line in _lines(path))
    reader = csv.reader(text, delimiter="\t" if _kind(path) == "tsv" else ",", strict=True)
    header = [name.strip() for name in next(reader, [])]
    if not header:
        raise BadSource(f"{path}: empty; a header line is needed")
    if not all(isinstance(_row(name, ""), CaptionRow) for name in header):
        raise BadSource(f"{path}: the header is not UTF-8; save the file as UTF-8")
    name = _choose(field, header)
    if name is None:
        raise BadSource(f"{path}: {_no_field(field, header)} (first line; name the column with --field)")
    column = header.index(name)
    while True:
        first = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # An unclosed quote swallows lines up to the csv module's field limit: say which, start afresh.
            yield BadRow(f"{path}:{first}-{reader.line_num}", f"broken quoting ({error})")
            continue
        if not record:
            continue
        if len(record) != len(header):
            yield BadRow(f"{path}:{first}", f"{len(record)} fields where the header has {len(header)}")
        else:
            yield _row(record[column], f"{path}:{first}")


def _parquet_captions(path: Path, field: str | None) -> Iterator[CaptionRow | BadRow]:
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            name = _choose(field, schema.names)
            if name is None:
                raise BadSource(f"{path}: {_no_field(field, schema.names)} (name the column with --field)")
            raw = _as_binary(schema.field(name).type)
            if raw is None:
                raise BadSource(f"{path}: field '{name}' is {schema.field(name).type}, not text")
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=[name]):
                # As bytes: one string that is not UTF-8 would otherwise fail its whole batch.
                for value in batch.column(0).cast(raw).to_pylist():
                    number += 1
                    if value == []:
                        yield BadRow(f"{path}:{number}", f"field '{name}' is an empty list")
                    else:
                        yield from _rows(value if isinstance(value, list) else [value], f"{path}:{number}")
    except pa.ArrowException as error:
        raise BadSource(f"{path}: broken Parquet ({str(error).splitlines()[0]})") from error


def _as_binary(kind: pa.DataType) -> pa.DataType | None:
    if pa.types.is_dictionary(kind):
        return _as_binary(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _as_binary(kind.value_type)
        return None if inner is None else pa.large_list(inner)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return pa.large_binary() if any(is_text(kind) for is_text in texts) else None


# ---------------------------------------------------------------------------------------------- tars


def scan_tar(path: Path) -> Iterator[TarSample]:
    """The samples of a WebDataset tar, from its headers alone: no image byte is read.

    Files belong to one sample when they stand together and share everything up to the first dot of the base
    name; the folder stays in the key. Raises `BadSource`: no such file, compressed (no byte ranges), cut
    short or corrupt (with the offset), or a key that comes twice.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise BadSource(
                    f"{path}: compressed; images are read by byte range from plain tars: gunzip it"
                )
            file.seek(0)
            yield from _scan(path, file)
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror or error}") from error


def read_member(file: BinaryIO, member: TarMember) -> bytes:
    """The bytes of one member of `file`, its tar opened for reading. Raises `BadSource` when cut short."""
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise BadSource(f"{getattr(file, 'name', 'tar')}: cut short at byte {member.offset + len(data):,}")
    return data


def _scan(path: Path, file: BinaryIO) -> Iterator[TarSample]:
    seen: set[str] = set()
    sample: TarSample | None = None
    for info in _members(path, file):
        folder, slash, base = info.name.removeprefix("./").rpartition("/")
        stem, dot, ext = base.partition(".")
        if not (info.isreg() and stem and dot):
            continue
        if info.issparse():
            raise BadSource(f"{path}: {info.name} is stored sparse; pack the tar without --sparse")
        key, ext = folder + slash + stem, ext.lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            if key in seen:
                raise BadSource(
                    f"{path}: key '{key}' comes twice; the files of a sample must stand together, once"
                )
            seen.add(key)
            sample = TarSample(key, {})
        if ext in sample.members:
            raise BadSource(f"{path}: key '{key}' has two files '.{ext}'")
        sample.members[ext] = TarMember(info.offset_data, info.size)
    if sample is not None:
        yield sample


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar, which must be whole: tarfile alone takes a corrupt or cut header for the end."""
    offset = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                if info.size < 0 or tar.offset <= offset:  # would never end (CVE-2025-8194)
                    raise tarfile.ReadError("bad size")
                offset = tar.offset
                yield info
            file.seek(offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive mark")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise BadSource(
            f"{path}: cut short or corrupt at byte {offset:,} ({error}); fetch it again"
        ) from error


def _tar_captions(path: Path, field: str | None) -> Iterator[CaptionRow | BadRow]:
    failure, usable = None, False
    # Two handles that only move forward, so that a compressed tar streams as well.
    with _open(path) as headers, _open(path) as file:
        for sample in _scan(path, headers):
            try:
                ext, values = sample_captions(file, sample, field)
            except BadCaption as error:
                failure = failure or error
                yield BadRow(f"{path}:{sample.key}", str(error))
            else:
                usable = True
                yield from _rows(values, f"{path}:{sample.key}.{ext}")
    if failure and not usable:
        raise BadSource(f"{path}: no sample has captions; the first: {failure}")
