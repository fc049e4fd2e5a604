"""Checkpoints: directories that are either whole or not there, in safetensors and JSON.

    run/checkpoints/step-000123/   model.safetensors  optimizer.safetensors  text-transform.safetensors  state.json
                                   (one transform per cache, -2, -3, … for further ones)
    run/checkpoints/latest         the name of the newest

A checkpoint is written under a temporary name, fsynced and renamed; `state.json` holds the digest of every
other file, so that a torn one (a lost power supply, a half copy) is found out and the one before is used.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lift_cache.errors import BadConfig, CacheDamaged, CacheNotFound
from lift_cache.files import (
    digest_file,
    make_directory,
    remove_temporaries,
    room_for,
    sync_directory,
    sync_file,
    temporary_name,
    write_atomic,
)
from lift_trainer.config import RESUMABLE, TrainConfig
from lift_trainer.record import STATE, State, TextState, as_current
from lift_trainer.tensors import write_tensors
from lift_trainer.transform import TextTransform

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def transform_file(number: int) -> str:
    """Name of the transform of one cache, counted from 0."""
    return "text-transform.safetensors" if number == 0 else f"text-transform-{number + 1}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: State

    def load_model(self, model: nn.Module) -> None:
        """Raises BadConfig: weights of another model than the settings make today."""
        tensors, wanted = load_file(self.path / MODEL), model.state_dict()
        for name in sorted(wanted.keys() | tensors.keys()):
            self._require_shape(MODEL, name, tensors.get(name), wanted.get(name))
        model.load_state_dict(tensors)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raises BadConfig: states of another model."""
        tensors = load_file(self.path / OPTIMIZER)
        for name, parameter in model.named_parameters():
            prefix = f"{name}/"
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            for key, tensor in state.items():
                if key != "step":
                    self._require_shape(OPTIMIZER, prefix + key, tensor, parameter)
            if state:
                # `step` stays where AdamW wants it: fused on the device, as the moments are.
                optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in state.items()}

    def _require_shape(
        self, file: str, name: str, found: torch.Tensor | None, wanted: torch.Tensor | None
    ) -> None:
        """Raises BadConfig: the two differ, or one is not there."""
        there, here = ("absent" if t is None else list(t.shape) for t in (found, wanted))
        if there != here:
            made = ", ".join(f"{library} {version}" for library, version in self.state.libraries.items())
            raise BadConfig(
                f"{self.path / file}: {name} is {there} there and {here} in the model that its settings make now; it "
                f"was written by {made}: go on with these, or begin another --run"
            )

    def load_transforms(self) -> tuple[TextTransform, ...]:
        """One per cache. Raises CacheDamaged."""
        return tuple(TextTransform.load(self.path / transform_file(n)) for n in range(len(self.state.texts)))


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after a step is, or will be."""
    return run / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    run: Path,
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    transforms: Sequence[TextTransform],
    keep: int,
    before: Checkpoint | None,
    best: Path | None = None,
) -> Checkpoint:
    """Write a checkpoint durably, point `latest` at it and drop all but the newest `keep`.

    Args:
        before: the one that the run went on from. What else is newer is torn, and would push out good ones.
        best: one that stays whatever `keep` says.

    Raises:
        CacheFull: no room; the checkpoints before stay.
    """
    directory = run / "checkpoints"
    make_directory(directory)
    remove_temporaries(directory)
    final = checkpoint_path(run, state.step)
    temporary = temporary_name(final)
    with room_for(directory):
        temporary.mkdir()
        try:
            write_tensors(temporary / MODEL, model.state_dict())
            write_tensors(
                temporary / OPTIMIZER,
                {
                    f"{name}/{key}": value
                    for name, parameter in model.named_parameters()
                    for key, value in optimizer.state.get(parameter, {}).items()
                },
            )
            for number, transform in enumerate(transforms):
                transform.save(temporary / transform_file(number))
            digests = {path.name: digest_file(path) for path in sorted(temporary.iterdir())}
            libraries = state.libraries | {"lift-trainer": code_version()}
            state = state.model_copy(update={"files": digests, "libraries": libraries})
            (temporary / STATE).write_text(state.model_dump_json(indent=2) + "\n")
            for path in temporary.iterdir():
                sync_file(path)
            sync_directory(temporary)
            if final.exists():  # torn, or it would have been resumed from
                shutil.rmtree(final)
            temporary.replace(final)
            sync_directory(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        write_atomic(directory / "latest", f"{final.name}\n".encode())
    since = before.state.step if before else 0
    others = [path for path in _directories(run) if path not in (final, best)]
    torn = [path for path in others if _step_of(path) > since]
    for old in torn + others[len(torn) + keep - 1 :]:
        shutil.rmtree(old)
    return Checkpoint(final, state)


@lru_cache(maxsize=1)
def code_version() -> str:
    """`0.1.0`, or `0.1.0 (v0.1-7-gc4dde26-dirty)` in a checkout that has this file."""
    try:
        released = version("lift-trainer")
    except PackageNotFoundError:
        released = "unknown"
    here = Path(__file__).resolve()
    # An environment may lie inside of somebody else's checkout, so the file itself must belong to it.
    told = [
        _git(here.parent, *words)
        for words in (
            ("ls-files", "--error-unmatch", here.name),
            ("describe", "--always", "--dirty", "--tags"),
        )
    ]
    return f"{released} ({told[1]})" if all(told) else released


def _git(where: Path, *words: str) -> str | None:
    try:
        ended = subprocess.run(
            ["git", "-C", str(where), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip() or None


def latest_name(run: Path) -> str | None:
    """What `latest` points at; None before the first checkpoint."""
    try:
        return (run / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return None


def find_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None when there is none; torn ones are named on stderr.

    Raises:
        CacheDamaged: there are checkpoints, and every one is torn.
        UnsupportedFormat: the newest is of a newer version.
    """
    problems = []
    for path in _directories(run):
        try:
            return read_checkpoint(path)
        except CacheDamaged as error:
            problems.append(str(error))
            print(f"{error}; going back to the one before", file=sys.stderr)
    if problems:
        raise CacheDamaged(f"no whole checkpoint in {run}: {problems[0]}; use another --run to start anew")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint directory and check its digests. Raises CacheDamaged, UnsupportedFormat."""
    try:
        written = (path / STATE).read_bytes()
        state = State.model_validate(as_current(path, json.loads(written)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CacheDamaged(f"{path} is torn: {STATE}: {str(error).splitlines()[0]}") from None
    for name in (MODEL, OPTIMIZER, *map(transform_file, range(len(state.texts)))):
        file = path / name
        if not file.is_file() or digest_file(file) != state.files.get(name):
            raise CacheDamaged(f"{path} is torn: {name} is not what was written")
    return Checkpoint(path, state)


def require_checkpoint(run: Path) -> Checkpoint:
    """As `find_checkpoint`. Raises CacheNotFound when the run has none, CacheDamaged."""
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise CacheNotFound(f"no checkpoint in {run}; train first: lift-train --run {run} …")
    return checkpoint


def _directories(run: Path) -> list[Path]:
    """Newest first."""
    found = (path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal())
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def refuse_other_config(run: Path, state: State, config: TrainConfig) -> None:
    """Raises BadConfig naming the first setting that differs from the run's, and both values."""
    ours, theirs = config.saved(), state.config.saved()
    for field in ours:
        if field not in RESUMABLE and ours[field] != theirs[field]:
            raise _refusal(run, f"--{field.replace('_', '-')}", theirs[field], ours[field])


