"""Captions and vectors on the wire: Arrow IPC streams, uncompressed, between an embedding server and its clients.

    request   caption: string                                       metadata: model (optional)
    answer    vector: fixed_size_list<float16 | float32>[d], cached: bool (of a look-up: found), tokens: int32,
              truncated: bool, error: string, code: string          metadata: recipe, model, version

Whatever concerns one row stands in that row; the HTTP status speaks of the server alone. What arrives may have
been written by anybody. Only these columns are read; compressed, dictionary-encoded and foreign-endian streams
are refused before Arrow reads a buffer of them, so that nothing is allocated beyond the bytes that came.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from lift_cache.errors import BadCaption, BadConfig

MIME = "application/vnd.apache.arrow.stream"
VERSION = "1"

CAPTION_TYPES = (pa.string(), pa.large_string())
VECTOR_TYPES = {np.dtype(np.float16): pa.float16(), np.dtype(np.float32): pa.float32()}
ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0")
"""What ends a stream; the second is that of Arrow before 0.15."""

WRITING = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V5, compression=None)
READING = pa.ipc.IpcReadOptions(
    ensure_native_endian=False,
    ensure_alignment=pa.ipc.Alignment.DataTypeSpecific,  # numpy and SIMD code are told that it is
    use_threads=False,
)


class TooManyRows(BadConfig):
    """A request of more captions than are taken at a time."""


@dataclass(frozen=True)
class RowError:
    """Why one caption has no vector: a code of the server's error table, and its words."""

    code: str
    message: str


@dataclass(frozen=True)
class Request:
    """Captions as they came, None where there is none. Text that is not UTF-8 has lone surrogates, which
    `keys.normalise` refuses for its row."""

    captions: list[str | None]
    model: str | None = None


@dataclass(frozen=True)
class Answered:
    """vectors float16 | float32 [n, d], zeros where there is an error · cached bool [n] · tokens int32 [n] ·
    truncated bool [n] · position → error."""

    vectors: np.ndarray
    cached: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    errors: dict[int, RowError] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """vectors float16 | float32 [n, d], zeros where not found, None when they were not asked for ·
    found bool [n] · tokens int32 [n] · truncated bool [n] · position → error."""

    vectors: np.ndarray | None
    found: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    errors: dict[int, RowError] = field(default_factory=dict)


UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, struct.error)
"""What pyarrow raises over bytes that are not what they claim to be; ValueError has text that is not UTF-8."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turn what pyarrow raises into BadConfig."""
    try:
        yield
    except UNREADABLE as error:
        said = one_line(str(error)) or type(error).__name__
        raise BadConfig(f"not a readable Arrow stream ({said})") from None


