"""`lift-cache plan`: what embedding some captions costs, before any money is spent.

    sources → normalise, count tokens → distinct captions → operations, GPU-hours, bytes, break-even

`survey` reads and counts; `costs` has the formulas and says where its figures come from.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lift_cache.errors import BadConfig
from lift_cache.sources import expand
from lift_cache.tools import costs
from lift_cache.tools.common import AsJson
from lift_cache.tools.printable import printable
from lift_cache.tools.survey import Counter, Survey, counter_for, survey

REUSE = (1, 3, 10)
"""Runs over one cache for which the break-even is shown."""

EDGES = (8, 16, 24, 32, 48, 64, 77, 96, 128, 192, 256, 512)
"""Last token counts of the histogram's bars; 77 is where CLIP cuts."""

NOT_COUNTED = (
    "that small matrices reach less of a GPU's peak than large ones, so that CLIP's text tower takes more time",
    "the memory that a joint text tower takes from the batch",
    "padding, where the engine pads (transformers does, vLLM does not)",
    "storing, moving and reading vectors",
    "the image tower and the loss, the same on both sides",
    "which of the two gives the better image encoder",
)


@dataclass(frozen=True)
class Plan:
    """All figures, for the captions that were read: operations, hours of one GPU, bytes, epochs."""

    found: Survey
    counter: Counter
    encoder: costs.Encoder
    max_tokens: int
    gpu: str
    mfu: float
    clip: str
    epochs: int | None
    runs: int

    @property
    def flops(self) -> float:
        """To embed every distinct caption once."""
        embedded = self.found.embedded
        return float(embedded @ self.encoder.shape.flops(np.arange(len(embedded))))

    @property
    def gpu_hours(self) -> float:
        return costs.gpu_hours(self.flops, self.gpu, self.mfu)

    @property
    def clip_flops(self) -> float:
        """To train CLIP's text tower for one epoch over every caption, repeated ones too."""
        return costs.clip_training_flops(self.clip) * self.found.captions

    @property
    def storage(self) -> list[costs.Storage]:
        return costs.storage(self.found.unique, self.found.text_bytes, self.encoder.dimensions)

    def break_even(self, runs: int = 1) -> float:
        """Epochs in each of `runs` runs over one cache from which on embedding once is the cheaper way."""
        return self.flops / self.clip_flops / runs

    @property
    def share_of_joint(self) -> float | None:
        """Embedding once against training the text tower along in all planned runs."""
        return None if self.epochs is None else self.break_even(self.runs) / self.epochs

    @property
    def reuse(self) -> list[int]:
        return sorted({*REUSE, self.runs})

    def bars(self) -> list[tuple[int, int | None, int]]:
        """The token histogram in a few bars: first, last, distinct captions; (n, None, …) would be truncated."""
        last = [edge for edge in EDGES if edge < self.max_tokens] + [self.max_tokens]
        first = [1, *(edge + 1 for edge in last)]
        heights = np.add.reduceat(self.found.histogram, first).tolist()
        filled = np.flatnonzero(heights)
        bars = list(zip(first, [*last, None], heights, strict=True))
        return bars[filled[0] : filled[-1] + 1]

    def values(self) -> dict[str, Any]:
        """What `--json` prints. Shares are of distinct captions, `unique_share` is of all."""
        found, encoder, shape = self.found, self.encoder, self.encoder.shape
        return {
            "files": found.files,
            "rows": found.rows,
            "captions": found.captions,
            "unique": found.unique,
            "unique_share": found.unique / found.captions,
            "sampled": found.sampled,
            "bad": found.bad,
            "first_bad": found.first_bad,
            "encoder": {
                "name": encoder.name,
                "model": encoder.model,
                "parameters": encoder.parameters,
                "block_weights": shape.weights,
                "layers": shape.layers,
                "width": shape.width,
                "mlp": shape.mlp,
                "vocabulary": encoder.vocabulary,
                "dimensions": encoder.dimensions,
            },
            "tokens": {
                "counted": self.counter.said,
                "exact": self.counter.exact,
                "total": found.tokens,
                "mean": found.tokens / found.unique,
                "p50": found.percentile(0.5),
                "p95": found.percentile(0.95),
                "longest": found.longest,
                "max_tokens": self.max_tokens,
                "truncated": found.truncated,
                "truncated_share": found.truncated / found.unique,
                "histogram": self.bars(),
            },
            "compute": {
                "flops": self.flops,
                "flops_per_caption": self.flops / found.unique,
                "gpu": self.gpu,
                "peak_tflops": costs.GPUS[self.gpu],
                "mfu": self.mfu,
                "gpu_hours": self.gpu_hours,
            },
            "storage": [asdict(one) | {"total": one.total} for one in self.storage],
            "break_even": {
                "clip": self.clip,
                "clip_flops_per_sample": costs.clip_training_flops(self.clip),
                "epochs_by_runs": {str(runs): self.break_even(runs) for runs in self.reuse},
                "planned_epochs": self.epochs,
                "planned_runs": self.runs,
                "share_of_joint": self.share_of_joint,
                "not_counted": NOT_COUNTED,
            },
            "conclusion": self.conclusion(),
        }

    def conclusion(self) -> str:
        runs = self.runs if self.runs > 1 else REUSE[-1]
        said = (
            f"Embedding once costs as much as training CLIP's text tower ({self.clip}) for "
            f"{_figure(self.break_even())} epochs; with the cache reused in {runs} runs, "
            f"{_figure(self.break_even(runs))} epochs in each."
        )
        share = self.share_of_joint
        if share is None:
            return said
        planned = f"{self.epochs} epochs" + (f" in each of {self.runs} runs" if self.runs > 1 else "")
        verdict = f"{_figure(1 / share)} times less" if share < 1 else f"{_figure(share)} times as much"
        return f"{said} For {planned}, it costs {verdict}."

    def table(self, title: str) -> Table:
        """The figures for a person."""
        found, encoder = self.found, self.encoder
        table = Table(
            title=Text(printable(title)),
            title_justify="left",
            show_header=False,
            box=None,
            padding=(0, 2, 0, 0),
        )
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")

        def row(*cells: str) -> None:
            table.add_row(*(Text(printable(cell)) for cell in cells))

        where = f"{found.files:,} file{'s' * (found.files > 1)}"
        row("captions", "read", f"{'the first ' * found.sampled}{found.captions:,} of {where}")
        row("", "distinct", f"{found.unique:,} ({found.unique / found.captions:.1%})")
        row("", "unusable", f"{found.bad:,}{'; ' * bool(found.bad)}{'; '.join(found.first_bad)}")

        published = f"{_count(encoder.parameters)} parameters, " if encoder.parameters else ""
        blocks = f"{_count(encoder.shape.weights)} in {encoder.shape.layers} blocks"
        row("encoder", "", f"{encoder.name}: {published}{blocks}, vectors of {encoder.dimensions:,}")

        row("tokens", "counted", self.counter.said)
        mean = found.tokens / found.unique
        row("", "total", f"{found.tokens:,}; {mean:.1f} a caption, {found.longest:,} at most")
        cut = f"{found.truncated:,} ({found.truncated / found.unique:.2%})"
        row("", "truncated", f"{cut} at {self.max_tokens:,} tokens")
        tallest = max(height for _, _, height in self.bars())
        for first, last, height in self.bars():
            bar = "█" * max(round(30 * height / tallest), bool(height))
            span = f"{first:,} to {last:,}" if last else f"over {self.max_tokens:,}"
            row("", span, f"{bar} {height / found.unique:.1%}".strip())

        each = f"{_si(self.flops / found.unique)}FLOP a caption"
        row("compute", "operations", f"{_si(self.flops)}FLOP, {each}")
        slower = "; for bfloat16, the recipe's float32 takes longer" if encoder.dtype == "float32" else ""
        assumed = "an assumed " if self.mfu == costs.MFU else ""
        peak = f"{assumed}{self.mfu:.0%} of its {costs.GPUS[self.gpu]:g} TFLOP/s{slower}"
        row("", self.gpu, f"{_gpu_time(self.gpu_hours)} at {peak}")

        for number, one in enumerate(self.storage):
            parts = f"vectors {_si(one.vectors)}B, keys and checksums {_si(one.rows)}B, "
            parts += f"captions {_si(one.captions)}B, index {_si(one.index)}B"
            row("" if number else "disk", one.dtype, f"{_si(one.total)}B: {parts}")

        if found.sampled:
            millions = found.captions / 1e6
            hours, size = _gpu_time(self.gpu_hours / millions), _si(self.storage[1].total / millions)
            row(
                "",
                "a million",
                f"{hours} and {size}B as float16 at most: of more captions, fewer are distinct",
            )

        clip = (
            f"{_si(costs.clip_training_flops(self.clip))}FLOP for a caption in an epoch, padded to 77 tokens"
        )
        row("break-even", f"CLIP {self.clip}", f"training its text tower: {clip}")
        for runs in self.reuse:
            each = f"{_figure(self.break_even(runs))} epochs" + (" in each" if runs > 1 else "")
            row("", f"{runs} runs" if runs > 1 else "1 run", each)
        return table


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _si(number: float) -> str:
    """Three digits and a prefix, for a unit that follows: `1.08 T`, `412 `."""
    power = max(0, min(7, int(np.floor(np.log10(max(number, 1) * 1.0005) / 3))))
    return f"{number / 1000**power:.3g} {'kMGTPEZ'[power - 1] if power else ''}"


