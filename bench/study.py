"""Does a fixed text encoder beat joint training at composition and long captions, for less compute?

    make study         four arms, one seed, in ten minutes: a preview
    make study-full    all of bench/study.yaml

`bench/study.yaml` fixes arms, learning rates, metrics and rules; this file only runs it. Every run leaves one JSON in
`--results`, and a run whose JSON is there is not run again, so the study can be made in parts, on several days:

    python bench/study.py run --list                           what is left, in order
    python bench/study.py run --only lift-smollm2-center/0     one arm and seed (lr0.001 in its place: of the sweep)
    python bench/study.py run                                  everything, two at a time
    python bench/study.py report                               tables, verdicts and figures of what is there

A JSON that was made with other settings than study.yaml's is refused by name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import arms  # noqa: F401 - before torch: it settles how threads wait
from cyclopts import App, Parameter
from study_figures import figure, picture
from study_report import Made, equal_compute, made_so_far, tables, verdict_table
from study_rules import Left, Results, Run, Study, composition, last
from study_run import perform, rehearsed

from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import write_atomic

HERE = Path(__file__).resolve().parent

app = App(help=__doc__, help_format="plaintext")

# --------------------------------------------------------------------------------------------- commands

Inputs = Annotated[
    Path, Parameter(help="Folder with data (`reported`, `validation`) and caches, as make study makes it.")
]
At = Annotated[Path, Parameter(help="Folder of the JSONs.")]
Rules = Annotated[Path, Parameter(help="What to compare.")]


@app.command
def run(
    *,
    inputs: Inputs = Path("runs/study"),
    results: At = HERE / "results" / "study",
    study: Rules = HERE / "study.yaml",
    only: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    list_runs: Annotated[bool, Parameter(name="--list", negative=())] = False,
    at_once: int = 2,
) -> None:
    """Make all runs that are left, saying first how many hours they take.

    Parameters
    ----------
    only
        ARM/SEED, or ARM/lrRATE of the sweep; may be given several times.
    list_runs
        Name the runs that are left and can be made now, and stop.
    at_once
        Processes, each on one thread.
    """
    rules = Study.read(study)
    kept = Results(results, rules)
    if list_runs:
        stage = next((stage for stage in kept.stages() if stage.runs), Left([], []))
        print("".join(f"{one.name}\n" for one in stage.runs), end="")
        return
    if only:
        for name in only:
            _made(_named(kept, name), kept, inputs)
        return
    _say_hours(kept, inputs, at_once)
    for stage in kept.stages():
        _all_at_once(stage.runs, ["--inputs", inputs, "--results", results, "--study", study], at_once)


@app.command
def preview(
    *,
    inputs: Inputs = Path("runs/study"),
    results: At = Path("runs/study/preview"),
    study: Rules = HERE / "study.yaml",
) -> None:
    """Four arms, one seed, one learning rate for all: shows how the study works, and proves nothing."""
    rules = Study.read(study)
    kept = Results(results, rules)
    print(f"{PREVIEW}\n", flush=True)
    made = {}
    for arm in rules.preview.arms:
        one = Run.of(rules, arm, 0, rules.preview.learning_rate, "reported")
        made[arm] = [_made(one, kept, inputs)]
    _write(results, rules, made, tables(rules, made), PREVIEW)


@app.command
def report(
    *,
    out: Path = Path("runs/study/report"),
    results: At = HERE / "results" / "study",
    study: Rules = HERE / "study.yaml",
) -> None:
    """Tables, verdicts and figures of all runs that are done: OUT/study.md, OUT/study.svg, OUT/picture.svg."""
    rules = Study.read(study)
    kept = Results(results, rules)
    made = made_so_far(kept)
    if not made:
        raise BadConfig(f"{results}: no arm has been reported on yet; `study.py run` goes on")
    missing = sum(len(stage.runs) + len(stage.waiting) * len(rules.seeds) for stage in kept.stages())
    note = f"UNFINISHED: {missing} runs are left; not to be quoted" if missing else None
    lines = [*tables(rules, made), *verdict_table(kept, made), *equal_compute(kept, made)]
    _write(out, rules, made, lines, note)


def _write(out: Path, rules: Study, made: Made, lines: Iterable[str], note: str | None) -> None:
    """Tables and figures; a note stands first and last, and in each figure."""
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([note, *lines, "", note] if note else lines) + "\n"
    write_atomic(out / "study.md", text.encode())
    for name, draw in (("study", figure), ("picture", picture)):
        write_atomic(out / f"{name}.svg", draw(rules, made, note=note).encode())
    print(f"{text}\n{out / 'study.svg'}, {out / 'picture.svg'}")


PREVIEW = "PREVIEW: one seed, and a learning rate that nobody tuned; not to be quoted. The study is make study-full."


def _named(kept: Results, name: str) -> Run:
    """Raises BadConfig: no such run, or its learning rate is not chosen yet."""
    arm, _, which = name.rpartition("/")
    if arm not in kept.study.arms:
        raise BadConfig(f"--only {name}: no such arm; there are {', '.join(kept.study.arms)}")
    runs = kept.sweep(arm) if which.startswith("lr") else kept.reported(arm)
    found = next((one for one in runs if one.name == name), None)
    if found is None:
        raise BadConfig(f"--only {name}: there are {', '.join(one.name for one in runs)}")
    return found


def _made(one: Run, kept: Results, inputs: Path) -> dict[str, Any]:
    """The result of a run, which is made unless it was."""
    found = kept.get(one)
    if found is not None:
        print(f"{one.name}: done before", flush=True)
        return found
    result = perform(one, inputs, inputs / "runs")
    kept.put(one, result)
    own = "long" if "caption_field" in kept.study.arms[one.arm] else "seen"
    print(
        f"{one.name}: composition {composition(last(result), own):.1%} ({own}), {result['cpu_seconds']:.0f} CPU s",
        flush=True,
    )
    return result


def _all_at_once(runs: Sequence[Run], flags: Sequence[object], at_once: int) -> None:
    """Each run in a process of its own. Raises LiftError at the end where one failed."""

    def one(run: Run) -> int:
        command = [sys.executable, __file__, "run", "--only", run.name, *flags]
        return subprocess.run([str(word) for word in command], check=False).returncode

    with ThreadPoolExecutor(at_once) as pool:
        codes = list(pool.map(one, runs))
    failed = [run.name for run, code in zip(runs, codes, strict=True) if code]
    if failed:
        raise LiftError(f"{', '.join(failed)}: not finished (see above); the same command goes on")


def _say_hours(kept: Results, inputs: Path, at_once: int) -> None:
    rules = kept.study
    left = [run.arm for stage in kept.stages() for run in stage.runs]
    left += [arm for stage in kept.stages() for arm in stage.waiting for _ in rules.seeds]
    if not left:
        print("nothing is left to run")
        return
    seconds: dict[str, float] = {}
    total = 0.0
    for arm in left:
        kind = str(rules.arms[arm].get("text_shape"))  # arms with the same text tower take the same time
        if kind not in seconds:
            seconds[kind] = rehearsed(Run.of(rules, arm, 0, rules.learning_rates[0], "reported"), inputs)
        total += seconds[kind]
    print(
        f"{len(left)} runs are left, about {total / 3600 / at_once:.1f} hours with {at_once} at a time "
        "(from a few steps of each kind)",
        flush=True,
    )


if __name__ == "__main__":
    try:
        app()
    except LiftError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
