"""Vectors of a snapshot in other forms: aligned to image shards, as Parquet, as .npy."""

from __future__ import annotations

import glob
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App, Parameter

from lift_cache import files
from lift_cache.errors import BadConfig
from lift_cache.keys import KEY_BYTES
from lift_cache.reader import CacheReader
from lift_cache.segment import StoredRows, binary_array
from lift_cache.sources import expand
from lift_cache.tools.aligned import write_aligned
from lift_cache.tools.common import AsJson, Location, progress, say

BATCH_BYTES = 32 << 20
"""Vectors that are read and written at a time; also a row group of Parquet."""

NAMED_LEFT_OUT = 3

Dtype = Literal["float32", "stored"]
Done = Callable[[int], None]


def _ignore(_: int) -> None:
    pass


# Aligned to image shards


@dataclass
class AlignedExport:
    """What an aligned export did. `bytes` are those of all files, `written` of them are new."""

    snapshot: str
    shards: int = 0
    written: int = 0
    samples: int = 0
    pairs: int = 0
    missing: int = 0
    left_out: int = 0
    first_left_out: list[str] = field(default_factory=list)
    bytes: int = 0


def export_aligned(
    location: str,
    shards: Sequence[str],
    out: Path,
    *,
    caption_field: str | None = None,
    on_missing: Literal["error", "null"] = "error",
    done: Done = _ignore,
) -> AlignedExport:
    """One Arrow file per image shard, row i = sample i (see `lift_cache.tools.aligned`).

    Args:
        location: `PATH` or `PATH@SNAPSHOT`.
        shards: tars: paths, globs, `{000..010}` braces, folders.
        out: folder for the files; what is right there already is left as it is.
        done: called with 1 after each shard.

    Raises:
        MissingCaptions: a caption is not in the snapshot; the shards before it are done.
        CacheNotFound, CacheDamaged, CacheFull, BadSource, BadConfig.
    """
    reader = CacheReader(location)
    paths = expand(shards)
    _refuse_same_names(paths)
    files.make_directory(out)
    result = AlignedExport(reader.snapshot_id)
    for path in paths:
        _remove_left(out / f"{path.stem}.arrow")
        made = write_aligned(reader, path, out, caption_field=caption_field, on_missing=on_missing)
        result.shards += 1
        result.written += made.written
        result.samples += made.card.samples
        result.pairs += made.card.pairs
        result.missing += made.card.missing
        result.left_out += len(made.left_out)
        for where, reason in made.left_out.items():
            if len(result.first_left_out) < NAMED_LEFT_OUT:
                result.first_left_out.append(f"{where}: {reason}")
        result.bytes += made.path.stat().st_size
        done(1)
    return result


def _refuse_same_names(shards: Sequence[Path]) -> None:
    name, count = Counter(path.stem for path in shards).most_common(1)[0]
    if count > 1:
        both = [str(path) for path in shards if path.stem == name]
        raise BadConfig(f"{both[0]} and {both[1]} would both become {name}.arrow; export them to two folders")


# Parquet and .npy


@dataclass(frozen=True)
class Export:
    """What was written where. `bytes` are those of all files."""

    snapshot: str
    rows: int
    path: str
    bytes: int


