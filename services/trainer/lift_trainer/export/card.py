"""What every export says about itself: `lift.json` for programs, `README.md` for people, the texts' files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lift_cache.errors import BadSource
from lift_trainer.checkpoint import transform_file
from lift_trainer.evaluators.result import Result
from lift_trainer.evaluators.table import table
from lift_trainer.export.source import HEADS, Source, TextSide
from lift_trainer.tensors import write_tensors
from lift_trainer.text_towers import ClipTextTower

CARD_VERSION = 1

PILLOW = (
    " The run was evaluated on images resized by torchvision; Pillow, below, rounds differently, by about one "
    "level of 255 in single pixels."
)


@dataclass(frozen=True)
class Check:
    """The exported folder, loaded back by its library and compared with the run."""

    library: str
    """With its version."""
    images: int
    largest_difference: float
    """Of any coordinate of any unit vector."""
    tolerance: float


def write_texts(source: Source, folder: Path, *, but_clip: bool) -> None:
    """Text transforms and trained text towers. `but_clip`: the layout itself holds a text transformer."""
    for side, transform, tower in _text_files(source, but_clip):
        if transform:
            assert side.transform is not None
            side.transform.save(folder / transform)
        if tower:
            assert side.tower is not None
            write_tensors(folder / tower, side.tower.state_dict())


def _text_files(source: Source, but_clip: bool) -> list[tuple[TextSide, str | None, str | None]]:
    """Each text side with the names of its two files; None for one that there is not."""
    named = []
    for number, side in enumerate(source.texts):
        transform = transform_file(number)
        tower = side.tower is not None and not (but_clip and isinstance(side.tower, ClipTextTower))
        named.append(
            (
                side,
                transform if side.transform else None,
                transform.replace("transform", "tower") if tower else None,
            )
        )
    return named


def record(source: Source, layout: str, *, but_clip: bool) -> dict[str, Any]:
    """What `lift.json` holds, but for the check."""
    return {
        "version": CARD_VERSION,
        "name": source.name,
        "layout": layout,
        "image": {
            "architecture": source.architecture,
            "size": source.image_size,
            "resize": "shorter side to size, bicubic, antialiased; then the central square",
            "mean": source.mean,
            "std": source.std,
            "pooling": source.tower.pooling,
            "width": source.tower.width,
            "head": source.head,
            "dimensions": source.dimensions,
        },
        "texts": [_text(*files) for files in _text_files(source, but_clip)],
        "logit_scale": source.logit_scale,
        "logit_bias": source.logit_bias,
        "training": source.training,
    }


def _text(side: TextSide, transform: str | None, tower: str | None) -> dict[str, Any]:
    trained: dict[str, Any] | None = None
    if isinstance(side.tower, ClipTextTower):
        trained = {"kind": "clip", "file": tower, **asdict(side.tower.shape)}
    elif side.tower is not None:
        trained = {"kind": "head", "file": tower, "head": HEADS[type(side.tower.head)]}
    return {
        "recipe": side.recipe.model_dump(mode="json") if side.recipe else None,
        "fingerprint": side.recipe.fingerprint if side.recipe else None,
        "snapshot": side.snapshot,
        "transform": str(side.transform.spec) if side.transform else None,
        "transform_file": transform,
        "tower": trained,
    }


def write_record(folder: Path, said: dict[str, Any]) -> None:
    (folder / "lift.json").write_text(json.dumps(said, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------- README.md


def readme(
    source: Source, said: dict[str, Any], *, library: str, usage: str, notes: str, check: Check
) -> str:
    """The model card. `usage` is Python, in which FOLDER stands for the folder."""
    image, training = said["image"], said["training"]
    normalise = f"(pixels / 255 − {image['mean']}) / {image['std']}"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\ntags:\n- lift\n---",
        f"# {source.name}",
        f"An image encoder into the space of fixed caption embeddings (LIFT, arXiv 2506.04209): "
        f"`{image['architecture']}` at {image['size']} pixels, pooling {image['pooling']}, head {image['head']}, "
        f"unit vectors of {image['dimensions']} dimensions. Cosines with the vectors of captions (see Texts) "
        f"say how well they fit.",
        "## Images",
        f"RGB; shorter side to {image['size']} pixels, bicubic with antialiasing; the central square; "
        f"`{normalise}`."
        + (" The last step is part of the graph." if library == "onnx" else "")
        + (PILLOW if library != "transformers" else ""),
        f"```python\n{usage}\n```",
        notes,
        "## Texts",
        *(_about_text(one) for one in said["texts"]),
        _scale(said),
        "## Training",
        f"{training.get('step', 0):,} of {training.get('total_steps', 0):,} steps; sample index "
        f"`{training.get('sample_index')}`; {training.get('left_out', 0):,} broken samples left out.",
        _table(("setting", "value"), training.get("settings", {})),
        _table(("software", "version"), training.get("software", {})),
        *_evaluations(source),
        "## Check",
        f"Loaded back by {check.library} and compared with the run on {check.images} images: no coordinate of "
        f"a vector differs by more than {check.largest_difference:.1e} (allowed: {check.tolerance:.0e}).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about_text(text: dict[str, Any]) -> str:
    tower, recipe = text["tower"], text["recipe"]
    if tower and tower["kind"] == "clip":
        where = f"`{tower['file']}`" if tower["file"] else "the model itself"
        return (
            f"A text transformer was trained with the images; it is in {where}. It reads up to "
            f"{tower['context']} tokens of CLIP's byte-pair encoding."
        )
    lines = []
    if recipe:
        lines.append(
            f"Captions were embedded by `{recipe['model']}`, revision `{recipe['revision']}`; recipe "
            f"fingerprint `{text['fingerprint']}`, snapshot `{text['snapshot']}`. Every detail of the recipe is "
            "in `lift.json`; vectors of another recipe do not fit."
        )
    else:
        lines.append("Captions were hashed word 1- to 3-grams, a control without a language model.")
    lines.append(
        f"Then the text transform `{text['transform']}`, in `{text['transform_file']}`:\n\n"
        "```python\nimport torch.nn.functional as F\nfrom safetensors.torch import load_file\n\n"
        f'fitted = load_file("FOLDER/{text["transform_file"]}")\n'
        "x = F.normalize(vectors, dim=-1)\n"
        'x = x - fitted["mean"] if "mean" in fitted else x\n'
        'x = x @ fitted["projection"] if "projection" in fitted else x\n'
        "texts = F.normalize(x, dim=-1)\n```"
    )
    if tower:
        lines.append(
            f"Then the head `{tower['head']}` that was trained with the images, whose weights are in "
            f"`{tower['file']}` (`lift_trainer.text_towers.CachedTextTower`)."
        )
    return "\n\n".join(lines)


def _scale(said: dict[str, Any]) -> str:
    if said["logit_scale"] is None:
        return ""
    bias = "" if said["logit_bias"] is None else f" and bias {said['logit_bias']:.4g}"
    return f"The loss multiplied cosines with exp({said['logit_scale']:.4g}){bias}."


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | `{json.dumps(value)}` |" for name, value in rows.items()])


def _evaluations(source: Source) -> list[str]:
    """Scores of this very checkpoint, where the run has been evaluated."""
    results = []
    for file in sorted((source.run / "eval").glob("*.json")) if source.run else []:
        try:
            results.append(Result.read(file))
        except BadSource:
            print(f"left out of the card: {file} is no result of lift-eval", file=sys.stderr)
    shown = [table([result]) for result in results if result.subject.step == source.training.get("step")]
    return ["## Evaluation", *(f"```\n{text}\n```" for text in shown)] if shown else []
