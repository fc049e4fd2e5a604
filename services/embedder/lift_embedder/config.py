"""Settings of the commands: one definition each for flags, `LIFT_*` environment variables and YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from lift_embedder.engines import EngineKind
from lift_embedder.recipes import RecipeOptions


class EngineOptions(RecipeOptions):
    """What computes, and from what: settings of `serve`, and of a `fill` that starts servers of its own."""

    revision: str | None = None
    "Branch, tag or commit of a hub model; resolved once, when the cache is created."
    trust_remote_code: bool = False
    "Run Python code from the model's repository."
    engine: EngineKind = "auto"
    "What computes: vLLM, transformers, vLLM where it loads, or `openai`: an existing /v1/embeddings fleet."
    store: Literal["float16", "float32"] | None = None
    "How a new cache stores vectors; float16 unless said."
    batch_tokens: PositiveInt = 8192
    "Tokens per engine batch, which is also one durable commit."
    batch_seconds: PositiveFloat = 300.0
    "An engine that takes longer for a batch is taken to hang, and replaced."
    upstream: tuple[str, ...] = ()
    "With `--engine openai`: URLs of the servers that compute."
    upstream_model: str | None = None
    "What they call the model; asked of them when not given."
    upstream_input: Literal["ids", "text"] = "ids"
    "What they are sent: token ids, or text, for servers that take no ids (some captions cannot be sent so)."
    upstream_key_file: Path | None = None
    "File with their API key; or LIFT_UPSTREAM_KEY."


class ServeConfig(EngineOptions):
    """Settings of `lift-embed serve`; those of the recipe come first."""

    cache: Path
    "Cache directory; created with the recipe when it is not there."
    model: str
    "Named recipe (see `lift-embed recipes`), hub id, or local folder."
    host: str = "127.0.0.1"
    "Address to listen on; beyond this machine only with keys."
    port: int = Field(8080, ge=0, le=65535)
    "Port to listen on; 0 takes a free one and logs it."
    keys_file: Path | None = None
    "File of API keys, a line `NAME SCOPE KEY` each (scopes: read, embed, admin); or such lines in LIFT_KEYS."
    insecure: bool = False
    "Listen beyond this machine without keys."
    allowed_hosts: tuple[str, ...] = ()
    "Further names under which clients may address this server."
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


class FillConfig(EngineOptions):
    """Settings of `lift-embed fill`. Those of recipe and engine are for `--cache`, where it starts the server."""

    server: str | None = None
    "URL of the embedding server; http://127.0.0.1:8080 unless `--cache` is given. Its key: LIFT_API_KEY."
    cache: Path | None = None
    "Fill this cache directory with a server of fill's own, which takes the cache's lock; needs `--model`."
    model: str | None = None
    "With `--cache`: named recipe (see `lift-embed recipes`), hub id, or local folder."
    devices: tuple[str, ...] = ()
    "With `--cache`: an engine on each of these, such as `0,1,2,3`; `cpu` is one on the CPU."
    shard: str | None = None
    "`i/n`, from 0/n: take only this share of the captions; n such runs together take each caption once."
    field: str | None = None
    "Column or JSON field with the captions; found by its usual names when not given."
    batch: PositiveInt = Field(256, le=2048)
    "Captions per request."
    concurrency: PositiveInt = 4
    "Requests under way at a time, for each engine."
    max_bad: NonNegativeInt = 1000
    "Rows left out that are counted and kept in the ledger; one more stops the run."
    failed: Path | None = None
    "Ledger of the rows that were left out, JSON lines; in the state directory unless said."
    retry_failed: bool = False
    "Send only the captions in that ledger again, and leave in it those that still fail."
    state: Path | None = None
    "Directory of ledgers, marks of files that are done, and logs; ~/.local/state/lift/fill unless said."
    recheck: bool = False
    "Read files again that an earlier run finished."
    dedup_mib: PositiveInt = 1024
    "MiB for remembering which captions came before (1,024: 58 million); beyond it the cache answers repeats."
    wait_server: NonNegativeFloat | None = None
    "Seconds to wait for a server that is away, starting or busy: 120, and 1,800 for servers of fill's own."
    dry_run: bool = False
    "Read, check and count the captions, ask the cache which it has; send nothing."
    snapshot: bool = False
    "Make a snapshot at the end."
    summary: Path | None = None
    "Also write the summary to this JSON file."

    @field_validator("devices", mode="before")
    @classmethod
    def _commas(cls, value: Any) -> Any:
        """`0,1` is two devices, however it was given."""
        given = [value] if isinstance(value, str | int) else value
        return tuple(part.strip() for one in given for part in str(one).split(",") if part.strip())

    @field_validator("shard")
    @classmethod
    def _of(cls, value: str | None) -> str | None:
        if value is not None:
            found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
            if not found or int(found[1]) >= int(found[2]):
                raise ValueError("write it as i/n: 0/4, 1/4, 2/4 and 3/4 are four shares")
        return value

    @model_validator(mode="after")
    def _one_target(self) -> FillConfig:
        if self.cache is not None and self.server is not None:
            raise ValueError(
                "--server and --cache (or LIFT_SERVER and LIFT_CACHE) are both set: leave one out"
            )
        if self.cache is not None and self.model is None and not self.dry_run:
            raise ValueError("--cache needs --model: what shall embed")
        if self.devices and self.cache is None:
            raise ValueError("--devices needs --cache; a server that runs already has its device")
        if self.retry_failed and (self.dry_run or self.recheck):
            raise ValueError("--retry-failed reads the ledger only; leave --dry-run and --recheck out")
        return self

    @property
    def share(self) -> tuple[int, int]:
        """`shard` as numbers; (0, 1) is everything."""
        first, _, count = (self.shard or "0/1").partition("/")
        return int(first), int(count)

    @property
    def patience(self) -> float:
        """Seconds to wait for a server: a model of ours may take long to load."""
        if self.wait_server is not None:
            return self.wait_server
        return 120.0 if self.cache is None else 1800.0

    def engine_options(self) -> dict[str, Any]:
        """Those of the settings that a server of our own takes over."""
        return self.model_dump(include=set(EngineOptions.model_fields))
