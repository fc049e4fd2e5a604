"""Where captions go: a server that runs already, or a cache directory, filled by servers of our own.

One engine      our server on the cache itself.
Several         a server each on a part, `CACHE/parts/<i>`, a cache of its own; the cache's lock stays with us. A
                caption goes to one of them by its key, unless the cache has it. At the end the parts are sealed
                and merged into the cache, and only then removed; parts that a run left are merged by the next.

Inside the cache, because what lies beside it may be another disk, or gone with a container.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lift_cache import files
from lift_cache.client import EmbeddingClient, ServerInfo
from lift_cache.errors import CacheLocked, LiftError, ServerUnavailable
from lift_cache.keys import caption_keys
from lift_cache.writer import CacheWriter
from lift_embedder.config import FillConfig, ServeConfig
from lift_embedder.fill.books import Answer
from lift_embedder.fill.lanes import Ask
from lift_embedder.fill.marks import digest
from lift_embedder.fill.servers import OwnServer

DEFAULT_SERVER = "http://127.0.0.1:8080"

SAY_EVERY = 10.0
"""Seconds between two words on why nothing moves."""

LOCK_SECONDS = 5.0
"""How long a server that was just killed may take to let go of its cache."""

GONE = ".gone"
"""Ending of a part that was merged and is being removed."""

Say = Callable[[str], None]


class Target(ABC):
    """Where captions go, once it was started.

    Attributes:
        name: under which marks know it.
        fingerprint: of the cache's recipe; of a cache that does not exist, None until `start`.
        rows: captions that the cache had to begin with.
        asks: one way to send captions for each engine; none before `start`.
    """

    name: str
    fingerprint: str | None
    rows: int
    asks: Sequence[Ask]

    def start(self) -> None:  # noqa: B027
        """Begin to take captions. Raises LiftError."""

    @abstractmethod
    def found(self, captions: list[str]) -> np.ndarray:
        """Which of some captions the cache has: bool [n]."""

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (uint8 [n, 16]) need not be sent, so far as that is known without asking: bool [n]."""
        return np.zeros(len(keys), bool)

    def check(self) -> None:  # noqa: B027
        """Raises LiftError when captions cannot be sent any more."""

    @property
    def restarts(self) -> int:
        """Servers of our own that had died and were started again."""
        return 0

    @abstractmethod
    def finish(self, *, snapshot: bool) -> str | None:
        """After the last answer. Returns the id of the snapshot that was asked for."""

    def interrupt(self) -> None:  # noqa: B027
        """End what must not outlive the run, and leave the rest for the next."""

    @property
    def place(self) -> str:
        """Where the captions are that were acknowledged, in words."""
        return "the cache"


# ---------------------------------------------------------------------------------------------- servers


class Connection:
    """A client for one server, which says now and then why it waits."""

    def __init__(
        self,
        url: str,
        config: FillConfig,
        say: Say,
        check: Callable[[], None] = lambda: None,
        key: str | None = None,
    ) -> None:
        """
        Args:
            check: raises when waiting is in vain.
            key: of a server of our own.
        """
        self._url, self._key, self._patience = url, key, config.patience
        self._say, self._check = say, check
        self._lock, self._said = threading.Lock(), time.monotonic() - SAY_EVERY / 2
        self._stopped = False
        self.client = EmbeddingClient(
            url,
            patience=config.patience,
            api_key=key,
            batch=config.batch,
            priority="bulk",
            on_wait=self._waiting,
        )

    def info(self) -> ServerInfo:
        """Raises ServerUnavailable, also where nothing can be added."""
        info = self.client.info()
        if info.read_only is not None:
            raise self._read_only(info.read_only)
        return info

    def embed(self, captions: list[str]) -> Answer:
        """Raises ServerUnavailable."""
        answer = self.client.embed(captions, on_error="return")
        return Answer(answer.cached, answer.tokens, answer.truncated, answer.errors)

    def found(self, captions: list[str]) -> np.ndarray:
        """Which of some captions the server's cache has: bool [n]. Raises ServerUnavailable."""
        return self.client.lookup(captions, vectors=False, on_error="return").found

    def close(self) -> None:
        """Wait for nothing any more."""
        self._stopped = True
        self.client.close()

    def _read_only(self, reason: str) -> ServerUnavailable:
        return ServerUnavailable(f"{self._url} is read-only: {reason}")

    def _waiting(self, trouble: str, seconds: float) -> None:
        """Say so now and then, and look whether waiting is in vain. Raises what then ends the run."""
        self._check()
        if self._stopped:
            raise ServerUnavailable("stopped")
        with self._lock:
            if time.monotonic() - self._said < SAY_EVERY:
                return
            self._said = time.monotonic()
        self._say(f"waiting up to {self._patience:.0f} s: {trouble}")
        try:
            with EmbeddingClient(self._url, timeout=5, patience=0, api_key=self._key) as looking:
                read_only = looking.info().read_only
        except LiftError:
            return
        if read_only is not None:
            raise self._read_only(read_only)


