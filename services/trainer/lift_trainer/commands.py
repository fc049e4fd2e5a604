"""The command behind lift-train."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.config import Dict, Env, Yaml

from lift_cache.errors import BadConfig
from lift_cache.terminal import ending_in_one_line, run_app
from lift_trainer.config import RUN, TrainConfig
from lift_trainer.loading import loading

TRAIN_INTERRUPTED = "what was saved stays, and the same command goes on from there"


def train(argv: Sequence[str] | None) -> None:
    """Exits 0, 2 on a user's error, 128 + signal when it was stopped."""
    with ending_in_one_line(TRAIN_INTERRUPTED):
        status = _train(sys.argv[1:] if argv is None else argv)
    if status:
        sys.exit(status)


TRAIN_HELP = """Train an image encoder against a cache of caption embeddings.

The same command again continues a run from its newest checkpoint. Every flag can also be a field of the
file given by --config (YAML), or an environment variable: --batch-size, batch_size, LIFT_BATCH_SIZE; a flag
wins over the environment, the environment over the file, the file over a preset.

**A first run, on a laptop**

`lift-train --cache cache --data 'emoji/train-*.tar' --tower vit:width=128,depth=4,heads=4,patch=8
--image-size 64 --batch-size 256 --epochs 10 --warmup 5% --run runs/emoji`

**The paper's tower on your own images (CSV with columns image, caption)**

`lift-train --preset recommended --cache cache --data pairs.csv --images photos/ --epochs 32 --batch-size 1024
--lr-scaling sqrt --run runs/photos`

**Another method on the same data**

`lift-train --preset clip --data pairs.csv --images photos/ --epochs 32 --batch-size 1024 --run runs/clip`

**Eight GPUs**

`torchrun --nproc-per-node 8 --no-python -- lift-train --config run.yaml`

**The run of a checkpoint once more**

`lift-train --from-record runs/photos --run runs/again`

**What would happen, without doing it**

`lift-train --config run.yaml --dry-run`
"""


def _train(argv: Sequence[str]) -> int:
    app = App(name="lift-train", version=version("lift-trainer"), help=TRAIN_HELP, help_format="markdown")

    @app.default
    def train(
        *,
        config: Annotated[TrainConfig, Parameter(name="*")],
        config_file: Annotated[
            Path | None, Parameter(name="--config", group=RUN, help="YAML file with any of these settings.")
        ] = None,
        preset: Annotated[
            str | None,
            Parameter(group=RUN, help=f"Settings of a published method: {', '.join(sorted(presets()))}."),
        ] = None,
        from_record: Annotated[
            Path | None,
            Parameter(
                group=RUN,
                help="Repeat the run of this directory or checkpoint: its settings, snapshot and data.",
            ),
        ] = None,
        dry_run: Annotated[
            bool, Parameter(negative=(), group=RUN, env_var=(), help="Print the plan and stop.")
        ] = False,
    ) -> int:
        # These import torch: seconds that --help should not cost.
        with loading(TRAIN_INTERRUPTED):
            from lift_trainer.distributed import rank
            from lift_trainer.job import prepare
            from lift_trainer.launch import ranks
            from lift_trainer.loop import train as run_job
            from lift_trainer.plan import cost, plan

        with ranks(config.device):

            def say(text: str) -> None:
                if rank() == 0:
                    print(text, file=sys.stderr)

            job = prepare(config, record)
            say(plan(job))
            if dry_run:
                say(cost(job))
                return 0
            outcome = run_job(job)
            if outcome.signal is not None and not outcome.finished:
                say(
                    f"stopped by {outcome.signal.name} after step {outcome.step} of {outcome.total}; saved as "
                    f"{outcome.checkpoint}; the same command continues there"
                )
                return 128 + outcome.signal
            bad = f", {len(job.rejects.named)} broken samples left out" if job.rejects.named else ""
            say(
                f"done: {outcome.step} steps, saved as {outcome.checkpoint}{bad}; next: "
                f"lift-eval retrieval --run {config.run} --data SHARDS"
            )
        return 0

    sources: list[Any] = [Env("LIFT_", command=False)]
    if file := _given(argv, "config"):
        sources.append(_yaml(Path(file)))
    if name := _given(argv, "preset"):
        sources.append(_yaml(_preset(name)))
    record = None
    if place := _given(argv, "from-record"):
        with loading(TRAIN_INTERRUPTED):
            from lift_trainer.record import read_record
        record = read_record(Path(place))
        settings = record.config.model_dump(mode="json", exclude_defaults=True, exclude={"run"})
        sources.append(Dict(settings, source=f"--from-record {place}", use_commands_as_keys=False))
    app.config = sources
    return run_app(app, argv)


def _given(argv: Sequence[str], name: str) -> str | None:
    """What flags name further settings has to be known before the others are parsed."""
    flag = f"--{name}"
    for position, argument in enumerate(argv):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and position + 1 < len(argv):
            return argv[position + 1]
    return os.environ.get(f"LIFT_{name.upper().replace('-', '_')}")


def presets() -> dict[str, Path]:
    """Files with the settings of published methods, by name."""
    return {path.stem: path for path in (Path(__file__).parent / "presets").glob("*.yaml")}


def _preset(name: str) -> Path:
    """Raises BadConfig."""
    found = presets()
    if name not in found:
        raise BadConfig(f"--preset {name}: there is none of that name, but {', '.join(sorted(found))}")
    return found[name]


def _yaml(file: Path) -> Yaml:
    """Raises BadConfig: no such file, not YAML, not a mapping, a field that does not exist."""
    import yaml

    try:
        fields = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadConfig(f"--config {file}: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise BadConfig(f"--config {file}: no settings in it; write lines such as `batch_size: 256`")
    unknown = [str(name) for name in fields if str(name).replace("-", "_") not in TrainConfig.model_fields]
    if unknown:
        raise BadConfig(f"--config {file}: there is no setting {unknown[0]!r}; see lift-train --help")
    return Yaml(file, must_exist=True, use_commands_as_keys=False)
