"""Shapes told in several wordings, and at length: where hashed words and word pairs should no longer do.

The scenes and what is held out of them are those of `shapes`. Each picture also has a background and a place, which
only long captions tell. What is asked about a picture comes in three variants, with the same pictures in each:

- `seen`: in the wordings of training;
- `new`: in a wording that training never shows. It names the second thing first, so that a rule such as "what is
  named first lies left" is wrong there;
- `long`: in four sentences.

False captions keep the wording, background and place of the true one and differ from it in one thing.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from lift_trainer.data.shapes import (
    BATCH,
    RELATIONS,
    Scene,
    all_scenes,
    false_scenes,
    paint,
    split,
)
from lift_trainer.data.shards import DatasetWriter, Sample

VERSION = 1
"""Of captions, pictures and their order: part of the settings that `dataset.json` keeps."""

TRAINED = (
    "a {c1} {s1} {relation} a {c2} {s2}",
    "the {s1} is {c1}, the {s2} is {c2}, and the {s1} is {relation} the {s2}",
    "{c1} and {c2} are the colours of a {s1} and a {s2}, the first of them {relation} the second",
)
HELD_OUT = "there is a {s2} that is {c2}, and {relation} it a {s1} that is {c1}"
LONG = (
    "The background is {background}, and two shapes lie a little {place} the middle of it. "
    "One of them is a {s1}, the other a {s2}. The {s1} is {c1} and the {s2} is {c2}. "
    "They are neighbours, with the {s1} {relation} the {s2}."
)

BACKGROUNDS = {"white": (230, 255), "grey": (150, 175)}
"""Grey levels."""
PLACES = {"above": -1, "below": 1}
"""Of the two shapes' common middle, y downwards."""

VARIANTS = ("seen", "new", "long")
TEST_PICTURES = 480
"""Of each held-out kind: ten and two for each of its 48 and 240 scenes."""


class Context(NamedTuple):
    background: str
    place: str


CONTEXTS = tuple(Context(*both) for both in itertools.product(BACKGROUNDS, PLACES))


def short_caption(scene: Scene, wording: str) -> str:
    return wording.format(**_words(scene))


def long_caption(scene: Scene, context: Context) -> str:
    return LONG.format(**_words(scene), **context._asdict())


def _words(scene: Scene) -> dict[str, str]:
    (c1, s1), relation, (c2, s2) = scene
    return {"c1": c1, "s1": s1, "relation": relation, "c2": c2, "s2": s2}


def all_captions() -> Iterator[str]:
    """Every caption, true or false, of any seed: 4 wordings and 4 contexts of 576 scenes."""
    for scene in all_scenes():
        for wording in (*TRAINED, HELD_OUT):
            yield short_caption(scene, wording)
        for context in CONTEXTS:
            yield long_caption(scene, context)


class Picture(NamedTuple):
    scene: Scene
    context: Context
    png: bytes


def draw(scenes: list[Scene], contexts: list[Context], size: int, rng: np.random.Generator) -> np.ndarray:
    """Anti-aliased pictures: uint8 [n, size, size, 3]. Lengths are in units of the picture's side."""
    n = len(scenes)
    towards = np.array([RELATIONS[scene.relation] for scene in scenes])
    across = towards[:, ::-1]
    off = rng.uniform(0.04, 0.07, n) * np.array([PLACES[context.place] for context in contexts])
    centre = 0.5 + np.stack([rng.uniform(-0.06, 0.06, n), off], 1)
    apart = rng.uniform(0.22, 0.26, (n, 1)) * towards + rng.uniform(-0.03, 0.03, (n, 1)) * across
    shade = np.array([rng.uniform(*BACKGROUNDS[context.background]) for context in contexts], np.float32)
    picture = np.broadcast_to(shade[:, None, None, None], (n, size, size, 3)).copy()
    for things, middle in (
        ([scene.first for scene in scenes], centre + apart),
        ([scene.second for scene in scenes], centre - apart),
    ):
        paint(picture, things, middle, rng.uniform(0.13, 0.17, n), rng)
    return np.clip(picture, 0, 255).round().astype(np.uint8)


def build(
    writer: DatasetWriter,
    *,
    version: int = VERSION,
    size: int,
    seed: int,
    train: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Draw and write `train` training pictures, and `TEST_PICTURES` of each held-out kind in every variant.

    Splits are `train`, and `test` and `unseen` as in `shapes` by variant: `test-seen`, `unseen-long`, …
    """
    total, drawn = train + 2 * TEST_PICTURES, 0

    def pictures(scenes: list[Scene], count: int, rng: np.random.Generator) -> Iterator[Picture]:
        nonlocal drawn
        for start in range(0, count, BATCH):
            # Every scene as often as any other, in an order of its own.
            some = [scenes[turn % len(scenes)] for turn in range(start, min(start + BATCH, count))]
            contexts = [CONTEXTS[at] for at in rng.integers(len(CONTEXTS), size=len(some))]
            for scene, context, pixels in zip(some, contexts, draw(some, contexts, size, rng), strict=True):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                yield Picture(scene, context, buffer.getvalue())
            drawn += len(some)
            progress(drawn, total)

    scenes = split(seed)
    rngs = {name: np.random.default_rng([seed, stream]) for stream, name in enumerate(scenes, 1)}
    training = pictures(scenes["train"], train, rngs["train"])
    writer.write("train", _training(training), per_shard=10_000)
    for name in ("test", "unseen"):
        asked = list(pictures(scenes[name], TEST_PICTURES, rngs[name]))
        false = [false_scenes(picture.scene, rngs[name]) for picture in asked]
        for variant in VARIANTS:
            writer.write(f"{name}-{variant}", _questions(variant, asked, false))
    writer.write_captions(all_captions())
    writer.describe(
        name="paraphrases",
        settings={"version": version, "size": size, "train": train, "seed": seed},
        licence="CC0 1.0",
        sources=["generated"],
        scenes={name: len(some) for name, some in scenes.items()},
        wordings={"trained": TRAINED, "held out": HELD_OUT, "long": LONG},
    )


def _training(pictures: Iterator[Picture]) -> Iterator[Sample]:
    for number, (scene, context, png) in enumerate(pictures):
        captions = tuple(short_caption(scene, wording) for wording in TRAINED)
        yield Sample(f"{number:06}", png, captions, long=long_caption(scene, context))


def _questions(variant: str, pictures: list[Picture], false: list[dict[str, Scene]]) -> Iterator[Sample]:
    for number, ((scene, context, png), others) in enumerate(zip(pictures, false, strict=True)):

        def told(scene: Scene, number: int = number, context: Context = context) -> str:
            if variant == "long":
                return long_caption(scene, context)
            # A turn of wordings for each turn of scenes, for their numbers are multiples of three.
            wording = TRAINED[(number + number // 3) % 3] if variant == "seen" else HELD_OUT
            return short_caption(scene, wording)

        yield Sample(f"{number:06}", png, (told(scene),), {kind: told(one) for kind, one in others.items()})
