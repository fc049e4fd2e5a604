"""The sample index: what becomes a sample, what is named and left out, and what its digest stands for."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lift_cache.errors import BadSource
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