def export_parquet(
    location: str, out: Path, *, dtype: Dtype = "float32", captions: bool = True, done: Done = _ignore
) -> Export:
    """One Parquet file: key (16 bytes) · caption · vector (list) · tokens · truncated, in storage order.

    Args:
        location: `PATH` or `PATH@SNAPSHOT`.
        out: a file that does not exist.
        dtype: vectors decoded to float32, or as stored.
        captions: False leaves the column out, for a cache that was copied without captions.
        done: called with the number of rows just written.

    Raises:
        BadConfig: `out` exists.
        CacheNotFound, CacheFull, CacheDamaged (also: there are no captions).
    """
    reader = CacheReader(location)
    temporary = _begin(reader, out, dtype, captions)
    value = pa.from_numpy_dtype(_dtype(reader, dtype))
    schema = pa.schema(
        [
            ("key", pa.binary(KEY_BYTES)),
            *([("caption", pa.string())] if captions else []),
            ("vector", pa.list_(value, reader.dimensions)),
            ("tokens", pa.int32()),
            ("truncated", pa.bool_()),
        ],
        metadata={"lift.card": json.dumps(_card(reader, dtype))},
    )
    with files.room_for(out.parent):
        try:
            with pq.ParquetWriter(
                temporary,
                schema,
                compression={"caption": "zstd"},  # vectors are noise to every codec
                use_dictionary=False,
                write_statistics=["key"],
                write_page_checksum=True,
            ) as writer:
                for rows in _rows(reader, dtype, captions):
                    writer.write_batch(_parquet_batch(reader, rows, dtype, schema))
                    done(len(rows))
            files.publish(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    return Export(reader.snapshot_id, reader.rows, str(out), out.stat().st_size)


def _parquet_batch(reader: CacheReader, rows: StoredRows, dtype: Dtype, schema: pa.Schema) -> pa.RecordBatch:
    columns = {
        "key": binary_array(rows.keys),
        "caption": None if rows.captions is None else rows.captions.cast(pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(_vectors(reader, rows, dtype).reshape(-1)), reader.dimensions
        ),
        "tokens": pa.array(rows.tokens, pa.int32()),
        "truncated": pa.array(rows.truncated, pa.bool_()),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def export_npy(
    location: str, out: Path, *, dtype: Dtype = "float32", captions: bool = True, done: Done = _ignore
) -> Export:
    """A folder: vectors.npy [n, d] · keys.npy uint8 [n, 16] · captions.jsonl · card.json; line i is row i.

    Args, Raises: as `export_parquet`; `out` is a folder that does not exist.
    """
    reader = CacheReader(location)
    temporary = _begin(reader, out, dtype, captions)
    with files.room_for(out.parent):
        try:
            temporary.mkdir()
            with (
                _npy(
                    temporary / "vectors.npy", (reader.rows, reader.dimensions), _dtype(reader, dtype)
                ) as vectors,
                _npy(temporary / "keys.npy", (reader.rows, KEY_BYTES), np.dtype(np.uint8)) as keys,
                (temporary / "captions.jsonl").open("w", encoding="utf-8") as lines,
            ):
                for rows in _rows(reader, dtype, captions):
                    vectors(_vectors(reader, rows, dtype))
                    keys(rows.keys)
                    if rows.captions is not None:
                        lines.writelines(_lines(rows))
                    done(len(rows))
            if not captions:
                (temporary / "captions.jsonl").unlink()
            (temporary / "card.json").write_text(json.dumps(_card(reader, dtype), indent=2) + "\n")
            size = sum(path.stat().st_size for path in temporary.iterdir())
            for path in temporary.iterdir():
                files.sync_file(path)
                files.share_with_group(path)
            files.publish(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Export(reader.snapshot_id, reader.rows, str(out), size)


@contextmanager
def _npy(path: Path, shape: tuple[int, int], dtype: np.dtype) -> Iterator[Callable[[np.ndarray], None]]:
    """A .npy file of a known shape, written row by row without a map of it."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        yield lambda rows: np.ascontiguousarray(rows, dtype).tofile(file)


def _lines(rows: StoredRows) -> Iterator[str]:
    assert rows.captions is not None
    for key, caption, tokens, truncated in zip(
        rows.keys, rows.captions.to_pylist(), rows.tokens.tolist(), rows.truncated.tolist(), strict=True
    ):
        line = {"key": key.tobytes().hex(), "caption": caption, "tokens": tokens, "truncated": truncated}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _begin(reader: CacheReader, out: Path, dtype: Dtype, captions: bool) -> Path:
    """A temporary name beside `out`, when there is room for what it will hold."""
    if out.exists():
        raise BadConfig(f"{out} exists; delete it, or choose another --out")
    files.make_directory(out.parent)
    _remove_left(out)
    texts = sum(info.captions_size for info in reader.manifest.segments) if captions else 0
    row_bytes = reader.dimensions * _dtype(reader, dtype).itemsize + 2 * KEY_BYTES
    files.require_room(out.parent, reader.rows * row_bytes + texts, f"{out.name}")
    return files.temporary_name(out)


def _remove_left(out: Path) -> None:
    """What a killed run left of this output; no one else writes to this name."""
    unfinished = files.temporary_name(out).name
    for path in out.parent.glob(f"{files.TEMPORARY}*-{glob.escape(out.name)}"):
        if len(path.name) == len(unfinished):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _dtype(reader: CacheReader, dtype: Dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype == "float32" else reader.encoding.numpy_dtype


def _vectors(reader: CacheReader, rows: StoredRows, dtype: Dtype) -> np.ndarray:
    return reader.encoding.decode(rows.vectors) if dtype == "float32" else rows.vectors


def _rows(reader: CacheReader, dtype: Dtype, captions: bool) -> Iterator[StoredRows]:
    batch = max(1, BATCH_BYTES // (reader.dimensions * _dtype(reader, dtype).itemsize))
    return reader.iter_rows(batch, captions=captions)


def _card(reader: CacheReader, dtype: Dtype) -> dict[str, Any]:
    return {
        "rows": reader.rows,
        "dimensions": reader.dimensions,
        "dtype": str(_dtype(reader, dtype)),
        "snapshot": reader.snapshot_id,
        "recipe": reader.recipe.model_dump(mode="json"),
        "fingerprint": reader.recipe.fingerprint,
        "encoding": reader.encoding.model_dump(mode="json"),
    }


# Commands

app = App(name="export", help="Write the vectors of a snapshot in another form.")

As = Annotated[
    Dtype, Parameter(help="Values as float32, or as they are stored (int8: with scales in the card).")
]
WithCaptions = Annotated[
    bool, Parameter(name="--captions", negative="--no-captions", help="Write the caption texts too.")
]


@app.command
def aligned(
    cache: Location,
    *shards: Annotated[str, Parameter(help="Image shards: tars, globs, train-{000..010}.tar, folders.")],
    out: Annotated[Path, Parameter(help="Folder for the files, one per shard.")],
    caption_field: Annotated[
        str | None, Parameter(help="Field of the samples' JSON with the captions, as for training.")
    ] = None,
    on_missing: Annotated[
        Literal["error", "null"],
        Parameter(help="Captions that the cache lacks: stop, or write null vectors."),
    ] = "error",
    as_json: AsJson = False,
) -> None:
    """One Arrow file per image shard, row i = sample i, for training from storage that is read in sequence.

    Run the same command again after an interruption: files that are right are left as they are.

    Example: `lift-cache export aligned runs/cache data/train-{000..099}.tar --out data/aligned`
    """
    if not shards:
        raise BadConfig("name at least one shard: a tar, a glob, train-{000..010}.tar, or a folder")
    with progress(len(expand(shards)), "aligning shards") as done:
        result = export_aligned(
            cache, shards, out, caption_field=caption_field, on_missing=on_missing, done=done
        )
    said = (
        f"{result.shards:,} shards ({result.written:,} written, the others were there): {result.samples:,} samples, "
        f"{result.pairs:,} captions, {result.missing:,} of them without a vector; {result.bytes / 1e6:,.1f} MB in {out}"
    )
    if result.left_out:
        said += (
            f"; {result.left_out:,} samples or captions cannot be used: {'; '.join(result.first_left_out)}"
        )
    say(as_json, asdict(result), said)


@app.command
def parquet(
    cache: Location,
    *,
    out: Annotated[Path, Parameter(help="The Parquet file.")],
    dtype: As = "float32",
    captions: WithCaptions = True,
    as_json: AsJson = False,
) -> None:
    """One Parquet file: key, caption, vector, tokens, truncated; in row groups of 32 MB.

    Example: `lift-cache export parquet runs/cache --out vectors.parquet`
    """
    with progress(CacheReader(cache).rows, "exporting rows") as done:
        result = export_parquet(cache, out, dtype=dtype, captions=captions, done=done)
    say(as_json, asdict(result), f"{result.rows:,} rows, {result.bytes / 1e6:,.1f} MB in {out}")


@app.command
def npy(
    cache: Location,
    *,
    out: Annotated[Path, Parameter(help="A folder, to be created.")],
    dtype: As = "float32",
    captions: WithCaptions = True,
    as_json: AsJson = False,
) -> None:
    """A folder with vectors.npy, keys.npy, captions.jsonl and card.json; line i of each is row i.

    Example: `lift-cache export npy runs/cache --out vectors`, then `np.load("vectors/vectors.npy", mmap_mode="r")`
    """
    with progress(CacheReader(cache).rows, "exporting rows") as done:
        result = export_npy(cache, out, dtype=dtype, captions=captions, done=done)
    say(as_json, asdict(result), f"{result.rows:,} rows, {result.bytes / 1e6:,.1f} MB in {out}")
