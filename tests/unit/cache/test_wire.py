"""Captions and vectors cross the wire unchanged, and nothing that anybody may send does more than be refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_cache import wire
from lift_cache.errors import BadCaption, BadConfig, LiftError
from lift_cache.keys import keyed
from lift_cache.wire import Answered, Found, RowError

ROWS = 100
RECIPE = "f" * 64

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def stream(*batches: pa.RecordBatch, **options: object) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def captions(*values: str | None, kind: pa.DataType | None = None) -> pa.RecordBatch:
    return pa.record_batch([pa.array(values, kind or pa.string())], names=["caption"])


def read(body: bytes) -> wire.Request:
    return wire.decode_request(body, most_rows=ROWS)


def answered(rows: int = 4, dtype: type = np.float16, errors: dict[int, RowError] | None = None) -> Answered:
    vectors = np.random.default_rng(0).normal(size=(rows, 3)).astype(dtype)
    vectors[list(errors or {})] = 0
    numbers = np.arange(rows, dtype=np.int32)
    return Answered(vectors, numbers % 2 == 0, numbers, numbers % 3 == 0, errors or {})


@given(st.lists(texts | st.none(), min_size=1, max_size=20), st.none() | texts)
@settings(deadline=None)
def test_a_request_arrives_as_it_was_sent(sent: list[str | None], model: str | None) -> None:
    assert read(wire.encode_request(sent, model)) == wire.Request(sent, model)


@given(
    st.integers(0, 9),
    st.dictionaries(st.integers(0, 8), st.builds(RowError, texts, texts)),
    st.sampled_from([np.float16, np.float32]),
)
@settings(deadline=None)
def test_an_answer_arrives_as_it_was_sent(
    rows: int, errors: dict[int, RowError], dtype: type[np.generic]
) -> None:
    sent = answered(rows, dtype, {i: error for i, error in errors.items() if i < rows})
    got, recipe = wire.decode_answer(wire.encode_answer(sent, recipe=RECIPE, model="m"))
    assert recipe == RECIPE
    assert got.vectors.dtype == dtype
    assert got.vectors.tobytes() == sent.vectors.tobytes()
    for name in ("cached", "tokens", "truncated"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
    assert got.errors == sent.errors


def test_a_lookup_says_what_was_found_and_sends_vectors_only_of_that() -> None:
    whole = answered()
    found = np.array([True, False, True, False])
    error = {1: RowError("invalid_caption", "the caption is empty")}
    sent = Found(whole.vectors, found, whole.tokens, whole.truncated, error)
    body = wire.encode_answer(sent, recipe=RECIPE, model="m")
    got, _ = wire.decode_found(body)
    assert got.vectors is not None
    np.testing.assert_array_equal(got.vectors, np.where(found[:, None], whole.vectors, 0))
    assert got.found.tolist() == found.tolist()
    assert got.errors == error
    assert whole.vectors[1].tobytes() not in body  # what memory held there is not sent

    bare = Found(None, found, whole.tokens, whole.truncated)
    assert wire.decode_found(wire.encode_answer(bare, recipe=RECIPE, model="m"))[0].vectors is None
    with pytest.raises(BadConfig, match="other columns"):
        wire.decode_answer(body)


def test_any_arrow_writer_may_send_captions_in_several_batches() -> None:
    body = stream(captions("a", None), captions("b"), captions(), captions("ü"))
    assert read(body).captions == ["a", None, "b", "ü"]
    assert read(stream(captions("a", kind=pa.large_string()))).captions == ["a"]
    assert read(stream(captions("a"), use_legacy_format=True)).captions == ["a"]


def test_a_caption_that_is_not_utf8_is_the_error_of_its_row() -> None:
    body = stream(captions("good", "dém", None)).replace("é".encode(), b"\xff\xfe")
    got = read(body).captions
    assert (got[0], got[2]) == ("good", None)
    _, _, bad = keyed(got)
    assert list(bad) == [1, 2]
    assert "not valid UTF-8" in bad[1]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (["a", 7], r"input\[1\]: a caption must be text, not int"),
        (["a", b"b"], r"input\[1\]: a caption must be text, not bytes"),
        (["a", None, "x\ud800"], r"input\[2\]: the caption is not valid UTF-8 \(lone surrogate at 1\)"),
    ],
)
def test_what_is_no_text_is_refused_before_it_is_sent(sent: list[str | None], said: str) -> None:
    with pytest.raises(BadCaption, match=said):
        wire.encode_request(sent)


WITH_METADATA = pa.schema([pa.field("caption", pa.string(), metadata={"ARROW:extension:name": "mine"})])
WHOLE = stream(captions("a", "b"))

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "lz4": (lambda: stream(captions("a" * 999), compression="lz4"), "compressed"),
    "zstd": (lambda: stream(captions("a" * 999), compression="zstd"), "compressed"),
    "zstd before 1.0": (
        lambda: stream(captions("a" * 999), compression="zstd", metadata_version=pa.ipc.MetadataVersion.V4),
        "before 1.0",
    ),
    "dictionary": (
        lambda: stream(pa.record_batch([pa.array(["a"]).dictionary_encode()], names=["caption"])),
        "dictionar",
    ),
    "numbers": (lambda: stream(captions(7, kind=pa.int64())), "not caption: int64"),  # type: ignore[arg-type]
    "bytes": (lambda: stream(captions("a", kind=pa.binary())), "not caption: binary"),
    "views": (lambda: stream(captions("a", kind=pa.string_view())), "not caption: string_view"),
    "known extension": (
        lambda: stream(captions("{}", kind=pa.json_())),
        "not caption: extension<arrow.json>",
    ),
    "own extension": (
        lambda: stream(pa.record_batch([pa.array(["a"])], schema=WITH_METADATA)),
        "extension type",
    ),
    "another name": (lambda: stream(captions("a").rename_columns(["te\nxt"])), "not te xt: string"),
    "a further column": (
        lambda: stream(pa.record_batch([pa.array(["a"])] * 2, names=["caption", "x"])),
        "x: string",
    ),
    "no column": (lambda: stream(pa.record_batch([], schema=pa.schema([]))), "not none"),
    "metadata": (
        lambda: stream(captions("a").replace_schema_metadata({"model": "m", "pandas": "{}"})),
        "may have model; not 'pandas'",
    ),
    "no caption": (lambda: stream(captions()), "no caption"),
    "an answer": (lambda: wire.encode_answer(answered(), recipe=RECIPE, model="m"), "not vector: fixed_size"),
    "an Arrow file": (lambda: b"ARROW1\0\0" + WHOLE, "not a readable Arrow stream"),
    "JSON": (lambda: b'{"input": ["a"]}', "not a readable Arrow stream"),
    "nothing": (lambda: b"", "cut off"),
    "cut in its end": (lambda: WHOLE[:-4], "not a readable|cut off"),
    "cut between messages": (lambda: WHOLE[:-8], "cut off"),
    "cut in a batch": (lambda: WHOLE[:-20], "not a readable Arrow stream"),
    "more after the end": (lambda: WHOLE + b"\0", "after its end"),
    "two streams": (lambda: WHOLE[:-8] + WHOLE, "not a readable Arrow stream"),
    "big-endian": (lambda: big_endian(WHOLE), "big-endian"),
}


def big_endian(body: bytes) -> bytes:
    """The stream with `endianness` written in its schema."""
    changed, metadata = bytearray(body), 8
    message = metadata + struct.unpack_from("<I", changed, metadata)[0]
    slots = message - struct.unpack_from("<i", changed, message)[0] + 4
    header = message + struct.unpack_from("<H", changed, slots + 2 * wire.MESSAGE_HEADER)[0]
    schema = header + struct.unpack_from("<I", changed, header)[0]
    slots = schema - struct.unpack_from("<i", changed, schema)[0] + 4
    changed[slots : slots + 2] = changed[slots + 2 : slots + 4]  # any place that is not zero will do
    return bytes(changed)


@pytest.mark.parametrize("name", REFUSED)
def test_anything_but_plain_captions_is_refused_in_one_line_that_says_what_it_is(name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(BadConfig, match=said) as refused:
        read(make())
    assert "\n" not in str(refused.value)


def test_a_request_of_too_many_rows_or_batches_is_refused_as_such() -> None:
    assert len(read(stream(captions(*"ab" * (ROWS // 2)))).captions) == ROWS
    with pytest.raises(wire.TooManyRows, match="100"):
        read(stream(captions(*"ab" * (ROWS // 2)), captions("one more")))
    with pytest.raises(wire.TooManyRows, match="101 record batches"):
        read(stream(*[captions()] * (ROWS + 1)))


def test_a_small_body_cannot_make_the_reader_allocate_a_large_buffer() -> None:
    bomb = stream(captions("a" * 2**26), compression="zstd")
    assert len(bomb) < 2**16
    before = pa.total_allocated_bytes()
    with pytest.raises(BadConfig, match="compressed"):
        read(bomb)
    assert pa.total_allocated_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda batch: batch.drop_columns(["tokens"]), "other columns"),
        (lambda batch: batch.append_column("more", pa.array([1] * 4)), "other columns"),
        (lambda batch: batch.set_column(2, "tokens", pa.array([1] * 4, pa.int64())), "other columns"),
        (lambda batch: batch.set_column(2, "tokens", pa.array([1, 2, 3, None], pa.int32())), "nulls"),
        (lambda batch: batch.set_column(4, "error", pa.array(["x", None, None, None])), "lacks vectors"),
        (lambda batch: batch.drop_columns(["vector"]), "no vectors"),
        (lambda batch: batch.replace_schema_metadata({"recipe": "r", "version": "2"}), "update"),
        (lambda batch: batch.replace_schema_metadata({"version": "1"}), "recipe"),
        (
            lambda batch: batch.set_column(0, "vector", pa.array([[1.0]] * 4, pa.list_(pa.float64(), 1))),
            "other",
        ),
        (
            lambda batch: batch.set_column(0, "vector", pa.array([[None]] * 4, pa.list_(pa.float32(), 1))),
            "lacks",
        ),
    ],
)
def test_an_answer_that_does_not_fit_together_is_refused(
    change: Callable[[pa.RecordBatch], pa.RecordBatch], said: str
) -> None:
    body = wire.encode_answer(answered(), recipe=RECIPE, model="m")
    batch = pa.ipc.open_stream(body).read_next_batch()
    wire.decode_answer(stream(batch))
    with pytest.raises(BadConfig, match=said):
        wire.decode_answer(stream(change(batch)))


ERRORS = {1: RowError("invalid_caption", "the caption is empty"), 3: RowError("vector_rejected", "é")}
FOUND = Found(
    answered().vectors, np.array([True, False, True, False]), *[np.zeros(4, kind) for kind in ("i4", bool)]
)
SEEDS: list[tuple[bytes, Callable[[bytes], object]]] = [
    (wire.encode_request(["a", "dé", None, "ß" * 20], "m"), read),
    (stream(captions("a", "é", None), captions("ç")), read),
    (stream(captions("a" * 99), compression="lz4"), read),
    (stream(captions("a"), use_legacy_format=True), read),
    (stream(pa.record_batch([pa.array(["a"]).dictionary_encode()], names=["caption"])), read),
    (wire.encode_answer(answered(errors=ERRORS), recipe=RECIPE, model="m"), wire.decode_answer),
    (wire.encode_answer(FOUND, recipe=RECIPE, model="m"), wire.decode_found),
]
NUMBERS = [0, 1, -1, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63)]

edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=4),
            st.sampled_from([struct.pack("<q", number) for number in NUMBERS]),
            st.sampled_from([struct.pack("<q", number)[:4] for number in NUMBERS]),
        ),
        st.sampled_from(["replace", "insert", "delete"]),
    ),
    min_size=1,
    max_size=6,
)


@given(st.sampled_from(SEEDS), edits)
@settings(max_examples=600, deadline=None)
def test_a_spoilt_stream_is_refused_or_read_and_nothing_else(
    seed: tuple[bytes, Callable[[bytes], object]], changes: list[tuple[float, bytes, str]]
) -> None:
    body, decode = bytearray(seed[0]), seed[1]
    for where, data, how in changes:
        place = int(where * len(body)) & ~3
        stop = place if how == "insert" else place + len(data)
        body[place:stop] = b"" if how == "delete" else data
    try:
        got = decode(bytes(body))
    except LiftError as error:
        assert "\n" not in str(error)
        return
    if isinstance(got, wire.Request):
        assert 0 < len(got.captions) <= ROWS
        keyed(got.captions)
    else:
        rows = got[0]  # type: ignore[index]
        assert len(rows.vectors) == len(rows.tokens) == len(rows.truncated)
        assert not rows.vectors[list(rows.errors)].any()
