"""Settings of the commands: one definition each for flags, `LIFT_*` environment variables and YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from lift_embedder.engines import EngineKind
from lift_embedder.recipes import RecipeOptions


class ServeConfig(RecipeOptions):
    """Settings of `lift-embed serve`; those of the recipe come first."""

    cache: Path
    "Cache directory; created with the recipe when it is not there."
    model: str
    "Named recipe (see `lift-embed recipes`), hub id, or local folder."
    revision: str | None = None
    "Branch, tag or commit of a hub model; resolved once, when the cache is created."
    trust_remote_code: bool = False
    "Run Python code from the model's repository."
    engine: EngineKind = "auto"
    "What computes: vLLM, transformers, vLLM where it loads, or `openai`: an existing /v1/embeddings fleet."
    host: str = "127.0.0.1"
    "Address to listen on; beyond this machine only with keys."
    port: int = Field(8080, ge=0, le=65535)
    "Port to listen on; 0 takes a free one and logs it."
    store: Literal["float16", "float32"] | None = None
    "How a new cache stores vectors; float16 unless said."
    keys_file: Path | None = None
    "File of API keys, a line `NAME SCOPE KEY` each (scopes: read, embed, admin); or such lines in LIFT_KEYS."
    insecure: bool = False
    "Listen beyond this machine without keys."
    allowed_hosts: tuple[str, ...] = ()
    "Further names under which clients may address this server."
    batch_tokens: PositiveInt = 8192
    "Tokens per engine batch, which is also one durable commit."
    batch_seconds: PositiveFloat = 300.0
    "An engine that takes longer for a batch is taken to hang, and replaced."
    queue_tokens: PositiveInt = 1_048_576
    "Tokens that may wait for the engine; beyond it requests get 429 with Retry-After."
    queue_mib: PositiveInt = 256
    "MiB that waiting captions may take; likewise."
    most_inputs: PositiveInt = Field(2048, le=65_536)
    "Captions per request."
    most_body_mib: PositiveInt = 32
    "MiB per request body, after decoding."
    buffer_mib: PositiveInt = 512
    "MiB of request bodies held at a time; beyond it requests get 503 with Retry-After."
    drain_seconds: PositiveFloat = 30.0
    "At SIGTERM, how long requests that are under way may take to their end."
    upstream: tuple[str, ...] = ()
    "With `--engine openai`: URLs of the servers that compute."
    upstream_model: str | None = None
    "What they call the model; asked of them when not given."
    upstream_key_file: Path | None = None
    "File with their API key; or LIFT_UPSTREAM_KEY."


class FillConfig(BaseModel):
    """Settings of `lift-embed fill`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    server: str = "http://127.0.0.1:8080"
    "URL of the embedding server."
    field: str | None = None
    "Column or JSON field with the captions; found by its usual names when not given."
    batch: PositiveInt = Field(256, le=2048)
    "Captions per request."
    concurrency: PositiveInt = 4
    "Requests under way at a time."
    max_bad: NonNegativeInt = 1000
    "Bad captions that are named, counted and left out; one more stops the run."
    wait_server: NonNegativeFloat = 120.0
    "Seconds to wait for a server that is away, starting or busy."
    dry_run: bool = False
    "Read, check and count the captions; send nothing."
    snapshot: bool = False
    "Ask for a snapshot at the end."
    summary: Path | None = None
    "Also write the summary to this JSON file."
