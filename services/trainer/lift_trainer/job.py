"""A run, decided before its first step: what is trained, on what, in which order, from where."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lift_cache.errors import BadConfig
from lift_cache.snapshot import split_location
from lift_trainer.aligned import open_aligned
from lift_trainer.checkpoint import (
    Checkpoint,
    find_checkpoint,
    latest_name,
    refuse_other_config,
    refuse_other_inputs,
)
from lift_trainer.config import Span, TextShape, TrainConfig, TransformSpec
from lift_trainer.distributed import rank, world_size
from lift_trainer.heldout import require_scores
from lift_trainer.launch import require_same, taking_turns
from lift_trainer.model import LiftModel, build_model
from lift_trainer.optim import CosineSchedule, scaled_lr
from lift_trainer.record import State, TextState
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.sampling import Captions, Sampler, Shuffle
from lift_trainer.text import Control, TextOrigin, TextVectors, TokenText, open_texts
from lift_trainer.transform import TextTransform, fit_transform


@dataclass(frozen=True)
class Job:
    config: TrainConfig
    device: torch.device
    index: Index
    rejects: Rejects
    texts: tuple[TextVectors, ...]
    """One per cache; or one that gives tokens."""
    origins: tuple[TextOrigin, ...]
    """Of each cache; none where a text transformer is trained."""
    transforms: tuple[TextTransform, ...]
    """As `origins`."""
    sampler: Sampler
    schedule: CosineSchedule
    model: LiftModel
    checkpoint: Checkpoint | None
    """Where the run goes on; None at its beginning."""
    latest: str | None
    """Name of the newest checkpoint ever written, before this was decided."""
    caches: list[str]
    """Of the configuration, at the snapshots of the run."""

    @property
    def start(self) -> int:
        """Steps done already."""
        return self.checkpoint.state.step if self.checkpoint else 0

    def left_out(self, bad: Iterable[tuple[int, str]]) -> None:
        """Name and count samples whose image cannot be read. Raises BadSource beyond `max_bad`."""
        for sample, reason in bad:
            self.rejects.add(self.index.where(sample), reason)

    @property
    def captions(self) -> Captions:
        """Which captions stand for an image."""
        return Captions(self.config.captions, self.config.most_captions, tuple(self.config.caption_mix))

    @property
    def text_states(self) -> tuple[TextState, ...]:
        """What a checkpoint says about each cache."""
        return _text_states(self.texts, self.origins, self.transforms)

    @property
    def share(self) -> slice:
        """This process's part of every global batch."""
        return self.sampler.share(rank(), world_size())


def prepare(config: TrainConfig, record: State | None = None) -> Job:
    """Decide everything; nothing is written but the overlay of `--on-missing embed`.

    Under several ranks each decides for itself, rank 0 first, and all must come to the same.

    Args:
        record: of another run, which this one is to repeat.

    Raises:
        LiftError: some input cannot be used, or is not what the run in `config.run` or the record began with.
    """
    require_scores(config)
    device = choose_device(config.device)
    # The same setting as a flag: worker processes, and evaluations, read the variable.
    if config.shard_cache:
        os.environ["LIFT_SHARD_CACHE"] = str(config.shard_cache)
    if config.shard_cache_gib:
        os.environ["LIFT_SHARD_CACHE_GIB"] = str(config.shard_cache_gib)
    if config.run.exists() and not config.run.is_dir():
        raise BadConfig(f"--run {config.run} is a file; name a directory")
    with taking_turns():
        job = _prepare(config, device, record)
    require_same(
        {
            "the digest of --data": job.index.digest,
            "the settings": config.model_dump_json(exclude={"device"}),
            "the step to go on from": job.start,
            **{f"text {number}": state.model_dump_json() for number, state in enumerate(job.text_states)},
        }
    )
    return job


