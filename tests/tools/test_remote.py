"""Pushing a cache to an S3 server and pulling it back: nothing lost, nothing wrong kept, nothing sent twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from lift_cache import files
from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import (
    BadConfig,
    CacheDamaged,
    CacheFull,
    CacheLocked,
    CacheNotFound,
    EncodingMismatch,
    LiftError,
    RecipeMismatch,
    ServerUnavailable,
)
from lift_cache.keys import caption_keys
from lift_cache.lock import WriterLock
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.snapshot import snapshots_of
from lift_cache.tools.remote import Transfer, pull_snapshot, push_snapshot
from lift_cache.tools.stores import parse_location, redact
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter, Rows

Vectors = Callable[..., np.ndarray]

SECRETS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "not-to-be-shown"}


class S3:
    """moto's S3 server in a process of its own, and its log of requests."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("wb") as sink:
            command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
            self._process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        self.address = f"127.0.0.1:{found[1]}"
        self.files = fs.S3FileSystem(
            access_key="someone",
            secret_key="not-to-be-shown",
            endpoint_override=self.address,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def uri(self, prefix: str, snapshot: str = "") -> str:
        return f"s3://{prefix}{snapshot}?endpoint_override=http://{self.address}"

    def bucket(self, name: str) -> str:
        self.files.create_dir(name)
        return name

    def objects(self, prefix: str) -> dict[str, int]:
        every = fs.FileSelector(prefix, allow_not_found=True, recursive=True)
        return {
            info.path.removeprefix(f"{prefix}/"): info.size
            for info in self.files.get_file_info(every)
            if info.type == fs.FileType.File
        }

    def requests(self) -> list[str]:
        """`PUT /bucket/name`, in the order of their end, without those for parts of an object."""
        lines = re.findall(r'"(?:\x1b\[[\d;m]+)*(\w+ /\S*) HTTP/1\.1', self._log.read_text())
        return [line.partition("?")[0] for line in lines if "?partNumber" not in line]

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = S3(tmp_path_factory.mktemp("s3") / "log")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in {**SECRETS, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    return s3.bucket(re.sub(r"[^a-z0-9]+", "-", request.node.name)[:60].strip("-"))


def names(n: int, start: int = 0) -> list[str]:
    return [f"a caption with the number {i}" for i in range(start, start + n)]


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> Path:
    """200 captions in four segments, one snapshot."""
    path = tmp_path / "cache"
    write_cache(path, recipe, Encoding(dimensions=24), names(200), vectors(200), segment_rows=50)
    return path


def grow(path: Path, captions: list[str], vectors: np.ndarray) -> None:
    n = len(captions)
    with CacheWriter.open(path) as writer:
        writer.put(Rows(captions, vectors, np.ones(n, np.int32), np.zeros(n, bool)))
        writer.note_provenance({"engine": f"made {n}"})
        writer.snapshot()


def content(path: Path) -> dict[bytes, bytes]:
    """Key → vector bytes of the newest snapshot."""
    reader = CacheReader(path)
    rows = np.arange(reader.rows)
    return {
        key.tobytes(): vector.tobytes()
        for key, vector in zip(reader.keys(rows), reader.gather(rows, check=True), strict=True)
    }


def sealed_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "segments").iterdir()}


