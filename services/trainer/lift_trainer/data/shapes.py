"""The shapes data set: two coloured shapes and how they lie, with false captions made of the same words.

4 colours × 4 shapes × 4 relations; the two objects of a scene differ in colour and in shape, which makes 576
scenes. What a model has to compose is held out twice, and apart:

- `test`: scenes held out together with everything that could give them away: the same two objects along the same
  axis in any order (a circle left of a square is a square right of a circle) and with their colours exchanged.
  So neither the true caption nor its swapped twins were ever seen in training.
- `unseen`: scenes with one of four colour–shape pairs that training never shows, one per colour and per shape.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from lift_trainer.data.shards import DatasetWriter, Sample

COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (240, 200, 20)}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first object lies, seen from the second: (x, y), y downwards."""

HELD_OUT_GROUPS = 12
"""Of the 72 (colour pair, shape pair, axis) groups of eight scenes each."""

TEST_SAMPLES = 2000
BATCH = 1000


class Thing(NamedTuple):
    colour: str
    shape: str


class Scene(NamedTuple):
    first: Thing
    relation: str
    second: Thing

    def caption(self) -> str:
        return f"a {self.first.colour} {self.first.shape} {self.relation} a {self.second.colour} {self.second.shape}"

    def group(self) -> tuple[frozenset[str], frozenset[str], bool]:
        """Scenes of one group differ only by swaps; they are held out together."""
        colours = frozenset((self.first.colour, self.second.colour))
        shapes = frozenset((self.first.shape, self.second.shape))
        return colours, shapes, self.relation in ("left of", "right of")


def all_scenes() -> list[Scene]:
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [
        Scene(first, relation, second)
        for first, relation, second in itertools.product(things, RELATIONS, things)
        if first.colour != second.colour and first.shape != second.shape
    ]


def split(seed: int) -> dict[str, list[Scene]]:
    """The 576 scenes, each in exactly one of `train`, `test` and `unseen`."""
    rng = np.random.default_rng([seed, 0])
    unseen = {Thing(colour, SHAPES[at]) for colour, at in zip(COLOURS, rng.permutation(4), strict=True)}
    scenes = all_scenes()
    groups = list(dict.fromkeys(scene.group() for scene in scenes))
    held_out = {groups[at] for at in rng.choice(len(groups), HELD_OUT_GROUPS, replace=False)}
    splits: dict[str, list[Scene]] = {"train": [], "test": [], "unseen": []}
    for scene in scenes:
        if unseen & {scene.first, scene.second}:
            splits["unseen"].append(scene)
        else:
            splits["test" if scene.group() in held_out else "train"].append(scene)
    return splits


