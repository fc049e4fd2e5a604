"""Nearest images of a caption, for several checkpoints: images embedded once and kept, the caption now.

caption → embedder (or cache, tokens, hashed n-grams) → transform → head → y ┐
images → tower → x, kept in RUN/eval ────────────────────────────────────────┴→ the nearest
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lift_cache.client import EmbeddingClient
from lift_cache.errors import EncodingMismatch, LiftError, MissingCaptions, RecipeMismatch
from lift_cache.files import write_atomic
from lift_cache.keys import normalise
from lift_trainer.checkpoint import MODEL
from lift_trainer.evaluators.images import encode
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index

PATIENCE = 5.0
"""Seconds to wait for an embedder that is away or busy: somebody sits before the page."""


@dataclass(frozen=True)
class Near:
    image: int
    """Sample of the index."""
    cosine: float


class Side:
    """One checkpoint with the vectors of all images."""

    def __init__(
        self, name: str, trained: TrainedRun, index: Index, clients: Sequence[EmbeddingClient]
    ) -> None:
        """Embeds the images, unless their vectors are kept from another time.

        Args:
            clients: of embedders; the one that has the run's recipe is asked. None: the run's cache must have it.

        Raises:
            RecipeMismatch: embedders, but none of the run's recipe (which field).
            EncodingMismatch: that embedder keeps vectors of another width.
            BadSource: no readable image, or too many broken ones.
            ServerUnavailable, BadConfig: as `EmbeddingClient.info`.
        """
        self.name = name
        self._trained = trained
        self._client = _client_of(trained, clients)
        self._x_nd, self._image = _kept_images(trained, index)

    @property
    def images(self) -> int:
        return len(self._image)

    def nearest(self, caption: str, k: int) -> list[Near]:
        """The k images of the highest cosine, best first.

        Raises:
            BadCaption: empty, or the embedder has no vector for it.
            MissingCaptions: there is no embedder, and the cache lacks it.
            ServerUnavailable: the embedder is away.
        """
        cosines, best = (self._x_nd @ self._text(normalise(caption))).topk(min(k, self.images))
        return [
            Near(int(self._image[place]), cosine)
            for place, cosine in zip(best.tolist(), cosines.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def _text(self, caption: str) -> torch.Tensor:
        """Unit vector, float32 [D]."""
        if self._client is None:
            try:
                return self._trained.embed_texts([caption])[0]
            except MissingCaptions:
                raise MissingCaptions(
                    "its cache has no such caption; name a running embedder by --server to ask for any"
                ) from None
        stored = torch.from_numpy(self._client.embed([caption]).vectors).to(self._trained.device)
        return self._trained.texts.project(stored)[0]


def _client_of(trained: TrainedRun, clients: Sequence[EmbeddingClient]) -> EmbeddingClient | None:
    recipe = trained.checkpoint.state.recipe
    if recipe is None or not clients:  # a run whose texts need no encoder asks none
        return None
    refused: RecipeMismatch | None = None
    for client in clients:
        info = client.info()
        try:
            recipe.require_same(info.recipe, here=str(trained.run), there=client.url)
        except RecipeMismatch as error:
            refused = refused or error
            continue
        if (served := info.encoding.dimensions) != (width := _stored_width(trained)):
            raise EncodingMismatch(
                f"{client.url} answers {served} dimensions and {trained.run} was trained on {width}; serve from a "
                "cache with the same encoding"
            )
        return client
    assert refused is not None
    raise refused


def _stored_width(trained: TrainedRun) -> int:
    """Of the vectors before the transform."""
    mean_d = trained.transform.mean_d if trained.transform else None
    return trained.checkpoint.state.texts[0].dimensions if mean_d is None else len(mean_d)


def _kept_images(trained: TrainedRun, index: Index) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors of readable images, float32 [n, D] on the device, and their samples, int64 [n]."""
    checkpoint = trained.checkpoint
    path = (
        trained.run / "eval" / f"images-{checkpoint.state.files[MODEL][:12]}-{index.digest[:12]}.safetensors"
    )
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        tensors = load_file(path)
        return tensors["vectors"].to(trained.device), tensors["samples"].numpy()
    x_nd, samples = encode(index, trained, Rejects(checkpoint.state.config.max_bad))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({"vectors": x_nd.cpu().contiguous(), "samples": torch.from_numpy(samples)}))
    return x_nd, samples


def _answer(side: Side, caption: str, k: int) -> list[Near] | LiftError:
    try:
        return side.nearest(caption, k)
    except LiftError as error:
        return error


class Nearest:
    """Several sides on the same images; safe to ask from several threads."""

    def __init__(self, sides: Sequence[Side], index: Index) -> None:
        self.sides, self.index = sides, index
        self._one_at_a_time = threading.Lock()

    def ask(self, caption: str, k: int) -> list[list[Near] | LiftError]:
        """For each side what it finds, or why it cannot answer (as `Side.nearest`)."""
        with self._one_at_a_time:
            return [_answer(side, caption, k) for side in self.sides]

    def captions(self, sample: int) -> list[str]:
        """Of an image."""
        first, stop = self.index.first[sample : sample + 2]
        return [self.index.captions[int(pair)] for pair in self.index.pairs[first:stop]]


def open_nearest(
    runs: Sequence[tuple[str, TrainedRun]], index: Index, servers: Sequence[str], say: Callable[[str], None]
) -> Nearest:
    """Raises as `Side`."""
    clients = [EmbeddingClient(url, timeout=60, patience=PATIENCE) for url in servers]
    sides = []
    for name, trained in runs:
        sides.append(Side(name, trained, index, clients))
        say(f"{name}: {sides[-1].images:,} images")
    return Nearest(sides, index)
