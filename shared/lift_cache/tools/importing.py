"""Making a cache of vectors that other software embedded: Parquet, .npz, the LIFT authors' layout.

What made them cannot be checked, so the recipe is what the user says it is, marked *declared*. Rows that may
not be stored are left out, counted and listed; the others go in.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TextIO, cast

import numpy as np
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lift_cache import files
from lift_cache.bulk import BulkWriter
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, BadSource, LiftError
from lift_cache.keys import KEY_BYTES, normalise
from lift_cache.recipe import Recipe
from lift_cache.sources import expand
from lift_cache.tools.common import AsJson, progress, say
from lift_cache.tools.vector_files import (
    NAME_FIELDS,
    BrokenFile,
    NamedCaptions,
    VectorRows,
    count_rows,
    parquet_rows,
    vector_folders,
    vector_rows,
)

LEFT_OUT = 1
"""Exit status when rows were left out."""

NAMED_LEFT_OUT = 3
ROW_OVERHEAD = 2 * KEY_BYTES + 64
"""Bytes of a row besides its vector, in segment, index and captions; an estimate for the free-space check."""


class Declared(BaseModel):
    """What the user says of how the vectors were made; a recipe but for the length of the vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    "Hub id or name of the model that made the vectors."
    revision: str = "unknown"
    "Its commit."
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    "In which it ran."
    pooling: Literal["cls", "last", "mean", "model"] = "model"
    "How token states became one vector; `model`: by the model's own code."
    max_tokens: int = Field(512, gt=0)
    "Tokens at which captions were cut."
    template: str = "{caption}"
    "What was embedded, around the caption."
    end_token: bool = False
    "An end token closed every caption."
    normalized: bool = False
    "The vectors were scaled to unit length."

    def recipe(self, dimensions: int) -> Recipe:
        """Raises BadConfig."""
        if self.model is None:
            raise BadConfig("name the model that made these vectors with --model, or give its --recipe file")
        try:
            return Recipe(
                model=self.model,
                revision=self.revision,
                dtype=self.compute_dtype,
                tokenizer_revision=self.revision,
                end_token=self.end_token,
                pooling=self.pooling,
                template=self.template,
                max_tokens=self.max_tokens,
                normalize=self.normalized,
                dimensions=dimensions,
                declared=True,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise BadConfig(f"--{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@dataclass
class Import:
    """What an import did, or would do. Rows are those of the sources."""

    rows: int = 0
    imported: int = 0
    """Rows that are in the cache, those of equal captions among them."""
    captions: int | None = None
    """Distinct captions in the cache; unknown in a dry run."""
    rejected: int = 0
    """Rows, or whole files, with a caption or vector that cannot be used."""
    unmatched_vectors: int = 0
    """Rows whose image the metadata does not name."""
    unmatched_captions: int = 0
    """Metadata rows for whose image there is no vector."""
    first_left_out: list[str] = field(default_factory=list)
    list_file: str | None = None
    """The file that names everything that was left out or unmatched, JSON Lines of `where` and `reason`."""
    dimensions: int = 0
    snapshot: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Fields:
    """Columns, where they are not found by their usual names."""

    caption: str | None = None
    vector: str | None = None
    name: str | None = None
    metadata_name: str | None = None


def import_vectors(
    sources: Sequence[str],
    out: Path,
    declared: Declared | Recipe,
    *,
    metadata: Path | None = None,
    fields: Fields = Fields(),
    store: Literal["float16", "float32"] = "float16",
    left_out: Path | None = None,
    dry_run: bool = False,
    done: Callable[[int], None] = lambda _: None,
) -> Import:
    """Make a new cache of vectors that are at hand.

    Args:
        sources: Parquet and .npz files with captions and vectors: paths, globs, braces, folders. With
            `metadata`: folders of Parquet files with names of images and vectors.
        out: a directory that is empty or does not exist; on an error nothing of it stays.
        declared: how the vectors were made; its `declared` is set.
        metadata: a Parquet file of names and captions, or a folder with one for each folder of vectors,
            named after it.
        left_out: JSON Lines of what was left out; `<out>.left-out.jsonl` by default, none in a dry run.
        done: called with the number of rows just read.

    Raises:
        BadSource: a source is broken, lacks a column, or no row of all can be imported.
        BadConfig: `out` holds something, or the recipe cannot be.
        CacheFull.
    """
    files.refuse_other_content(out)
    source = (
        _Plain(expand_vectors(sources), fields)
        if metadata is None
        else _Joined([Path(source) for source in sources], metadata, fields)
    )
    if isinstance(declared, Recipe):
        recipe = declared.model_copy(update={"declared": True})
    else:
        recipe = declared.recipe(_usual_length(source.vectors()))
    dimensions = recipe.dimensions
    encoding = Encoding(dtype=store, dimensions=dimensions)
    result = Import(dimensions=dimensions, dry_run=dry_run)
    listed = left_out or out.with_name(f"{out.name}.left-out.jsonl")
    with _Listing(None if dry_run else listed, result) as listing:
        if dry_run:
            _fill(source.batches(), encoding, _check(encoding), result, listing, done)
            return result
        with _nothing_left_on_failure(out):
            files.make_directory(out)
            row_bytes = dimensions * encoding.numpy_dtype.itemsize + ROW_OVERHEAD
            files.require_room(out, source.most_rows * row_bytes, f"an import of {source.most_rows:,} rows")
            provenance = [{"imported": _named(sources)}]
            with BulkWriter(out, recipe, encoding, provenance=provenance) as writer:
                _fill(source.batches(), encoding, writer.add, result, listing, done)
                if not result.imported:
                    reason = f" ({result.first_left_out[0]})" if result.first_left_out else ""
                    raise BadSource(f"no row of {_named(sources)} can be imported{reason}")
                snapshot = writer.finish()
    result.snapshot, result.captions = snapshot.id, snapshot.rows
    return result


Add = Callable[[Sequence[str], np.ndarray, np.ndarray | None, np.ndarray | None], dict[int, str]]


def _fill(
    batches: Iterator[VectorRows | _Left],
    encoding: Encoding,
    add: Add,
    result: Import,
    listing: _Listing,
    done: Callable[[int], None],
) -> None:
    for rows in batches:
        if isinstance(rows, _Left):
            listing.add(rows)
            result.rows += rows.rows
            continue
        result.rows += len(rows)
        done(len(rows))
        right = rows.lengths == encoding.dimensions
        for row in np.flatnonzero(~right).tolist():
            listing.add(
                _Left(rows.where(row), f"a vector of length {rows.lengths[row]}, not {encoding.dimensions}")
            )
        kept = rows.take(right)
        vectors = kept.values.reshape(-1, encoding.dimensions)
        bad = add(
            cast(list[str], kept.captions), vectors, kept.tokens, kept.truncated
        )  # refused when no text
        for row, reason in sorted(bad.items()):
            listing.add(_Left(kept.where(row), reason))
        result.imported += len(kept) - len(bad)


def _check(encoding: Encoding) -> Add:
    """What `BulkWriter.add` would refuse, without a cache."""

    def add(
        captions: Sequence[str], vectors: np.ndarray, tokens: np.ndarray | None, truncated: np.ndarray | None
    ) -> dict[int, str]:
        bad = encoding.encode(vectors)[1]
        for row, caption in enumerate(captions):
            try:
                normalise(caption)
            except LiftError as error:
                bad.setdefault(row, str(error))
        return bad

    return add


def _usual_length(batches: Iterable[VectorRows]) -> int:
    """The length of most vectors at the beginning, to which the others are held."""
    for rows in batches:
        lengths = Counter(rows.lengths[rows.lengths > 0].tolist())
        if lengths:
            return int(lengths.most_common(1)[0][0])
    raise BadSource("there is no vector in the sources; are these the right files and columns?")


def expand_vectors(sources: Sequence[str]) -> list[Path]:
    """Parquet and .npz files behind paths, globs, braces and folders. Raises BadSource."""
    found: list[Path] = []
    for source in sources:
        if Path(source).is_dir():
            inside = sorted(path for path in Path(source).rglob("*") if path.suffix in (".parquet", ".npz"))
            if not inside:
                raise BadSource(f"{source}: no .parquet or .npz file in this folder")
            found += inside
        elif source.endswith(".npz") and Path(source).exists():
            found.append(Path(source))
        else:
            found += expand([source])
    return list(dict.fromkeys(found))


# Where rows come from


@dataclass(frozen=True)
class _Left:
    """Something that is not imported: `rows` rows of the sources that come in no other form.

    `unmatched`: which side has no partner.
    """

    where: str
    reason: str
    rows: int = 0
    unmatched: Literal["vector", "caption"] | None = None


class _Plain:
    """Files that hold captions and vectors.

    Attributes:
        most_rows: rows that there are at most.
    """

    def __init__(self, paths: Sequence[Path], fields: Fields) -> None:
        """Raises BadSource."""
        self._paths, self._fields = paths, fields
        self.most_rows = sum(map(count_rows, paths))

    def vectors(self) -> Iterator[VectorRows]:
        for path in self._paths:
            yield from vector_rows(path, self._fields.caption, self._fields.vector)

    def batches(self) -> Iterator[VectorRows | _Left]:
        return self.vectors()


class _Joined:
    """Vectors by the name of their image, joined to captions by the same name."""

    def __init__(self, sources: Sequence[Path], metadata: Path, fields: Fields) -> None:
        """Raises BadSource: a folder without metadata, which is found before anything is read."""
        self._sources, self._metadata, self._fields = sources, metadata, fields
        paths = {self._metadata_of(folder) for folder, _ in vector_folders(sources)}
        if not paths:
            raise BadSource(f"{', '.join(map(str, sources))}: no Parquet file in these folders")
        self.most_rows = sum(map(count_rows, paths))

    def _metadata_of(self, folder: Path) -> Path:
        if not self._metadata.is_dir():
            if not self._metadata.exists():
                raise BadSource(f"no such file: {self._metadata}")
            return self._metadata
        path = self._metadata / f"{folder.name}.parquet"
        if not path.exists():
            raise BadSource(f"{folder}: its captions should be in {path}, which does not exist")
        return path

    def vectors(self) -> Iterator[VectorRows]:
        """Rows that have names of images for captions."""
        for _, paths in vector_folders(self._sources):
            for path in paths:
                with contextlib.suppress(BrokenFile):
                    yield from self._rows(path)

    def _rows(self, path: Path) -> Iterator[VectorRows]:
        return parquet_rows(
            path, self._fields.name, self._fields.vector, first_choice=NAME_FIELDS, flag="--name-field"
        )

    def batches(self) -> Iterator[VectorRows | _Left]:
        captions: NamedCaptions | None = None
        for folder, paths in vector_folders(self._sources):
            wanted = self._metadata_of(folder)
            if captions is None or captions.path != wanted:
                if captions is not None:
                    yield from _unused(captions)
                captions = NamedCaptions(wanted, self._fields.metadata_name, self._fields.caption)
            for path in paths:
                yield from self._of_file(path, folder, captions)
        if captions is not None:
            yield from _unused(captions)

    def _of_file(self, path: Path, folder: Path, captions: NamedCaptions) -> Iterator[VectorRows | _Left]:
        try:
            for batch in self._rows(path):
                yield from self._join(batch, folder, captions)
        except BrokenFile as error:  # one of very many, cut short when its writer was killed
            yield _Left(str(path), str(error).removeprefix(f"{path}: "))

    def _join(self, rows: VectorRows, folder: Path, captions: NamedCaptions) -> Iterator[VectorRows | _Left]:
        joined: list[object] = []
        for row, name in enumerate(map(str, rows.captions)):
            found = captions.find(folder.name, name)
            joined.append(None if found is None else captions.captions[found])
            if found is None:
                yield _Left(rows.where(row), f"{captions.path} names no image {name!r}", 1, "vector")
            elif joined[-1] is None:
                yield _Left(rows.where(row), f"{captions.path} has no caption of {name!r}, or several", 1)
        keep = np.array([caption is not None for caption in joined], bool)
        yield replace(rows, captions=joined).take(keep)


def _unused(captions: NamedCaptions) -> Iterator[_Left]:
    for row, name in captions.unused():
        yield _Left(f"{captions.path}:{row}", f"no vector of an image named {name!r}", 0, "caption")


# What is left behind


class _Listing:
    """Counts what is left out, and names it in a file that is there only when there is something to name."""

    def __init__(self, path: Path | None, result: Import) -> None:
        self._path, self._result = path, result
        self._file: TextIO | None = None

    def __enter__(self) -> _Listing:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, left: _Left) -> None:
        result = self._result
        if left.unmatched == "caption":
            result.unmatched_captions += 1
        elif left.unmatched == "vector":
            result.unmatched_vectors += 1
        else:
            result.rejected += 1
        if left.unmatched != "caption" and len(result.first_left_out) < NAMED_LEFT_OUT:
            result.first_left_out.append(f"{left.where}: {left.reason}")
        if self._path is not None:
            if self._file is None:
                self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
                result.list_file = str(self._path)
            self._file.write(
                json.dumps({"where": left.where, "reason": left.reason}, ensure_ascii=False) + "\n"
            )


@contextlib.contextmanager
def _nothing_left_on_failure(out: Path) -> Iterator[None]:
    """Half an import is not a cache: it could not be told from a whole one, nor be continued."""
    existed = out.exists()
    before = set(out.iterdir()) if existed else set()
    try:
        yield
    except BaseException:
        for path in set(out.iterdir()) - before if out.exists() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed and out.exists():
            out.rmdir()
        raise


def _named(sources: Sequence[str]) -> str:
    """Sources by their last name: what is written into a cache tells nothing of the machine it was made on."""
    more = f" and {len(sources) - 1:,} more" if len(sources) > 1 else ""
    return Path(sources[0]).name + more


# Command


def import_command(
    *sources: Annotated[
        str, Parameter(help="Parquet or .npz files, or folders of them; with --metadata, folders of vectors.")
    ],
    out: Annotated[Path, Parameter(help="The new cache.")],
    recipe: Annotated[
        Path | None, Parameter(help="JSON of the whole recipe, such as another cache's recipe.json.")
    ] = None,
    declared: Annotated[Declared | None, Parameter(name="*")] = None,
    metadata: Annotated[
        Path | None,
        Parameter(
            help="Parquet file of image names and captions, or a folder with one for each vector folder."
        ),
    ] = None,
    caption_field: Annotated[str | None, Parameter(help="Column with the captions.")] = None,
    vector_field: Annotated[str | None, Parameter(help="Column with the vectors.")] = None,
    name_field: Annotated[
        str | None, Parameter(help="With --metadata: column with the image names, of the vectors.")
    ] = None,
    metadata_name_field: Annotated[
        str | None, Parameter(help="With --metadata: column with the image names, of the metadata.")
    ] = None,
    store: Annotated[
        Literal["float16", "float32"], Parameter(help="How the cache stores vectors.")
    ] = "float16",
    left_out: Annotated[
        Path | None, Parameter(help="Where to list what is left out; OUT.left-out.jsonl by default.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Read and count everything, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Make a new cache of vectors that other software embedded; the recipe is declared, not verified.

    Rows with an unusable caption or vector are left out and listed, and the exit status is 1; of equal captions
    the first counts. With --metadata: the layout of the LIFT authors' code, folders of small Parquet files of
    image names (key) and vectors (embedding), whose captions stand in a Parquet file named after the folder.

    Examples: `lift-cache import vectors.parquet --out runs/cache --model intfloat/e5-mistral-7b-instruct`,
    `lift-cache import caption_embeddings --metadata raw_captions --caption-field org_caption --out runs/cache
    --model nvidia/NV-Embed-v2 --compute-dtype float16 --max-tokens 77`
    """
    if not sources:
        raise BadConfig("name at least one source: a Parquet or .npz file, a glob, or a folder")
    how: Declared | Recipe = declared or Declared()
    if recipe is not None:
        if declared is not None:
            raise BadConfig("--recipe says all of how the vectors were made; leave --model and its like out")
        how = Recipe.load(recipe)
    fields = Fields(caption_field, vector_field, name_field, metadata_name_field)
    with progress(None, "importing rows") as done:
        result = import_vectors(
            sources,
            out,
            how,
            metadata=metadata,
            fields=fields,
            store=store,
            left_out=left_out,
            dry_run=dry_run,
            done=done,
        )
    say(as_json, asdict(result), _text(result, out))
    return LEFT_OUT if result.rejected or result.unmatched_vectors else 0


def _text(result: Import, out: Path) -> str:
    said = f"{result.rows:,} rows, {result.imported:,} of them "
    if result.dry_run:
        said = f"dry run, nothing was written: {said}can be imported"
    else:
        said += f"imported: {result.captions:,} captions × {result.dimensions:,} in {out}, snapshot {result.snapshot}"
    said += (
        f"; {result.rejected:,} rejected, {result.unmatched_vectors:,} vectors without a caption, "
        f"{result.unmatched_captions:,} captions without a vector"
    )
    if result.first_left_out:
        said += f"; the first: {'; '.join(result.first_left_out)}"
    return f"{said}; all are listed in {result.list_file}" if result.list_file else said
