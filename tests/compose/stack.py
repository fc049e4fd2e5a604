"""A compose project, as the tests drive it. `scripts/compose_check.py` finds the engine and builds the images."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import httpx

ROOT = Path(__file__).parents[2]
FILES = os.environ.get("COMPOSE_FILE", "docker-compose.yml")
"""What images are built with; `scripts/compose_check.py` sets it."""

DOCKER = ROOT / "docker"
SMALL = Path(__file__).with_name("small.yaml")
PROJECT = os.environ.get("LIFT_CHECK_PROJECT", "lift-check")


def docker(
    *words: object, check: bool = True, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["docker", *map(str, words)], capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    if check and done.returncode:
        raise AssertionError(
            f"docker {' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: Callable[[], Any], says: str, seconds: float = 240) -> Any:
    """The first true answer of `what`."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if answer := what():
            return answer
        time.sleep(0.2)
    raise AssertionError(f"{says}: not within {seconds:.0f} s")


def pack(folder: Path, tar: Path) -> Path:
    """A folder as a tar whose files belong to the embedder's user."""

    def embedders(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 10001
        return member

    with tarfile.open(tar, "w") as file:
        file.add(folder, folder.name, filter=embedders)
    return tar


class Stack:
    """One compose project: its own containers, volumes, network and ports."""

    def __init__(self, name: str, *overlays: Path, **environment: str) -> None:
        self.name = f"{PROJECT}-{name}"
        self.port = int(environment.setdefault("LIFT_PORT", str(free_port())))
        # What the machine has set for itself must not reach the services, but for what building needs.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LIFT_") or k == "LIFT_WHEELS"}
        files = [*(ROOT / name for name in FILES.split(":")), *overlays]
        joined = {"COMPOSE_PROJECT_NAME": self.name, "COMPOSE_FILE": ":".join(map(str, files))}
        self.environment = inherited | joined | environment

    def with_files(self, *overlays: Path, **environment: str) -> Stack:
        """The same project, seen through further files."""
        other = copy.copy(self)
        files = ":".join([self.environment["COMPOSE_FILE"], *map(str, overlays)])
        other.environment = self.environment | {"COMPOSE_FILE": files} | environment
        return other

    def compose(
        self, *words: object, check: bool = True, stdin: IO[bytes] | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["docker", "compose", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=400,
            stdin=stdin,
            check=False,
            cwd=ROOT,
            env=self.environment | environment,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def start(
        self, script: str, *, folder: Path, output: IO[bytes], errors: int = subprocess.STDOUT
    ) -> subprocess.Popen[bytes]:
        """Commands for a shell, in the background."""
        return subprocess.Popen(
            ["bash", "-ec", script], cwd=folder, env=self.environment, stdout=output, stderr=errors
        )

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine says of a service's container."""
        ids = self.compose("ps", "-aq", service).stdout.split()
        assert len(ids) == 1, f"{service}: {ids}"
        return dict(json.loads(docker("inspect", ids[0]).stdout)[0])

    def running(self, service: str) -> bool:
        return bool(self.compose("ps", "-q", "--status", "running", service).stdout)

    def exit_code(self, service: str) -> int:
        state = self.inspect(service)["State"]
        assert state["Status"] == "exited", f"{service}: {state['Status']}"
        return int(state["ExitCode"])

    def wait_for(self, service: str, seconds: float = 240) -> int:
        """The exit code of a service that runs to its end."""
        until(lambda: self.inspect(service)["State"]["Status"] == "exited", f"{service} ends", seconds)
        return self.exit_code(service)

    def said(self, service: str) -> list[str]:
        """Lines that a service wrote."""
        # Compose itself puts an escape sequence before some of them.
        return self.compose("logs", "--no-log-prefix", service).stdout.replace("\x1b[2K", "").splitlines()

    def copy_out(self, service: str, path: str, to: Path) -> Path:
        self.compose("cp", f"{service}:{path}", to)
        return to

    def unpack_cache(self, tar: Path) -> None:
        """Put a packed cache into the volume, as docs/deploy.md restores one."""
        with tar.open("rb") as file:
            unpack = ("--entrypoint", "tar", "embedder", "-C", "/cache", "-xf", "-")
            self.compose("run", "--rm", "--no-deps", "-T", *unpack, stdin=file)

    def image(self, service: str) -> str:
        return self.compose("config", "--images", service).stdout.strip()

    def key(self, name: str) -> str:
        return self.compose("exec", "-T", "embedder", "cat", f"/keys/{name}").stdout.strip()

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60, trust_env=False
        )

    def left_behind(self) -> list[str]:
        """Whatever of this project the engine still has."""
        label = f"label=com.docker.compose.project={self.name}"
        return [
            f"{kind} {one}"
            for kind, listing in (
                ("container", ("ps", "-aq")),
                ("volume", ("volume", "ls", "-q")),
                ("network", ("network", "ls", "-q")),
            )
            for one in docker(*listing, "--filter", label).stdout.split()
        ]
