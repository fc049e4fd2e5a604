"""A real browser, headless, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEADLINE = 60.0


CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.getClientRects().length) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const [a, b] = [luminance(parse(svg ? style.fill : style.color)), luminance(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${element.className} ${walker.currentNode.textContent.trim()}`);
  }
  return low;
})()"""


class Browser:
    """One tab.

    Attributes:
        complaints: what it wrote to its console: errors, refused styles and scripts, failed requests.
        requests: addresses that it asked for.
    """

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-quic"
        flags = f"--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe {quiet}"
        command = [BROWSER, *flags.split(), f"--user-data-dir={profile}", "about:blank"]
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def at_three_and_four() -> None:  # where it expects them
            high = [os.dup(fd) for fd in (to_browser, from_browser)]
            for place, fd in enumerate(high, 3):
                os.dup2(fd, place)
                os.set_inheritable(place, True)

        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=False,
            preexec_fn=at_three_and_four,  # noqa: PLW1509 - nothing else runs meanwhile
        )
        os.close(to_browser)
        os.close(from_browser)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self._attach()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _attach(self) -> None:
        give_up = time.monotonic() + DEADLINE
        while time.monotonic() < give_up:
            tabs = [tab for tab in self.call("Target.getTargets")["targetInfos"] if tab["type"] == "page"]
            if tabs:
                attached = self.call("Target.attachToTarget", targetId=tabs[0]["targetId"], flatten=True)
                self._session = attached["sessionId"]
                return
            time.sleep(0.1)
        raise AssertionError("the browser did not start")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; what happens until its answer is noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if "method" in answer:
                self._note(answer["method"], answer["params"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], DEADLINE)
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(argument.get("value")) for argument in params["args"]))
        elif event == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def open(self, url: str, *, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        self.resize(width, height)
        self.dark(dark)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def dark(self, wanted: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def wait(self, condition: str, seconds: float = DEADLINE) -> None:
        give_up = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < give_up, f"never came: {condition}\n{self.text()}\n{self.complaints}"
            time.sleep(0.05)

    def text(self) -> str:
        return str(self.run("document.body.innerText"))

    def low_contrast(self) -> list[str]:
        """Texts that stand out less than 4.5 : 1 (WCAG 2.1, level AA), with their ratios."""
        return list(self.run(CONTRAST))

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        what = {"key": key, "windowsVirtualKeyCode": codes[key]}
        if key == "Enter":
            what["text"] = "\r"
        elif key == " ":
            what["text"] = " "
        self.call("Input.dispatchKeyEvent", type="keyDown", **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def point(self, element: str, *, across: float) -> None:
        """Move the mouse over an element, to this share of its width."""
        box = self.run(
            f"(() => {{ const e = {element}; e.scrollIntoView(); return e.getBoundingClientRect().toJSON(); }})()"
        )
        x, y = box["left"] + across * box["width"], box["top"] + box["height"] / 2
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def close(self) -> None:
        for fd in (self._write, self._read):
            os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(DEADLINE)
