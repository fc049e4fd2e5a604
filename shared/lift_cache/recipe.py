"""The recipe: everything that can change a vector, in one frozen object with a fingerprint.

Two caches may share vectors only if their recipes are equal. The fingerprint stands in every file that
holds vectors, and opening, filling, merging or training with another recipe is refused by naming the
first field that differs. Engine and library versions are not part of it: they are provenance, and canary
captions tell whether they still agree.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lift_cache.errors import CacheDamaged, RecipeMismatch, UnsupportedFormat
from lift_cache.files import write_atomic
from lift_cache.keys import TEXT_VERSION, normalise

RECIPE_VERSION = 1

MOST_DRIFT = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 4e-3}
"""Largest 1 − cosine between two honest engines, by compute dtype. Seen between vLLM and transformers on a
CPU: 2e-7 in float32, 6e-4 in bfloat16."""


class Recipe(BaseModel):
    """How a caption becomes a vector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    model: str = Field(min_length=1, description="Hub id, or the name of a local folder.")
    revision: str = Field(
        min_length=1, description="Commit, or sha256:<hex> over weight and tokenizer files when local."
    )
    code_revision: str | None = Field(None, description="Commit of the model's own code, when it was run.")
    quantization: str | None = None
    adapter: str | None = None
    config_overrides: dict[str, str | int | float | bool] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="Compute dtype.")
    tokenizer_revision: str = Field(min_length=1)
    special_tokens: bool = Field(True, description="The tokenizer adds its special tokens.")
    end_token: bool = Field(description="An end token closes every input.")
    pooling: Literal["cls", "last", "mean", "model"] = Field(
        description="Token states to one vector; `model`: the model's own code pools."
    )
    hidden_layer: int = Field(-1, description="Layer whose states are pooled; -1 is the last.")
    final_norm: bool = Field(True, description="The model's final norm is applied before pooling.")
    template: str = Field("{caption}", description="What is embedded, around the caption.")
    max_tokens: int = Field(gt=0, description="Tokens per input, special tokens included.")
    truncation: Literal["right", "left"] = Field("right", description="The side that is cut.")
    normalize: bool = Field(description="The engine scales vectors to unit length.")
    dimensions: int = Field(gt=0, description="Length of the vectors the model emits.")
    text_version: int = TEXT_VERSION
    declared: bool = Field(False, description="Stated by the user, not checked against an engine.")

    @field_validator("template")
    @classmethod
    def _one_caption(cls, template: str) -> str:
        if template.count("{caption}") != 1:
            raise ValueError("the template needs {caption} exactly once")
        return template

    def canonical_json(self) -> str:
        """Sorted keys, no spaces, ASCII: the same bytes for the same recipe on every machine."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def render(self, caption: str) -> str:
        """The text that goes to the tokenizer. Raises BadCaption."""
        return self.template.replace("{caption}", normalise(caption))

    def differences(self, other: Recipe) -> list[tuple[str, Any, Any]]:
        """(field, value here, value there) for every field that differs, in declaration order."""
        return [
            (name, getattr(self, name), getattr(other, name))
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        ]

    def require_same(self, other: Recipe, *, here: str, there: str) -> None:
        """Refuse another recipe.

        Raises:
            RecipeMismatch: names every field that differs and both values; `field`, `ours` and `theirs`
                hold the first.
        """
        differing = self.differences(other)
        if differing:
            field, ours, theirs = differing[0]
            said = "; ".join(f"{name} is {a!r} in {here} and {b!r} in {there}" for name, a, b in differing)
            raise RecipeMismatch(
                f"the recipes differ: {said}; use the same recipe, or another cache directory for the new one",
                field=field,
                ours=ours,
                theirs=theirs,
            )

    @classmethod
    def parse(cls, text: str | bytes, *, where: str) -> Recipe:
        """Read a recipe from JSON.

        Raises:
            UnsupportedFormat: a newer recipe version.
            CacheDamaged: not a recipe.
        """
        try:
            data = json.loads(text)
            version = data["version"]
        except (ValueError, KeyError, TypeError):
            raise CacheDamaged(f"{where} is not a recipe; restore it from a copy of the cache") from None
        if isinstance(version, int) and version > RECIPE_VERSION:
            raise UnsupportedFormat(
                f"{where} has recipe version {version}; this software reads {RECIPE_VERSION}: update it"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "recipe"
            raise CacheDamaged(f"{where}: {field}: {first['msg']}") from None

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read `recipe.json`. Raises CacheDamaged and UnsupportedFormat as `parse` does, OSError."""
        return cls.parse(path.read_bytes(), where=str(path))

    def save(self, path: Path) -> None:
        """Write `recipe.json` durably, under its final name only when whole."""
        write_atomic(path, (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode())
