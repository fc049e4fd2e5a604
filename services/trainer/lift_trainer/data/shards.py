"""WebDataset shards that come out byte for byte the same, and appear whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lift_cache.errors import BadConfig
from lift_cache.files import sync_directory, sync_file

DESCRIPTION = "dataset.json"


@dataclass(frozen=True, slots=True)
class Sample:
    key: str
    png: bytes
    captions: tuple[str, ...]
    negatives: Mapping[str, str] = field(default_factory=dict)
    """Captions of the same words that are false, by kind: `swap_att`, `replace_rel`, …"""
    long: str | None = None
    """A caption of several sentences."""

    def record(self) -> dict[str, object]:
        negatives = {"negatives": dict(self.negatives)} if self.negatives else {}
        long = {"long": self.long} if self.long else {}
        return {"captions": list(self.captions), **long, **negatives}


class DatasetWriter:
    """Writes splits beside each other and describes them in `dataset.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits: dict[str, dict[str, int]] = {}
        self.files: dict[str, dict[str, object]] = {}

    def write(self, split: str, samples: Iterable[Sample], per_shard: int = 1000) -> None:
        """`{split}-000.tar` and so on: `key.png` and `key.json` per sample, no clock and no user in them."""
        captions: set[str] = set()
        samples_in, captions_in, tar = 0, 0, None
        try:
            for sample in samples:
                if tar is None:
                    path = self.folder / f"{split}-{samples_in // per_shard:03}.tar"
                    tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                _add(tar, f"{sample.key}.png", sample.png)
                _add(tar, f"{sample.key}.json", json.dumps(sample.record(), ensure_ascii=False).encode())
                captions.update(sample.captions)
                samples_in, captions_in = samples_in + 1, captions_in + len(sample.captions)
                if samples_in % per_shard == 0:
                    tar.close()
                    tar = None
        finally:
            if tar is not None:
                tar.close()
        self.splits[split] = {"samples": samples_in, "captions": captions_in, "unique": len(captions)}
        for path in sorted(self.folder.glob(f"{split}-*.tar")):
            data = path.read_bytes()
            self.files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def write_captions(self, captions: Iterable[str]) -> None:
        """`captions.txt`, one a line: for filling a cache with more than the shards' own captions."""
        data = "".join(f"{caption}\n" for caption in captions).encode()
        (self.folder / "captions.txt").write_bytes(data)
        self.files["captions.txt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def describe(self, **about: object) -> None:
        """`dataset.json`, written last: settings, licence, sources, counts, files."""
        description = {**about, "splits": self.splits, "files": self.files}
        with (self.folder / DESCRIPTION).open("w", encoding="utf-8") as file:
            json.dump(description, file, indent=1, ensure_ascii=False)
            file.write("\n")


def already_there(out: Path, name: str, settings: Mapping[str, object]) -> bool:
    """Whether `out` holds the data set of this name, made with these settings, whole; False where nothing is yet.

    What a data set says of itself beyond them, such as the version of the drawings, may differ.

    Raises `BadConfig` when `out` holds anything else: nothing of a user's is ever overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        description = json.loads((out / DESCRIPTION).read_text())
        there, files = dict(description["settings"]), dict(description["files"])
        held = description["name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadConfig(f"{out}: something else is here; name another folder or remove it") from None
    if held != name:
        raise BadConfig(f"{out}: the data set {held} is here, not {name}; name another folder")
    for setting, wanted in settings.items():
        if there.get(setting) != wanted:
            raise BadConfig(
                f"{out}: made with {setting}={there.get(setting)}, not {wanted}; name another folder"
            )
    for file, about in files.items():
        path = out / file
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            raise BadConfig(f"{path}: missing or cut short; remove {out} and run this again")
    return True


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build in; it gets its name when the block ends well, and goes when it does not.

    Raises `BadConfig` where `out` has no name of its own (`.`).
    """
    if out.name in ("", ".."):
        raise BadConfig(f"{out}: name a new folder for the data")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed run
    part.mkdir(parents=True)
    try:
        yield part
        for path in part.iterdir():
            sync_file(path)
        sync_directory(part)
        part.rename(out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime, uid, gid: 0
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
