"""One run of the study: trained, asked at several steps, and its operations counted."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from reporting import machine
from study_rules import Run, Scores

from lift_cache.errors import BadSource
from lift_cache.sources import read_member, scan_tar
from lift_cache.tools.costs import ENCODERS
from lift_trainer.checkpoint import checkpoint_path, read_checkpoint
from lift_trainer.config import TextShape, TrainConfig
from lift_trainer.data.paraphrases import VARIANTS
from lift_trainer.evaluators.shapes import SPLITS, TASKS
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.flops import contrast_flops, image_flops, text_flops
from lift_trainer.images import center_view, decode
from lift_trainer.job import Job, prepare
from lift_trainer.loop import train
from lift_trainer.samples import captions_only
from lift_trainer.text import CachedText, TokenText

MOST_PIXELS = 1 << 20


class Question(NamedTuple):
    own: str
    false: dict[str, str]
    """Task → caption."""


@dataclass(frozen=True)
class Quiz:
    """The pictures of one split, and what is asked about them in each variant."""

    views: torch.Tensor
    """uint8 [n, 3, S, S]."""
    questions: dict[str, list[Question]]

    @classmethod
    def read(cls, data: Path, split: str, size: int) -> Quiz:
        """Raises BadSource."""
        questions: dict[str, list[Question]] = {}
        views = torch.empty(0)
        for variant in VARIANTS:
            path = data / f"{split}-{variant}-000.tar"
            if not path.is_file():
                raise BadSource(f"{path}: not there; make it with lift-data paraphrases {data}")
            with path.open("rb") as file:
                samples = list(scan_tar(path))
                if variant == VARIANTS[0]:  # the same pictures in all
                    pngs = [read_member(file, one.members["png"]) for one in samples]
                    views = torch.stack([center_view(decode(png, MOST_PIXELS), size) for png in pngs])
                records = [json.loads(read_member(file, one.members["json"])) for one in samples]
            questions[variant] = [Question(record["captions"][0], record["negatives"]) for record in records]
        return cls(views, questions)


def answered(
    trained: TrainedRun, quizzes: Mapping[str, Quiz], mean_image: torch.Tensor | None = None
) -> Scores:
    """Two-way accuracies of a checkpoint, a tie being wrong, as `lift_trainer.evaluators` have them.

    A variant that a text transformer would cut off is left out.

    Args:
        mean_image: float32 [D], which answers in the place of every picture.
    """
    scores: Scores = {}
    for split, quiz in quizzes.items():
        if mean_image is None:
            x_nd = torch.cat([trained.embed_images(views) for views in quiz.views.split(256)])
        else:
            x_nd = mean_image.expand(len(quiz.views), -1)
        scores[split] = {}
        for variant, questions in quiz.questions.items():
            texts = sorted({text for own, false in questions for text in (own, *false.values())})
            number = {text: i for i, text in enumerate(texts)}
            if trained.model.joint:
                context = TextShape.parse(trained.checkpoint.state.config.text_shape).context
                if TokenText(captions_only(texts).captions, context).truncated()[0]:
                    continue
            y_ud = trained.embed_texts(texts)

            def cosines(chosen: list[str], x_nd=x_nd, y_ud=y_ud, number=number) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return (x_nd * y_ud[[number[text] for text in chosen]]).sum(1)

            own_n = cosines([question.own for question in questions])
            scores[split][variant] = {
                task: (own_n > cosines([question.false[task] for question in questions]))
                .double()
                .mean()
                .item()
                for task in TASKS
            }
    return scores


def opened(run: Path, step: int) -> TrainedRun:
    """A run as it was after a step."""
    return TrainedRun.open(run, "cpu", checkpoint=read_checkpoint(checkpoint_path(run, step)))


def flops(job: Job) -> dict[str, float]:
    """`step`: of one training step, both passes; `embedding`: of embedding the training captions, once."""
    model, batch = job.model, job.config.batch_size
    text = model.texts[0]
    image = (
        image_flops(model.tower, job.config.image_size)
        + text_flops(text)
        + contrast_flops(batch, text.dimensions, texts_train=text.trains)
    )
    embedding = 0.0
    if isinstance(job.texts[0], CachedText):
        encoder = ENCODERS[job.texts[0].reader.recipe.model].shape
        embedding = encoder.flops(job.texts[0].reader.tokens(job.texts[0].rows)).sum()
    return {"step": image.step * batch, "embedding": float(embedding)}


def config_of(run: Run, inputs: Path, where: Path, **changed: Any) -> TrainConfig:
    """Of a run in `where`; caches and data lie in `inputs`."""
    settings = {**run.settings["training"], **changed}
    if "cache" in settings:
        settings["cache"] = str(inputs / settings["cache"])
    if "caption_field" in settings:
        settings["caption_field"] = [settings["caption_field"]]
    every = run.settings["score_every"]
    return TrainConfig.model_validate(
        {
            "data": [str(inputs / run.data / "train-*.tar")],
            "run": where,
            "tensorboard": False,
            "log_every": every,
            "checkpoint_every": every,
            "keep": settings["steps"] // every + 1,
            **settings,
        }
    )


def _require_data(data: Path, settings: Mapping[str, int]) -> None:
    """Raises BadSource."""
    try:
        there = json.loads((data / "dataset.json").read_bytes())["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        there = {}
    for name, wanted in settings.items():
        if there.get(name) != wanted:
            raise BadSource(
                f"{data}: made with {name}={there.get(name)}, and study.yaml says {wanted}; make it with "
                "lift-data paraphrases"
            )


def perform(run: Run, inputs: Path, scratch: Path) -> dict[str, Any]:
    """Train and score; a run that was cut off goes on at its checkpoint.

    Raises:
        BadSource: the data in `inputs` were made with other settings than study.yaml's, or cannot be read again.
    """
    _require_data(inputs / run.data, run.settings["data"])
    where = scratch / run.file.removesuffix(".json")
    config = config_of(run, inputs, where)
    began = time.process_time()
    job = prepare(config)
    counted = flops(job)
    if not train(job).finished:
        raise KeyboardInterrupt
    quizzes = {split: Quiz.read(inputs / run.data, split, config.image_size) for split in SPLITS}
    every = run.settings["score_every"]
    curve = [
        {"step": step, "scores": answered(opened(where, step), quizzes)}
        for step in range(every, config.steps + 1, every)  # type: ignore[operator]
    ]
    end = opened(where, config.steps)  # type: ignore[arg-type]
    mean_image = end.mean_image()
    if mean_image is None:  # it has said why; without it the blind scores would be those of the pictures
        raise BadSource(f"{where}: no mean training image, so no blind scores")
    lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    recipe = job.origins[0].recipe if job.origins else None
    result = {
        "run": run.name,
        "digest": run.digest,
        "settings": run.settings,
        "recipe": recipe.fingerprint if recipe else None,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "flops": counted,
        "curve": curve,
        "blind": answered(end, quizzes, mean_image),
        "loss": [[line["step"], line["loss"]] for line in lines],
        "cpu_seconds": round(time.process_time() - began, 1),
        "made_with": machine() | end.checkpoint.state.libraries,
    }
    shutil.rmtree(where)
    return result


def rehearsed(run: Run, inputs: Path, steps: int = 6) -> float:
    """Seconds of a whole run, from a few steps and one scoring on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "run")
        config = config_of(run, inputs, where, steps=steps, warmup=0)
        config = config.model_copy(update={"log_every": steps // 2})
        began = time.perf_counter()
        train(prepare(config))
        trained = time.perf_counter()
        rate = json.loads((where / "metrics.jsonl").read_text().splitlines()[-1])["images_per_s"]
        step = config.batch_size / rate
        quizzes = {split: Quiz.read(inputs / run.data, split, config.image_size) for split in SPLITS}
        scoring = time.perf_counter()
        answered(opened(where, steps), quizzes)
        scored = time.perf_counter() - scoring
    full: int = run.settings["training"]["steps"]
    once = trained - began - steps * step + scoring - trained
    return once + full * step + (full // run.settings["score_every"] + 3) * scored
