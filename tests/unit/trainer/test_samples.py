"""The sample index: what becomes a sample, what is named and left out, and what its digest stands for."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lift_trainer.samples as samples_module
from lift_cache.errors import BadSource
from lift_cache.keys import caption_keys
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from tests.unit.trainer.conftest import World, png, write_tar


def index_of(*sources: Path, limit: int = 0, **options: object) -> tuple[Index, dict[str, str]]:
    rejects = Rejects(limit)
    return build_index([str(source) for source in sources], rejects, **options), rejects.named  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
    return folder


def test_a_tar_gives_images_by_byte_range_and_captions_by_number(world: World) -> None:
    index, left_out = index_of(world.shard)
    assert not left_out and len(index) == 28 and len(index.pairs) == 35 and len(index.captions) == 35
    assert index.image_bytes(5) == png(5)
    assert [index.captions[i] for i in index.pairs[index.first[4] : index.first[5]]] == [
        "drawing number 4",
        "also called 4",
    ]
    assert index.where(4) == f"{world.shard}:0004"


def test_equal_captions_are_one_caption(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar", [("0", png(0), {"caption": "a  cat"}), ("1", png(1), {"caption": "a cat "})]
    )
    index, _ = index_of(shard)
    assert index.captions == ["a cat"] and index.pairs.tolist() == [0, 0]


def test_tables_join_rows_of_one_image(photos: Path) -> None:
    rows = [("0.png", "zero"), ("1.png", "one"), ("0.png", "nought")]
    table = photos / "pairs.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    parquet = photos.parent / "pairs.parquet"
    pq.write_table(pa.table({"path": [r[0] for r in rows], "text": [[r[1]] for r in rows]}), parquet)
    from_csv, _ = index_of(table)
    from_parquet, _ = index_of(parquet, images=photos, image_field="path")
    assert from_csv.names == ["0.png", "1.png"] and from_csv.captions == ["zero", "nought", "one"]
    assert from_csv.image_bytes(1) == png(1)
    assert from_csv.digest == from_parquet.digest


def test_the_digest_stays_when_data_move_and_changes_with_any_caption(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "other-name.tar"
    moved.parent.mkdir()
    shutil.copy(world.shard, moved)
    digest = index_of(world.shard)[0].digest
    assert index_of(moved)[0].digest == digest
    samples = [(f"{i:04d}", png(i), {"captions": [f"drawing number {i}"]}) for i in range(28)]
    assert index_of(write_tar(tmp_path / "fewer.tar", samples))[0].digest != digest


def test_broken_samples_are_named_counted_and_refused_beyond_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("0", png(0), {"caption": "fine"}),
            ("1", None, {"caption": "no image"}),
            ("2", png(2), {"caption": "  "}),
            ("3", png(3), {"caption": 17}),
            ("4", png(4), {"captions": ["fine too", ""]}),
        ],
    )
    index, left_out = index_of(shard, limit=4)
    assert index.names == ["0", "4"] and index.captions == ["fine", "fine too"]
    assert list(left_out) == [f"{shard}:1", f"{shard}:2", f"{shard}:3", f"{shard}:4[1]"]
    assert left_out[f"{shard}:2"] == "the caption is empty"
    assert capsys.readouterr().err.count("left out ") == 4
    with pytest.raises(BadSource, match=r"a\.tar:4\[1\]: .* 4 broken samples, more than --max-bad 3"):
        index_of(shard, limit=3)


def test_an_image_path_cannot_leave_its_folder(photos: Path) -> None:
    secret = photos.parent / "secret.png"
    secret.write_bytes(png(9))
    (photos / "t.csv").write_text("image,caption\n../secret.png,a\n0.png,b\nabsent.png,c\n")
    index, left_out = index_of(photos / "t.csv", limit=2)
    assert index.names == ["0.png"]
    assert "points outside" in left_out[f"{photos}/t.csv:../secret.png"]
    assert "no such image" in left_out[f"{photos}/t.csv:absent.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            "picture,caption\n0.png,a\n",
            "no column 'image', it has picture, caption; name .* --image-field",
        ),
        (
            "t.csv",
            "image,words\n0.png,a\n",
            "no column 'caption' or .* has image, words; name it by --caption-field",
        ),
        ("t.csv", "", "empty; a header line is needed"),
        ("t.csv", "image,caption\n", "no sample with an image and a caption"),
        ("t.parquet", "this is not parquet", "cannot be read"),
        ("t.tar", "this is not a tar" * 100, "t.tar"),
        ("t.jsonl", '{"caption": "a"}\n', r"images come from \.tar, \.csv, \.tsv or \.parquet files"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_clear_line(
    photos: Path, name: str, content: str, message: str
) -> None:
    (photos / name).write_text(content)
    with pytest.raises(BadSource, match=message) as caught:
        index_of(photos / name)
    assert "\n" not in str(caught.value)


def test_leaving_captions_out_keeps_the_rest_in_place(world: World) -> None:
    index, _ = index_of(world.shard)
    keep = np.array([not caption.startswith("drawing") for caption in index.captions])
    smaller = index.keep_captions(keep)
    assert smaller.names == [f"{i:04d}" for i in range(0, 28, 4)]
    assert [smaller.captions[i] for i in smaller.pairs] == [f"also called {i}" for i in range(0, 28, 4)]
    assert smaller.image_bytes(1) == png(4)


def test_broken_rows_of_a_table_are_named_and_the_rest_is_used(photos: Path) -> None:
    table = photos / "t.csv"
    table.write_bytes(
        b"image , caption\n0.png,a\n1.png,one,two\n1.png,caf\xe9\n2.png,c\n"
        + b"x" * 300
        + b".png,long\na\0b.png,nul\n"
    )
    index, left_out = index_of(table, limit=9)
    assert index.names == ["0.png", "2.png"] and index.captions == ["a", "c"]
    assert left_out[f"{table}:3"] == "3 fields where the header has 2"
    reasons = " ".join(left_out.values())
    assert len(left_out) == 4 and "File name too long" in reasons and "null" in reasons


def test_one_text_that_is_not_utf8_leaves_the_rest_of_a_parquet_table(photos: Path) -> None:
    text = pa.array([b"a", b"caf\xe9", b"c"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": ["0.png", "1.png", "2.png"], "caption": text}), photos / "t.parquet")
    index, left_out = index_of(photos / "t.parquet", limit=1)
    assert index.captions == ["a", "c"] and len(left_out) == 1


def test_a_name_that_is_not_utf8_is_spelt_in_ascii() -> None:
    rejects = Rejects(5)
    rejects.add("a.tar:\udcff", "broken")
    assert list(rejects.named) == ["a.tar:\\udcff"]


# ---------------------------------------------------------------------------------------------- caption fields


def test_several_caption_fields_are_kept_apart_and_one_is_as_it_was(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("0", png(0), {"short": "a", "long": ["b", "c"]}),
            ("1", png(1), {"long": "a", "short": None}),
            ("2", png(2), {"short": " d "}),
            ("3", png(3), {"short": "", "long": []}),
        ],
    )
    index, left_out = index_of(shard, limit=1, caption_fields=("short", "long"))
    assert list(left_out) == [f"{shard}:3"] and index.names == ["0", "1", "2"]
    assert [index.captions[i] for i in index.pairs] == ["a", "b", "c", "a", "d"]
    assert index.field_of_pair.tolist() == [0, 1, 1, 1, 0]
    assert index.pairs_of(np.array([2, 0])).tolist() == [[4, -1, -1], [0, 1, 2]]
    turned, _ = index_of(shard, limit=1, caption_fields=("long", "short"))
    assert turned.digest != index.digest
    smaller = index.keep_captions(np.array([False, True, True, True]))
    assert smaller.names == ["0", "2"] and smaller.field_of_pair.tolist() == [1, 1, 0]
    one = write_tar(tmp_path / "b.tar", [("0", b"0123456789", {"caption": "a"})])
    by_name, _ = index_of(one, caption_fields=("caption",))
    assert by_name.digest == index_of(one)[0].digest == "bf9f4edc06a499feb1c831de30c6fb75"
    assert not by_name.field_of_pair.any()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_tables_caption_fields_are_its_columns_of_which_a_row_may_lack_some(
    photos: Path, kind: str
) -> None:
    rows = [("0.png", "a", "b"), ("1.png", None, "c"), ("0.png", "d", None), ("2.png", None, None)]
    table = photos / f"t.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "short", "long"), *rows])
    else:
        columns = zip(("image", "short", "long"), zip(*rows, strict=True), strict=True)
        pq.write_table(pa.table({name: list(values) for name, values in columns}), table)
    index, left_out = index_of(table, limit=1, caption_fields=("long", "short"))
    assert index.names == ["0.png", "1.png"] and list(left_out) == [f"{table}:2.png"]
    captions = [index.captions[i] for i in index.pairs]
    assert dict(zip(captions, index.field_of_pair.tolist(), strict=True)) == {"a": 1, "b": 0, "c": 0, "d": 1}
    only_long = write_tar(photos / "x.tar", [("0", png(0), {"long": "e"})])
    both, _ = index_of(table, only_long, limit=1, caption_fields=("long", "short"))
    assert both.field_of_pair[both.first[2] :].tolist() == [0]


def test_a_kept_index_knows_its_fields(kept: Path, tmp_path: Path) -> None:
    samples = [(f"{i}", png(i), {"short": f"s{i}", "long": f"l{i}"}) for i in range(3)]
    shard = write_tar(tmp_path / "a.tar", samples)
    age(shard)
    made, _ = index_of(shard, caption_fields=("short", "long"))
    opened, _ = index_of(shard, caption_fields=("short", "long"))
    assert opened.known_digest == made.digest and opened.field_of_pair.tolist() == [0, 1] * 3
    short, _ = index_of(shard, caption_fields=("short",))
    assert short.captions == ["s0", "s1", "s2"], "other fields, another index"


# ---------------------------------------------------------------------------------------------- kept indexes


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of indexes that takes small and new data, too; shards older than it minds."""
    monkeypatch.setattr("lift_trainer.samples.WORTH_KEEPING", 0)
    monkeypatch.setenv("LIFT_INDEX_DIR", str(tmp_path / "indexes"))
    return tmp_path / "indexes"


