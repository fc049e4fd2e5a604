"""Several processes as one run, started by torchrun: meeting, agreeing, and speaking with one voice."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from lift_cache.errors import BadConfig
from lift_trainer.distributed import rank, world_size

PATIENCE = timedelta(hours=2)
"""How long ranks wait for one of them: rank 0 reads the index first, and scores held-out data alone."""


@contextlib.contextmanager
def ranks(device: str) -> Iterator[None]:
    """The process group that torchrun's environment describes; nothing outside of it.

    Exchanges go through NCCL on GPUs and through gloo on CPUs. An error that every rank meets is said by rank 0
    alone.

    Args:
        device: as in the configuration.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def taking_turns() -> Iterator[None]:
    """Rank 0 first, then the others: what it reads, fetches and keeps is there for them.

    An error of rank 0 is everybody's, and said once: the others end with status 2.
    """
    if world_size() == 1:
        yield
        return
    if rank() == 0:
        failed = [True]
        try:
            yield
            failed = [False]
        finally:
            dist.broadcast_object_list(failed)
        return
    failed = [False]
    dist.broadcast_object_list(failed)
    if failed[0]:
        sys.exit(2)
    yield


def require_same(values: Mapping[str, object]) -> None:
    """Refuse ranks that have come to different things. Collective.

    Raises:
        BadConfig: on rank 0, naming the rank and what differs; the others end with status 2.
    """
    if world_size() == 1:
        return
    found: list[dict[str, object]] = [{} for _ in range(world_size())]
    dist.all_gather_object(found, dict(values))
    for number, theirs in enumerate(found):
        for name, value in found[0].items():
            if theirs.get(name) != value:
                if rank() != 0:
                    sys.exit(2)
                raise BadConfig(
                    f"rank {number} has {name} = {_short(theirs.get(name))} and rank 0 has {_short(value)}: give all "
                    "processes the same data, cache and settings"
                )


def agreed(flag: bool) -> bool:
    """Whether any rank says so. Collective."""
    if world_size() == 1:
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said.item())


def joined(values: dict[str, str]) -> dict[str, str]:
    """What the ranks know, together. Collective."""
    if world_size() == 1:
        return values
    found: list[dict[str, str]] = [{} for _ in range(world_size())]
    dist.all_gather_object(found, values)
    return {name: value for each in found for name, value in each.items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
