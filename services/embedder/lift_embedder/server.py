"""`lift-embed serve`: everything that must hold before the engine is loaded, and the end of a server's life."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

import uvicorn

from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, CacheNotFound
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter
from lift_embedder import __version__, canaries, logs, models
from lift_embedder.access import ENVIRONMENT, Keys, is_loopback, refuse_open_listening
from lift_embedder.app import create_app
from lift_embedder.config import ServeConfig
from lift_embedder.engines import create_engine, resolve_kind
from lift_embedder.engines.openai_engine import Fleet, read_key, text_for
from lift_embedder.history import History
from lift_embedder.metrics import Metrics
from lift_embedder.path import EmbeddingPath
from lift_embedder.queue import Queue
from lift_embedder.recipes import build_recipe
from lift_embedder.service import Service
from lift_embedder.supervisor import Supervisor
from lift_embedder.tokens import CaptionTokenizer

log = logging.getLogger(__name__)

STOP_SECONDS = 15.0
"""After draining: closing the engine and the cache. What is acknowledged needs neither."""


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; then answer what is under way, commit, and return.

    Raises:
        LiftError: what the user has to change (port, lock, recipe, model), before an engine is loaded.
    """
    logs.configure()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server takes over: nothing is under way
    keys = Keys.load(config.keys_file, os.environ.pop(ENVIRONMENT, ""))
    refuse_open_listening(config.host, keys, config.insecure)
    fleet = _fleet(config)
    listener = bind(config.host, config.port)
    model = models.resolve(
        config.model,
        revision=_revision_of(config),
        trust_remote_code=config.trust_remote_code,
        weights=fleet is None,
    )
    recipe = build_recipe(model.named, model.name, model.facts, config, declared=_declared(config))
    encoding = Encoding(dtype=config.store, dimensions=recipe.dimensions) if config.store else None
    with CacheWriter.open(config.cache, recipe, encoding) as cache:
        kind = resolve_kind(config.engine, recipe)
        loaded = models.load_tokenizer(model)
        tokenizer = CaptionTokenizer(recipe, loaded)
        if fleet is not None:
            fleet = replace(
                fleet,
                witnesses=[row.ids for row in tokenizer(canaries.CAPTIONS)],
                as_text=text_for(loaded) if config.upstream_input == "text" else None,
            )
        metrics = Metrics()
        supervisor = Supervisor(
            lambda: create_engine(kind, model.folder, recipe, batch_tokens=config.batch_tokens, fleet=fleet),
            tokenizer,
            cache,
            metrics,
            batch_seconds=config.batch_seconds,
        )
        queue = Queue(
            most_tokens=config.queue_tokens,
            most_bytes=config.queue_mib << 20,
            batch_tokens=config.batch_tokens,
        )
        path = EmbeddingPath(cache, tokenizer, supervisor, metrics, queue)
        service = Service(
            path,
            metrics,
            History(),
            names=frozenset({config.model, recipe.model, model.folder.name}),
            shorter=model.named is not None and model.named.shorter,
            most_inputs=config.most_inputs,
        )
        metrics.describe(version=__version__, engine=kind, model=recipe.model, recipe=service.fingerprint)
        metrics.watch_cache(lambda: cache.rows, service.history.size)
        app = create_app(
            service,
            keys=keys,
            loopback=is_loopback(config.host),
            allowed_hosts=config.allowed_hosts,
            most_body_bytes=config.most_body_mib << 20,
            buffer_bytes=config.buffer_mib << 20,
        )
        log.info(
            "listening",
            extra={
                "url": f"http://{config.host}:{listener.getsockname()[1]}",
                "cache": str(config.cache),
                "rows": cache.rows,
                "model": recipe.model,
                "revision": recipe.revision,
                "recipe": recipe.fingerprint,
                "engine": kind,
            },
        )
        Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=math.ceil(config.drain_seconds),
                server_header=False,
                ws="none",
            ),
            limit=config.drain_seconds + STOP_SECONDS,
        ).run(sockets=[listener])
        service.close()
    log.info("stopped: every acknowledged caption is in the cache", extra={"cache": str(config.cache)})


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is found before anything is loaded. Raises BadConfig."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, so that asyncio knows it for TCP and sends answers without delay.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Bound alone still lets a second server bind; listening does not.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise BadConfig(
            f"--host {host} --port {port}: {error.strerror or error}; stop what listens there, or choose another port"
        ) from None
    return listener


def _recorded(config: ServeConfig) -> Recipe | None:
    """The recipe of the cache, if it is there already."""
    try:
        return Recipe.load(config.cache / "recipe.json")
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise CacheNotFound(f"--cache {config.cache} is a file; a cache is a directory") from None


def _declared(config: ServeConfig) -> bool:
    """Whether the recipe is only declared: of a new cache, where the engine does not load the weights itself.

    A cache that is there stays what it is, whichever engine adds to it: the canaries decide whether it may.
    """
    recorded = _recorded(config)
    return config.engine == "openai" if recorded is None else recorded.declared


def _fleet(config: ServeConfig) -> Fleet | None:
    """The upstream servers of `--engine openai`. Raises BadConfig."""
    if config.engine == "openai":
        key, seconds = read_key(config.upstream_key_file), config.batch_seconds / 3
        return Fleet(config.upstream, model=config.upstream_model, key=key, seconds=seconds)
    if config.upstream:
        raise BadConfig("--upstream names servers that compute; it goes with --engine openai")
    return None


def _revision_of(config: ServeConfig) -> str | None:
    """The commit to load: a branch or tag is resolved once, when the cache is created."""
    recorded = _recorded(config)
    if recorded is None:
        return config.revision
    repository = models.repository_of(config.model)
    if repository is None or repository != recorded.model:
        return config.revision
    if config.revision is not None and re.fullmatch(r"[0-9a-f]{40}", config.revision):
        return config.revision  # a commit other than the recorded one is refused with the recipe
    head = models.moved_to(repository, recorded.revision, config.revision)
    if head is not None:
        log.warning(
            "%s is at %s%s now; this cache stays with the commit that it was made with",
            repository,
            head,
            f" ({config.revision})" if config.revision else "",
        )
    return recorded.revision


class Server(uvicorn.Server):
    """uvicorn's server, whose clean stop is a success: upstream raises the signal again after draining."""

    def __init__(self, config: uvicorn.Config, *, limit: float) -> None:
        """
        Args:
            limit: seconds from the first signal to the end of the process, at most.
        """
        super().__init__(config)
        self._limit = limit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            log.info("stopping: requests under way are answered first", extra={"limit seconds": self._limit})
            end = threading.Timer(self._limit, _end)
            end.daemon = True
            end.start()
        super().handle_exit(sig, frame)


def _end() -> None:
    """Leave work on the cache where it stands: all of it can be cut off anywhere, and nothing waits for it."""
    log.warning("stopped at the limit: every acknowledged caption is in the cache, maintenance was cut short")
    os._exit(0)
