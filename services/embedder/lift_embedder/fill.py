"""`lift-embed fill`: every caption of some sources into a server's cache, once.

read → check → skip what was seen in this run → batches → server (several requests under way) → count

What was filled before is answered by the cache, so running the same command again is how a run is resumed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from queue import Queue

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lift_cache.client import EmbeddingClient
from lift_cache.errors import BadCaption, BadConfig, BadSource, LiftError, ServerUnavailable
from lift_cache.files import write_atomic
from lift_cache.keys import key_of_normalised, normalise
from lift_cache.sources import BadRow, CaptionRow, expand, iter_captions
from lift_embedder.config import FillConfig
from lift_embedder.keyset import KeySet

NAMED_BAD = 20
"""Bad captions printed one by one; the summary counts them all."""

FIRST_BAD = 3
"""Bad captions that the end of a run names again."""


@dataclass
class Summary:
    """What a run did. `captions` are usable rows; `unique` of them are distinct."""

    rows: int = 0
    captions: int = 0
    unique: int = 0
    cached: int = 0
    embedded: int = 0
    tokens: int = 0
    truncated: int = 0
    rejected: int = 0
    first_rejected: list[str] = field(default_factory=list)
    seconds: float = 0.0
    captions_per_second: float = 0.0
    snapshot: str | None = None

    def text(self) -> str:
        said = (
            f"{self.rows:,} rows, {self.captions:,} captions, {self.unique:,} unique: {self.cached:,} were cached, "
            f"{self.embedded:,} embedded ({self.tokens:,} tokens, {self.truncated:,} truncated), "
            f"{self.rejected:,} rejected; {self.seconds:.1f} s, {self.captions_per_second:,.0f} captions/s"
        )
        return f"{said}; snapshot {self.snapshot}" if self.snapshot else said


@dataclass(frozen=True, slots=True)
class Caption:
    """Normalised text and the first place it was read from."""

    text: str
    where: str


class TooManyBad(BadSource):
    """More bad captions than `--max-bad`."""


def fill(sources: Sequence[str], config: FillConfig, console: Console | None = None) -> Summary:
    """Run to the end of the sources, or to an error that says what is done.

    Raises:
        BadConfig: `config.summary` cannot be written.
        BadSource: nothing there, nothing in it, or more than `config.max_bad` bad captions.
        ServerUnavailable: the server was away for longer than `config.wait_server`.
        KeyboardInterrupt: its text says what is saved.
    """
    if config.summary is not None and (config.summary.is_dir() or not config.summary.parent.is_dir()):
        raise BadConfig(f"--summary {config.summary}: name a file in a folder that exists")
    run = Fill(sources, config, console or Console(stderr=True))
    try:
        return run.run()
    except TooManyBad:
        raise
    except LiftError as error:
        raise type(error)(f"{error}; {run.saved()}") if run.summary.unique else error from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.saved()) from None


class Fill:
    """One run over some sources."""

    def __init__(self, sources: Sequence[str], config: FillConfig, console: Console) -> None:
        self.summary = Summary()
        self._paths = expand(sources)
        self._config = config
        self._console = console
        self._seen = KeySet()
        self._said_waiting = 0.0
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        # No bar where nobody sees it move: a log gets a line every few seconds instead.
        self._progress = Progress(
            TextColumn("fill"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("fill", total=None, rate="")
        self._last_line = time.monotonic()

    def run(self) -> Summary:
        began = time.monotonic()
        stop = threading.Event()
        threading.Thread(target=self._count_ahead, args=(stop,), daemon=True).start()
        try:
            with self._progress:
                self._began = began
                if self._config.dry_run:
                    for _ in self._unique():
                        pass
                else:
                    self._send_all()
        except BaseException:
            try:
                self._finish(began)
            except (LiftError, OSError) as error:  # what ended the run matters more
                self._console.print(f"no summary was written: {error}", markup=False, highlight=False)
            raise
        finally:
            stop.set()
        self._finish(began)
        return self.summary

    def saved(self) -> str:
        done = self.summary.cached + self.summary.embedded
        return f"{done:,} captions are in the cache, the same command goes on from there"

    def _finish(self, began: float) -> None:
        summary = self.summary
        summary.seconds = round(time.monotonic() - began, 3)
        summary.captions_per_second = round(
            (summary.cached + summary.embedded) / max(summary.seconds, 1e-9), 1
        )
        if self._config.summary is not None:
            write_atomic(self._config.summary, (json.dumps(asdict(summary), indent=2) + "\n").encode())

    def _send_all(self) -> None:
        client = EmbeddingClient(
            self._config.server, patience=self._config.wait_server, on_wait=self._waiting
        )
        with client:
            read_only = client.info().read_only
            if read_only is not None:
                raise self._read_only(read_only)
            queue: Queue[list[Caption] | None] = Queue(self._config.concurrency)
            # Daemons: one that waits for a server must not hold up Ctrl-C.
            senders = [
                threading.Thread(target=self._send_from, args=(client, queue), daemon=True)
                for _ in range(self._config.concurrency)
            ]
            for sender in senders:
                sender.start()
            for batch in self._batches():
                queue.put(batch)
                self._raise_failure()
            for _ in senders:
                queue.put(None)
            for sender in senders:
                sender.join()
            self._raise_failure()
            if self._config.snapshot:
                self.summary.snapshot = str(client.snapshot()["id"])

    def _send_from(self, client: EmbeddingClient, queue: Queue[list[Caption] | None]) -> None:
        while (batch := queue.get()) is not None:
            if self._failure is not None:
                continue  # keep the queue moving, so that the reader gets to see the failure
            try:
                self._send(client, batch)
            except BaseException as error:
                self._failure = error

    def _read_only(self, reason: str) -> ServerUnavailable:
        return ServerUnavailable(f"{self._config.server} is read-only: {reason}")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send(self, client: EmbeddingClient, batch: list[Caption]) -> None:
        try:
            answer = client.embed([caption.text for caption in batch])
        except BadCaption as error:
            # The server takes all of a request or nothing: halve it until the bad one stands alone.
            if len(batch) == 1:
                self._reject(batch[0].where, str(error))
                return
            middle = len(batch) // 2
            self._send(client, batch[:middle])
            self._send(client, batch[middle:])
            return
        with self._lock:
            cached = int(answer.cached.sum())
            self.summary.cached += cached
            self.summary.embedded += len(batch) - cached
            self.summary.tokens += int(answer.tokens[~answer.cached].sum())
            self.summary.truncated += int(answer.truncated.sum())

    def _batches(self) -> Iterator[list[Caption]]:
        batch: list[Caption] = []
        for caption in self._unique():
            batch.append(caption)
            if len(batch) == self._config.batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _unique(self) -> Iterator[Caption]:
        """Usable captions that this run has not seen yet."""
        for row in self._rows():
            try:
                if isinstance(row, BadRow):
                    raise BadCaption(row.reason)
                text = normalise(row.caption)
            except BadCaption as error:
                self._reject(row.where, str(error))
                continue
            self.summary.captions += 1
            if self._seen.add(key_of_normalised(text)):
                self.summary.unique += 1
                yield Caption(text, row.where)
        if not self.summary.captions:
            raise BadSource(f"no usable caption in {self.summary.rows:,} rows; check the sources and --field")

    def _rows(self) -> Iterator[CaptionRow | BadRow]:
        for path in self._paths:
            for row in iter_captions(path, self._config.field):
                self.summary.rows += 1
                if self.summary.rows % 64 == 0:
                    self._show()
                yield row

    def _reject(self, where: str, reason: str) -> None:
        with self._lock:
            self.summary.rejected += 1
            count = self.summary.rejected
            if count <= FIRST_BAD:
                self.summary.first_rejected.append(where)
        if count <= NAMED_BAD:
            self._console.print(f"left out {where}: {reason}", markup=False, highlight=False)
        elif count == NAMED_BAD + 1:
            self._console.print("further bad captions are counted, not named")
        if count > self._config.max_bad:
            raise TooManyBad(
                f"{count:,} bad captions (the last: {where}: {reason}); mend the source, or allow more with --max-bad"
            )

    def _count_ahead(self, stop: threading.Event) -> None:
        """Rows in all sources, counted beside the run, for the time left. What is wrong there is said by the run."""
        rows = 0
        try:
            for path in self._paths:
                for _ in iter_captions(path, self._config.field):
                    rows += 1
                    if stop.is_set():
                        return
        except LiftError:
            return
        self._progress.update(self._task, total=rows)

    def _show(self) -> None:
        summary = self.summary
        sent = summary.cached + summary.embedded
        rate = sent / max(time.monotonic() - self._began, 1e-9)
        share = summary.cached / sent if sent else 0.0
        line = f"{rate:,.0f} captions/s, {share:.0%} cached, {summary.rejected:,} rejected"
        self._progress.update(self._task, completed=summary.rows, rate=line)
        if self._progress.disable and time.monotonic() - self._last_line > 5:
            self._last_line = time.monotonic()
            total = self._progress.tasks[0].total
            of = f" of {total:,.0f}" if total else ""
            self._console.print(f"fill: {summary.rows:,}{of} rows, {line}", highlight=False)

    def _waiting(self, trouble: str, seconds: float) -> None:
        """Say so now and then, and look whether waiting is in vain. Raises what then ends the run."""
        self._raise_failure()
        with self._lock:
            if time.monotonic() - self._said_waiting < 5:
                return
            self._said_waiting = time.monotonic()
        self._console.print(
            f"waiting up to {self._config.wait_server:.0f} s: {trouble}", markup=False, highlight=False
        )
        try:
            with EmbeddingClient(self._config.server, timeout=5, patience=0) as looking:
                read_only = looking.info().read_only
        except LiftError:
            return
        if read_only is not None:
            raise self._read_only(read_only)
