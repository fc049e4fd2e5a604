"""What can be evaluated, and with which settings: flags of `lift-eval TASK`, fields of a suite file.

Nothing here imports torch before a task is opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lift_cache.errors import BadConfig
from lift_trainer.config import DATA, listed

if TYPE_CHECKING:
    from lift_trainer.evaluators.labelled import Labelled
    from lift_trainer.evaluators.protocol import Evaluator
    from lift_trainer.rejects import Rejects

MaxBad = Annotated[int, Parameter(group=DATA)]


def _field(name: str = "") -> Any:
    return Parameter(group=DATA, name=name or None)


class Task(BaseModel, ABC):
    """Settings of one task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: ClassVar[str]

    name: Annotated[str | None, _field()] = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="Of the data, part of the result's file name. Default: from the data.",
    )
    max_bad: MaxBad = Field(
        100, ge=0, description="Stop when more images than this are broken; each one is named and left out."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _one_or_several(cls, value: object, info: ValidationInfo) -> object:
        several = info.field_name and cls.model_fields[info.field_name].annotation == list[str]
        return [value] if several and isinstance(value, str) else value

    @abstractmethod
    def open(self) -> list[Evaluator]:
        """Read the data, without images. Raises LiftError."""


class RetrievalTask(Task):
    """Image-to-text and text-to-image R@1, R@5, R@10, and the mean of both.

    Protocols: karpathy (the first five captions of each image; only its own are right), lift (the first only, as the
    paper's authors score), any-caption (all; an equal caption of another image is right too).

    `lift-eval retrieval --run runs/emoji --data emoji/test-000.tar`

    `lift-eval retrieval --run runs/a runs/b --data coco/annotations/captions_val2017.json --images coco/val2017`

    `lift-eval retrieval --run runs/a --data flickr_annotations_30k.csv --images flickr30k-images`
    """

    task: ClassVar[str] = "retrieval"

    data: Annotated[list[str], listed(DATA)] = Field(
        min_length=1,
        description="Shards or tables, as for lift-train; or COCO's `captions_*.json`, Karpathy's `dataset_*.json`, "
        "Flickr30k's CSV (of both the test split).",
    )
    protocol: Annotated[Literal["karpathy", "lift", "any-caption"], _field()] = Field(
        "karpathy", description="Which captions there are, and which are right."
    )
    images: Annotated[Path | None, _field()] = Field(
        None, description="Folder that image names start from. Default: the folder of the table or JSON."
    )
    image_field: Annotated[str, _field()] = Field(
        "image", description="Column of a table that names the image."
    )
    caption_field: Annotated[list[str], listed(DATA)] = Field(
        [], description="Fields or columns that hold the captions."
    )
    seed: Annotated[int, _field()] = Field(0, ge=0, description="Which captions the gallery shows.")

    def open(self) -> list[Evaluator]:
        from lift_trainer.evaluators.captioned import name_of, open_captioned
        from lift_trainer.evaluators.retrieval import Retrieval
        from lift_trainer.rejects import Rejects

        rejects = Rejects(self.max_bad)
        captioned = open_captioned(
            self.data,
            rejects,
            images=self.images,
            image_field=self.image_field,
            caption_field=self.caption_field,
        )
        name = self.name or name_of(self.data[0])
        return [Retrieval(name, captioned, self.protocol, self.max_bad, rejects.named, self.seed)]


class ShapesTask(Task):
    """Two-way choices on generated scenes: five hard-negative tasks, each with its blind score.

    `lift-eval shapes --run runs/shapes --data data/shapes`
    """

    task: ClassVar[str] = "shapes"

    data: Annotated[list[str], listed(DATA)] = Field(
        min_length=1,
        description="Folder that lift-data shapes wrote (both held-out splits), or shards whose JSON has negatives.",
    )

    def open(self) -> list[Evaluator]:
        from lift_trainer.evaluators.captioned import name_of
        from lift_trainer.evaluators.shapes import SPLITS, open_shapes

        folder = Path(self.data[0])
        if len(self.data) == 1 and folder.is_dir() and any(folder.glob("unseen-*.tar")):
            before = f"{self.name}-" if self.name else ""
            return [
                open_shapes([str(folder / f"{split}-*.tar")], before + split, max_bad=self.max_bad)
                for split in SPLITS
            ]
        return [open_shapes(self.data, self.name or name_of(self.data[0]), max_bad=self.max_bad)]


class SugarCrepeTask(Task):
    """SugarCrepe (Hsieh et al. 2023): seven tasks on COCO val2017, each with its blind score.

    The mean is that of the seven, unweighted; item_mean weighs them by their items. A tie is wrong.

    `lift-eval sugarcrepe --run runs/a --data sugar-crepe/data --images coco/val2017`
    """

    task: ClassVar[str] = "sugarcrepe"

    data: Annotated[Path, _field()] = Field(description="Folder with the seven published JSON files.")
    images: Annotated[Path, _field()] = Field(description="Folder with the images of COCO val2017.")

    def open(self) -> list[Evaluator]:
        from lift_trainer.evaluators.sugarcrepe import open_sugarcrepe

        return [open_sugarcrepe(self.data, self.images, self.name or "coco", max_bad=self.max_bad)]


class LabelledTask(Task, ABC):
    """Of images with a class each."""

    label_field: Annotated[str | None, _field()] = Field(
        None,
        description="Field or column that names the class. Default: the data are folders, one per class.",
    )
    label_pattern: Annotated[str | None, _field()] = Field(
        None, description="Regular expression: of what the field says only the matches count, each once."
    )
    images: Annotated[Path | None, _field()] = Field(
        None, description="Folder that a table's image paths start from."
    )
    image_field: Annotated[str, _field()] = Field(
        "image", description="Column of a table that names the image."
    )

    def _labelled(self, data: Sequence[str], rejects: Rejects) -> Labelled:
        from lift_trainer.evaluators.labelled import Labelled

        return Labelled.open(
            data,
            rejects,
            label_field=self.label_field,
            label_pattern=self.label_pattern,
            images=self.images,
            image_field=self.image_field,
        )


class ZeroShotTask(LabelledTask):
    """Zero-shot classification: top-1, top-5, and top-1 as the mean over classes.

    Prompts: openai80 (the 80 templates of CLIP's authors, averaged), lift1 (the one of LIFT's authors), or a file with
    one template a line, {} for the class. A tie with a wrong class is wrong.

    `lift-eval zeroshot --run runs/a --data imagenet/val --classes imagenet_class_index.json`

    `lift-eval zeroshot --run runs/a --data 'test-*.tar' --label-field label --prompts prompts.txt`
    """

    task: ClassVar[str] = "zeroshot"

    data: Annotated[list[str], listed(DATA)] = Field(
        min_length=1,
        description="Folder with a folder of images per class; with --label-field, shards or tables.",
    )
    prompts: Annotated[str, _field()] = Field(
        "openai80", description="openai80, lift1, or a file of templates."
    )
    classes: Annotated[Path | None, _field()] = Field(
        None,
        description="Names of the classes: JSON as ImageNet's class index, or text, one class a line. Default: as the "
        "data call them.",
    )

    def open(self) -> list[Evaluator]:
        from lift_trainer.evaluators.captioned import name_of
        from lift_trainer.evaluators.labelled import class_names
        from lift_trainer.evaluators.templates import Templates
        from lift_trainer.evaluators.zeroshot import ZeroShot
        from lift_trainer.rejects import Rejects

        templates, rejects = Templates.read(self.prompts), Rejects(self.max_bad)
        images = self._labelled(self.data, rejects)
        names = class_names(images.classes, self.classes)
        return [ZeroShot(self.name or name_of(self.data[0]), images, names, templates, rejects)]


class ProbeTask(LabelledTask):
    """Linear probe and kNN on states before the head: what the image encoder knows without any text.

    kNN: the k nearest training images by cosine vote with weight exp(cosine / 0.07). Linear: logistic regression, its
    penalty chosen on a fifth of the training images.

    `lift-eval probe --run runs/a --train imagenet/train --data imagenet/val`

    `lift-eval probe --run runs/a --train 'data/shapes/train-*.tar' --data 'data/shapes/test-*.tar'
    --label-field captions --label-pattern 'circle|square|triangle|cross'`
    """

    task: ClassVar[str] = "probe"

    train: Annotated[list[str], listed(DATA)] = Field(
        min_length=1, description="Labelled training images, of the kind of --data."
    )
    data: Annotated[list[str], listed(DATA)] = Field(
        min_length=1,
        description="Labelled test images: folder with a folder per class; with --label-field, shards or tables.",
    )
    k: Annotated[int, _field()] = Field(20, ge=1, description="Neighbours that vote.")

    def open(self) -> list[Evaluator]:
        from lift_trainer.evaluators.captioned import name_of
        from lift_trainer.evaluators.probe import Probe
        from lift_trainer.rejects import Rejects

        rejects = Rejects(self.max_bad)
        train, test = self._labelled(self.train, rejects), self._labelled(self.data, rejects)
        return [Probe(self.name or name_of(self.data[0]), train, test, self.k, rejects)]


TASKS: dict[str, type[Task]] = {
    kind.task: kind for kind in (RetrievalTask, ShapesTask, SugarCrepeTask, ZeroShotTask, ProbeTask)
}


def read_suite(path: Path) -> list[Task]:
    """The tasks of a suite file: YAML, a list of mappings `task: NAME` with the task's settings.

    Paths in it start from the working directory.

    Raises:
        BadConfig: no such file, of another shape, an unknown task or setting.
    """
    import yaml

    try:
        written = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise BadConfig(
            f"suite {path}: {error.strerror or error}; give a YAML file with a list of tasks, as `- task: retrieval`"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadConfig(f"suite {path}: {' '.join(str(error).split())}") from None
    if not isinstance(written, list) or not written:
        raise BadConfig(f"suite {path}: no list of tasks; begin each with a line such as `- task: retrieval`")
    return [_task(f"suite {path}, task {number}", fields) for number, fields in enumerate(written, 1)]


def is_suite(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def open_tasks(tasks: Sequence[Task]) -> list[Evaluator]:
    """Raises BadConfig: one result would be written over another. LiftError: data that cannot be used."""
    evaluators = [evaluator for task in tasks for evaluator in task.open()]
    seen = set()
    for evaluator in evaluators:
        named = (evaluator.task, evaluator.name, evaluator.protocol)
        if named in seen:
            raise BadConfig(
                f"two tasks {evaluator.task} ({evaluator.protocol}) are on data named {evaluator.name}; "
                "name them apart with `name`"
            )
        seen.add(named)
    return evaluators


def _task(where: str, fields: object) -> Task:
    if not isinstance(fields, dict) or str(fields.get("task")) not in TASKS:
        raise BadConfig(f"{where}: no line `task:` with one of {', '.join(TASKS)}")
    kind = TASKS[fields["task"]]
    settings = {str(name).replace("-", "_"): value for name, value in fields.items() if name != "task"}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadConfig(f"{where} ({kind.task}): {field}: {first['msg']}") from None