class ServerTarget(Target):
    """A server that runs already."""

    def __init__(self, config: FillConfig, say: Say) -> None:
        """Raises BadConfig, ServerUnavailable."""
        url = config.server or DEFAULT_SERVER
        self._connection = Connection(url, config, say)
        try:
            info = self._connection.info()
        except BaseException:
            self.interrupt()
            raise
        self.name, self.fingerprint, self.rows = self._connection.client.url, info.fingerprint, info.rows
        self.asks = [self._connection.embed]

    def found(self, captions: list[str]) -> np.ndarray:
        return self._connection.found(captions)

    def finish(self, *, snapshot: bool) -> str | None:
        made = str(self._connection.client.snapshot()["id"]) if snapshot else None
        self._connection.close()
        return made

    def interrupt(self) -> None:
        self._connection.close()


# ---------------------------------------------------------------------------------------------- a cache


class CacheTarget(Target):
    """A cache directory, filled by servers of our own."""

    def __init__(self, config: FillConfig, logs: Path, say: Say) -> None:
        """Open the cache where there is one, and merge what an earlier run left in parts.

        Args:
            logs: directory for what the servers print.

        Raises:
            CacheLocked, CacheDamaged, RecipeMismatch, BadConfig, and others of their kind.
        """
        assert config.cache is not None
        self._config, self._logs, self._say = config, logs, say
        self._cache = config.cache
        self._servers: list[OwnServer] = []
        self._connections: list[Connection] = []
        self._restarts = 0
        self._main: CacheWriter | None = None
        self.name = f"cache:{config.cache.absolute()}"
        self.fingerprint, self.rows, self.asks = None, 0, []
        if (self._cache / "recipe.json").is_file():
            self._main = open_writer(self._cache)
            try:
                adopt_parts(self._main, say)
                self.fingerprint, self.rows = self._main.recipe.fingerprint, self._main.rows
            except BaseException:
                self.interrupt()
                raise

    def start(self) -> None:
        """Start the servers and wait until they listen. Raises LiftError."""
        if len(self._config.devices) > 1:
            self._open_parts(self._config.devices)
        else:
            self._leave()  # to the server
            self._serve(self._cache, next(iter(self._config.devices), None), 1)
        for server in self._servers:
            url = server.url(self._config.patience)
            self._connections.append(Connection(url, self._config, self._say, self.check, server.key))
        infos = [connection.info() for connection in self._connections]
        self.fingerprint = infos[0].fingerprint
        self.asks = [connection.embed for connection in self._connections]

    def found(self, captions: list[str]) -> np.ndarray:
        if self._main is None:
            return np.zeros(len(captions), bool)
        return self._main.contains(caption_keys(captions))

    def has(self, keys: np.ndarray) -> np.ndarray:
        return super().has(keys) if self._main is None else self._main.contains(keys)

    def check(self) -> None:
        for server in self._servers:
            server.check()

    @property
    def restarts(self) -> int:
        return self._restarts + sum(server.restarts for server in self._servers)

    def finish(self, *, snapshot: bool) -> str | None:
        """Stop the servers; then merge the parts, seal where this is one shard of several, make the snapshot."""
        self._stop()
        if self._main is None and not snapshot and self._config.shard is None:
            return None  # what one server has filled is where it belongs
        with self._main or open_writer(self._cache) as main:
            self._main = None
            adopt_parts(main, self._say)
            if self._config.shard is not None:
                main.seal()  # what `lift-cache adopt` takes are sealed segments
            return main.snapshot().id if snapshot else None

    def interrupt(self) -> None:
        try:
            self._stop()
        finally:
            self._leave()

    @property
    def place(self) -> str:
        parts = self._cache / "parts"
        return f"the cache or in {parts}, which the next run merges" if parts.is_dir() else "the cache"

    def _open_parts(self, devices: Sequence[str]) -> None:
        if not (self._cache / "canaries.json").is_file():
            # The first engine makes the recipe and sets the standard that all parts are held to.
            self._leave()
            self._say("one engine first, for the canaries that all are held to")
            self._serve(self._cache, devices[0], 1).wait_ready(self._config.patience)
            self._stop()
        self._main = self._main or open_writer(self._cache)
        cpus = sum(device == "cpu" for device in devices)
        for number, device in enumerate(devices):
            part = self._cache / "parts" / str(number)
            files.make_directory(part)
            with CacheWriter.open(part, self._main.recipe, self._main.encoding):
                pass
            files.write_atomic(part / "canaries.json", (self._cache / "canaries.json").read_bytes())
            self._serve(part, device, cpus)

    def _leave(self) -> None:
        if self._main is not None:
            self._main.close()
            self._main = None

    def _serve(self, cache: Path, device: str | None, cpus: int) -> OwnServer:
        config = ServeConfig(cache=cache, model=str(self._config.model), **self._config.engine_options())
        files.make_directory(self._logs)
        whose = self._cache.absolute()
        log = self._logs / f"{whose.name}-{digest(str(whose))[:8]}-{len(self._servers)}.log"
        threads = max(1, len(os.sched_getaffinity(0)) // max(cpus, 1))
        server = OwnServer(config, device, threads, log, self._say)
        self._servers.append(server)
        server.start()
        return server

    def _stop(self) -> None:
        """Stop all servers, in good order; a second Ctrl-C ends them at once."""
        for connection in self._connections:
            connection.close()
        self._restarts = self.restarts
        if self._servers:
            self._say("stopping: what is under way is answered first")
        try:
            for server in self._servers:
                server.end()
            for server in self._servers:
                server.wait_end()
        except BaseException:
            for server in self._servers:
                server.kill()
            raise
        finally:
            self._servers = []


def adopt_parts(main: CacheWriter, say: Say) -> None:
    """Merge what is in the parts of a cache into it, and remove them. Cut off anywhere, it can be done again.

    Raises:
        RecipeMismatch, EncodingMismatch, CacheDamaged, CacheFull, CacheLocked: the part is left as it is.
        BadConfig: something else is there.
    """
    directory = main.path / "parts"
    if not directory.is_dir():
        return
    for gone in directory.glob(f"*{GONE}"):
        shutil.rmtree(gone)
    for part in sorted(directory.iterdir()):
        if (part / "recipe.json").is_file():
            with open_writer(part) as writer:
                writer.seal()
                rows = writer.rows
            if rows:
                added = main.merge(part).added
                say(f"merged {part}: {added:,} captions" + (f" of {rows:,}" if added != rows else ""))
        else:
            files.refuse_other_content(part)  # never was a cache
        gone = part.with_suffix(GONE)
        part.rename(gone)  # at once, so that half of a part is never taken for one
        files.sync_directory(directory)
        shutil.rmtree(gone)
    directory.rmdir()


def open_writer(path: Path) -> CacheWriter:
    """An existing cache, open for writing, once a server that was killed a moment ago has let go of it."""
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return CacheWriter.open(path)
        except CacheLocked as error:
            if time.monotonic() > give_up:
                raise CacheLocked(f"{error} (--server URL)") from None
