"""A user's files become captions, in order and whole; what cannot be used is named and ends nothing."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lift_cache.errors import BadCaption, BadSource
from lift_cache.sources import (
    BadRow,
    CaptionRow,
    captions_of,
    expand,
    iter_captions,
    read_member,
    sample_captions,
    scan_tar,
)

any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def captions(path: Path, field: str | None = None) -> list[str]:
    rows = list(iter_captions(path, field))
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row.caption for row in rows if isinstance(row, CaptionRow)]


def bad(path: Path, field: str | None = None) -> list[tuple[str, str]]:
    return [(row.where, row.reason) for row in iter_captions(path, field) if isinstance(row, BadRow)]


# ------------------------------------------------------------------------------------------ round trips


@relaxed
@given(texts=st.lists(any_text, min_size=1))
def test_whatever_the_csv_module_writes_comes_back_as_written(tmp_path: Path, texts: list[str]) -> None:
    texts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "caption"], *([index, text] for index, text in enumerate(texts))])
    assert captions(path) == texts


@relaxed
@given(texts=st.lists(st.one_of(any_text, st.lists(any_text, min_size=1)), min_size=1))
def test_json_lines_parquet_and_tar_hold_the_same_captions(
    tmp_path: Path, texts: list[str | list[str]]
) -> None:
    flat = [text for item in texts for text in ([item] if isinstance(item, str) else item)]
    lines = [json.dumps({"captions": item}) for item in texts]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pq.write_table(
        pa.table({"captions": [[item] if isinstance(item, str) else item for item in texts]}),
        tmp_path / "a.parquet",
        row_group_size=3,
    )
    files = [(f"{index:04}.json", line.encode()) for index, line in enumerate(lines)]
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "a.tgz", files, "w:gz")
    for name in ("a.jsonl.gz", "a.parquet", "a.tar", "a.tgz"):
        assert captions(tmp_path / name) == flat, name


def test_every_text_type_of_parquet_is_read(tmp_path: Path) -> None:
    texts = ["a cat", "zwei Hunde", "三"]
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(kind)}), tmp_path / "a.parquet")
        assert captions(tmp_path / "a.parquet") == texts


def test_plain_text_is_one_caption_a_line_and_blank_lines_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\n  \na dog")
    assert list(iter_captions(tmp_path / "a.txt")) == [
        CaptionRow("a cat", f"{tmp_path}/a.txt:1"),
        CaptionRow("a dog", f"{tmp_path}/a.txt:4"),
    ]


# ------------------------------------------------------------------------------------------ WebDataset


def test_a_sample_gives_the_byte_ranges_of_its_files(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        [("./a/1.JPG", b"jpeg"), ("./a/1.seg.png", b"mask"), ("./a/1.json", b"{}"), ("b/1.jpg", b"other")],
    )
    samples = list(scan_tar(path))
    assert [(sample.key, list(sample.members)) for sample in samples] == [
        ("a/1", ["jpg", "seg.png", "json"]),
        ("b/1", ["jpg"]),
    ]
    with path.open("rb") as file:
        assert [read_member(file, sample.members["jpg"]) for sample in samples] == [b"jpeg", b"other"]


def test_long_names_folders_links_and_hidden_files_do_not_disturb_the_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    long = "folder/" + "x" * 300
    with tarfile.open(path, "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("folder/1.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name in ("folder/._2.jpg", "folder/.DS_Store", "folder/README", f"{long}.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"a cat"))
    assert captions(path) == ["a cat"]
    assert [sample.key for sample in scan_tar(path)] == [long]


def test_the_text_file_stands_in_for_json_without_a_caption_unless_a_field_was_asked_for(
    tmp_path: Path,
) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.json", b'{"url": "x"}'), ("1.txt", b"a cat\n")])
    assert captions(path) == ["a cat"]
    assert [row.where for row in iter_captions(path) if isinstance(row, CaptionRow)] == [f"{path}:1.txt"]
    with path.open("rb") as file:
        assert sample_captions(file, next(scan_tar(path)), None) == ("txt", ["a cat"])
    with pytest.raises(BadSource, match=r"no field 'alt'; it has url"):
        list(iter_captions(path, "alt"))


def test_a_key_that_comes_twice_is_refused_by_name(tmp_path: Path) -> None:
    apart = write_tar(tmp_path / "a.tar", [("1.txt", b"a"), ("2.txt", b"b"), ("1.jpg", b"c")])
    with pytest.raises(BadSource, match=r"a\.tar: key '1' comes twice"):
        list(scan_tar(apart))
    twice = write_tar(tmp_path / "b.tar", [("1.txt", b"a"), ("1.txt", b"b")])
    with pytest.raises(BadSource, match=r"b\.tar: key '1' has two files '\.txt'"):
        list(scan_tar(twice))


@relaxed
@given(st.data())
def test_a_tar_cut_anywhere_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"a" * 700 * i) for i in range(4)]).read_bytes()
    end = max(index for index, byte in enumerate(whole) if byte) // 512 * 512 + 512
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: data.draw(st.integers(0, end))])
    with pytest.raises(BadSource, match=r"cut\.tar: cut short or corrupt at byte \d"):
        list(scan_tar(cut))


@relaxed
@given(st.data())
def test_flipped_bytes_give_samples_or_one_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"a cat") for i in range(3)]).read_bytes())
    for at in data.draw(st.lists(st.integers(0, 3 * 1024), min_size=1, max_size=8)):
        whole[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "flipped.tar"
    path.write_bytes(whole)
    try:
        list(iter_captions(path))
    except BadSource as error:
        assert "flipped.tar" in str(error)
        assert "\n" not in str(error)


def test_a_compressed_tar_gives_captions_but_no_byte_ranges(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", [("1.jpg", b"x" * 10_000), ("1.txt", b"a cat")], "w:gz")
    assert captions(path) == ["a cat"]
    with pytest.raises(BadSource, match="compressed"):
        next(scan_tar(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadSource, match=r"a\.tar\.gz: broken gzip"):
        list(iter_captions(path))


# ------------------------------------------------------------------------------------------ bad rows


def test_one_bad_json_line_never_ends_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"caption": "a"}\n{"caption": \n{"other": 1}\n{"caption": null}\n{"caption": [7, "b"]}\n[1]\n'
        b'{"caption": "\xff"}\n{"caption": "\\ud800"}\n{"caption": []}\n'
        + b"[" * 100_000
        + b'\n{"caption": "z"}\n'
    )
    rows = list(iter_captions(path))
    assert [row.caption for row in rows if isinstance(row, CaptionRow)] == ["a", "b", "z"]
    assert bad(path) == [
        (f"{path}:2", "not JSON"),
        (f"{path}:3", "no field caption, captions, text, title; it has other"),
        (f"{path}:4", "no caption (null)"),
        (f"{path}:5[0]", "not text but int"),
        (f"{path}:6", "not a JSON object but list"),
        (f"{path}:7", "not UTF-8 (byte 13)"),
        (f"{path}:8", "not UTF-8 (character 0)"),
        (f"{path}:9", "field 'caption' is an empty list"),
        (f"{path}:10", "not JSON"),
    ]


def test_one_bad_csv_row_never_ends_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,caption\n1,a\n2\n3,b,c\n4,\xff\n5,"x"y\n\n6,"two\nlines"\n7,z\n')
    assert [row.caption for row in iter_captions(path) if isinstance(row, CaptionRow)] == [
        "a",
        "two\nlines",
        "z",
    ]
    assert bad(path) == [
        (f"{path}:3", "1 fields where the header has 2"),
        (f"{path}:4", "3 fields where the header has 2"),
        (f"{path}:5", "not UTF-8 (character 0)"),
        (f"{path}:6-6", "broken quoting (',' expected after '\"')"),
    ]


def test_an_unclosed_quote_is_named_with_the_lines_it_swallowed_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('caption\n"open\n' + "x" * 1000 + "\n" + ("a cat\n" * 40_000))
    (where, reason), *others = bad(path)
    assert (where.startswith(f"{path}:2-"), others) == (True, [])
    assert "broken quoting" in reason
    last = int(where.rpartition("-")[2])
    assert sum(isinstance(row, CaptionRow) for row in iter_captions(path)) == 40_003 - last
    path.write_text('caption\na\n"open\nb\n')
    assert bad(path) == [(f"{path}:3-4", "broken quoting (unexpected end of data)")]


def test_one_bad_parquet_value_never_ends_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3)))
    broken = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffz"))
    pq.write_table(pa.table({"caption": pa.concat_arrays([broken, pa.array([None], pa.string())])}), path)
    assert [row.caption for row in iter_captions(path) if isinstance(row, CaptionRow)] == ["a", "z"]
    assert bad(path) == [(f"{path}:2", "not UTF-8 (character 0)"), (f"{path}:4", "no caption (null)")]


def test_one_bad_sample_never_ends_the_stream(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [("1.json", b"{"), ("2.jpg", b""), ("3.txt", b"\xff"), ("4.txt", b"z")]
    )
    assert bad(path) == [
        (f"{path}:1", "not JSON"),
        (f"{path}:2", "has no json or txt (it has jpg)"),
        (f"{path}:3", "not UTF-8 (byte 0)"),
    ]
    with pytest.raises(BadCaption, match="not UTF-8"):
        captions_of(b"\xff", "txt", None)


# ------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,alt\n1,x\n", "no field caption, captions, text, title; it has id, alt"),
        ("a.csv", b"", "empty; a header line is needed"),
        ("a.csv", b"caption\n", "no caption in it"),
        ("a.csv", "caption\na\n".encode("utf-16"), "header is not UTF-8"),
        ("a.jsonl", b'{"alt": "x"}\n{"alt": "y"}\n', "no line has captions; the first: no field"),
        ("a.jsonl", b"\n", "no caption in it"),
        ("a.txt", b"", "no caption in it"),
        ("a.txt.gz", b"\x1f\x8bxxxxxxxxxxxxxxx", "broken gzip"),
        ("a.txt.gz", gzip.compress(b"a cat\n")[:-4], "broken gzip"),
        ("a.parquet", b"PAR1 nonsense", "broken Parquet"),
        ("a.tar", b"x" * 2000, "cut short or corrupt at byte 0"),
        ("a.tar", bytes(10240), "no caption in it"),
        ("a.txt", b"x" * (17 << 20), "is this text?"),
        ("a.doc", b"x", "not a known kind of file"),
    ],
)
def test_an_unusable_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadSource) as caught:
        list(iter_captions(tmp_path / name))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_column_that_is_no_text_is_refused_and_a_missing_one_lists_the_columns(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "alt": ["x"]}), path)
    with pytest.raises(BadSource, match="field 'id' is int64, not text"):
        list(iter_captions(path, "id"))
    with pytest.raises(BadSource, match="no field 'alt_text'; it has id, alt"):
        list(iter_captions(path, "alt_text"))
    assert captions(path, "alt") == ["x"]


# ------------------------------------------------------------------------------------------ which files


def test_braces_globs_and_folders_name_the_same_shards(tmp_path: Path) -> None:
    shards = [tmp_path / f"train-{index:03}.tar" for index in range(12)]
    for shard in shards:
        shard.touch()
    assert expand([f"{tmp_path}/train-{{000..011}}.tar"]) == shards
    assert expand([f"{tmp_path}/train-*.tar"]) == shards
    assert expand([str(tmp_path)]) == shards
    assert expand([str(shards[3]), str(tmp_path), str(shards[3])]) == [shards[3], *shards[:3], *shards[4:]]
    assert expand([f"{tmp_path}/train-{{003,00{{7..8}}}}.tar"]) == [shards[index] for index in (3, 7, 8)]


def test_a_source_that_matches_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-000.tar").touch()
    for source, message in [
        (
            f"{tmp_path}/train-{{000..999999999999}}.tar",
            r"no such file: .*/train-001\.tar \(from .*train-\{000",
        ),
        (f"{tmp_path}/*.csv", r"no such file: .*\*\.csv"),
        (f"{tmp_path}/absent.tar", r"no such file: .*absent\.tar"),
    ]:
        with pytest.raises(BadSource, match=message):
            expand([source])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadSource, match="no file in this folder holds captions"):
        expand([f"{tmp_path}/empty"])
    (tmp_path / "README.txt").touch()
    with pytest.raises(BadSource, match=r"mixes kinds \(1 tar, 1 text\)"):
        expand([str(tmp_path)])
