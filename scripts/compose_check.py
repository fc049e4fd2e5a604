"""`make compose-check`: are the compose files right, and does `docker compose up` do what the README says?

    configuration, Dockerfiles → an engine → build → tests/compose → nothing left behind

Without a container engine the files are read and the rest is skipped, which the last lines say. A folder with a lab
(`--lab`: lib.sh, fetch.sh, start.sh, base.sh, ca.sh, stop.sh) can start an engine of its own where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=6"]
ENGINE = "build, up, kill, up again, down -v, backup, two hosts, bad input"
NEVER_HERE = (
    "Prometheus and Grafana themselves, and the GPU overlay on a GPU: /metrics is scraped without them"
)

ROOM = 30 << 30

Environment = dict[str, str]


class Skipped(Exception):
    """No engine can run here."""


class Failed(Exception):
    """A step ended with an error; its own words have been printed."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lab", type=Path, default=ROOT.parent / "shared" / "dockerlab", help="folder with a lab"
    )
    parser.add_argument("--minutes", type=float, default=20, help="everything must be over by then")
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # and what was started is stopped
    end = time.monotonic() + 60 * options.minutes
    not_checked = []
    try:
        with contextlib.ExitStack() as stack:
            try:
                environment = stack.enter_context(engine(options.lab))
            except Skipped as reason:
                not_checked.append(f"{ENGINE} ({reason})")
                run([*PYTEST, "tests/compose/test_config.py"], dict(os.environ), end)
            else:
                stack.callback(remove_projects, environment)
                not_checked.append(NEVER_HERE)
                with building(environment, end):
                    run([*PYTEST, "tests/compose/test_config.py"], environment, end)
                run([*PYTEST, "-x", "tests/compose/test_pipeline.py"], environment, end)
                run([*PYTEST, "tests/compose/test_bad_input.py"], environment, end)
    except Failed as failure:
        say(f"FAILED: {failure}")
        return 1
    finally:
        for what in not_checked:
            say(f"NOT CHECKED: {what}")
    say("what was checked holds")
    return 0


def say(line: str) -> None:
    print(f"compose-check: {line}", flush=True)


@contextlib.contextmanager
def engine(lab: Path) -> Iterator[Environment]:
    """An engine that answers, or one of a lab's own; as the environment in which images can be built.

    Raises:
        Skipped: there is none.
    """
    if answers(os.environ):
        yield dict(os.environ)
        return
    if not (lab / "start.sh").exists():
        raise Skipped(f"no container engine answers, and there is no lab at {lab}")
    folder = tempfile.mkdtemp(prefix="lift-lab-")
    try:
        if (free := shutil.disk_usage(folder).free) < ROOM:
            raise Skipped(f"{free >> 30} GiB are free in {folder}, and images and layers take {ROOM >> 30}")
        environment = sourced(lab / "lib.sh", {**os.environ, "DOCKERLAB": folder, "TMPDIR": folder})
        try:
            start_lab(lab, environment)
            yield environment
        finally:
            subprocess.run([lab / "stop.sh"], env=environment, check=False, stdout=subprocess.DEVNULL)
    finally:
        # Some disks take ten minutes to give back what images and layers took, and nothing waits for it.
        subprocess.Popen(["rm", "-rf", folder], start_new_session=True, stderr=subprocess.DEVNULL)


def start_lab(lab: Path, environment: Environment) -> None:
    """Start a lab's engine, and add to the environment what building with it needs. Raises Skipped."""
    started = time.monotonic()
    for step in ("fetch.sh", "start.sh", "base.sh", "ca.sh python:3.11-slim"):
        done = subprocess.run(
            f"{lab}/{step}", shell=True, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise Skipped(f"the lab's {step} failed: {' '.join(last)}")
    say(f"an engine of the lab answers after {time.monotonic() - started:.0f} s")
    environment["PYTHON_IMAGE"] = "python:3.11-slim-ca"
    environment["COMPOSE_FILE"] = "docker-compose.yml:docker/compose.ci.yaml"
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    wheels = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if wheels and Path(wheels).is_dir():
        environment["LIFT_WHEELS"] = wheels


def answers(environment: Mapping[str, str]) -> bool:
    return shutil.which("docker", path=environment["PATH"]) is not None and not any(
        subprocess.run(["docker", *words], env=environment, capture_output=True, check=False).returncode
        for words in (["info"], ["compose", "version"])
    )


def sourced(script: Path, environment: Environment) -> Environment:
    """The environment after a shell has read a script."""
    shell = ["bash", "-c", f'. "{script}" && env -0']
    said = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in said.split("\0") if "=" in line)


@contextlib.contextmanager
def building(environment: Environment, end: float) -> Iterator[None]:
    """Both images are built meanwhile: one waits for the network where the other unpacks. Raises Failed."""
    started = time.monotonic()
    builds: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for service in ("embedder", "trainer"):
                with (Path(folder) / service).open("w") as log:
                    command = ["docker", "compose", "build", service]
                    builds[service] = subprocess.Popen(
                        command, stdout=log, stderr=log, cwd=ROOT, env=environment
                    )
            yield
            for service, one in builds.items():
                if one.wait(max(1, end - time.monotonic())):
                    print((Path(folder) / service).read_text()[-4000:])
                    raise Failed(f"the image of {service} could not be built")
                say(f"image of {service} built after {time.monotonic() - started:.0f} s")
        except subprocess.TimeoutExpired:
            raise Failed("the images were not built in time") from None
        finally:
            for one in builds.values():
                one.kill()
                one.wait()
    listing = [
        "docker",
        "image",
        "ls",
        "--filter",
        "reference=lift-*",
        "--format",
        "{{.Repository}}:{{.Tag}} {{.Size}}",
    ]
    said = subprocess.run(listing, env=environment, capture_output=True, text=True, check=False).stdout
    say("images: " + ", ".join(said.splitlines()))


def project() -> str:
    return f"lift-check-{os.getpid()}"


def run(command: list[str], environment: Environment, end: float) -> None:
    """Run tests, and let them clean up when the time is over. Raises Failed."""
    process = subprocess.Popen(command, cwd=ROOT, env={**environment, "LIFT_CHECK_PROJECT": project()})
    try:
        code = process.wait(max(1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        raise Failed(f"{command[-1]} was not over in time") from None
    finally:
        process.kill()
        process.wait()
    if code:
        raise Failed(f"{command[-1]} ended with status {code}")


def remove_projects(environment: Environment) -> None:
    """Whatever a test that was cut off left behind."""

    def listed(*words: str) -> list[str]:
        found = subprocess.run(
            ["docker", *words], env=environment, capture_output=True, text=True, check=False
        )
        return [
            name
            for name, _, owner in (line.partition(" ") for line in found.stdout.splitlines())
            if owner.startswith(f"{project()}-")
        ]

    owner = '{{.Label "com.docker.compose.project"}}'
    for remove, listing in (
        (("rm", "-f"), ("ps", "-a", "--format", "{{.ID}} " + owner)),
        (("volume", "rm"), ("volume", "ls", "--format", "{{.Name}} " + owner)),
        (("network", "rm"), ("network", "ls", "--format", "{{.ID}} " + owner)),
    ):
        if names := listed(*listing):
            subprocess.run(["docker", *remove, *names], env=environment, capture_output=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
