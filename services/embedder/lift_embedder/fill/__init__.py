"""`lift-embed fill`: every caption of some sources into a cache, once.

    files → rows → captions → not seen, not there → lanes (requests under way) → answers → books (counts, marks)

    resume     which files need not be read again
    reading    source files to captions, each key once, in bounded memory
    targets    a server, or a cache directory with servers of our own
    lanes      batches; several requests under way for each server
    books      what became of every row; marks of files that are done, the ledger of rows that are left out

What was filled before is answered by the cache, so running the same command again is how a run is resumed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import platformdirs
from rich.console import Console

from lift_cache.errors import BadConfig, BadSource, LiftError
from lift_cache.files import TEMPORARY, make_directory, publish, write_atomic
from lift_cache.keys import caption_keys, normalise
from lift_cache.sources import expand
from lift_embedder.config import FillConfig
from lift_embedder.fill.books import Books, Item, Source, TooManyBad
from lift_embedder.fill.dry import DryTarget, outlook
from lift_embedder.fill.lanes import Lanes
from lift_embedder.fill.ledger import FailedRow, Ledger, read_ledger
from lift_embedder.fill.marks import Marks, digest
from lift_embedder.fill.progress import Progress
from lift_embedder.fill.reading import CHUNK, Chunk, lane_of, unique_captions
from lift_embedder.fill.resume import Work, remaining_work
from lift_embedder.fill.summary import Summary
from lift_embedder.fill.targets import CacheTarget, ServerTarget, Target
from lift_embedder.keyset import KeySet

__all__ = ["Summary", "fill"]


def fill(sources: Sequence[str], config: FillConfig, console: Console | None = None) -> Summary:
    """Run to the end of the sources, or to an error that says what is done.

    Raises:
        BadConfig: a path that cannot be written.
        BadSource: nothing there, nothing in it, or more than `config.max_bad` rows that are left out.
        ServerUnavailable: the server was away for longer than `config.patience`.
        LiftError: of a cache directory: locked, made otherwise, full, damaged.
        KeyboardInterrupt: its text says what is saved.
    """
    for flag, path in (("--summary", config.summary), ("--failed", config.failed)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise BadConfig(f"{flag} {path}: name a file in a folder that exists")
    with _stopped_by_sigterm():
        return Fill(sources, config, console or Console(stderr=True)).run()


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """A scheduler's SIGTERM is Ctrl-C: servers stop in good order, and the summary is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Fill:
    """One run over some sources."""

    def __init__(self, sources: Sequence[str], config: FillConfig, console: Console) -> None:
        self._sources, self._config, self._console = sources, config, console
        self._paths = [] if config.retry_failed else expand(sources)
        self._state = config.state or platformdirs.user_state_path("lift") / "fill"
        self._place = "the cache"
        self.summary = Summary(files=len(self._paths))

    def run(self) -> Summary:
        began = time.monotonic()
        try:
            if self._config.dry_run:
                self._look()
            else:
                self._fill()
        except BaseException as error:
            try:
                self._finish(began)
            except (LiftError, OSError) as other:  # what ended the run matters more
                self._say(f"no summary was written: {other}")
            if isinstance(error, LiftError | KeyboardInterrupt) and not isinstance(error, TooManyBad):
                self._add_what_is_saved(error)
            raise
        self._finish(began)
        return self.summary

    # The way through

    def _fill(self) -> None:
        config = self._config
        try:
            make_directory(self._state)
        except OSError as error:
            raise BadConfig(
                f"--state {self._state}: {error.strerror}; name a directory to write to"
            ) from None
        target: Target
        if config.cache is None:
            target = ServerTarget(config, self._say)
        else:
            target = CacheTarget(config, self._state / "logs", self._say)
        books: Books | None = None
        try:
            if config.retry_failed:
                self._retry(target)
                return
            work = self._work(target)
            if work.read:
                target.start()
            path, marks = self._ledger_path(target), self._marks(target)
            ledger = Ledger(path, keep=lambda row: row.file in work.done)
            books = self._books(target, marks, ledger)
            self._send_all(work, target, books)
            self._measure(target, books)
            self._end(target)
        except BaseException as error:
            self._break_off(target, error)
            raise
        finally:
            if books is not None:
                books.close()

    def _look(self) -> None:
        """A dry run: as `_fill`, and nothing is written."""
        target = DryTarget(self._config)
        try:
            self._send_all(self._work(target), target, self._books(target, None, None))
        finally:
            target.interrupt()
        summary = self.summary
        summary.to_embed, summary.embedded = summary.embedded, 0
        for line in outlook(summary, target, self._rate(target), self._sources):
            self._say(line)

    def _work(self, target: Target) -> Work:
        if target.fingerprint is None or self._config.recheck:
            return Work(self._paths)
        path = self._ledger_path(target)
        return remaining_work(self._paths, self._marks(target), path, target, self._say)

    def _send_all(self, work: Work, target: Target, books: Books) -> None:
        config, summary = self._config, self.summary
        summary.files_done, summary.rows_done = len(work.done), work.rows_done
        seen = KeySet(config.dedup_mib << 20)
        lanes = self._lanes(target, books)
        try:
            with Progress(work.read, summary, self._console) as progress:
                for path in work.read:
                    source = books.begin(path)
                    progress.reading(source)
                    for chunk in unique_captions(source, config.field, config.share, seen, books):
                        _send(source, chunk, target, lanes, books)
                    books.read(source)
                lanes.finish()
        finally:
            lanes.stop()
        if not (summary.captions or work.done or config.shard):
            raise BadSource(f"no usable caption in {summary.rows:,} rows; check the sources and --field")

    def _retry(self, target: Target) -> None:
        """Send what is in the ledger; the rows that still fail make the new one."""
        path = self._ledger_path(target)
        if next(read_ledger(path), None) is None:
            self._say(f"no row is left out in {path}")
            return
        target.start()
        again = path.with_name(f"{TEMPORARY}retry-{path.name}")
        ledger = Ledger(again)
        books = self._books(target, None, ledger)
        lanes = self._lanes(target, books)
        try:
            with Progress([], self.summary, self._console):
                for name, rows in itertools.groupby(read_ledger(path), key=lambda row: row.file):
                    source = Source(Path(name))
                    while together := list(itertools.islice(rows, CHUNK)):
                        _send(source, _captions_of(source, together, books), target, lanes, books)
                lanes.finish()
            self._end(target)
        except BaseException:
            lanes.stop()
            books.close()
            again.unlink(missing_ok=True)  # the ledger stays as it was
            raise
        books.close()
        if again.exists():
            publish(again, path)
        else:
            path.unlink(missing_ok=True)
        self.summary.failed = str(path) if path.exists() else None

    # Within

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _books(self, target: Target, marks: Marks | None, ledger: Ledger | None) -> Books:
        books = Books(
            self.summary,
            marks=marks,
            ledger=ledger,
            max_bad=self._config.max_bad,
            cache_rows=target.rows,
            say=self._say,
        )
        if ledger is not None:
            books.carry_over(ledger)
        return books

    def _lanes(self, target: Target, books: Books) -> Lanes:
        return Lanes(
            target.asks,
            books.answered,
            batch=self._config.batch,
            concurrency=self._config.concurrency,
            check=target.check,
        )

    def _end(self, target: Target) -> None:
        self.summary.snapshot = target.finish(snapshot=self._config.snapshot)
        self.summary.restarts = target.restarts

    def _break_off(self, target: Target, error: BaseException) -> None:
        """The end of a run that failed: what was acknowledged goes where it belongs, unless somebody is waiting."""
        try:
            if not isinstance(error, KeyboardInterrupt):
                target.finish(snapshot=False)
        except (LiftError, OSError) as other:
            self._say(f"not all is in its place: {other}")
        finally:
            target.interrupt()
            self._place = target.place

    def _marks(self, target: Target) -> Marks:
        return Marks(
            self._state,
            target=target.name,
            fingerprint=str(target.fingerprint),
            field=self._config.field,
            shard=self._config.share,
        )

    def _ledger_path(self, target: Target) -> Path:
        """Where the rows that are left out are noted; the same for the same sources, whatever files are in them."""
        if self._config.failed is not None:
            return self._config.failed
        config, places = self._config, [str(Path(source).absolute()) for source in self._sources]
        name = digest(places, config.field, config.share, target.name, target.fingerprint)
        first = re.sub(r"[^\w.-]+", "_", Path(places[0]).name)[:60]
        path = self._state / "failed" / f"{first}-{name[:12]}.jsonl"
        if not config.dry_run:
            make_directory(path.parent)
        return path

    def _rate_path(self, target: Target) -> Path:
        return self._state / "rates" / f"{digest(target.name, target.fingerprint)}.json"

    def _measure(self, target: Target, books: Books) -> None:
        """Remember how fast this cache is filled, for dry runs."""
        if books.first_answer is not None and self.summary.embedded:
            rate = self.summary.embedded / max(time.monotonic() - books.first_answer, 1e-3)
            path = self._rate_path(target)
            make_directory(path.parent)
            write_atomic(path, json.dumps({"captions_per_second": rate}).encode())

    def _rate(self, target: Target) -> float | None:
        try:
            return float(json.loads(self._rate_path(target).read_bytes())["captions_per_second"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _add_what_is_saved(self, error: BaseException) -> None:
        saved = self.summary.cached + self.summary.embedded
        said = f"{saved:,} captions are in {self._place}, the same command goes on from there"
        if isinstance(error, KeyboardInterrupt):
            error.args = (said,)
        elif self.summary.unique and not self._config.dry_run:
            error.args = (f"{error}; {said}", *error.args[1:])

    def _finish(self, began: float) -> None:
        summary = self.summary
        summary.seconds = round(time.monotonic() - began, 3)
        answered = summary.cached + summary.embedded
        summary.captions_per_second = round(answered / max(summary.seconds, 1e-9), 1)
        if self._config.summary is not None:
            write_atomic(self._config.summary, (json.dumps(asdict(summary), indent=2) + "\n").encode())


def _send(source: Source, chunk: Chunk, target: Target, lanes: Lanes, books: Books) -> None:
    """Send those captions of a chunk that the target is not known to have."""
    there = target.has(chunk.keys)
    books.already_there(int(there.sum()))
    chunk = chunk.where(~there)
    books.taken(source, len(chunk.texts))
    lane = lane_of(chunk.keys, len(lanes)).tolist()
    for number, text, where in zip(lane, chunk.texts, chunk.wheres, strict=True):
        lanes.add(number, Item(text, where, source))


def _captions_of(source: Source, rows: Sequence[FailedRow], books: Books) -> Chunk:
    """What of a ledger can be sent again; the rest stays in it."""
    texts: list[str] = []
    wheres: list[str] = []
    for row in rows:
        books.row(source)
        try:
            texts.append(normalise(row.caption))
            wheres.append(row.where)
        except LiftError:
            books.left_out(source, row.where, row.code, row.reason, row.caption)
    books.usable(source, texts)
    books.unique(len(texts), at_least=False)
    return Chunk(texts, wheres, caption_keys(texts))
