"""A small world: coloured squares in a tar, a cache of their captions, and a tower that trains in a blink."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lift_cache import wire
from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.recipe import Recipe
from lift_trainer.config import TrainConfig
from lift_trainer.samples import Index
from lift_trainer.text import TextOrigin, TextVectors, open_texts

SIDE = 16

torch.set_num_threads(1)  # threads would spend longer on meeting each other than on these matrices
TOWER = "vit:width=16,depth=1,heads=2,patch=8"


def png(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def write_tar(path: Path, samples: Sequence[tuple[str, bytes | None, object]]) -> Path:
    """(key, image bytes, JSON) per sample."""
    with tarfile.open(path, "w") as tar:
        for key, image, record in samples:
            members = [("json", json.dumps(record).encode())]
            if image is not None:
                members.insert(0, ("png", image))
            for ext, data in members:
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def open_text(index: Index, *, cache: str | None, **options: Any) -> tuple[TextVectors, Index, TextOrigin]:
    """`open_texts` with one cache, or none for a control without one."""
    texts, index, origins = open_texts(index, caches=[cache] if cache is not None else [], **options)
    return texts[0], index, origins[0]


@dataclass(frozen=True)
class World:
    root: Path
    shard: Path
    cache: Path
    captions: list[str]
    vectors: np.ndarray
    recipe: Recipe

    def config(self, run: str = "run", **changes: object) -> TrainConfig:
        settings: dict[str, object] = {
            "data": [str(self.shard)],
            "cache": str(self.cache),
            "tower": TOWER,
            "image_size": SIDE,
            "batch_size": 8,
            "epochs": 4,
            "warmup": "1",
            "pos_embed": "learned:0.5",
            "run": self.root / run,
            "device": "cpu",
            "tensorboard": False,
            "log_every": 1,
            "workers": 0,
        }
        return TrainConfig.model_validate(settings | changes)

    def flags(self, run: str = "run", **changes: object) -> list[str]:
        """The same as a command line."""
        config = self.config(run, **changes)
        given = config.model_dump(mode="json", exclude_unset=True)
        argv: list[str] = []
        for name, value in given.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                argv.append(flag if value else f"--no-{name.replace('_', '-')}")
            elif isinstance(value, list):
                argv += [flag, *value]
            elif value is not None:
                argv += [flag, str(value)]
        return argv


@pytest.fixture
def world(tmp_path: Path, recipe: Recipe, vectors: Callable[..., np.ndarray]) -> World:
    """28 samples, of which every fourth has two captions."""
    captions = [f"drawing number {i}" for i in range(28)] + [f"also called {i}" for i in range(0, 28, 4)]
    samples = [
        (f"{i:04d}", png(i), {"captions": [f"drawing number {i}"] + [f"also called {i}"] * (i % 4 == 0)})
        for i in range(28)
    ]
    made = vectors(len(captions))
    write_cache(
        tmp_path / "cache", recipe, Encoding(dtype="float16", dimensions=made.shape[1]), captions, made
    )
    return World(
        tmp_path, write_tar(tmp_path / "train-000.tar", samples), tmp_path / "cache", captions, made, recipe
    )


NO_VECTOR = wire.RowError("vector_rejected", "the vector is zero")


class Embedder:
    """Speaks the embedder's protocol over HTTP; the vector of a caption is its length, repeated."""

    def __init__(self, recipe: Recipe) -> None:
        embedder = self
        self.embedded: list[str] = []
        self.refused: set[str] = set()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                encoding = Encoding(dimensions=recipe.dimensions)
                self._answer(
                    {
                        "recipe": recipe.model_dump(mode="json"),
                        "fingerprint": recipe.fingerprint,
                        "encoding": encoding.model_dump(mode="json"),
                        "rows": 0,
                    }
                )

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                captions = [caption or "" for caption in wire.decode_request(body, most_rows=2048).captions]
                embedder.embedded += captions
                errors = {i: NO_VECTOR for i, caption in enumerate(captions) if caption in embedder.refused}
                vectors = np.array([[len(caption)] * recipe.dimensions for caption in captions], np.float32)
                none, three = np.zeros(len(captions), bool), np.full(len(captions), 3)
                answer = wire.Answered(vectors, none, three, none, errors)
                data = wire.encode_answer(answer, recipe=recipe.fingerprint, model=recipe.model)
                self._send(wire.MIME, data)

            def _answer(self, body: dict[str, Any]) -> None:
                self._send("application/json", json.dumps(body).encode())

            def _send(self, kind: str, data: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def embedder(recipe: Recipe) -> Iterator[Embedder]:
    embedder = Embedder(recipe)
    yield embedder
    embedder.close()