def shards(folder: Path, captions: list[list[str]]) -> list[Path]:
    """One tar of 1-caption samples for each list, changed a minute ago."""
    folder.mkdir(exist_ok=True)
    made = []
    for number, texts in enumerate(captions):
        path = folder / f"train-{number:03d}.tar"
        write_tar(path, [(f"{number}{i:03d}", png(i), {"caption": text}) for i, text in enumerate(texts)])
        age(path)
        made.append(path)
    return made


def age(path: Path, seconds: float = 60) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


TEXTS = [["a cat", "a dog"], ["a dog", "a bird", "a cat"], ["a fish"]]


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were really read."""
    names: list[str] = []
    scan = samples_module.scan_source

    def noting(path: Path, shown: str, *rest: object) -> object:
        names.append(path.name)
        return scan(path, shown, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(samples_module, "scan_source", noting)
    return names


def same(a: Index, b: Index) -> bool:
    arrays = ("file", "offset", "size", "first", "pairs", "keys")
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
        and list(a.names) == list(b.names)
        and list(a.captions) == list(b.captions)
        and a.digest == b.digest
    )


def test_a_kept_index_is_the_index_and_reads_no_shard(
    tmp_path: Path, kept: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = shards(tmp_path / "data", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr("lift_trainer.samples.WORTH_KEEPING", 1 << 62)
        fresh, _ = index_of(*paths)
    scanned.clear()
    first, _ = index_of(*paths)
    assert len(scanned) == 3
    again, _ = index_of(*paths)
    assert len(scanned) == 3
    assert same(first, fresh) and same(again, fresh)
    assert again.captions == ["a cat", "a dog", "a bird", "a fish"] and again.pairs.tolist() == [
        0,
        1,
        1,
        2,
        0,
        3,
    ]
    assert again.captions[-1] == "a fish" and again.names[1:3] == ["0001", "1000"]
    assert again.image_bytes(4) == png(2) and again.where(4) == f"{paths[1]}:1002"
    keep = np.array([True, False, True, True])
    assert same(again.keep_captions(keep), fresh.keep_captions(keep))
    assert same(again.take(np.array([1, 4])), fresh.take(np.array([1, 4])))


def test_only_shards_that_changed_are_read_again(tmp_path: Path, kept: Path, scanned: list[str]) -> None:
    paths = shards(tmp_path / "data", TEXTS)
    before, _ = index_of(*paths)
    write_tar(paths[1], [("1000", png(0), {"caption": "a horse"})])
    age(paths[1], 30)
    scanned.clear()
    after, _ = index_of(*paths)
    assert scanned == ["train-001.tar"] and after.digest != before.digest
    assert list(after.captions) == ["a cat", "a dog", "a horse", "a fish"]
    assert len(list((kept / "parts").glob("*.arrow"))) == 3, "the part of the earlier state is deleted"
    # Another choice of the same shards reads none.
    assert list(index_of(paths[2], paths[0])[0].captions) == ["a fish", "a cat", "a dog"]
    assert scanned == ["train-001.tar"]
    # Another field of the same shards is another index.
    with pytest.raises(BadSource, match="no field 'words'"):
        index_of(*paths, limit=1, caption_fields=("words",))


def test_a_shard_changed_a_moment_ago_is_read_each_time(
    tmp_path: Path, kept: Path, scanned: list[str]
) -> None:
    paths = shards(tmp_path / "data", TEXTS)
    paths[0].touch()
    index_of(*paths)
    index_of(*paths)
    assert scanned.count("train-000.tar") == 2 and scanned.count("train-001.tar") == 1


@pytest.mark.parametrize("what", ["index", "part", "cut index", "no part", "no directory"])
def test_a_damaged_or_missing_kept_file_is_made_again(
    tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    paths = shards(tmp_path / "data", TEXTS)
    before, _ = index_of(*paths)
    [whole], parts = kept.glob("*.arrow"), sorted((kept / "parts").glob("*.arrow"))
    names = list(before.names)
    if what == "no directory":
        shutil.rmtree(kept)
    elif what == "no part":
        parts[0].unlink()
    elif what == "cut index":
        whole.write_bytes(whole.read_bytes()[:-100])
    else:
        hurt, value = (parts[0], b"a cat") if what == "part" else (whole, caption_keys(["a cat"]).tobytes())
        if what == "part":
            whole.unlink()
            hurt = next(part for part in parts if value in part.read_bytes())
        data = bytearray(hurt.read_bytes())
        data[data.index(value)] ^= 1
        hurt.unlink()
        hurt.write_bytes(data)
    after, _ = index_of(*paths)
    assert after.digest == before.digest and list(after.names) == names
    said = capsys.readouterr().err
    assert said.count("is not what was written; made again") == (what in ("index", "part", "cut index"))
    assert index_of(*paths)[0].digest == before.digest
    assert capsys.readouterr().err == ""


def test_what_was_left_out_is_said_and_counted_again(
    tmp_path: Path, kept: Path, scanned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tar(tmp_path / "a.tar", [("0", png(0), {"caption": "fine"}), ("1", None, {"caption": "x"})])
    age(path)
    _, first = index_of(path, limit=1)
    _, again = index_of(path, limit=1)
    assert scanned == ["a.tar"] and first == again == {f"{path}:1": "no image (it has json)"}
    assert capsys.readouterr().err.count("left out ") == 2
    with pytest.raises(BadSource, match="more than --max-bad 0"):
        index_of(path, limit=0)


def test_a_table_whose_images_changed_or_were_missing_is_read_again(
    photos: Path, kept: Path, scanned: list[str]
) -> None:
    table = photos / "t.csv"
    table.write_text("image,caption\n0.png,a\n1.png,b\n")
    age(table)
    index_of(table)
    index_of(table)
    assert scanned == ["t.csv"]
    (photos / "1.png").write_bytes(png(1, (8, 9)))
    changed, _ = index_of(table)
    assert scanned == ["t.csv"] * 2 and changed.image_bytes(1) == png(1, (8, 9))
    (photos / "1.png").unlink()
    assert len(index_of(table, limit=1)[0]) == 1
    (photos / "1.png").write_bytes(png(1))
    assert len(index_of(table)[0]) == 2


def test_a_directory_that_cannot_be_written_costs_one_line(
    tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.write_text("in the way")
    paths = shards(tmp_path / "data", TEXTS)
    assert len(index_of(*paths)[0]) == 6
    assert capsys.readouterr().err.count("is not kept in") == 1


BUILDING = """
import sys
import lift_trainer.samples as samples
from lift_trainer.rejects import Rejects

samples.WORTH_KEEPING = 0
print(samples.build_index(sys.argv[1:], Rejects(0)).digest)
"""


def test_processes_that_build_one_index_at_a_time_agree(tmp_path: Path, kept: Path) -> None:
    paths = shards(tmp_path / "data", [[f"caption {n} {i}" for i in range(50)] for n in range(20)])
    command = [sys.executable, "-c", BUILDING, *map(str, paths)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {process.communicate(timeout=120)[0] for process in started}
    assert digests == {f"{index_of(*paths)[0].digest}\n"}
    assert not list(kept.rglob(".tmp-*")) and len(list((kept / "parts").iterdir())) == 20


def test_an_index_over_many_shards_equals_one_over_one(tmp_path: Path, kept: Path) -> None:
    texts = [f"caption {i * i % 97}" for i in range(300)]
    many = shards(tmp_path / "many", [texts[i : i + 7] for i in range(0, 300, 7)])
    index, _ = index_of(*many)
    assert [index.captions[i] for i in index.pairs.tolist()] == texts
    assert list(index.captions) == list(dict.fromkeys(texts))
    np.testing.assert_array_equal(index.keys, caption_keys(list(dict.fromkeys(texts))))
