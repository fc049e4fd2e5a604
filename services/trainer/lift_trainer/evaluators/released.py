"""Weights that LIFT's authors released, of LIFT and of the CLIP beside it, as one encoder each.

Their code is a fork of open_clip (github.com/Jingfeng0705/LIFT), and so are the names in their files:

    visual.…                         ViT-B/16; LIFT's pools the mean of its patches, CLIP's the class token
    mlp_projector.projector.0, .2    LIFT's head, Linear–GELU–Linear (`text_decoder.…` in older files)
    visual.proj                      CLIP's head, one matrix
    transformer.…, token_embedding.…, positional_embedding, ln_final.…, text_projection      CLIP's text tower

Trained with OpenAI's mean and standard deviation of pixels. Their evaluation (evaluation/evaluate/*.py) normalises with
ImageNet's instead, and cuts the central 224 pixels out of 256: `pixel_stats="reference"`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lift_cache.client import EmbeddingClient
from lift_cache.errors import BadConfig, BadSource, LiftError
from lift_cache.files import digest_file
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_trainer.config import TextShape, TrainConfig
from lift_trainer.evaluators.means import kept_mean, mean_image, mean_vector, sample_of
from lift_trainer.evaluators.result import Subject
from lift_trainer.evaluators.texts import embed_distinct
from lift_trainer.heads import unit_vectors
from lift_trainer.job import choose_device
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index, captions_only
from lift_trainer.text import open_texts
from lift_trainer.text_towers import ClipTextTower, Tokenizer
from lift_trainer.towers import ImageTower

PixelStats = Literal["training", "reference"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS: int = TrainConfig.model_fields["max_pixels"].default
MAX_BAD: int = TrainConfig.model_fields["max_bad"].default
HEAD_WIDTH = 64
"""Of attention, in all of open_clip's ViTs."""
TEXTS = 256
"""At a time."""

State = dict[str, torch.Tensor]

ONCE = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}
"""open_clip's name of a weight → timm's."""
PER_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
UNUSED = {"logit_scale", "logit_bias"}
"""A cosine needs neither."""


def read_weights(path: Path) -> State:
    """The weights of a file, bare or as a training checkpoint holds them; nothing in it is executed.

    Raises:
        BadSource: no such file, not of tensors.
    """
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise BadSource(f"{path}: not safetensors ({error})") from None
    except Exception:  # torch.load has no error of its own: pickle's, zipfile's, RuntimeError, …
        # torch's own text advises to let the file run code.
        raise BadSource(
            f"{path}: not a file of PyTorch weights, or it holds more than tensors and plain values, which is not read "
            "as it could run code"
        ) from None
    for name in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content:
        raise BadSource(f"{path}: no weights by name in it")
    state = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise BadSource(f"{path}: {name!r} is no tensor but {type(value).__name__}")
        plain = name.removeprefix("module.")  # from DistributedDataParallel
        if plain.startswith("text_decoder."):
            plain = plain.replace("text_decoder.", "mlp_projector.", 1)
        state[plain] = value
    return state


@dataclass(frozen=True)
class Model:
    kind: Literal["lift", "clip"]
    tower: ImageTower
    """With OpenAI's pixel statistics."""
    text: ClipTextTower | None
    """CLIP's; LIFT's texts come from the encoder that it was trained with."""


def load_model(path: Path) -> Model:
    """Raises BadSource: unreadable, or of another layout (the first name that does not fit)."""
    state = read_weights(path)
    for name, axes in (("visual.conv1.weight", 4), ("visual.positional_embedding", 2)):
        if name not in state or state[name].ndim != axes:
            raise BadSource(
                f"{path}: no {name} as in open_clip's ViTs, its first is {next(iter(state))}; what can be loaded are "
                "the files that LIFT's authors released, and what their code saves"
            )
    kind: Literal["lift", "clip"] = "lift" if any(k.startswith("mlp_projector.") for k in state) else "clip"
    vit, places = _vit(state, "token" if kind == "clip" else "avg")
    modules: dict[str, nn.Module] = {"vit": vit}
    text = None
    if kind == "lift":
        linear = "mlp_projector.projector.2.weight" not in state
        width = _rows(state, f"mlp_projector.projector.{0 if linear else 2}.weight")
        tower = ImageTower(vit, width, head="linear" if linear else "mlp")
        for part in ("weight", "bias"):
            if linear:
                places[f"mlp_projector.projector.0.{part}"] = f"head.{part}"
            else:
                places |= {f"mlp_projector.projector.{n}.{part}": f"head.{n}.{part}" for n in (0, 2)}
    else:
        width = state["visual.proj"].shape[-1] if "visual.proj" in state else 1
        tower = ImageTower(vit, width, head="linear", pooling="class")
        places["visual.proj"] = "head.weight"
        text = _text(path, state, width)
        modules["text"] = text.transformer
        places |= {name: f"text.{name}" for name in text.transformer.state_dict()}
    modules["head"] = tower.head
    _load(path, state, places, modules)
    return Model(kind, tower.eval().requires_grad_(False), text and text.eval().requires_grad_(False))


