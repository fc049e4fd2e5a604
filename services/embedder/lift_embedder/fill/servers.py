"""Servers of fill's own: `lift-embed serve` on a free port of loopback, restarted when it dies, gone with fill."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from lift_cache.errors import BadConfig, LiftError, ServerUnavailable
from lift_cache.terminal import USER_ERROR
from lift_embedder.config import ServeConfig

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between a server's death and its next start; doubles with every death in a row."""

MOST_DEATHS = 5
"""Deaths in a row, none of them after `LASTING` seconds of life, after which it is not started again."""

LASTING = 120.0
STOP_SECONDS = 90.0
"""How long a server may take to stop: more than it allows itself."""

LOOK = 0.1


class OwnServer:
    """One server process on one device. The thread that starts it watches over it until it is stopped."""

    def __init__(
        self, config: ServeConfig, device: str | None, threads: int, log: Path, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            config: of the server; its host and port are chosen here.
            device: what CUDA_VISIBLE_DEVICES is set to, `cpu` for none of them, None to leave it as it is.
            threads: of an engine on the CPU.
            log: file that takes what the server prints.
        """
        self.key = secrets.token_urlsafe(24)
        self.restarts = 0
        self._config, self._device, self._threads = config, device, threads
        self._log, self._say = log, say
        self._port, self._start = 0, 0
        self._url: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: LiftError | None = None
        self._stopping = threading.Event()
        self._turn = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    @property
    def name(self) -> str:
        on = "" if self._device is None else f" on device {self._device}"
        return f"the server{on}"

    def start(self) -> None:
        """Begin; returns at once. Raises OSError: its log cannot be written."""
        self._log.write_bytes(b"")
        self._watcher.start()

    def url(self, patience: float) -> str:
        """Its address, the same after a restart, once it listens. Raises LiftError."""
        give_up = time.monotonic() + patience
        while self._url is None:
            self.check()
            if time.monotonic() > give_up:
                raise ServerUnavailable(
                    f"{self.name} did not listen within {patience:.0f} s; see {self._log}"
                )
            time.sleep(LOOK)
        return self._url

    def wait_ready(self, patience: float) -> None:
        """Wait for its engine. Raises ServerUnavailable: it takes too long, and what it said last."""
        give_up = time.monotonic() + patience
        url = self.url(patience)
        with httpx.Client(
            base_url=url, trust_env=False, headers={"Authorization": f"Bearer {self.key}"}
        ) as http:
            said = "no answer"
            while time.monotonic() < give_up:
                self.check()
                with contextlib.suppress(httpx.HTTPError):
                    answer = http.get("/readyz")
                    if answer.status_code == httpx.codes.OK:
                        return
                    said = _message(answer)
                    if "read-only" in said:
                        break
                time.sleep(5 * LOOK)
        raise ServerUnavailable(f"{self.name} does not become ready: {said}; see {self._log}")

    def check(self) -> None:
        """Raises LiftError when the server is gone for good."""
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Ask it to stop; returns at once."""
        with self._turn:
            self._stopping.set()
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()

    def wait_end(self) -> None:
        """Wait until it is gone: it answers what is under way first."""
        self.end()
        give_up = time.monotonic() + STOP_SECONDS
        while self._watcher.is_alive():
            self._watcher.join(LOOK)
            if time.monotonic() > give_up and self._process is not None:
                self._process.kill()  # what it acknowledged is durable

    def kill(self) -> None:
        """End it at once."""
        self.end()
        if self._process is not None:
            self._process.kill()

    def _watch(self) -> None:
        pause, deaths = FIRST_PAUSE, 0
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                process = self._launch()
                if process is None:
                    return
                said = self._follow(process)
                if self._stopping.is_set():
                    return
                if process.returncode == USER_ERROR:
                    raise BadConfig(
                        said.removeprefix("error: ") or f"{self.name} did not start; see {self._log}"
                    )
                lasted = time.monotonic() - began > LASTING
                pause, deaths = (FIRST_PAUSE, 1) if lasted else (pause, deaths + 1)
                if deaths >= MOST_DEATHS:
                    raise ServerUnavailable(
                        f"{self.name} died {deaths} times in a row ({_how(process.returncode)}); its log: {self._log}"
                    )
                self._say(
                    f"{self.name} ended ({_how(process.returncode)}); starting it again in {pause:.0f} s"
                )
                self.restarts += 1
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        except LiftError as error:
            self._failure = error
        except Exception as error:
            self._failure = ServerUnavailable(f"{self.name} cannot be run: {error}")

    def _launch(self) -> subprocess.Popen[bytes] | None:
        config = self._config.model_copy(update={"host": "127.0.0.1", "port": self._port})
        command = [
            sys.executable,
            "-m",
            "lift_embedder.fill.child",
            str(os.getpid()),
            config.model_dump_json(),
        ]
        with self._turn:
            if self._stopping.is_set():
                return None
            with self._log.open("ab") as log:
                self._start = log.tell()
                # A session of its own: Ctrl-C is for fill, which then stops its servers in good order.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    start_new_session=True,
                )
            return self._process

    def _environment(self) -> dict[str, str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("LIFT_API_KEY")
        }
        environment["LIFT_KEYS"] = f"fill admin {self.key}"
        if self._device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = "" if self._device == "cpu" else self._device
        if self._device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(self._threads))
        return environment

    def _follow(self, process: subprocess.Popen[bytes]) -> str:
        """Learn its address, and wait for its end; returns why it ended, as far as it said."""
        listening = False
        while process.poll() is None and not listening:
            for line in self._said():
                if (url := _url_in(line)) is not None:
                    listening, self._url, self._port = True, url, int(url.rpartition(":")[2])
            time.sleep(LOOK)
        process.wait()
        errors = [line for line in self._said() if line.startswith("error: ")]
        return errors[-1] if errors else ""

    def _said(self) -> list[str]:
        """What the process that runs now has printed."""
        with self._log.open("rb") as log:
            log.seek(self._start)
            return log.read().decode(errors="replace").splitlines()


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text.split())[:300]


def _url_in(line: str) -> str | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        entry = json.loads(line)
        if entry["message"] == "listening":
            return str(entry["url"])
    return None


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