def _prepare(config: TrainConfig, device: torch.device, record: State | None) -> Job:
    latest = latest_name(config.run)  # first: another process may still be writing
    checkpoint = find_checkpoint(config.run)
    rejects = Rejects(config.max_bad)
    if checkpoint:
        refuse_other_config(config.run, checkpoint.state, config)
        rejects.named.update(checkpoint.state.bad)
    began = checkpoint.state if checkpoint else record
    index = build_index(
        config.data,
        rejects,
        caption_fields=config.caption_field,
        images=config.images,
        image_field=config.image_field,
    )
    caches = _pinned(config, began)
    texts, index, origins = open_training_texts(
        config, index, caches, config.run / "overlay.safetensors", control=config.text_control
    )
    if checkpoint:
        transforms = checkpoint.load_transforms()
    else:
        spec = TransformSpec.parse(config.text_transform)
        transforms = tuple(
            fit_transform(spec, text, index.keys) for text, _ in zip(texts, origins, strict=False)
        )
    if began:
        refuse_other_inputs(
            config.run if checkpoint else "the recorded run",
            began,
            index_digest=index.digest,
            texts=_text_states(texts, origins, transforms),
        )
    sampler = Sampler(
        config.seed, len(index), config.batch_size, Shuffle(config.shuffle_block, config.shuffle_buffer)
    )
    sampler.share(rank(), world_size())
    total = config.steps or config.epochs * sampler.steps_per_epoch
    schedule = CosineSchedule(
        scaled_lr(config.lr, config.lr_scaling, config.batch_size, config.base_batch),
        Span.parse(config.warmup).in_steps(config.batch_size, total),
        total,
    )
    widths = [t.output_dimensions(text.dimensions) for t, text in zip(transforms, texts, strict=False)]
    model = build_model(config, widths, fetch=checkpoint is None)
    if checkpoint:
        checkpoint.load_model(model)
    return Job(
        config=config,
        device=device,
        index=index,
        rejects=rejects,
        texts=texts,
        origins=origins,
        transforms=tuple(transform.to(device) for transform in transforms),
        sampler=sampler,
        schedule=schedule,
        model=model.to(device),
        checkpoint=checkpoint,
        latest=latest,
        caches=caches,
    )


def open_training_texts(
    config: TrainConfig, index: Index, caches: Sequence[str], overlay: Path, *, control: Control
) -> tuple[tuple[TextVectors, ...], Index, tuple[TextOrigin, ...]]:
    """Join an index to what the configuration trains against.

    Args:
        caches: those of the configuration, with the snapshots of the run.
        overlay: see `open_texts`.

    Returns:
        The texts, one per cache or one that gives tokens; the index, smaller under `--on-missing skip`; the origin of
        each cache.

    Raises:
        As `open_texts` and `open_aligned`.
    """
    if config.text_tower == "clip":
        return (TokenText(index.captions, TextShape.parse(config.text_shape).context),), index, ()
    if config.text == "aligned":
        text, index, origin = open_aligned(index, Path(caches[0]), on_missing=config.on_missing)
        return (text,), index, (origin,)
    return open_texts(
        index,
        caches=caches,
        control=control,
        on_missing=config.on_missing,
        server=config.server,
        overlay=overlay,
        seed=config.seed,
    )


def _text_states(
    texts: Sequence[TextVectors], origins: Sequence[TextOrigin], transforms: Sequence[TextTransform]
) -> tuple[TextState, ...]:
    return tuple(
        TextState(
            snapshot=origin.snapshot,
            recipe=origin.recipe,
            overlay_digest=origin.overlay,
            dimensions=transform.output_dimensions(text.dimensions),
        )
        for text, origin, transform in zip(texts, origins, transforms, strict=False)
    )


def _pinned(config: TrainConfig, began: State | None) -> list[str]:
    """The caches, at the snapshots with which the run began even when there are newer ones."""
    if began is None or config.text == "aligned" or len(began.texts) != len(config.cache):
        return config.cache
    pinned = []
    for location, text in zip(config.cache, began.texts, strict=True):
        path, wanted = split_location(location)
        pinned.append(f"{path}@{text.snapshot}" if text.snapshot and not wanted else location)
    return pinned


def choose_device(name: str) -> torch.device:
    """`auto` is cuda where there is one, each rank its own. Raises BadConfig."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadConfig(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device