def _vit(state: State, pool: Literal["avg", "token"]) -> tuple[VisionTransformer, dict[str, str]]:
    """A ViT of the file's shape, and where each of its weights belongs."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = len(state["visual.positional_embedding"]) - 1  # the class token has a place too
    depth = _depth(state, "visual.transformer")
    hidden = _rows(state, "visual.transformer.resblocks.0.mlp.c_fc.weight")
    vit = VisionTransformer(
        img_size=round(patches**0.5) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=max(1, width // HEAD_WIDTH),
        mlp_ratio=hidden / width,
        num_classes=0,
        global_pool=pool,
        pre_norm=True,
        fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    places = {f"visual.{theirs}": f"vit.{ours}" for theirs, ours in ONCE.items()}
    for block in range(depth):
        places |= {
            f"visual.transformer.resblocks.{block}.{theirs}": f"vit.blocks.{block}.{ours}"
            for theirs, ours in PER_BLOCK.items()
        }
    return vit, places


def _text(path: Path, state: State, dimensions: int) -> ClipTextTower:
    """Raises BadSource: no text tower. BadConfig: open_clip is not installed."""
    positions = state.get("positional_embedding")
    if positions is None or positions.ndim != 2:
        raise BadSource(
            f"{path}: no mlp_projector.projector.0.weight, as LIFT has, and no positional_embedding, as CLIP has"
        )
    context, width = positions.shape
    shape = TextShape(context, width, _depth(state, "transformer"), max(1, width // HEAD_WIDTH))
    return ClipTextTower(dimensions, shape)


def _depth(state: State, transformer: str) -> int:
    blocks = re.compile(rf"{re.escape(transformer)}\.resblocks\.(\d+)\.")
    return max((int(found[1]) + 1 for found in map(blocks.match, state) if found), default=1)


def _rows(state: State, name: str) -> int:
    return len(state[name]) if name in state and state[name].ndim else 1


def _load(path: Path, state: State, places: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
    """Every weight of the file into its place. Raises BadSource: the first that has none, or is of another shape."""
    wanted = {
        f"{part}.{name}": value for part, m in modules.items() for name, value in m.state_dict().items()
    }
    unplaced = next((name for name in state if name not in places and name not in UNUSED), None)
    lacking = next((name for name in places if name not in state), None)
    if unplaced or lacking:
        what = f"{unplaced} has no place in it" if unplaced else f"{lacking} is missing"
        raise BadSource(f"{path}: not the layout of LIFT's released files: {what}")
    with torch.no_grad():
        for name, place in places.items():
            value = state[name].T if name == "visual.proj" else state[name]
            target = wanted[place]
            if value.numel() != target.numel() or value.squeeze().shape != target.squeeze().shape:
                raise BadSource(
                    f"{path}: not the layout of LIFT's released files: {name} is {list(state[name].shape)}, "
                    f"expected {list(target.shape)}"
                )
            target.copy_(value.view(target.shape) if value.is_contiguous() else value)
        if "head.bias" in wanted and "visual.proj" in places:
            wanted["head.bias"].zero_()  # CLIP's matrix has none


def results_folder(path: Path, pixel_stats: PixelStats) -> Path:
    """Beside the file, and another for other pixels: `lift.pt.eval`, `lift.pt.reference.eval`."""
    return path.with_name(f"{path.name}{'.reference' if pixel_stats == 'reference' else ''}.eval")


class _Texts(NamedTuple):
    """Where LIFT's texts come from; nothing, for CLIP's."""

    recipe: Recipe | None = None
    location: str | None = None
    """PATH@SNAPSHOT of a cache; None: the server alone."""


@dataclass(frozen=True)
class ReleasedModel:
    """A released file opened for evaluation."""

    path: Path
    model: Model
    device: torch.device
    pixel_stats: PixelStats = "training"
    cache: str | None = None
    server: str | None = None
    """Embedder of LIFT's captions: for those that the cache lacks, or for all."""
    training: tuple[Index, Rejects] | None = None
    """Some of what the file was trained on, and what is broken of it: for blind scores and distances."""
    batch_size: int = 256
    max_pixels: int = MAX_PIXELS

    @classmethod
    def open(
        cls,
        path: Path,
        device: str = "auto",
        *,
        pixel_stats: PixelStats = "training",
        cache: str | None = None,
        server: str | None = None,
        train_data: Sequence[str] = (),
        batch_size: int = 256,
    ) -> ReleasedModel:
        """
        Args:
            train_data: shards or tables of what the file was trained on, or of a part of it.

        Raises:
            BadSource: not a released file, or what their code saves; training data that cannot be used.
            BadConfig: it is LIFT, and there is neither cache nor server, or they are of another width. CLIP needs none.
            CacheNotFound, CacheDamaged, ServerUnavailable.
        """
        where, model = choose_device(device), load_model(path)
        if model.kind == "lift" and not (cache or server):
            raise BadConfig(
                f"{path} is a LIFT, whose texts are embedded elsewhere (its authors: NV-Embed-v2); give --cache or "
                "--server"
            )
        model.tower.to(where)
        if model.text:
            model.text.to(where)
        if pixel_stats == "reference":
            model.tower.mean.copy_(torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
            model.tower.std.copy_(torch.tensor(IMAGENET_STD).view(3, 1, 1))
        training = None
        if train_data:
            rejects = Rejects(MAX_BAD)
            training = sample_of(build_index(train_data, rejects)), rejects
        opened = cls(path, model, where, pixel_stats, cache, server, training, batch_size)
        _ = opened._texts  # what is wrong with them is said before any image is read
        return opened

    @property
    def directory(self) -> Path:
        """Where the vectors of its captions are kept."""
        return results_folder(self.path, self.pixel_stats)

    @property
    def image_size(self) -> int:
        """Of the views; the reference takes larger ones and cuts out their middle."""
        side = self._side
        return side * 256 // 224 if self.pixel_stats == "reference" else side

    @property
    def _side(self) -> int:
        return int(self.model.tower.vit.patch_embed.img_size[0])

    @cached_property
    def subject(self) -> Subject:
        texts = self._texts
        return Subject(
            name=self.path.stem + (", reference pixels" if self.pixel_stats == "reference" else ""),
            checkpoint=str(self.path),
            snapshot=texts.location.rpartition("@")[2] if texts.location else None,
            recipe=texts.recipe.fingerprint if texts.recipe else None,
        )

    @torch.inference_mode()
    def embed_images(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self._finite("image", self.model.tower(self._cut(views_n3ss)))

    @torch.inference_mode()
    def features(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self._finite("image", self.model.tower.features(self._cut(views_n3ss)))

    def _cut(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        edge = (views_n3ss.shape[-1] - self._side) // 2
        return views_n3ss[..., edge : edge + self._side, edge : edge + self._side].to(self.device)

    @torch.inference_mode()
    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        return self._finite(
            "text", embed_distinct(captions, self._tokens if self.model.text else self._stored)
        )

    def _tokens(self, captions: Sequence[str]) -> torch.Tensor:
        text = self.model.text
        assert text is not None
        tokenizer = Tokenizer(text.shape.context)
        ids = tokenizer(captions).ids
        return torch.cat([text(some.to(self.device)) for some in ids.split(TEXTS)])

    def _stored(self, captions: Sequence[str]) -> torch.Tensor:
        """Unit vectors of distinct, normalised captions, from the cache, else from the server."""
        source = self._texts
        if source.location is None or source.recipe is None:
            assert self.server is not None
            with EmbeddingClient(self.server, priority="bulk") as client:
                stored = client.embed(captions).vectors
                return unit_vectors(torch.from_numpy(stored).float().to(self.device))
        (text,), _, _ = open_texts(
            captions_only(captions),
            caches=[source.location],
            on_missing="embed" if self.server else "error",
            server=self.server,
            overlay=self.directory / f"overlay-{source.recipe.fingerprint[:12]}.safetensors",
        )
        stored = np.ascontiguousarray(text.gather(np.arange(len(captions))))
        return unit_vectors(torch.from_numpy(stored).float().to(self.device))

    @cached_property
    def _texts(self) -> _Texts:
        """Raises BadConfig: of another width than LIFT's head."""
        if self.model.text:
            return _Texts()
        if self.cache is not None:
            reader = CacheReader(self.cache)
            location = f"{reader.path}@{reader.snapshot_id}"
            dimensions, found = reader.dimensions, _Texts(reader.recipe, location)
        else:
            assert self.server is not None
            with EmbeddingClient(self.server) as client:
                info = client.info()
            location, dimensions, found = self.server, info.encoding.dimensions, _Texts(info.recipe)
        own = int(self.model.tower.head.dimensions)  # type: ignore[arg-type]
        if dimensions != own:
            raise BadConfig(
                f"{self.path} makes vectors of {own} dimensions, and those of {location} have {dimensions}; give the "
                "encoder that it was trained with (its authors: NV-Embed-v2)"
            )
        return found

    def _finite(self, kind: str, vectors_nd: torch.Tensor) -> torch.Tensor:
        if not vectors_nd.isfinite().all():
            raise LiftError(f"{self.path}: it makes {kind} vectors that are not finite")
        return vectors_nd

    def mean_image(self) -> torch.Tensor | None:
        """None without training data."""
        return self._kept("image", lambda index, rejects: mean_image(index, self, rejects))

    def mean_text(self) -> torch.Tensor | None:
        """None without training data."""
        return self._kept(
            "text",
            lambda index, _: mean_vector(self.embed_texts([*index.captions.take(np.unique(index.pairs))])),
        )

    def _kept(self, kind: str, compute: Callable[[Index, Rejects], torch.Tensor]) -> torch.Tensor | None:
        if self.training is None:
            return None
        index, rejects = self.training
        made_of = f"{self._weights} {index.digest} {self.subject.recipe or ''}"
        of = hashlib.blake2b(made_of.encode(), digest_size=6).hexdigest()
        path = self.directory / f"mean-{kind}-{of}.safetensors"
        return kept_mean(kind, path, lambda: compute(index, rejects), self.device)

    @cached_property
    def _weights(self) -> str:
        return digest_file(self.path)
