"""Every setting of a training run, once: flag, YAML field, `LIFT_*` variable and default.

The defaults are the paper's (arXiv 2506.04209): ViT-B/16 at 224 with average pooling, a
Linear–GELU–Linear head of the text's width, AdamW 1e-3 with weight decay 0.2, cosine schedule, 500 steps
of warm-up at batch 16,384, clip 1.0, bf16. One is not: the position embedding starts with a standard
deviation of 0.5 instead of CLIP's width^-0.5 (bench/posembed.py says why).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lift_cache.errors import BadConfig

HeadName = Literal["none", "linear", "mlp", "gated", "sharelock"]
Start = Literal["scratch", "pretrained", "frozen"]
Pooling = Literal["mean", "class", "class+mean"]
LossName = Literal["infonce", "cosine", "siglip"]
Mask = Literal["none", "caption", "caption+image"]
OptimizerName = Literal["adamw", "adam", "lion"]
Spared = Literal["1d", "1d+positions", "nothing"]

DATA = Group("Data", sort_key=1)
TEXT = Group("Text", sort_key=2)
MODEL = Group("Image tower", sort_key=3)
LOSS = Group("Loss and optimiser", sort_key=4)
SCALE = Group("Memory and speed", sort_key=5)
WATCH = Group("During training", sort_key=6)
RUN = Group("Run", sort_key=7)


def _flag(group: Group) -> Parameter:
    return Parameter(group=group, negative_iterable=(), negative_none=())


def _paths(kind: Any, text: str, *, delimiter: str | None = None) -> list[str]:
    """How a variable of the environment names several: as PATH does."""
    return text.split(os.pathsep)


def _several(group: Group) -> Parameter:
    """A flag that is given once for each of several."""
    return Parameter(group=group, negative_iterable=(), env_var_split=_paths)


def listed(group: Group, help: str | None = None) -> Parameter:
    """A flag that takes one or more values at once."""
    return Parameter(group=group, consume_multiple=True, negative_iterable=(), help=help)


def _switch(group: Group) -> Parameter:
    return Parameter(group=group)


class TrainConfig(BaseModel):
    """A training run. Equal configurations (apart from `RESUMABLE`) over equal data give equal weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[list[str], listed(DATA)] = Field(
        min_length=1,
        description="WebDataset tars, or CSV/TSV/Parquet tables: files, globs, {000..010} braces.",
    )
    images: Annotated[Path | None, _flag(DATA)] = Field(
        None, description="Folder that a table's image paths start from. Default: the table's own folder."
    )
    image_field: Annotated[str, _flag(DATA)] = Field(
        "image", description="Column of a table that names the image."
    )
    caption_field: Annotated[list[str], _several(DATA)] = Field(
        [],
        description="Field of the samples' JSON, or column of a table, that holds the caption or captions. "
        "Several (short ones and long ones): one flag each.",
    )
    caption_mix: Annotated[list[float], listed(DATA)] = Field(
        [], description="How often each --caption-field is drawn, such as 0.5 0.5. Default: equally often."
    )
    captions: Annotated[Literal["one", "all"], _flag(DATA)] = Field(
        "one", description="Of an image's captions, one is drawn each epoch, or all are positives."
    )
    most_captions: Annotated[int, _flag(DATA)] = Field(
        5, gt=0, description="With --captions all: so many at most, drawn each epoch."
    )
    max_bad: Annotated[int, _flag(DATA)] = Field(
        100, ge=0, description="Stop when more samples than this are broken; each one is named and left out."
    )
    max_pixels: Annotated[int, _flag(DATA)] = Field(
        50_000_000,
        gt=0,
        description="An image with more pixels counts as broken: decoding it could fill the memory.",
    )

    cache: Annotated[list[str], _several(TEXT)] = Field(
        [],
        description="Cache of caption embeddings: PATH (newest snapshot) or PATH@ID. Several: one flag each; "
        "every one of them gives each caption one more vector as a positive.",
    )
    text: Annotated[Literal["cache", "aligned"], _flag(TEXT)] = Field(
        "cache",
        description="aligned: --cache is a folder written by lift-cache export aligned, in the order of --data.",
    )
    text_tower: Annotated[Literal["cached", "clip"], _flag(TEXT)] = Field(
        "cached", description="clip: train CLIP's text transformer with the images; no cache is used."
    )
    text_shape: Annotated[str, _flag(TEXT)] = Field(
        "context=77,width=512,depth=12,heads=8",
        description="Of --text-tower clip. context: tokens of a caption.",
    )
    text_head: Annotated[HeadName, _flag(TEXT)] = Field(
        "none", description="Trained on top of the cached vectors; none: they are the targets as they are."
    )
    text_negatives: Annotated[int, _flag(TEXT)] = Field(
        0, ge=0, description="Further captions per step as negatives, drawn from all training captions."
    )
    on_missing: Annotated[Literal["error", "skip", "embed"], _flag(TEXT)] = Field(
        "error", description="Captions that the cache lacks: stop, leave them out, or embed them at --server."
    )
    server: Annotated[str | None, _flag(TEXT)] = Field(
        None,
        description="Address of the embedder, for --on-missing embed. It makes vectors of one recipe, so of several "
        "caches all but one have to be whole.",
    )
    text_transform: Annotated[str, _flag(TEXT)] = Field(
        "none", description="none | center | whiten:K | whiten:K,shrink=A. Fitted to the training captions."
    )
    text_control: Annotated[Literal["none", "permuted", "ngram-hash", "word-hash"], _flag(TEXT)] = Field(
        "none",
        description="Train on a control: vectors dealt to the wrong captions, or, without a cache, hashed word "
        "1-3-grams or single words.",
    )

    tower: Annotated[str, _flag(MODEL)] = Field(
        "vit_base_patch16_clip_224",
        description="A timm vision transformer, or vit:width=128,depth=4,heads=4,patch=8. Trained from scratch.",
    )
    image_size: Annotated[int, _flag(MODEL)] = Field(224, gt=0, description="Side of the input, in pixels.")
    start: Annotated[Start, _flag(MODEL)] = Field(
        "scratch",
        description="Fresh weights; or timm's of that name, trained on (pretrained) or kept (frozen).",
    )
    weights: Annotated[Path | None, _flag(MODEL)] = Field(
        None, description="File with those weights, instead of fetching them."
    )
    pooling: Annotated[Pooling, _flag(MODEL)] = Field(
        "mean",
        description="What the head sees: the mean of the patches, the class token, or both side by side.",
    )
    head: Annotated[HeadName, _flag(MODEL)] = Field(
        "mlp", description="From the pooled states into the common space."
    )
    init: Annotated[Literal["timm", "open_clip"], _flag(MODEL)] = Field(
        "timm", description="Whose distribution fresh weights are drawn from."
    )
    dimensions: Annotated[int | None, _flag(MODEL)] = Field(
        None, gt=0, description="Width of the common space. Default: that of the side that has no head."
    )
    keep_features: Annotated[bool, _switch(MODEL)] = Field(
        False, description="Compute the states of a frozen tower once, without crops, and train on these."
    )
    pos_embed: Annotated[str, _flag(MODEL)] = Field(
        "learned:0.5",
        description="learned:STD (a number or width^-0.5) or fixed sincos (sincos:RMS rescales it).",
    )

    loss: Annotated[LossName, _flag(LOSS)] = Field(
        "infonce", description="Contrastive in both directions, SigLIP's sigmoid, or 1 - cosine of the pairs."
    )
    mask: Annotated[Mask, _flag(LOSS)] = Field(
        "none",
        description="What is no negative: an equal caption elsewhere in the batch; also the same image once more.",
    )
    scale: Annotated[float | None, _flag(LOSS)] = Field(
        None,
        ge=1,
        le=100,
        description="1 / temperature at the start. Default: 1/0.07 (infonce), 10 (siglip).",
    )
    bias: Annotated[float | None, _flag(LOSS)] = Field(
        None, description="Of siglip at the start. Default: -10."
    )
    learn_scale: Annotated[bool, _switch(LOSS)] = Field(
        True, description="Train the scale (and siglip's bias)."
    )
    batch_size: Annotated[int, _flag(LOSS)] = Field(16_384, gt=0, description="Images per step.")
    epochs: Annotated[int, _flag(LOSS)] = Field(1, gt=0, description="Passes over the images.")
    steps: Annotated[int | None, _flag(LOSS)] = Field(
        None, gt=0, description="Length of the run in steps, instead of epochs."
    )
    lr: Annotated[float, _flag(LOSS)] = Field(1e-3, gt=0, description="Peak learning rate.")
    lr_scaling: Annotated[Literal["none", "sqrt", "linear"], _flag(LOSS)] = Field(
        "none", description="Scale the learning rate with batch-size / base-batch."
    )
    base_batch: Annotated[int, _flag(LOSS)] = Field(
        16_384, gt=0, description="Batch size at which --lr holds."
    )
    warmup: Annotated[str, _flag(LOSS)] = Field(
        "500", description='Steps ("500"), samples ("50000s") or a share ("5%%").'
    )
    optimizer: Annotated[OptimizerName, _flag(LOSS)] = Field(
        "adamw", description="adam: with weight decay as a part of the gradient."
    )
    betas: Annotated[tuple[float, float] | None, _flag(LOSS)] = Field(
        None, description="Default: 0.9 0.98 (adamw), 0.9 0.999 (adam), 0.9 0.99 (lion)."
    )
    eps: Annotated[float | None, _flag(LOSS)] = Field(
        None, gt=0, description="Default: 1e-6 (adamw), 1e-8 (adam)."
    )
    weight_decay: Annotated[float, _flag(LOSS)] = Field(0.2, ge=0, description="See --spared.")
    spared: Annotated[Spared | None, _flag(LOSS)] = Field(
        None,
        description="What does not decay: 1-d parameters (default), position embeddings too, nothing (adam).",
    )
    clip: Annotated[float, _flag(LOSS)] = Field(1.0, ge=0, description="Largest gradient norm; 0: any.")

    gradient_cache: Annotated[int | None, _flag(SCALE)] = Field(
        None,
        gt=0,
        description="Images at a time on each device, in two passes: the exact loss of the whole batch in the "
        "memory of so few.",
    )
    gradient_checkpointing: Annotated[bool, _switch(SCALE)] = Field(
        False, description="Recompute activations in the backward pass instead of keeping them."
    )
    compile: Annotated[bool, _switch(SCALE)] = Field(False, description="torch.compile the towers.")
    shuffle_block: Annotated[int, _flag(SCALE)] = Field(
        256, gt=0, description="Consecutive samples that are read together."
    )
    shuffle_buffer: Annotated[int, _flag(SCALE)] = Field(
        4096, gt=0, description="Blocks that are mixed; data that fit are shuffled completely."
    )
    shard_cache: Annotated[Path | None, _flag(SCALE)] = Field(
        None, description="Folder for pieces of s3:// shards. Default: ~/.cache/lift/shards."
    )
    shard_cache_gib: Annotated[float | None, _flag(SCALE)] = Field(
        None, gt=0, description="Its bound. Default: 64."
    )

    eval_data: Annotated[list[str], listed(WATCH)] = Field(
        [], description="Held-out shards or tables, scored while the run goes on."
    )
    eval_every: Annotated[int | None, _flag(WATCH)] = Field(
        None, gt=0, description="Steps between two scorings. Default with --eval-data: every 1,000."
    )
    evaluators: Annotated[list[str], listed(WATCH)] = Field(
        [],
        description="Further scores: retrieval (of the held-out data), or a suite file as for lift-eval suite.",
    )
    best: Annotated[str, _flag(WATCH)] = Field(
        "loss",
        description="Held-out score by which the best checkpoint is kept; of a suite TASK-NAME-PROTOCOL/SCORE, as "
        "shapes-test-two-way/mean.",
    )
    log_every: Annotated[int, _flag(WATCH)] = Field(10, gt=0, description="Steps between lines of metrics.")
    tensorboard: Annotated[bool, _switch(WATCH)] = Field(True, description="Also write TensorBoard files.")
    wandb: Annotated[str | None, _flag(WATCH)] = Field(
        None, description="Also log to this project of Weights & Biases."
    )

    run: Annotated[Path, _flag(RUN)] = Field(
        Path("runs/lift"), description="Directory of the run. The same command continues what is in it."
    )
    seed: Annotated[int, _flag(RUN)] = Field(0, ge=0, description="Order, augmentation and initial weights.")
    precision: Annotated[Literal["bf16", "fp32"], _flag(RUN)] = Field("bf16", description="bf16: autocast.")
    device: Annotated[str, _flag(RUN)] = Field(
        "auto", description="cpu, cuda, cuda:1, mps; auto: cuda where there is one."
    )
    workers: Annotated[int | None, _flag(RUN)] = Field(
        None,
        ge=0,
        description="Processes that read and decode. Default: by the machine; they change no result.",
    )
    cache_images: Annotated[float, _flag(RUN)] = Field(
        2.0, ge=0, description="Keep decoded images in memory when all fit into this many GiB; 0: never."
    )
    checkpoint_every: Annotated[int, _flag(RUN)] = Field(
        1_000, gt=0, description="Steps between checkpoints."
    )
    keep: Annotated[int, _flag(RUN)] = Field(2, gt=0, description="Checkpoints that are kept.")

    @field_validator("cache", "caption_field", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        if value is None:
            return []
        return [value] if isinstance(value, str | Path) else value

    @field_validator("text_shape")
    @classmethod
    def _text_shape(cls, value: str) -> str:
        TextShape.parse(value)
        return value

    @field_validator("tower")
    @classmethod
    def _tower(cls, value: str) -> str:
        if value.startswith("vit:"):
            ViTShape.parse(value)
        return value

    @field_validator("pos_embed")
    @classmethod
    def _pos_embed(cls, value: str) -> str:
        PosEmbed.parse(value)
        return value

    @field_validator("text_transform")
    @classmethod
    def _text_transform(cls, value: str) -> str:
        TransformSpec.parse(value)
        return value

    @field_validator("warmup", mode="before")
    @classmethod
    def _warmup(cls, value: object) -> str:
        Span.parse(str(value))
        return str(value)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        joint = self.text_tower == "clip"
        if not joint and self.text_control not in ("ngram-hash", "word-hash") and not self.cache:
            raise ValueError(
                "--cache is missing: the directory that lift-embed filled (or use --text-control ngram-hash or "
                "word-hash, or --text-tower clip)"
            )
        if joint:
            for flag, value, plain in (
                ("--text-transform", self.text_transform, "none"),
                ("--text-head", self.text_head, "none"),
                ("--text-control", self.text_control, "none"),
                ("--text", self.text, "cache"),
            ):
                if value != plain:
                    raise ValueError(
                        f"{flag} {value} is about cached vectors; leave it out with --text-tower clip"
                    )
        if self.on_missing == "embed" and not self.server:
            raise ValueError("--on-missing embed needs --server URL, the address of lift-embed serve")
        if self.text == "aligned" and (len(self.cache) > 1 or self.on_missing == "embed"):
            raise ValueError("--text aligned takes one --cache, and --on-missing error or skip")
        if self.keep_features and self.start != "frozen":
            raise ValueError(
                "--keep-features needs --start frozen: states of a tower that trains do not stay"
            )
        if self.gradient_cache and self.head == "sharelock":
            raise ValueError(
                "--gradient-cache runs the image side in parts, and the batch norm of --head sharelock needs the whole "
                "batch; leave one of them out"
            )
        if self.start == "scratch" and self.weights is not None:
            raise ValueError("--weights needs --start pretrained or frozen")
        if self.caption_mix and len(self.caption_mix) != len(self.caption_field):
            raise ValueError(
                f"--caption-mix has {len(self.caption_mix)} numbers for {len(self.caption_field)} of --caption-field"
            )
        if self.caption_mix and not (min(self.caption_mix) >= 0 < sum(self.caption_mix)):
            raise ValueError("--caption-mix: shares of 0 or more, not all 0")
        if (self.eval_every or self.evaluators) and not self.eval_data:
            raise ValueError("--eval-every and --evaluators need --eval-data, the held-out shards")
        return self

    def saved(self) -> dict[str, Any]:
        """JSON form, for `config.json` and checkpoints."""
        return self.model_dump(mode="json")


RESUMABLE = frozenset(
    "data images image_field cache on_missing server max_bad weights shard_cache shard_cache_gib run device workers "
    "cache_images checkpoint_every keep eval_data eval_every evaluators best log_every tensorboard wandb".split()
)
"""Fields that may differ when a run is continued: they say where things lie or how often to report. What
they lead to (sample index, snapshot) is compared by digest instead."""


@dataclass(frozen=True)
class ViTShape:
    """`vit:width=128,depth=4,heads=4,patch=8`."""

    width: int
    depth: int
    heads: int
    patch: int

    @classmethod
    def parse(cls, text: str) -> ViTShape:
        """Raises ValueError."""
        pairs = [part.partition("=") for part in text.removeprefix("vit:").split(",")]
        values = {name.strip(): int(value) for name, _, value in pairs if value.strip().isdecimal()}
        if set(values) != set(cls.__dataclass_fields__) or len(pairs) != len(values) or 0 in values.values():
            raise ValueError(f"{text!r} is not of the form vit:width=128,depth=4,heads=4,patch=8")
        shape = cls(**values)
        if shape.width % shape.heads or shape.width % 4:
            raise ValueError(f"{text!r}: the width must be a multiple of the number of heads and of 4")
        return shape


@dataclass(frozen=True)
class TextShape:
    """Of CLIP's text transformer, `context=77,width=512,depth=12,heads=8`: those beside ViT-B/16."""

    context: int = 77
    """Tokens of a caption, with start and end; longer ones are cut off. The paper's long captions have 323."""
    width: int = 512
    depth: int = 12
    heads: int = 8

    @classmethod
    def parse(cls, text: str) -> TextShape:
        """What is left out is as beside ViT-B/16. Raises ValueError."""
        pairs = [part.partition("=") for part in text.split(",")]
        values = {name.strip(): int(value) for name, _, value in pairs if value.strip().isdecimal()}
        if not set(values) <= set(cls.__dataclass_fields__) or len(values) != len(pairs):
            raise ValueError(f"{text!r} is not of the form context=77,width=512,depth=12,heads=8")
        return cls(**values)

    def __post_init__(self) -> None:
        if self.context < 3 or min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"text tower {self}: the context must be at least 3 and the width a multiple of the heads"
            )


