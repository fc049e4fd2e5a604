"""What a run did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Summary:
    """Counts of one run.

    Attributes:
        files: source files; `files_done` of them an earlier run had finished, with `rows_done` rows: not read.
        rows: read in this run; `captions` of these are usable and of this shard, `unique` of those distinct, or
            at least so many where `unique_is_least` says so.
        cached, embedded: captions that the cache had, and those that it has now; `tokens` are of the latter.
        rejected: rows of these sources that are left out, those of files that are done among them; `failed` is
            the ledger that names them.
        to_embed: of a dry run: captions that the cache has not.
        restarts: servers of our own that had died and were started again.
    """

    files: int = 0
    files_done: int = 0
    rows_done: int = 0
    rows: int = 0
    captions: int = 0
    unique: int = 0
    unique_is_least: bool = False
    cached: int = 0
    embedded: int = 0
    tokens: int = 0
    truncated: int = 0
    rejected: int = 0
    first_rejected: list[str] = field(default_factory=list)
    failed: str | None = None
    to_embed: int | None = None
    restarts: int = 0
    seconds: float = 0.0
    captions_per_second: float = 0.0
    snapshot: str | None = None

    def text(self) -> str:
        """For a person, one line."""
        least = "at least " if self.unique_is_least else ""
        read = f"{self.rows:,} rows, {self.captions:,} captions, {least}{self.unique:,} unique"
        done = f"{self.embedded:,} embedded ({self.tokens:,} tokens, {self.truncated:,} truncated)"
        if self.to_embed is not None:
            done = f"{self.to_embed:,} to embed"
        said = f"{read}: {self.cached:,} were cached, {done}, {self.rejected:,} rejected"
        if self.to_embed is None:
            said += f"; {self.seconds:.1f} s, {self.captions_per_second:,.0f} captions/s"
        if self.files_done:
            said += (
                f"; {self.files_done:,} of {self.files:,} files were done before ({self.rows_done:,} rows)"
            )
        if self.failed:
            said += f"; rows left out: {self.failed}"
        return f"{said}; snapshot {self.snapshot}" if self.snapshot else said


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `5 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{round(hours / 24)} days"