def _gpu_time(hours: float) -> str:
    return f"{_figure(hours)} GPU-hours" if hours >= 0.1 else f"{_figure(hours * 3600)} GPU-seconds"


def _figure(number: float) -> str:
    """Two significant digits where more would promise too much."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


# ---------------------------------------------------------------------------------------------- command


def next_steps(
    sources: Sequence[str], encoder: costs.Encoder, recipe: Mapping[str, str], field: str | None
) -> list[str]:
    """The commands that carry a plan out. `recipe`: flags of the server that differ from its defaults."""
    name = Path(encoder.served_as).name
    serve = ["lift-embed", "serve", "--cache", f"caches/{name}", "--model", encoder.served_as, *encoder.serve]
    for flag, value in recipe.items():
        serve += [f"--{flag}", value]
    fill = ["lift-embed", "fill", *sources, "--snapshot", *(["--field", field] if field else [])]
    return [shlex.join(serve), shlex.join(fill)]


def plan(
    *sources: str,
    model: str = "e5-mistral",
    field: str | None = None,
    sample: int | None = None,
    template: str = "{caption}",
    max_tokens: int | None = None,
    gpu: str = "h100",
    mfu: float = costs.MFU,
    clip: str = "vit-b-16",
    epochs: int | None = None,
    runs: int = 1,
    as_json: AsJson = False,
) -> None:
    """Say what embedding some captions costs, before it is done: tokens, GPU-hours, bytes, and when it pays.

    Examples: `lift-cache plan 'shards/*.tar'`, `lift-cache plan captions.parquet --model qwen3-embedding-0.6b
    --gpu a100 --epochs 32 --runs 4`, `lift-cache plan 'shards/*.tar' --sample 100000 --model ./my-encoder`

    Parameters
    ----------
    sources:
        WebDataset tars, Parquet, CSV, TSV, JSON Lines or text (also .gz): files, globs, {000..010}, folders.
    model:
        A named encoder, its hub id, or a folder with config.json and tokenizer.json.
    field:
        Column or JSON field that holds the captions.
    sample:
        Read the first so many captions; all figures are then of these.
    template:
        Text around `{caption}`: an instruction or a prompt.
    max_tokens:
        Tokens per caption, special tokens included; longer ones are cut. Default: the recipe's.
    gpu:
        The GPU that embeds, such as h100, a100 or l4.
    mfu:
        Share of its peak in dense bfloat16 that is reached; the default is an assumption.
    clip:
        The CLIP model whose text tower would be trained instead, such as vit-b-16 or vit-l-14.
    epochs:
        Epochs of a training run that is planned, to compare with.
    runs:
        Training runs that will read the cache.
    """
    if not sources:
        raise BadConfig("name at least one source: a file, a glob, train-{000..010}.tar, or a folder")
    for flag, number in (("sample", sample), ("epochs", epochs), ("runs", runs)):
        if number is not None and number < 1:
            raise BadConfig(f"--{flag} {number}: at least 1")
    encoder = costs.find_encoder(model)
    limit = encoder.max_tokens if max_tokens is None else max_tokens
    if limit < 2:
        raise BadConfig(f"--max-tokens {limit}: at least 2")
    counter = counter_for(encoder, template)
    costs.gpu_hours(0, gpu, mfu)  # a mistake is said before the sources are read
    costs.clip_training_flops(clip)

    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    total = sample or sum(path.stat().st_size for path in expand(sources))
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        task = bars.add_task("", total=total)

        def progress(done: int, captions: int) -> None:
            bars.update(task, completed=captions if sample else done, description=f"{captions:,} captions")

        found = survey(sources, counter, limit, field=field, sample=sample, progress=progress)

    made = Plan(found, counter, encoder, limit, gpu, mfu, clip, epochs, runs)
    recipe = {} if template == "{caption}" else {"template": template}
    recipe |= {} if max_tokens is None else {"max-tokens": str(max_tokens)}
    steps = next_steps(sources, encoder, recipe, field)
    if as_json:
        print(json.dumps(made.values() | {"next": steps}))
        return
    console = Console()
    console.print(made.table(" ".join(sources)))
    for line in ("", made.conclusion(), f"Not counted: {'; '.join(NOT_COUNTED)}.", "", "Next:", *steps):
        console.print(line, highlight=False, markup=False, soft_wrap=line in steps)