def hard_negatives(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """One false caption of each kind."""
    return {kind: false.caption() for kind, false in false_scenes(scene, rng).items()}


def false_scenes(scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """One scene of each kind whose caption is false (SugarCrepe's swap and replace, arXiv 2306.14610)."""
    (colour, shape), relation, (other_colour, other_shape) = scene

    def another(choices: list[str], *taken: str) -> str:
        return str(rng.choice([choice for choice in choices if choice not in taken]))

    new_colour = another(list(COLOURS), colour, other_colour)
    new_shape = another(list(SHAPES), shape, other_shape)
    if rng.integers(2):
        replaced_colour = Scene(Thing(new_colour, shape), relation, scene.second)
        replaced_shape = Scene(Thing(colour, new_shape), relation, scene.second)
    else:
        replaced_colour = Scene(scene.first, relation, Thing(new_colour, other_shape))
        replaced_shape = Scene(scene.first, relation, Thing(other_colour, new_shape))
    return {
        "swap_att": Scene(Thing(other_colour, shape), relation, Thing(colour, other_shape)),
        "swap_obj": Scene(scene.second, relation, scene.first),
        "replace_att": replaced_colour,
        "replace_obj": replaced_shape,
        "replace_rel": Scene(scene.first, another(list(RELATIONS), relation), scene.second),
    }


# ---------------------------------------------------------------------------------------------- drawing


def draw(scenes: list[Scene], size: int, rng: np.random.Generator) -> np.ndarray:
    """Anti-aliased pictures of `scenes`: uint8 [n, size, size, 3]. Lengths are in units of the picture's side."""
    n = len(scenes)
    towards = np.array([RELATIONS[scene.relation] for scene in scenes])
    across = towards[:, ::-1]
    centre = 0.5 + rng.uniform(-0.06, 0.06, (n, 2))
    apart = rng.uniform(0.22, 0.28, (n, 1)) * towards + rng.uniform(-0.05, 0.05, (n, 1)) * across
    shade = rng.uniform(225, 255, (n, 1, 1, 1))
    picture = np.broadcast_to(shade, (n, size, size, 3)).astype(np.float32)  # a copy
    for things, middle in (
        ([scene.first for scene in scenes], centre + apart),
        ([scene.second for scene in scenes], centre - apart),
    ):
        paint(picture, things, middle, rng.uniform(0.12, 0.17, n), rng)
    return np.clip(picture, 0, 255).round().astype(np.uint8)


def paint(
    picture: np.ndarray, things: list[Thing], middle: np.ndarray, radius: np.ndarray, rng: np.random.Generator
) -> None:
    """Put a thing about each `middle`, float [n, 2], into float32 pictures [n, size, size, 3], in place."""
    cover = _cover([thing.shape for thing in things], middle, radius, picture.shape[1])[..., None]
    colour = np.array([COLOURS[thing.colour] for thing in things]) + rng.uniform(-12, 12, (len(things), 3))
    picture += cover * (colour[:, None, None].astype(np.float32) - picture)


def _cover(shapes: list[str], middle: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """How much of each pixel each shape covers: float32 [n, size, size]."""
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = pixel[None, None, :] - middle[:, 0, None, None].astype(np.float32)
    y = pixel[None, :, None] - middle[:, 1, None, None].astype(np.float32)
    r = radius[:, None, None].astype(np.float32)
    cover = np.empty((len(shapes), size, size), np.float32)
    kinds = np.array(shapes)
    for shape in SHAPES:
        at = np.flatnonzero(kinds == shape)
        cover[at] = np.clip(0.5 - size * _distance(shape, x[at], y[at], r[at]), 0, 1)
    return cover


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance from (x, y) to the edge of a shape of radius r about the origin, negative inside."""
    x, tall = np.abs(x), np.abs(y)
    distance: np.ndarray
    if shape == "circle":
        distance = np.sqrt(x**2 + y**2) - r
    elif shape == "square":
        distance = np.maximum(x, tall) - 0.88 * r
    elif shape == "triangle":
        distance = np.maximum(y - 0.8 * r, 0.894 * x - 0.447 * (y + 1.1 * r))
    else:
        upright = np.maximum(x - 0.35 * r, tall - 1.05 * r)
        lying = np.maximum(x - 1.05 * r, tall - 0.35 * r)
        distance = np.minimum(upright, lying)
    return distance


# ---------------------------------------------------------------------------------------------- the data set


def build(
    writer: DatasetWriter,
    *,
    size: int,
    seed: int,
    train: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Draw and write `train` training samples and `TEST_SAMPLES` of each held-out kind."""
    counts = {"train": train, "test": TEST_SAMPLES, "unseen": TEST_SAMPLES}
    total, written = sum(counts.values()), 0

    def counted(samples: Iterator[Sample]) -> Iterator[Sample]:
        nonlocal written
        for sample in samples:
            yield sample
            written += 1
            progress(written, total)

    for stream, (name, scenes) in enumerate(split(seed).items(), 1):
        rng = np.random.default_rng([seed, stream])
        writer.write(name, counted(_samples(scenes, counts[name], size, rng)), per_shard=10_000)
    writer.describe(
        name="shapes",
        settings={"size": size, "seed": seed, "train": train},
        licence="CC0 1.0",
        sources=["generated"],
        scenes={name: len(scenes) for name, scenes in split(seed).items()},
    )


def _samples(scenes: list[Scene], count: int, size: int, rng: np.random.Generator) -> Iterator[Sample]:
    for start in range(0, count, BATCH):
        # Every scene as often as any other, in an order of its own.
        turns = range(start, min(start + BATCH, count))
        drawn = [scenes[turn % len(scenes)] for turn in turns]
        for turn, scene, pixels in zip(turns, drawn, draw(drawn, size, rng), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield Sample(f"{turn:06}", buffer.getvalue(), (scene.caption(),), hard_negatives(scene, rng))