def one_line(text: str, most: int = 200) -> str:
    """Text that others wrote, for a message: its beginning, without what a line or a terminal would act on."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:most]).split())


def encode_request(captions: Sequence[str | None], model: str | None = None) -> bytes:
    """Captions as a stream; None travels as null, and its row comes back with an error.

    Raises:
        BadCaption: not text, or a lone surrogate; names its position.
    """
    if not set(map(type, captions)) <= {str, type(None)}:
        for i, caption in enumerate(captions):
            if not isinstance(caption, str | None):
                raise BadCaption(f"input[{i}]: a caption must be text, not {type(caption).__name__}")
    try:
        column = pa.array(captions, pa.large_string())
    except UnicodeEncodeError:
        raise _not_utf8(captions) from None
    metadata = {"model": model} if model is not None else None
    schema = pa.schema([pa.field("caption", pa.large_string())], metadata)
    return _stream(pa.record_batch([column], schema=schema))


@_reading()
def decode_request(body: bytes, *, most_rows: int) -> Request:
    """The captions of a stream that anybody may have written.

    Raises:
        BadConfig: not such a stream, or one with anything else in it; says what.
        TooManyRows: more than `most_rows` captions.
    """
    captions: list[str | None] = []
    with _open(body, most_batches=most_rows) as stream:
        if (
            len(stream.schema) != 1
            or (kind := stream.schema.field(0)).type not in CAPTION_TYPES
            or kind.name != "caption"
        ):
            raise BadConfig(
                f"the one column is caption, of type string or large_string; not {_columns(stream.schema)}"
            )
        model = _metadata(stream.schema, allowed={"model"}).get("model")
        for batch in stream:
            if len(captions) + batch.num_rows > most_rows:
                raise TooManyRows(f"more than {most_rows:,} captions; send them in several requests")
            captions += _texts(batch.column(0))
    if not captions:
        raise BadConfig("the request has no caption")
    return Request(captions, model)


def encode_answer(answer: Answered | Found, *, recipe: str, model: str) -> bytes:
    """An answer as a stream of one batch; rows with an error, and those not found, have no vector.

    Args:
        recipe: fingerprint of what made the vectors.
    """
    known_name, known = ("cached", answer.cached) if isinstance(answer, Answered) else ("found", answer.found)
    present = np.ones(len(known), bool) if isinstance(answer, Answered) else np.array(known, bool)
    present[list(answer.errors)] = False
    messages, codes = _error_columns(answer.errors, len(known))
    columns = {
        known_name: pa.array(known, pa.bool_()),
        "tokens": pa.array(answer.tokens, pa.int32()),
        "truncated": pa.array(answer.truncated, pa.bool_()),
        "error": messages,
        "code": codes,
    }
    if answer.vectors is not None:
        columns = {"vector": _vector_column(answer.vectors, present), **columns}
    batch = pa.record_batch(columns, metadata={"recipe": recipe, "model": model, "version": VERSION})
    return _stream(batch)


@_reading()
def decode_answer(body: bytes) -> tuple[Answered, str]:
    """What a server answered, and the fingerprint of its recipe. The vectors are a view of `body`, read-only.

    Raises:
        BadConfig: not such a stream; says why.
    """
    batch, errors, recipe = _decode(body, "cached")
    present = np.ones(batch.num_rows, bool)
    present[list(errors)] = False
    cached, tokens, truncated = _flags(batch, "cached")
    if (vectors := _vectors(batch, present)) is None:
        raise BadConfig("the answer has no vectors")
    return Answered(vectors, cached, tokens, truncated, errors), recipe


@_reading()
def decode_found(body: bytes) -> tuple[Found, str]:
    """As `decode_answer`, for a look-up."""
    batch, errors, recipe = _decode(body, "found")
    found, tokens, truncated = _flags(batch, "found")
    if found[list(errors)].any():
        raise BadConfig("the answer has rows that are found and have an error")
    return Found(_vectors(batch, found), found, tokens, truncated, errors), recipe


def _stream(batch: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=WRITING) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _not_utf8(captions: Sequence[str | None]) -> BadCaption:
    for i, caption in enumerate(captions):
        try:
            (caption or "").encode()
        except UnicodeEncodeError as error:
            return BadCaption(f"input[{i}]: the caption is not valid UTF-8 (lone surrogate at {error.start})")
    return BadCaption("a caption is not valid UTF-8")


def _error_columns(errors: dict[int, RowError], rows: int) -> tuple[pa.Array, pa.Array]:
    if not errors:
        nothing = pa.nulls(rows, pa.string())
        return nothing, nothing
    messages: list[str | None] = [None] * rows
    codes: list[str | None] = [None] * rows
    for i, error in errors.items():
        messages[i], codes[i] = error.message.encode(errors="replace").decode(), error.code
    return pa.array(messages, pa.string()), pa.array(codes, pa.string())


def _vector_column(vectors: np.ndarray, present: np.ndarray) -> pa.Array:
    n, d = vectors.shape
    validity, absent = None, n - int(present.sum())
    if absent:
        vectors = np.where(present[:, None], vectors, vectors.dtype.type(0))  # never what memory held before
        validity = pa.array(present).buffers()[1]
    values_type = VECTOR_TYPES[vectors.dtype]
    values = pa.Array.from_buffers(values_type, n * d, [None, pa.py_buffer(np.ascontiguousarray(vectors))], 0)
    return pa.Array.from_buffers(pa.list_(values_type, d), n, [validity], absent, children=[values])


def _open(body: bytes, *, most_batches: int) -> pa.RecordBatchStreamReader:
    """A reader of which only the schema was read; its batches will lie in `body`. Raises BadConfig."""
    batches = sum(kind == "record batch" for kind in _messages(body))
    if batches > most_batches:
        raise TooManyRows(
            f"{batches:,} record batches where {most_batches:,} may be; send fewer, larger ones"
        )
    return pa.ipc.open_stream(body, options=READING)


def _messages(body: bytes) -> Iterator[str]:
    """Kinds of the messages of a stream, whose headers are looked at and whose buffers are not.

    Raises:
        BadConfig: compressed, dictionary-encoded, big-endian, of an old version, or not whole.
    """
    source = pa.BufferReader(body)
    reader = pa.ipc.MessageReader.open_stream(source)
    place = 0
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            break
        place = source.tell()
        header = _Header(message.metadata)
        if message.metadata_version != pa.ipc.MetadataVersion.V5:
            raise BadConfig("the stream was written by Arrow before 1.0; write it with a newer version")
        if message.type == "schema":
            if header.holds(SCHEMA_ENDIANNESS):
                raise BadConfig("the stream is big-endian; write it as little-endian")
        elif message.type != "record batch":
            raise BadConfig(
                f"the stream has a {message.type} message; write plain strings, without dictionaries"
            )
        elif header.holds(BATCH_COMPRESSION):
            raise BadConfig("the stream's buffers are compressed; write them uncompressed")
        yield message.type
    if body[place:] not in ENDS:
        raise BadConfig(
            "the stream is cut off, or has something after its end; close the writer before sending"
        )


SCHEMA_ENDIANNESS = 0
BATCH_COMPRESSION = 3
"""Numbers of the fields in format/Schema.fbs and format/Message.fbs of Arrow."""

MESSAGE_HEADER = 2


class _Header:
    """The schema or batch table of a message: pyarrow verifies this flatbuffer and does not show all of it."""

    def __init__(self, metadata: pa.Buffer) -> None:
        self._bytes = metadata.to_pybytes()
        (self._table,) = struct.unpack_from("<I", self._bytes, 0)
        place = self._place(MESSAGE_HEADER)
        if not place:
            raise BadConfig("the stream has a message without a header")
        self._table = place + struct.unpack_from("<I", self._bytes, place)[0]

    def holds(self, number: int) -> bool:
        """Whether a field of the table is written; what has its default value (little-endian, plain) is not."""
        return self._place(number) > 0

    def _place(self, number: int) -> int:
        """Where a field of the table lies; 0 when it is not there."""
        (back,) = struct.unpack_from("<i", self._bytes, self._table)
        vtable = self._table - back
        (size,) = struct.unpack_from("<H", self._bytes, vtable)
        if 4 + 2 * number >= size:
            return 0
        (offset,) = struct.unpack_from("<H", self._bytes, vtable + 4 + 2 * number)
        return self._table + offset if offset else 0


def _columns(schema: pa.Schema) -> str:
    """The first few, in one line, whatever the names in it are."""
    first = [schema.field(i) for i in range(min(len(schema), 8))]
    said = ", ".join(f"{column.name[:40]}: {column.type}" for column in first)
    return one_line(said) or "none"


def _metadata(schema: pa.Schema, allowed: set[str]) -> dict[str, str]:
    for column in schema:
        if column.metadata:
            raise BadConfig(f"column {column.name[:40]!r} has metadata (an extension type?); leave it out")
    metadata = {name.decode(): value.decode() for name, value in (schema.metadata or {}).items()}
    for name in metadata.keys() - allowed:
        raise BadConfig(f"the schema's metadata may have {', '.join(sorted(allowed))}; not {name[:40]!r}")
    return metadata


def _texts(column: pa.Array) -> list[str | None]:
    try:
        column.validate(full=True)
        return column.to_pylist()
    except UNREADABLE:
        pass  # one bad caption is that row's error; anything else is wrong as bytes too
    raw = column.view(pa.large_binary() if column.type == pa.large_string() else pa.binary())
    raw.validate(full=True)
    return [None if text is None else text.decode(errors="surrogateescape") for text in raw.to_pylist()]


def _decode(body: bytes, known: str) -> tuple[pa.RecordBatch, dict[int, RowError], str]:
    """The one batch of an answer, validated, its errors, and the recipe."""
    with _open(body, most_batches=1) as stream:
        _require_answer_columns(stream.schema, known)
        metadata = _metadata(stream.schema, allowed={"recipe", "model", "version"})
        if (version := metadata.get("version")) != VERSION:
            raise BadConfig(f"the answer has version {version!r}; this software reads {VERSION}: update it")
        batch = next(iter(stream), None)
    if batch is None or "recipe" not in metadata:
        raise BadConfig("the answer has no batch, or does not name its recipe")
    batch.validate(full=True)
    messages, codes = batch.column("error"), batch.column("code")
    if messages.null_count == codes.null_count == len(messages):
        return batch, {}, metadata["recipe"]
    rows = enumerate(zip(codes.to_pylist(), messages.to_pylist(), strict=True))
    errors = {
        i: RowError("error" if c is None else c, m or "")
        for i, (c, m) in rows
        if c is not None or m is not None
    }
    return batch, errors, metadata["recipe"]


def _require_answer_columns(schema: pa.Schema, known: str) -> None:
    """`vector` may be left out of a look-up's answer. Raises BadConfig."""
    columns = {column.name: column.type for column in schema} if len(schema) <= 6 else {}
    vector = columns.pop("vector", None)
    wanted = {known: pa.bool_(), "tokens": pa.int32(), "truncated": pa.bool_()}
    wanted |= {"error": pa.string(), "code": pa.string()}
    right = vector is None or (
        pa.types.is_fixed_size_list(vector)
        and vector.list_size > 0
        and vector.value_type in VECTOR_TYPES.values()
    )
    if not right or columns != wanted or len(schema) != len(wanted) + (vector is not None):
        raise BadConfig(f"the answer has other columns: {_columns(schema)}")


def _flags(batch: pa.RecordBatch, known: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = [batch.column(name) for name in (known, "tokens", "truncated")]
    if any(column.null_count for column in columns):
        raise BadConfig(f"the answer has nulls in {known}, tokens or truncated")
    known_n, tokens_n, truncated_n = (column.to_numpy(zero_copy_only=False) for column in columns)
    return known_n, tokens_n, truncated_n


def _vectors(batch: pa.RecordBatch, present: np.ndarray) -> np.ndarray | None:
    """Vectors [n, d] of a validated batch, zeros where `present` (bool [n]) says that there is none."""
    if "vector" not in batch.schema.names:
        return None
    column = batch.column("vector")
    values = column.values
    if values.null_count or not np.array_equal(column.is_valid().to_numpy(zero_copy_only=False), present):
        raise BadConfig("the answer lacks vectors of rows that should have them, or has some that should not")
    n, d = len(column), column.type.list_size
    vectors = values.to_numpy(zero_copy_only=True)[: n * d].reshape(n, d)
    return vectors if present.all() else np.where(present[:, None], vectors, vectors.dtype.type(0))
