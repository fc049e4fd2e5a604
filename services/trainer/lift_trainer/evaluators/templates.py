"""Prompt templates: sentences with a place for the name of a class.

`openai80` are the 80 that CLIP's authors published for ImageNet (openai/CLIP,
notebooks/Prompt_Engineering_for_ImageNet.ipynb). `lift1` is the one sentence of LIFT's authors, without a full stop
(evaluation/evaluate/imagenet.py in their repository).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lift_cache.errors import BadConfig

PLACE = "{}"
UNFIT = re.compile(r"[^\w.-]+")
"""Not in the name of a protocol, which becomes part of a file's."""

PUBLISHED = {path.stem: path for path in (Path(__file__).parent / "prompts").glob("*.txt")}


@dataclass(frozen=True)
class Templates:
    name: str
    """`openai80`, or a file's name and the beginning of its digest: two files of one name are two protocols."""
    sentences: tuple[str, ...]

    @classmethod
    def read(cls, choice: str) -> Templates:
        """Those of a published name, or of a file with one a line. Raises BadConfig."""
        path = PUBLISHED.get(choice, Path(choice))
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise BadConfig(f"--prompts {choice}: not UTF-8; write one template a line") from None
        except OSError as error:
            known = " or ".join(sorted(PUBLISHED))
            raise BadConfig(
                f"--prompts {choice}: {error.strerror or error}; give {known}, or a file"
            ) from None
        for number, line in enumerate(lines, 1):
            if line.strip() and line.count(PLACE) != 1:
                raise BadConfig(
                    f"--prompts {choice}:{number}: {line.strip()!r} has {line.count(PLACE)} places for the name of "
                    f"a class; write {PLACE} once, as in 'a photo of a {PLACE}.'"
                )
        sentences = tuple(line.strip() for line in lines if line.strip())
        if not sentences:
            raise BadConfig(
                f"--prompts {choice}: no template in it; write one a line, as 'a photo of a {PLACE}.'"
            )
        if choice in PUBLISHED:
            return cls(choice, sentences)
        digest = hashlib.blake2b("\n".join(sentences).encode(), digest_size=4).hexdigest()
        return cls(f"{UNFIT.sub('-', path.stem)}-{digest}", sentences)

    def of(self, name: str) -> list[str]:
        """One prompt per template."""
        return [sentence.replace(PLACE, name) for sentence in self.sentences]
