"""An existing fleet of `/v1/embeddings` servers as engine: vLLM's own, text-embeddings-inference, another one.

Nothing here sees the weights, and a server behind a URL can be replaced at any time. So every request carries a
witness, one of the canaries, and its other vectors count only when the witness has the vector that it had at the
start; whether that is the cache's model is what the canaries are compared for, as with every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lift_cache.errors import BadConfig, EngineUnavailable
from lift_cache.recipe import MOST_DRIFT, Recipe
from lift_embedder.engines.fleet import AT_A_TIME, Busy, Failing, Input, ModelCard, Refused, Server, address
from lift_embedder.tokens import special_tokens_around

log = logging.getLogger(__name__)

ROWS = 31
"""Texts per request beside the witness: text-embeddings-inference takes 32 unless told otherwise."""

LOOK_EVERY = 5.0
"""Seconds after which a server that was not used is asked for a witness: one that died unused is known to be."""

KEY_VARIABLE = "LIFT_UPSTREAM_KEY"

AsText = Callable[[list[int]], str | None]


@dataclass(frozen=True)
class Fleet:
    """Where the servers are and how they are asked.

    Raises:
        BadConfig: no URL, or one that is none.
    """

    urls: tuple[str, ...] = field(repr=False)  # may hold a password
    model: str | None = None
    "What the servers call the model; None takes the one that they list."
    key: str | None = field(default=None, repr=False)
    seconds: float = 100.0
    "That one answer may take: a third of a batch's deadline, so that other servers have their turn."
    witnesses: list[list[int]] = field(default_factory=list)
    "Token ids of the canaries; at least one by the time an engine starts."
    as_text: AsText | None = None
    "For servers that take no token ids; see `text_for`."

    def __post_init__(self) -> None:
        if not self.urls:
            raise BadConfig("--engine openai computes elsewhere: name the servers with --upstream URL")
        for url in self.urls:
            address(url)


class OpenAIEngine:
    """See `Engine`. A text that a server does not take as it is gets a vector of NaN, which is never stored."""

    verified = False

    def __init__(self, recipe: Recipe, fleet: Fleet) -> None:
        self.recipe = recipe
        self._fleet = fleet
        self._servers = [Server(url, key=fleet.key, seconds=fleet.seconds) for url in fleet.urls]
        self._owner = ""
        self._witnesses: list[Input] = []
        self._expected: np.ndarray | None = None  # float64 [witnesses, d]
        self._turn = itertools.count()
        self._freed = asyncio.Event()
        self._watching: list[asyncio.Task[None]] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        self._witnesses = [one for one in await self._prepare(self._fleet.witnesses) if one is not None]
        if not self._witnesses:
            raise EngineUnavailable(
                "no canary has a text that is tokenised as here; use --upstream-input ids"
            )
        # The first server that answers says what is expected of the others.
        rest = iter(self._servers)
        for server in rest:
            if await self._ask(server, []) is not None:
                break
        else:
            raise EngineUnavailable("; ".join(server.trouble for server in self._servers))
        await asyncio.gather(*(self._ask(server, []) for server in rest))
        self._watching = [asyncio.create_task(self._watch(server)) for server in self._servers]

    async def embed(self, inputs: Sequence[list[int]]) -> np.ndarray:
        if not self._watching or self._closed:
            raise EngineUnavailable("the upstream servers are not in use")
        vectors = np.full((len(inputs), self.recipe.dimensions), np.nan, np.float32)
        prepared = await self._prepare(inputs)
        rows = [row for row, one in enumerate(prepared) if one is not None]
        if len(rows) < len(inputs):
            log.warning(
                "captions that no text leads to cannot be sent as text; --upstream-input ids sends them all",
                extra={"captions": len(inputs) - len(rows)},
            )

        async def fill(part: list[int]) -> None:
            vectors[part] = await self._vectors([one for row in part if (one := prepared[row]) is not None])

        tasks = [asyncio.ensure_future(fill(rows[at : at + ROWS])) for at in range(0, len(rows), ROWS)]
        self._waiting.update(tasks)
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if self._closed:  # closed under us, not cancelled by the caller
                raise EngineUnavailable("the engine was stopped") from None
            raise
        finally:
            for task in tasks:
                task.cancel()
            self._waiting.difference_update(tasks)
        return vectors

    def healthy(self) -> bool:
        return not self._closed and not all(server.down for server in self._servers)

    async def aclose(self) -> None:
        self._closed = True
        tasks = [*self._waiting, *self._watching]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            with contextlib.suppress(Exception):
                await server.aclose()

    def describe(self) -> dict[str, str]:
        said = {
            "engine": "openai",
            "upstream": " ".join(server.name for server in self._servers),
            "upstream_model": next((server.model for server in self._servers if server.model), ""),
            "upstream_software": self._owner,
        }
        return {name: value for name, value in said.items() if value}

    # One server

    async def _ask(self, server: Server, inputs: Sequence[Input]) -> np.ndarray | None:
        """Vectors of a few inputs; None from a server that another one has to stand in for.

        Raises:
            Refused: of an input. None may be given to see whether the server is well; that never raises.
        """
        server.under_way += 1
        try:
            async with server.meeting:
                if not server.known:
                    await self._meet(server)
            number = next(self._turn) % len(self._witnesses)
            vectors = await server.embed([*inputs, self._witnesses[number]], self.recipe.dimensions)
            self._compare(server, vectors[-1:], slice(number, number + 1))
        except Refused as error:
            if not inputs:
                server.failed(Failing(str(error)))
            elif len(inputs) > 1 or await self._ask(server, []) is not None:
                raise
            return None  # it refuses canaries too: not the input's fault
        except Busy as error:
            server.busy(error)
            return None
        except Failing as error:
            server.failed(error)
            return None
        finally:
            server.under_way -= 1
            self._freed.set()
        server.answered()
        return vectors[:-1]

    async def _meet(self, server: Server) -> None:
        """See what a server serves that is new or was away. Raises Failing, Busy."""
        card = self._card(server, await server.models())
        server.model = card.id if card is not None else self._fleet.model
        try:
            vectors = await server.embed(self._witnesses, self.recipe.dimensions)
        except Refused as error:  # the canaries are ordinary captions
            raise Failing(str(error)) from None
        if self._expected is None:
            self._expect(server, vectors)
        self._compare(server, vectors, slice(None))
        self._owner = card.owned_by if card is not None else self._owner
        server.known = True

    def _card(self, server: Server, cards: list[ModelCard]) -> ModelCard | None:
        """Which of its models a server is asked for; None from one that lists none. Raises Failing."""
        named = [card for card in cards if card.id == self._fleet.model] if self._fleet.model else cards
        if not cards:
            return None
        if len(named) != 1:
            raise Failing(
                f"{server.name} serves {', '.join(card.id for card in cards)}; name one with --upstream-model"
            )
        longest, needed = named[0].max_model_len, self.recipe.max_tokens + 1
        if longest is not None and longest < needed:
            # vLLM is known never to finish an input of exactly its longest length.
            raise Failing(
                f"{server.name} serves with max_model_len {longest}; the recipe needs {needed}: start it with "
                f"--max-model-len {needed}"
            )
        return named[0]

    def _expect(self, server: Server, vectors: np.ndarray) -> None:
        """Take what the first server gives as what the others have to give. Raises Failing."""
        if not (np.isfinite(vectors).all() and vectors.any(1).all()):
            raise Failing(f"{server.name} gives canary vectors that are zero or not finite")
        if not self.recipe.normalize and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
            raise Failing(
                f"{server.name} scales vectors to unit length, which the recipe does not: start it without, or "
                "use --normalize"
            )
        self._expected = self._scaled(vectors)

    def _compare(self, server: Server, vectors: np.ndarray, which: slice) -> None:
        """Raises Failing when witnesses have not the vectors that are expected."""
        assert self._expected is not None
        expected = self._expected[which]
        # 1 − cosine for vectors of unit length; for others it also tells when they were scaled.
        drift = ((self._scaled(vectors) - expected) ** 2).sum(1) / (2 * (expected**2).sum(1))
        allowed = MOST_DRIFT[self.recipe.dtype]
        if not (drift <= allowed).all():  # also when it is NaN
            raise Failing(
                f"{server.name} gives other vectors than the upstream servers gave at the start: a canary moved "
                f"by {drift.max():.2g} (1 - cosine; at most {allowed:.2g})",
                for_long=True,
            )

    def _scaled(self, vectors: np.ndarray) -> np.ndarray:
        """As the recipe wants them, in float64."""
        return _unit(vectors) if self.recipe.normalize else vectors.astype(np.float64)

    # The fleet

    async def _vectors(self, inputs: Sequence[Input]) -> np.ndarray:
        """Vectors of one request's inputs, with NaN for those that are refused. Raises EngineUnavailable."""
        try:
            while True:
                vectors = await self._ask(await self._least_busy(), inputs)
                if vectors is not None:
                    return self._scaled(vectors).astype(np.float32)
        except Refused:
            if len(inputs) == 1:
                log.warning("the upstream refused a caption", extra={"tokens": inputs[0].tokens})
                return np.full((1, self.recipe.dimensions), np.nan, np.float32)
        half = len(inputs) // 2
        return np.concatenate([await self._vectors(inputs[:half]), await self._vectors(inputs[half:])])

    async def _least_busy(self) -> Server:
        """The server to ask next, once there is one. Raises EngineUnavailable when all are down."""
        while True:
            now = time.monotonic()
            # One that failed is tried by whoever watches it, not with captions that could wait there again.
            known = [server for server in self._servers if server.known] or self._servers
            free = [server for server in known if server.rests_until <= now and server.under_way < AT_A_TIME]
            if free:
                return min(free, key=lambda server: server.under_way)
            if not self.healthy():
                raise EngineUnavailable("; ".join(server.trouble for server in self._servers))
            self._freed.clear()
            ends = [server.rests_until - now for server in known if server.rests_until > now]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), min(ends, default=None))

    async def _watch(self, server: Server) -> None:
        """Look at a server that nobody uses: whether it is still there, or there again."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            now = time.monotonic()
            idle = not server.under_way and server.answered_at < now - LOOK_EVERY
            if idle and server.rests_until <= now:
                await self._ask(server, [])

    async def _prepare(self, inputs: Sequence[list[int]]) -> list[Input | None]:
        as_text = self._fleet.as_text
        if as_text is None:
            return [Input(ids, len(ids)) for ids in inputs]
        texts = await asyncio.to_thread(lambda: [as_text(ids) for ids in inputs])
        return [
            None if text is None else Input(text, len(ids)) for text, ids in zip(texts, inputs, strict=True)
        ]


def text_for(tokenizer: Any) -> AsText:
    """From token ids to a text that a server with the same tokenizer turns into exactly these ids, or None.

    None for ids that no text leads to: a caption with the name of a special token in it, an end token that the
    tokenizer does not add and cannot read, a cut through a character.
    """
    opening, closing = special_tokens_around(tokenizer)
    own = copy.deepcopy(tokenizer)  # how special tokens are read is a setting that threads would share

    def as_text(ids: list[int]) -> str | None:
        inner = ids[len(opening) : len(ids) - len(closing)]
        text: str = own.decode(inner, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if own(text, split_special_tokens=False)["input_ids"] == ids else None

    return as_text


def read_key(path: Path | None) -> str | None:
    """The fleet's key: the first line of a file, or `LIFT_UPSTREAM_KEY`. Raises BadConfig."""
    if path is None:
        key, where = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
        if not key:
            return None
    else:
        where = f"--upstream-key-file {path}"
        try:
            key = next(iter(path.read_text().splitlines()), "").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(f"{where}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise BadConfig(f"{where}: a key is one line of printable ASCII without spaces")
    return key


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Unit length in float64. A vector that is zero stays zero, for the cache to refuse it for what it is."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths == 0, 1, lengths)
