"""An aligned export numbers the samples of a shard as the trainer does."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from lift_cache.tools.aligned import members_digest, shard_samples
from lift_trainer.rejects import Rejects
from lift_trainer.samples import build_index

MEMBERS: list[tuple[str, bytes]] = [
    ("a/0.jpg", b"x" * 10),
    ("a/0.json", json.dumps({"caption": "one"}).encode()),
    ("a/1.json", json.dumps({"caption": "no image"}).encode()),
    ("a/2.txt", b"from text\n"),
    ("a/2.PNG", b"x" * 20),
    ("a/3.jpg", b"x"),
    ("a/3.json", json.dumps({"captions": ["two", " ", 7, "three", "two"]}).encode()),
    ("b/0.webp", b"x" * 30),
    ("b/0.json", json.dumps({"caption": "  one "}).encode()),
    ("b/1.jpg", b"x"),
    ("b/1.txt", b"\xff\xfe"),
    ("b/2.jpg", b"x"),
    ("b/2.json", json.dumps({"captions": ["", None]}).encode()),
    ("b/3.jpeg", b"x" * 40),
    ("b/3.jpg", b"x" * 41),
    ("b/3.cls", b"5"),
    ("b/3.json", b"{not json"),
    ("b/3.txt", "café".encode()),
    ("b/4.tiff", b"x" * 50),
    ("b/4.json", json.dumps({"caption": "last"}).encode()),
]


def test_row_i_of_an_aligned_file_is_sample_i_of_the_trainers_index(tmp_path: Path) -> None:
    shard = tmp_path / "train-000.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = build_index([str(shard)], Rejects(limit=100))
    samples = shard_samples(shard, None)
    assert samples.names == index.names == ["a/0", "a/2", "a/3", "b/0", "b/3", "b/4"]
    np.testing.assert_array_equal(samples.sizes, index.size)
    np.testing.assert_array_equal(samples.first, index.first)
    np.testing.assert_array_equal(samples.keys, index.keys[index.pairs])
    expected = members_digest(index.names, index.size, index.first, index.keys[index.pairs])
    assert samples.members_digest == expected
