"""`repair`: puts aside what is damaged, keeps every row that still proves itself, lists what has to be filled again.

What is damaged is read in processes of their own, since damaged bytes can end the process that parses them.
Nothing is deleted: it goes to quarantine/.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from cyclopts import Parameter
from rich.console import Console

from lift_cache import files
from lift_cache.encoding import Encoding
from lift_cache.errors import BadCaption, CacheDamaged, CacheNotFound, LiftError, StorageFailed
from lift_cache.keys import caption_key, caption_keys, sort_order
from lift_cache.lock import WriterLock
from lift_cache.recipe import Recipe
from lift_cache.segment import (
    CHECK_ROWS,
    Segment,
    SegmentWriter,
    StoredRows,
    binary_values,
    captions_path,
    check_segment,
    row_checksums,
    segment_ids,
    segment_path,
)
from lift_cache.snapshot import snapshots_of
from lift_cache.tools.common import AsJson, CachePath, say
from lift_cache.tools.maintain import open_writer
from lift_cache.verify import live_problems, verify_snapshot
from lift_cache.witness import lost as lost_tier


@dataclass
class Repaired:
    """What a repair did, or would do.

    Attributes:
        quarantined: names of segments, snapshots and live tiers that were put aside.
        salvaged: rows of them that proved themselves and are part of the cache again.
        lost: captions that have to be filled again; unnamed: rows whose captions are lost as well; unread: what
            could not be read to its end, so that it is not known what it held.
        refill: file with the lost captions, one a line.
    """

    quarantined: list[str] = field(default_factory=list)
    salvaged: int = 0
    lost: int = 0
    unnamed: int = 0
    unread: list[str] = field(default_factory=list)
    refill: str | None = None


def mend(cache: Path, *, dry_run: bool = False, progress: Callable[[str], None] = lambda _: None) -> Repaired:
    """Make a damaged cache whole again, with fewer rows.

    Raises:
        CacheNotFound, CacheLocked, CacheFull.
        CacheDamaged: the recipe or the encoding is; they cannot be guessed.
    """
    if not (cache / "recipe.json").is_file():
        raise CacheNotFound(f"{cache} is not a cache (no recipe.json); check the path")
    Recipe.load(cache / "recipe.json")
    Encoding.load(cache / "encoding.json")
    done = Repaired()
    lost: list[str] = []
    segments = cache / "segments"
    lock = WriterLock(cache)
    try:
        bad = []
        for segment_id in segment_ids(segments):
            progress(f"segment {segment_id}")
            try:
                check_segment(segments, segment_id)
            except LiftError:
                bad.append(segment_id)
        there = set(segment_ids(segments))
        gone = [
            path.name.removesuffix(".captions.arrow")
            for path in segments.glob("*.captions.arrow")
            if path.name.removesuffix(".captions.arrow") not in there
        ]
        progress("live")
        live_is_bad = (cache / "live" / "data.mdb").exists() and len(live_problems(cache)) > 1
        if lost_tier(cache):
            done.unread.append("live")
        rescue_live = (bool(bad) or live_is_bad) and (cache / "live" / "data.mdb").exists()
        sizes = [segment_path(segments, segment_id).stat().st_size for segment_id in bad]
        if rescue_live:
            sizes.append(
                (cache / "live" / "data.mdb").stat().st_blocks * 512
                if (cache / "live" / "data.mdb").exists()
                else 0
            )
        if not dry_run:
            files.require_room(segments, sum(sizes), "what is to be salvaged")
        done.quarantined += [f"segments/{segment_id}" for segment_id in bad]
        for segment_id in bad + gone:
            progress(f"salvaging {segment_id}")
            _salvage(["segment", segment_id], cache, dry_run, done, lost)
        if rescue_live:
            _salvage(["live"], cache, dry_run, done, lost)
            done.quarantined.append("live")
        if not dry_run:
            for segment_id in bad:
                for path in (segment_path(segments, segment_id), captions_path(segments, segment_id)):
                    if path.exists():
                        files.put_aside(cache, path)
            if "live" in done.quarantined:
                files.put_aside(cache, cache / "live")
            if "live" in (*done.quarantined, *done.unread):
                (cache / "live.json").unlink(missing_ok=True)
        for snapshot_id in snapshots_of(cache):
            try:
                verify_snapshot(cache, snapshot_id)
                named = dry_run and _names(cache, snapshot_id, bad)
            except LiftError:
                named = True
            if named:
                done.quarantined.append(f"snapshots/{snapshot_id}")
                if not dry_run:
                    files.put_aside(cache, cache / "snapshots" / snapshot_id)
    finally:
        lock.release()
    if dry_run:
        done.lost = len(set(lost))
        return done
    if done.quarantined or done.unread or lost:
        _finish(cache, done, lost)
    return done


def _names(cache: Path, snapshot_id: str, bad: list[str]) -> bool:
    from lift_cache.snapshot import load_manifest

    return any(info.id in bad for info in load_manifest(cache, snapshot_id).segments)


def _finish(cache: Path, done: Repaired, lost: list[str]) -> None:
    """Adopt what was salvaged, and write the list of what is missing then."""
    with open_writer(cache) as writer:
        texts = sorted(set(lost))
        missing = (
            [text for text, here in zip(texts, writer.contains(caption_keys(texts)), strict=True) if not here]
            if texts
            else []
        )
    done.lost = len(missing)
    if missing:
        files.make_directory(cache / "quarantine")
        number = 1 + len(list((cache / "quarantine").glob("refill-*.txt")))
        path = cache / "quarantine" / f"refill-{number}.txt"
        files.write_atomic(path, ("\n".join(missing) + "\n").encode())
        done.refill = str(path)


def _salvage(what: list[str], cache: Path, dry_run: bool, done: Repaired, lost: list[str]) -> None:
    """Have a child save what it can. Raises StorageFailed: it could not write; nothing was put aside yet."""
    command = [sys.executable, "-m", "lift_cache.tools.repair", str(cache), "dry" if dry_run else "do", *what]
    child = subprocess.run(command, check=False, capture_output=True, text=True)
    said: list[dict[str, Any]] = [
        json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")
    ]
    if child.returncode > 0:  # not the damage: a signal would have ended it
        reason = child.stderr.strip().splitlines()[-1:] or [f"status {child.returncode}"]
        raise StorageFailed(f"{' '.join(what)} could not be salvaged ({reason[0]}); nothing was put aside")
    for one in said:
        lost += one.get("lost", [])
        done.salvaged += one.get("salvaged", 0)
        done.unnamed += one.get("unnamed", 0)
    if child.returncode or not any("done" in one for one in said):
        done.unread.append(what[-1])


# In the child


def salvage_segment(cache: Path, segment_id: str, *, dry_run: bool) -> Iterator[dict[str, object]]:
    """Write the rows of a damaged segment that prove themselves as new segments; name the captions of the others."""
    directory = cache / "segments"
    captions = _sibling_captions(captions_path(directory, segment_id))
    try:
        segment = Segment(directory, segment_id)
        Recipe.load(cache / "recipe.json").require_same(segment.recipe, here="", there="")
        Encoding.load(cache / "encoding.json").require_same(segment.encoding, here="", there="")
    except LiftError:
        yield {"lost": list(captions.values())}
        return
    kept: set[bytes] = set()
    for with_captions in (True, False):
        rows = 0
        with SegmentWriter(directory, segment.recipe, segment.encoding, captions=with_captions) as writer:
            for part in _good_rows(segment):
                mine = [key.tobytes() in captions for key in part.keys]
                chosen = np.flatnonzero(np.array(mine, bool) == with_captions)
                if not len(chosen):
                    continue
                good = part.take(chosen)
                names = [key.tobytes() for key in good.keys]
                kept.update(names)
                texts = (
                    pa.array([captions[name] for name in names], pa.large_string()) if with_captions else None
                )
                writer.add(
                    StoredRows(good.keys, good.vectors, good.tokens, good.truncated, good.checksums, texts)
                )
                rows += len(good)
            if rows and not dry_run:
                writer.finish()
            yield {"salvaged": rows}
    yield {
        "lost": [caption for name, caption in captions.items() if name not in kept],
        "unnamed": max(0, segment.rows - len(kept | set(captions))),
    }


def _good_rows(segment: Segment) -> Iterator[StoredRows]:
    """Rows whose checksum is right, ascending, without captions."""
    before = b""
    for start in range(0, segment.rows, CHECK_ROWS):
        rows = np.arange(start, min(start + CHECK_ROWS, segment.rows))
        keys, vectors = segment.keys(rows), segment.vectors(rows)
        checksums = segment.column("checksum", rows)
        chosen = []
        for i in np.flatnonzero(row_checksums(keys, vectors) == checksums).tolist():
            name = keys[i].tobytes()
            if name > before:
                chosen.append(i)
                before = name
        part = StoredRows(
            keys, vectors, segment.column("tokens", rows), segment.column("truncated", rows), checksums, None
        )
        yield part.take(np.array(chosen, np.int64))


def _sibling_captions(path: Path) -> dict[bytes, str]:
    """Key → caption for what can be read of a captions file and proves itself."""
    found: dict[bytes, str] = {}
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, pa.ArrowException):
        return found
    for batch in batches:
        try:
            batch.validate(full=True)
            keys, captions = binary_values(batch.column(0)), batch.column(1).to_pylist()
        except (ValueError, KeyError, UnicodeDecodeError, pa.ArrowException):
            continue
        for key, caption in zip(keys, captions, strict=False):
            name = key.tobytes()
            try:
                if caption_key(caption) == name:
                    found[name] = caption
            except BadCaption:
                continue
    return found


def salvage_live(cache: Path, *, dry_run: bool) -> Iterator[dict[str, object]]:
    """Seal the rows of a live tier that prove themselves; name the captions of the others."""
    from lift_cache.live import LiveTier

    recipe, encoding = Recipe.load(cache / "recipe.json"), Encoding.load(cache / "encoding.json")
    live = LiveTier(cache / "live", recipe.fingerprint, encoding, readonly=True)
    seen: set[bytes] = set()
    for number in live.fresh_numbers():
        try:
            rows = live.read_batch(number, verified=False)
        except CacheDamaged:
            yield {"unnamed": live.batch_rows(number)}
            continue
        if rows is None or rows.captions is None:
            continue
        good, lost = [], []
        right = row_checksums(rows.keys, rows.vectors) == rows.checksums
        for i, caption in enumerate(rows.captions.to_pylist()):
            name = rows.keys[i].tobytes()
            try:
                named = caption_key(caption) == name
            except BadCaption:
                named = False
            if right[i] and named and name not in seen:
                seen.add(name)
                good.append(i)
            elif not right[i] and isinstance(caption, str) and caption:
                lost.append(caption)
        if good and not dry_run:
            part = rows.take(np.array(good))
            with SegmentWriter(cache / "segments", recipe, encoding) as writer:
                writer.add(part.take(sort_order(part.keys)))
                writer.finish()
        yield {"lost": lost, "salvaged": len(good)}


def main(arguments: list[str]) -> None:
    cache, mode, what, *rest = arguments
    dry_run = mode == "dry"
    source = (
        salvage_segment(Path(cache), rest[0], dry_run=dry_run)
        if what == "segment"
        else salvage_live(Path(cache), dry_run=dry_run)
    )
    try:
        for said in source:
            print(json.dumps(said), flush=True)
    except CacheDamaged:
        return  # without "done": it could not be read to its end
    except LiftError as error:
        sys.exit(str(error))
    print(json.dumps({"done": True}), flush=True)


# The command


def repair(
    cache: CachePath,
    *,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Say what would be done, and change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put aside what is damaged, keep every row that proves itself, list the captions to fill again.

    Nothing is deleted: damaged files go to quarantine/. Stop the server first.
    """
    with Console(stderr=True).status("reading") as status:
        done = mend(cache, dry_run=dry_run, progress=lambda what: status.update(f"reading {what}"))
    if not done.quarantined and not done.unread and not done.lost:
        say(as_json, asdict(done), "nothing is damaged")
        return
    did = "would put" if dry_run else "put"
    lines = [f"{did} aside: {', '.join(done.quarantined) or 'nothing'}"]
    lines.append(
        f"{done.salvaged:,} rows of it proved themselves and are kept; {done.lost:,} captions are lost"
    )
    if done.unnamed:
        lines.append(f"{done.unnamed:,} more rows are lost with their captions; fill from your sources again")
    if done.unread:
        lines.append(f"not readable to the end, what was there is unknown: {', '.join(done.unread)}")
    if done.refill:
        lines.append(f"fill them again: `lift-embed fill {done.refill} --server URL`")
    if not dry_run:
        lines.append(f"then make a snapshot: `lift-cache snapshot {cache}`")
    say(as_json, asdict(done), "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