def refuse_other_inputs(
    run: Path | str, state: State, *, index_digest: str, texts: Sequence[TextState]
) -> None:
    """Raises BadConfig when the data or the text vectors are not the ones that the run began with."""
    if index_digest != state.index_digest:
        raise _refusal(run, "the digest of --data", state.index_digest, index_digest)
    if len(texts) != len(state.texts):
        raise _refusal(run, "a number of --cache", len(state.texts), len(texts))
    for number, (theirs, ours) in enumerate(zip(state.texts, texts, strict=True)):
        which = "--cache" if number == 0 else f"--cache number {number + 1}"
        if theirs.recipe and ours.recipe:
            for field, then, now in theirs.recipe.differences(ours.recipe):
                raise _refusal(run, f"{field} in the recipe of {which}", then, now)
        for what, then, now in (
            (f"the snapshot of {which}", theirs.snapshot, ours.snapshot),
            ("the digest of the vectors embedded at --server", theirs.overlay_digest, ours.overlay_digest),
        ):
            if then != now:
                raise _refusal(run, what, then, now)


def _refusal(run: Path | str, what: str, theirs: Any, ours: Any) -> BadConfig:
    return BadConfig(
        f"{run} was begun with {what} = {theirs} and is now given {ours}; give what it was, or another --run"
    )
