"""Caption data sets in the shapes in which they are published."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from lift_cache.errors import BadSource
from lift_trainer.evaluators.captioned import name_of, open_captioned
from lift_trainer.evaluators.retrieval import Retrieval
from lift_trainer.rejects import Rejects
from tests.unit.trainer.encoders import Known, numbered


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i:012}.jpg").write_bytes(numbered(i))
    return folder


def coco(path: Path, images: int = 4) -> Path:
    """As `captions_val2017.json`: annotations of an image are not side by side."""
    path.write_text(
        json.dumps(
            {
                "info": {"year": 2017},
                "licenses": [],
                "images": [
                    {"license": 4, "file_name": f"{i:012}.jpg", "height": 8, "width": 8, "id": 100 + i}
                    for i in range(images)
                ],
                "annotations": [
                    {"image_id": 100 + i, "id": 10 * j + i, "caption": f"image {i} caption {j} "}
                    for j in range(6)
                    for i in range(images)
                ],
            }
        )
    )
    return path


def test_coco_gives_each_image_its_captions_in_the_order_of_the_file(tmp_path: Path, images: Path) -> None:
    data = open_captioned([str(coco(tmp_path / "captions_val2017.json"))], Rejects(0), images=images)
    assert list(data.images.names) == [f"{i:012}.jpg" for i in range(4)]
    assert data.captions[2] == [f"image 2 caption {j}" for j in range(6)]


def test_five_captions_count_and_a_missing_image_is_named(tmp_path: Path, images: Path) -> None:
    data = open_captioned([str(coco(tmp_path / "captions.json", 5))], Rejects(0), images=images)
    generator = np.random.default_rng(0)
    texts = {text: generator.normal(size=3).astype(np.float32) for own in data.captions for text in own}
    encoder = Known(generator.normal(size=(4, 3)).astype(np.float32), texts)
    result = Retrieval("coco", data).evaluate(encoder)
    assert result.protocol == "karpathy"
    assert list(result.left_out) == [str(images / f"{4:012}.jpg")]
    assert result.scores["r@1_image_to_text"].items == 4
    assert result.scores["r@1_text_to_image"].items == 20 and len(encoder.asked) == 25
    assert Retrieval("coco", data, "lift").evaluate(encoder).scores["r@1_text_to_image"].items == 4


def test_karpathys_file_gives_the_test_split(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "dataset_coco.json"
    path.write_text(
        json.dumps(
            {
                "dataset": "coco",
                "images": [
                    {
                        "filepath": "images",
                        "filename": f"{i:012}.jpg",
                        "split": ("test", "restval")[i % 2],
                        "sentids": [i],
                        "sentences": [{"raw": f"Image {i}.", "tokens": ["image"], "imgid": i, "sentid": i}],
                    }
                    for i in range(4)
                ],
            }
        )
    )
    data = open_captioned([str(path)], Rejects(0))
    assert data.captions == [["Image 0."], ["Image 2."]]
    assert data.images.image_bytes(1) == numbered(2)


def flickr(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["raw", "sentids", "split", "filename", "img_id"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(i: int, split: str, **changes: str) -> dict[str, str]:
    raw = json.dumps([f'Two "young" guys, {i}.', f"Men {i}"])
    return {
        "raw": raw,
        "sentids": "[0, 1]",
        "split": split,
        "filename": f"{i:012}.jpg",
        "img_id": str(i),
    } | changes


def test_flickrs_table_gives_the_test_split(tmp_path: Path, images: Path) -> None:
    path = flickr(tmp_path / "flickr_annotations_30k.csv", [row(0, "train"), row(1, "test"), row(2, "test")])
    data = open_captioned([str(path)], Rejects(0), images=images)
    assert data.captions == [['Two "young" guys, 1.', "Men 1"], ['Two "young" guys, 2.', "Men 2"]]
    assert list(data.images.names) == [f"{i:012}.jpg" for i in (1, 2)]


def test_a_table_as_for_training_is_one(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"image,caption\n{0:012}.jpg,a\n{1:012}.jpg,b\n{0:012}.jpg,c\n")
    data = open_captioned([str(path)], Rejects(0), images=images)
    assert data.captions == [["a", "c"], ["b"]]


def test_an_empty_caption_is_left_out_by_name_and_an_image_without_any(tmp_path: Path, images: Path) -> None:
    path = coco(tmp_path / "captions.json")
    content = json.loads(path.read_text())
    content["annotations"] = [*content["annotations"][:2], {"image_id": 102, "id": 9, "caption": " "}]
    path.write_text(json.dumps(content))
    rejects = Rejects(2)
    data = open_captioned([str(path)], rejects, images=images)
    assert list(data.images.names) == [f"{i:012}.jpg" for i in range(2)]
    assert rejects.named == {
        f"{path}:{2:012}.jpg": "the caption is empty",
        f"{path}:{3:012}.jpg": "no caption",
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "is not COCO's captions_*.json (images and annotations): Input should be a valid dictionary"),
        ('{"annotations": [], "images": [{"id": 1}]}', "images.0.file_name: Field required"),
        ('{"annotations": [], "images": []}', "no image with a caption in it"),
        (
            '{"annotations": [{"image_id": 1, "caption": "a"}], "images": []}',
            "a caption of image 1, which is not",
        ),
        ('{"images": [{"filename": "a.jpg", "split": "test"}]}', "images.0.sentences: Field required"),
        (
            '{"images": [{"filename": "a", "split": "val", "sentences": []}]}',
            "no image of it is of the split 'test'",
        ),
    ],
)
def test_json_of_another_shape_is_one_clear_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(BadSource) as refused:
        open_captioned([str(path)], Rejects(0))
    assert said in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_tables_and_folders_that_cannot_be_used_are_one_clear_line(tmp_path: Path, images: Path) -> None:
    with pytest.raises(BadSource, match="row 2: raw is not a JSON list"):
        open_captioned(
            [str(flickr(tmp_path / "a.csv", [row(0, "test", raw="Two men")]))], Rejects(0), images=images
        )
    with pytest.raises(BadSource, match="no row of it is of the split 'test'"):
        open_captioned([str(flickr(tmp_path / "b.csv", [row(0, "val")]))], Rejects(0), images=images)
    with pytest.raises(BadSource, match="no such folder; name that of the images of"):
        open_captioned([str(coco(tmp_path / "captions.json"))], Rejects(0), images=tmp_path / "none")
    with pytest.raises(BadSource, match="no such file"):
        open_captioned([str(tmp_path / "none.csv")], Rejects(0))


def test_results_are_named_after_their_data() -> None:
    assert (
        name_of("data/test-{000..003}.tar") == name_of("data/test-*.tar") == name_of("test-000.tar") == "test"
    )
    assert name_of("coco/captions_val2017.json") == "captions_val2017"
    assert name_of("flickr_annotations_30k.csv") == "flickr_annotations_30k"