def command(*argv: str) -> subprocess.Popen[str]:
    code = (
        "import sys\n"
        "from cyclopts import App\n"
        "from lift_cache.terminal import run_command\n"
        "from lift_cache.tools.remote import pull, push\n"
        "app = App()\n"
        "app.command(push)\n"
        "app.command(pull)\n"
        "run_command(app, None, interrupted='run it again')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# There and back


def test_what_was_pushed_is_pulled_byte_for_byte_and_trained_from(
    s3: S3, bucket: str, cache: Path, tmp_path: Path
) -> None:
    pushed = push_snapshot(str(cache), s3.uri(f"{bucket}/some/where"))
    pulled = pull_snapshot(s3.uri(f"{bucket}/some/where"), tmp_path / "copy")
    assert (pushed.files, pushed.files_present) == (pulled.files, pulled.files_present) == (10, 0)
    assert sealed_files(tmp_path / "copy") == sealed_files(cache)
    assert content(tmp_path / "copy") == content(cache)
    report = verify(tmp_path / "copy")
    assert (report.problems, report.segments, report.snapshots) == ([], 4, 1)
    reader = CacheReader(tmp_path / "copy")
    assert reader.captions(reader.lookup(caption_keys(names(3)))) == names(3)


def test_the_manifest_is_the_last_object_of_a_push(s3: S3, bucket: str, cache: Path) -> None:
    push_snapshot(str(cache), s3.uri(f"{bucket}/p"))
    written = [line for line in s3.requests() if line.startswith((f"PUT /{bucket}/p", f"POST /{bucket}/p"))]
    assert len(written) == 4 * 2 + 2 + 3
    assert written[-1].endswith("/manifest.json")


def test_a_pulled_cache_can_be_filled_further(
    s3: S3, bucket: str, cache: Path, tmp_path: Path, vectors: Vectors
) -> None:
    grow(cache, names(20, 200), vectors(20, seed=1))
    (cache / "canaries.json").write_text(json.dumps({"fingerprint": CacheReader(cache).recipe.fingerprint}))
    push_snapshot(str(cache), s3.uri(bucket))
    pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    grow(tmp_path / "copy", names(5, 300), vectors(5, seed=2))
    everything = content(tmp_path / "copy")
    assert len(everything) == 225
    assert content(cache).items() <= everything.items()
    with CacheWriter.open(tmp_path / "copy") as writer:
        assert writer.contains(caption_keys([*names(220), *names(5, 300)])).all()
        assert writer.provenance() == [{"engine": "made 20"}, {"engine": "made 5"}]
    assert (tmp_path / "copy" / "canaries.json").exists()


def test_captions_are_left_out_when_asked_and_come_later(
    s3: S3, bucket: str, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    push_snapshot(str(cache), s3.uri(bucket))
    without = pull_snapshot(s3.uri(bucket), copy, captions=False)
    assert not list(copy.glob("segments/*.captions.arrow"))
    assert content(copy) == content(cache)
    assert verify(copy).problems == []
    with pytest.raises(CacheNotFound, match=r"lacks the captions of 4 segments.*--no-captions"):
        push_snapshot(str(copy), s3.uri(f"{bucket}/other"))
    assert not s3.objects(f"{bucket}/other")
    push_snapshot(str(copy), s3.uri(f"{bucket}/other"), captions=False)
    with pytest.raises(CacheNotFound, match="lacks the captions"):
        pull_snapshot(s3.uri(f"{bucket}/other"), tmp_path / "third")

    later = pull_snapshot(s3.uri(bucket), copy)
    assert (later.files, later.files_present) == (4, without.files)
    assert sealed_files(copy) == sealed_files(cache)


def test_only_what_is_not_there_is_sent(
    s3: S3, bucket: str, cache: Path, tmp_path: Path, vectors: Vectors
) -> None:
    copy = tmp_path / "copy"
    push_snapshot(str(cache), s3.uri(bucket))
    pull_snapshot(s3.uri(bucket), copy)
    for again in (push_snapshot(str(cache), s3.uri(bucket)), pull_snapshot(s3.uri(bucket), copy)):
        assert (again.files, again.bytes, again.files_present) == (0, 0, 10)
    grow(cache, names(20, 200), vectors(20, seed=1))
    before = len(s3.requests())
    grown = push_snapshot(str(cache), s3.uri(bucket))
    sent = {line for line in s3.requests()[before:] if line.startswith(("PUT", "POST"))}
    assert grown.files == 4  # one segment, its captions, two files of the index
    assert len(sent) == 4 + 2  # manifest, provenance
    assert pull_snapshot(s3.uri(bucket), copy).bytes == grown.bytes
    assert len(CacheReader(copy)) == 220


def test_a_dry_run_counts_and_changes_nothing(s3: S3, bucket: str, cache: Path, tmp_path: Path) -> None:
    planned = push_snapshot(str(cache), s3.uri(bucket), dry_run=True)
    assert not s3.objects(bucket)
    done = push_snapshot(str(cache), s3.uri(bucket))
    assert (planned.files, planned.bytes) == (done.files, done.bytes)
    planned = pull_snapshot(s3.uri(bucket), tmp_path / "copy", dry_run=True)
    assert (planned.files, planned.bytes) == (done.files, done.bytes)
    assert not (tmp_path / "copy").exists()


def test_a_snapshot_is_chosen_by_number_or_id(
    s3: S3, bucket: str, cache: Path, tmp_path: Path, vectors: Vectors
) -> None:
    grow(cache, names(20, 200), vectors(20, seed=1))
    first, second = snapshots_of(cache)
    push_snapshot(f"{cache}@1", s3.uri(bucket))
    assert pull_snapshot(s3.uri(bucket), tmp_path / "a").snapshot == first
    push_snapshot(str(cache), s3.uri(bucket))
    assert pull_snapshot(s3.uri(bucket), tmp_path / "b").snapshot == second
    assert pull_snapshot(s3.uri(bucket, f"@{first}"), tmp_path / "c").snapshot == first
    assert pull_snapshot(s3.uri(bucket) + "@1", tmp_path / "d").snapshot == first
    older = pull_snapshot(s3.uri(bucket, "@1"), tmp_path / "b")
    assert (older.snapshot, older.newest, older.others) == (first, False, [second])
    assert CacheReader(tmp_path / "b").snapshot_id == second
    with pytest.raises(CacheNotFound, match=f"no single snapshot '7'; it has {first}, {second}"):
        pull_snapshot(s3.uri(bucket, "@7"), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_directory_that_was_pushed_to_is_a_cache(cache: Path, tmp_path: Path) -> None:
    for target in (str(tmp_path / "plain"), (tmp_path / "uri").as_uri()):
        push_snapshot(str(cache), target)
        path = Path(parse_location(target).path)
        assert content(path) == content(cache)
        assert verify(path).problems == []
        pull_snapshot(target, tmp_path / "back" / path.name)
        assert content(tmp_path / "back" / path.name) == content(cache)


@pytest.mark.parametrize("kind", ["format-1-float16", "format-2-float32"])
def test_caches_of_every_format_are_copied_as_they_are(kind: str, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / kind
    push_snapshot(str(golden), str(tmp_path / "store"))
    pull_snapshot(str(tmp_path / "store"), tmp_path / "copy")
    assert content(tmp_path / "copy") == content(golden)
    assert verify(tmp_path / "copy").problems == []


def test_a_pulled_snapshot_stays_whole_when_the_cache_had_other_vectors_for_its_captions(
    cache: Path, tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    mine = tmp_path / "mine"
    with CacheWriter.open(mine, recipe) as writer:
        writer.put(Rows(names(20), vectors(20, seed=8), np.ones(20, np.int32), np.zeros(20, bool)))
        writer.snapshot()
    before = content(mine)
    push_snapshot(str(cache), str(tmp_path / "store"))
    pulled = pull_snapshot(str(tmp_path / "store"), mine)
    with CacheWriter.open(mine) as writer:  # adopts what was pulled
        writer.snapshot()
    assert len(CacheReader(f"{mine}@{pulled.snapshot}")) == 200
    assert before.items() <= content(mine).items()  # what was there keeps its vector
    assert verify(mine).problems == []


# Killed


def killed_when(process: subprocess.Popen[str], far_enough: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not far_enough():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.kill()
    process.communicate()


@pytest.fixture
def many_segments(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> Path:
    path = tmp_path / "many"
    write_cache(path, recipe, Encoding(dimensions=24), names(600), vectors(600), segment_rows=10)
    return path


@pytest.mark.parametrize("objects", [1, 90])
def test_a_killed_push_is_resumed_with_what_is_missing(
    objects: int, s3: S3, many_segments: Path, tmp_path: Path
) -> None:
    bucket = s3.bucket(f"killed-push-{objects}")
    killed_when(
        command("push", str(many_segments), s3.uri(bucket)), lambda: len(s3.objects(bucket)) >= objects
    )
    time.sleep(0.2)  # what the server had received already
    there = s3.objects(bucket)
    assert not any(name.endswith("manifest.json") for name in there)
    arrived = {name for name in there if "/" in name}
    assert all(there[name] == (many_segments / name).stat().st_size for name in arrived)
    with pytest.raises(CacheNotFound, match=r"no snapshot|not a cache"):
        pull_snapshot(s3.uri(bucket), tmp_path / "early")

    before = len(s3.requests())
    resumed = push_snapshot(str(many_segments), s3.uri(bucket))
    sent = {line.split(" ")[1] for line in s3.requests()[before:] if line.startswith(("PUT", "POST"))}
    assert not sent & {f"/{bucket}/{name}" for name in arrived}
    assert (resumed.files, resumed.files_present) == (122 - len(arrived), len(arrived))
    pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    assert content(tmp_path / "copy") == content(many_segments)


@pytest.mark.parametrize("arrived", [1, 90])
def test_a_killed_pull_is_resumed_with_what_is_missing(
    arrived: int, s3: S3, many_segments: Path, tmp_path: Path
) -> None:
    bucket, copy = s3.bucket(f"killed-pull-{arrived}"), tmp_path / "copy"
    push_snapshot(str(many_segments), s3.uri(bucket))

    def here() -> dict[str, int]:
        found = [*copy.glob("segments/[!.]*"), *copy.glob("snapshots/.tmp-snapshot-*/[!.]*")]
        return {path.name: path.stat().st_size for path in found}

    killed_when(command("pull", s3.uri(bucket), str(copy)), lambda: len(here()) >= arrived)
    assert snapshots_of(copy) == []
    kept = here()
    before = len(s3.requests())
    resumed = pull_snapshot(s3.uri(bucket), copy)
    fetched = {line.rpartition("/")[2] for line in s3.requests()[before:] if line.startswith("GET")}
    assert not fetched & kept.keys()
    assert resumed.files == 122 - len(kept)
    assert resumed.bytes_present == sum(kept.values())
    assert content(copy) == content(many_segments)
    assert verify(copy).problems == []
    assert not list(copy.glob("**/.tmp-*"))


def test_a_push_killed_within_an_object_leaves_no_part_of_it(
    s3: S3, bucket: str, tmp_path: Path, recipe: Recipe
) -> None:
    path, n = tmp_path / "large", 4_000
    wide = np.random.default_rng(0).normal(size=(n, 4096)).astype(np.float32)
    write_cache(
        path, recipe.model_copy(update={"dimensions": 4096}), Encoding(dimensions=4096), names(n), wide
    )
    killed_when(command("push", str(path), s3.uri(bucket)), lambda: s3.log().count("?partNumber") >= 2)
    time.sleep(0.2)
    large = next(file for file in (path / "segments").iterdir() if file.stat().st_size > 24 << 20)
    assert f"segments/{large.name}" not in s3.objects(bucket)
    resumed = push_snapshot(str(path), s3.uri(bucket))
    assert resumed.bytes >= large.stat().st_size
    pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    assert content(tmp_path / "copy") == content(path)


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(s3: S3, bucket: str, many_segments: Path) -> None:
    process = command("push", str(many_segments), s3.uri(bucket))
    while len(s3.objects(bucket)) < 20:
        assert process.poll() is None
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "interrupted: run it again"
    resumed = push_snapshot(str(many_segments), s3.uri(bucket))
    assert 0 < resumed.files < 122


# Damage


def replace_object(s3: S3, name: str, data: bytes) -> None:
    with s3.files.open_output_stream(name, compression=None) as stream:
        stream.write(data)


@pytest.mark.parametrize("which", ["segment", "captions", "index"])
def test_a_damaged_object_is_named_and_not_kept(which: str, s3: S3, cache: Path, tmp_path: Path) -> None:
    bucket, copy = s3.bucket(f"damaged-{which}"), tmp_path / "copy"
    push_snapshot(str(cache), s3.uri(bucket))
    pattern = {
        "segment": r"segments/\w+\.arrow",
        "captions": r".*captions\.arrow",
        "index": r".*/index.*\.arrow",
    }
    name = next(name for name in s3.objects(bucket) if re.fullmatch(pattern[which], name))
    whole = s3.files.open_input_stream(f"{bucket}/{name}", compression=None).read()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    replace_object(s3, f"{bucket}/{name}", bytes(flipped))
    with pytest.raises(CacheDamaged, match=re.escape(f"s3://{bucket}/{name} does not hold")):
        pull_snapshot(s3.uri(bucket), copy)
    assert snapshots_of(copy) == []
    assert not list(copy.rglob(Path(name).name))
    with pytest.raises(CacheNotFound):
        CacheReader(copy)
    replace_object(s3, f"{bucket}/{name}", whole)
    pull_snapshot(s3.uri(bucket), copy)
    assert content(copy) == content(cache)
    assert not list(copy.glob("**/.tmp-*"))


def test_objects_that_are_missing_or_cut_short_are_named_before_anything_is_fetched(
    s3: S3, bucket: str, cache: Path, tmp_path: Path
) -> None:
    push_snapshot(str(cache), s3.uri(bucket))
    name = next(name for name in s3.objects(bucket) if re.fullmatch(r"segments/\w+\.arrow", name))
    replace_object(s3, f"{bucket}/{name}", b"short")
    with pytest.raises(CacheDamaged, match=re.escape(f"{name} has 5 bytes, not ")):
        pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    s3.files.delete_file(f"{bucket}/{name}")
    with pytest.raises(CacheDamaged, match=re.escape(f"{name} is missing (1 such files)")):
        pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("segments/*.arrow"))
    assert push_snapshot(str(cache), s3.uri(bucket)).files == 1
    pull_snapshot(s3.uri(bucket), tmp_path / "copy")


def test_a_manifest_with_other_bytes_is_refused(s3: S3, bucket: str, cache: Path, tmp_path: Path) -> None:
    push_snapshot(str(cache), s3.uri(bucket))
    name = next(name for name in s3.objects(bucket) if name.endswith("manifest.json"))
    text = s3.files.open_input_stream(f"{bucket}/{name}", compression=None).read()
    for wrong in (text.replace(b'"rows": 200', b'"rows": 201'), text[:-9], b"{}", b""):
        replace_object(s3, f"{bucket}/{name}", wrong)
        with pytest.raises(CacheDamaged, match=re.escape(f"s3://{bucket}/{name}")):
            pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_snapshot_cannot_name_files_outside_the_cache(cache: Path, tmp_path: Path) -> None:
    (snapshot,) = snapshots_of(cache)
    folder = cache / "snapshots" / snapshot
    manifest = json.loads((folder / "manifest.json").read_text())
    for wrong in ("../../../outside", "/etc/passwd", ".hidden"):
        manifest["segments"][0]["id"] = wrong
        data = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
        name = f"000009-{hashlib.blake2b(data, digest_size=8).hexdigest()}"
        evil = tmp_path / "evil"
        shutil.copytree(cache, evil)
        shutil.copytree(folder, evil / "snapshots" / name)
        (evil / "snapshots" / name / "manifest.json").write_bytes(data)
        with pytest.raises(CacheDamaged, match="is no file of a cache"):
            pull_snapshot(str(evil), tmp_path / "copy")
        shutil.rmtree(evil)
    assert not (tmp_path / "copy").exists()


def test_damage_at_the_source_is_not_pushed(s3: S3, bucket: str, cache: Path, tmp_path: Path) -> None:
    victim = next(path for path in (cache / "segments").iterdir() if not path.name.endswith("captions.arrow"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-70] + bytes([whole[-70] ^ 1]) + whole[-69:])
    with pytest.raises(CacheDamaged, match=re.escape(str(victim))):
        push_snapshot(str(cache), s3.uri(bucket))
    there = s3.objects(bucket)
    assert f"segments/{victim.name}" not in there
    assert not any(name.endswith("manifest.json") for name in there)
    victim.write_bytes(whole)
    push_snapshot(str(cache), s3.uri(bucket))
    pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    assert content(tmp_path / "copy") == content(cache)


def test_damage_beyond_the_first_chunk_of_a_large_file_is_not_pushed(
    s3: S3, bucket: str, tmp_path: Path, recipe: Recipe
) -> None:
    n, wide = 3_000, recipe.model_copy(update={"dimensions": 4096})
    path = tmp_path / "large"
    drawn = np.random.default_rng(0).normal(size=(n, 4096)).astype(np.float32)
    write_cache(path, wide, Encoding(dimensions=4096), names(n), drawn)
    large = next(file for file in (path / "segments").iterdir() if file.stat().st_size > 16 << 20)
    with large.open("r+b") as file:
        file.seek(-2_000_000, 2)
        file.write(b"wrong")
    with pytest.raises(CacheDamaged, match=re.escape(str(large))):
        push_snapshot(str(path), s3.uri(bucket))
    assert f"segments/{large.name}" not in s3.objects(bucket)


# Refused


def test_another_recipe_or_encoding_is_refused_by_field_both_ways(
    s3: S3, bucket: str, cache: Path, tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    push_snapshot(str(cache), s3.uri(bucket))
    other, narrow = tmp_path / "other", tmp_path / "narrow"
    longer = recipe.model_copy(update={"max_tokens": 64})
    write_cache(other, longer, Encoding(dimensions=24), names(3), vectors(3))
    write_cache(narrow, recipe, Encoding(dimensions=12), names(3), vectors(3))
    there = s3.objects(bucket)
    for copy in (
        lambda: push_snapshot(str(other), s3.uri(bucket)),
        lambda: pull_snapshot(s3.uri(bucket), other),
    ):
        with pytest.raises(RecipeMismatch, match="max_tokens is") as refused:
            copy()
        assert refused.value.field == "max_tokens"
    for copy in (
        lambda: push_snapshot(str(narrow), s3.uri(bucket)),
        lambda: pull_snapshot(s3.uri(bucket), narrow),
    ):
        with pytest.raises(EncodingMismatch, match="dimensions is"):
            copy()
    assert s3.objects(bucket) == there
    assert len(CacheReader(other)) == 3


def test_a_pull_adds_to_a_cache_of_the_same_recipe(
    s3: S3, bucket: str, cache: Path, tmp_path: Path, recipe: Recipe, vectors: Vectors
) -> None:
    mine = tmp_path / "mine"
    write_cache(mine, recipe, Encoding(dimensions=24), names(30, 1000), vectors(30, seed=5))
    push_snapshot(str(cache), s3.uri(bucket))
    pulled = pull_snapshot(s3.uri(bucket), mine)
    assert len(CacheReader(f"{mine}@{pulled.snapshot}")) == 200
    with CacheWriter.open(mine) as writer:
        assert writer.rows == 230
        writer.snapshot()
    assert len(CacheReader(mine)) == 230


def test_a_pull_waits_for_no_writer_and_does_not_disturb_one(
    s3: S3, bucket: str, cache: Path, tmp_path: Path
) -> None:
    push_snapshot(str(cache), s3.uri(bucket))
    copy = tmp_path / "copy"
    copy.mkdir()
    lock = WriterLock(copy)
    try:
        with pytest.raises(CacheLocked, match="has a writer already"):
            pull_snapshot(s3.uri(bucket), copy)
        assert [path.name for path in copy.iterdir()] == ["writer.lock"]
    finally:
        lock.release()
    pull_snapshot(s3.uri(bucket), copy)


def test_a_directory_with_something_else_in_it_is_left_alone(
    s3: S3, bucket: str, cache: Path, tmp_path: Path
) -> None:
    push_snapshot(str(cache), s3.uri(bucket))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for dry_run in (True, False):
        with pytest.raises(BadConfig, match=r"holds cat\.jpg already"):
            pull_snapshot(s3.uri(bucket), tmp_path / "photos", dry_run=dry_run)
    with pytest.raises(BadConfig, match="is a file"):
        pull_snapshot(s3.uri(bucket), tmp_path / "photos" / "cat.jpg")


def test_a_full_disk_is_said_before_anything_is_fetched(
    s3: S3, bucket: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_snapshot(str(cache), s3.uri(bucket))
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(CacheFull, match="needs about"):
        pull_snapshot(s3.uri(bucket), tmp_path / "copy")
    assert not list(tmp_path.glob("copy/**/*.arrow"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3://localhost:9000/bucket", "names no bucket.*endpoint_override=host:port"),
        ("s3://bucket/p?regoin=x", "unknown option 'regoin'; s3:// takes region"),
        ("ftp://host/p", "no such kind of store; use s3://"),
        ("file://host/p", "without host"),
        ("s3://[bad/p", "is not a URI"),
    ],
)
def test_a_uri_that_cannot_be_used_says_why(uri: str, said: str, cache: Path) -> None:
    with pytest.raises(BadConfig, match=said) as refused:
        push_snapshot(str(cache), uri)
    assert "\n" not in str(refused.value)


def test_a_store_without_bucket_snapshot_or_cache_says_so(
    s3: S3, bucket: str, cache: Path, tmp_path: Path
) -> None:
    for act in (
        lambda: push_snapshot(str(cache), s3.uri("no-such-bucket/p")),
        lambda: pull_snapshot(s3.uri("no-such-bucket/p"), tmp_path / "copy"),
    ):
        with pytest.raises(CacheNotFound, match="there is no bucket 'no-such-bucket'"):
            act()
    for uri in (s3.uri(bucket), str(tmp_path / "nothing")):
        with pytest.raises(CacheNotFound, match="is not a cache"):
            pull_snapshot(uri, tmp_path / "copy")
    with pytest.raises(CacheNotFound, match="is not a cache"):
        push_snapshot(str(tmp_path / "nothing"), s3.uri(bucket))
    assert not (tmp_path / "copy").exists()


def answering(reply: bytes) -> tuple[str, socket.socket]:
    """A server that says the same to everyone; nothing at all for an empty reply."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        held = []
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                break
            held.append(connection)
            if reply:
                connection.recv(65_536)
                connection.sendall(reply)
                connection.close()
        for connection in held:
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}", listening


DENIED = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: 110\r\n\r\n"
    + b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'.ljust(
        110
    )
)


def test_no_permission_says_which_credentials_to_set_and_shows_none(cache: Path) -> None:
    address, server = answering(DENIED)
    uri = f"s3://someone:not-to-be-shown@bucket/p?endpoint_override=http://{address}"
    with server, pytest.raises(BadConfig, match=r"with these credentials.*AWS_ACCESS_KEY_ID") as refused:
        push_snapshot(str(cache), uri)
    assert "not-to-be-shown" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_a_store_that_does_not_answer_is_given_up_in_bounded_time(
    how: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_cache.tools.stores.STALLED_SECONDS", 1)
    monkeypatch.setattr("lift_cache.tools.stores.ATTEMPTS", 2)
    address, server = answering(b"")
    if how == "closed":
        server.close()
    uri = f"s3://bucket/p?endpoint_override=http://{address}"
    for act in (lambda: push_snapshot(str(cache), uri), lambda: pull_snapshot(uri, tmp_path / "copy")):
        began = time.monotonic()
        with pytest.raises(
            ServerUnavailable, match=r"s3://bucket/p cannot be listed.*check the address"
        ) as refused:
            act()
        assert time.monotonic() - began < 15
        assert "\n" not in str(refused.value)
    server.close()


def test_secrets_in_a_uri_are_never_shown(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secret = "wJalr%2FXUtn"
    for uri in (
        f"s3://AKIA:{secret}@bucket/p?endpoint_override=127.0.0.1:1&scheme=http",
        f"s3://AKIA:{secret}@bucket/p?unknown=1",
        f"s3://AKIA:{secret}@",
        "s3://AKIA:wJalr/XUtn@bucket/p",
    ):
        with pytest.raises(LiftError) as refused:
            push_snapshot(str(cache), uri)
        assert "XUtn" not in str(refused.value)
        assert "wJalr" not in str(refused.value)
    assert "XUtn" not in repr(parse_location(f"s3://AKIA:{secret}@bucket/p"))
    assert redact("s3://AKIA:wJalr/XUtn@bucket/p@3") == "s3://***@3"
    assert "XUtn" not in "".join(capfd.readouterr())


def test_the_command_answers_in_json_and_fails_in_one_line(
    s3: S3, bucket: str, cache: Path, tmp_path: Path
) -> None:
    said, _ = command("push", str(cache), s3.uri(bucket)).communicate(timeout=60)
    pushed = Transfer(**json.loads(said))
    assert (pushed.files, pushed.rows, pushed.target) == (10, 200, f"s3://{bucket}")
    said, _ = command("pull", s3.uri(bucket), str(tmp_path / "copy"), "--no-captions").communicate(timeout=60)
    assert json.loads(said)["files"] == 6
    failing = command("pull", s3.uri(bucket, "@12"), str(tmp_path / "other"))
    _, error = failing.communicate(timeout=60)
    assert failing.returncode == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