@dataclass(frozen=True)
class PosEmbed:
    """`learned:STD` or `sincos[:RMS]`; `size` is the standard deviation or root mean square of its values."""

    kind: Literal["learned", "sincos"]
    size: float | Literal["width^-0.5"] | None

    @classmethod
    def parse(cls, text: str) -> PosEmbed:
        """Raises ValueError."""
        kind, colon, size = text.partition(":")
        if kind == "sincos" and not colon:
            return cls("sincos", None)
        if kind == "learned" and size in ("width^-0.5", "width**-0.5"):
            return cls("learned", "width^-0.5")
        try:
            number = float(size)
        except ValueError:
            number = 0.0
        if kind not in ("learned", "sincos") or not 0 < number < float("inf"):
            raise ValueError(f"{text!r} is none of learned:0.02, learned:width^-0.5, sincos, sincos:0.02")
        return cls("learned" if kind == "learned" else "sincos", number)


@dataclass(frozen=True)
class TransformSpec:
    """`none`, `center`, `whiten:K` or `whiten:K,shrink=A`."""

    kind: Literal["none", "center", "whiten"]
    k: int = 0
    shrink: float = 0.0

    @classmethod
    def parse(cls, text: str) -> TransformSpec:
        """Raises ValueError."""
        if text == "none":
            return cls("none")
        if text == "center":
            return cls("center")
        match = re.fullmatch(r"whiten:(\d+)(?:,shrink=([0-9.]+))?", text)
        if match is None:
            raise ValueError(f"{text!r} is none of none, center, whiten:128, whiten:128,shrink=0.5")
        k, shrink = int(match[1]), float(match[2] or 0)
        if k < 1 or not 0 <= shrink <= 1:
            raise ValueError(f"{text!r}: k must be at least 1 and shrink between 0 and 1")
        return cls("whiten", k, shrink)

    def __str__(self) -> str:
        if self.kind != "whiten":
            return self.kind
        return f"whiten:{self.k}" + (f",shrink={self.shrink:g}" if self.shrink else "")


@dataclass(frozen=True)
class Span:
    """A length given in steps ("500"), samples ("50000s", "50000samples") or as a share ("5%")."""

    amount: float
    unit: Literal["steps", "samples", "%"]

    @classmethod
    def parse(cls, text: str) -> Span:
        """Raises ValueError."""
        match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*(%|s|samples|steps)?", text.strip())
        if match is None or (match[2] != "%" and "." in match[1]):
            raise ValueError(f'{text!r} is none of "500" (steps), "50000s" (samples), "5%" (of the run)')
        unit = {"%": "%", "s": "samples", "samples": "samples"}.get(match[2] or "", "steps")
        return cls(float(match[1].replace("_", "")), unit)  # type: ignore[arg-type]

    def in_steps(self, batch_size: int, total_steps: int) -> int:
        """Whole steps, rounded up.

        Raises:
            BadConfig: longer than the run.
        """
        per_unit = {"steps": 1.0, "samples": 1 / batch_size, "%": total_steps / 100}[self.unit]
        steps = -int(-self.amount * per_unit // 1)
        if steps >= total_steps and steps > 0:
            raise BadConfig(
                f"--warmup is {steps} steps and the whole run {total_steps}; give a share instead, such as --warmup 5%"
            )
        return steps
