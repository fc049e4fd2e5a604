"""The page that answers: the nearest images of a caption, two checkpoints side by side, for this machine alone."""

from __future__ import annotations

import http.client
import io
import re
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pytest
from PIL import Image

from lift_cache.errors import EncodingMismatch, RecipeMismatch
from lift_cache.recipe import Recipe
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.rejects import Rejects
from lift_trainer.report.cli import main
from lift_trainer.report.nearest import Side, open_nearest
from lift_trainer.report.serve import SHOWN, Server
from lift_trainer.samples import Index, build_index
from tests.browser import BROWSER, Browser
from tests.unit.trainer.conftest import World, world  # noqa: F401 - a fixture

HOSTILE = "\"><img src=x onerror='window.harmed = 1'><script>window.harmed = 2</script>"


@pytest.fixture
def index(world: World) -> Index:  # noqa: F811
    return build_index([str(world.shard)], Rejects(0))


@pytest.fixture
def runs(world: World) -> dict[str, TrainedRun]:  # noqa: F811
    """One against a cache, which has the training captions only, and one that needs none."""
    train(prepare(world.config("cached", epochs=30, precision="fp32", lr=3e-3)))
    train(prepare(world.config("hashed", cache=[], text_control="ngram-hash")))
    return {name: TrainedRun.open(world.root / name) for name in ("cached", "hashed")}


@pytest.fixture
def serving(runs: dict[str, TrainedRun], index: Index) -> Iterator[Server]:
    server = Server(open_nearest([*runs.items()], index, [], lambda text: None), port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(server: Server, path: str, host: str | None = None, **headers: str) -> tuple[int, str, bytes]:
    """Status, content type, content."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)  # type: ignore[arg-type]
    try:
        connection.request("GET", path, headers=named | ({"Host": host} if host else {}))
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def ask(server: Server, caption: str) -> str:
    status, kind, page = get(server, f"/?q={quote_plus(caption)}")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    return page.decode()


@pytest.mark.slow
def test_a_caption_finds_its_image_and_both_checkpoints_answer(serving: Server, index: Index) -> None:
    page = ask(serving, "  drawing   number 7 ")
    cached, hashed = (part.split("</ol>")[0] for part in page.split('<ol class="near">')[1:])
    assert cached.count("<li") == hashed.count("<li") == SHOWN
    assert cached.lstrip().startswith('<li class="right"')  # it was trained on this one
    first = re.search(r'src="/image/(\d+)"', cached)
    assert first and index.names[int(first[1])] == "0007"
    status, kind, data = get(serving, f"/image/{first[1]}")
    assert (status, kind) == (200, "image/png")
    assert Image.open(io.BytesIO(data)).size == (16, 16)


@pytest.mark.slow
def test_a_caption_that_only_one_of_them_can_answer_says_so_and_why(serving: Server) -> None:
    page = ask(serving, "something else")
    assert page.count('<ol class="near">') == 1
    assert "its cache has no such caption; name a running embedder by --server" in page
    assert ask(serving, " \t ").count("the caption is empty") == 2


@pytest.mark.slow
def test_what_is_typed_is_shown_as_text_and_other_hosts_and_paths_are_refused(serving: Server) -> None:
    page = ask(serving, HOSTILE)
    assert "<script" not in page and "onerror='" not in page
    shown = re.search(r'value="([^"]*)"', page)
    assert shown and unescape(shown[1]) == HOSTILE
    assert "default-src 'none'; img-src 'self'; style-src 'sha256-" in unescape(page)
    port = serving.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", f"localhost.evil.example:{port}", "10.0.0.1"):
        status, _, said = get(serving, "/", host)
        assert (status, said) == (421, b"this page is for this machine alone\n")
        assert get(serving, "/image/0", host)[0] == 421
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert get(serving, "/", host)[0] == 200
    assert serving.server_address[0] == "127.0.0.1"
    assert get(serving, "/?q=a", Sec_Fetch_Site="cross-site")[0] == 421  # an <img> on somebody's page
    assert get(serving, "/?q=a", Sec_Fetch_Site="same-origin")[0] == 200
    for path in ("/image/28", "/image/-1", "/image/x", "/../etc/passwd", "//evil.example/", "/image/0/"):
        assert get(serving, path)[0] == 404


@pytest.mark.slow
def test_images_are_embedded_once_and_anew_for_other_images(
    runs: dict[str, TrainedRun], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["hashed"]
    first = Side("a", run, index, []).nearest("drawing number 3", 5)
    monkeypatch.setattr(TrainedRun, "embed_images", lambda *_: pytest.fail("embedded again"))
    again = Side("a", run, index, []).nearest("drawing number 3", 5)
    assert again == first
    monkeypatch.undo()
    fewer = index.take(np.arange(4))
    assert Side("a", run, fewer, []).images == 4


@pytest.mark.slow
def test_an_embedder_of_another_recipe_is_refused_by_name(
    runs: dict[str, TrainedRun], index: Index, recipe: Recipe
) -> None:
    def embedder(**changes: Any) -> Any:
        info = SimpleNamespace(
            recipe=recipe.model_copy(update=changes), encoding=SimpleNamespace(dimensions=24)
        )
        return SimpleNamespace(url="http://embedder", info=lambda: info)

    with pytest.raises(RecipeMismatch, match="pooling"):
        Side("a", runs["cached"], index, [embedder(pooling="mean")])
    Side("a", runs["cached"], index, [embedder(pooling="mean"), embedder()])  # the one that fits is asked
    Side("a", runs["hashed"], index, [embedder(pooling="mean")])  # it asks none
    narrow = embedder()
    narrow.info().encoding.dimensions = 12
    with pytest.raises(EncodingMismatch, match="12 dimensions"):
        Side("a", runs["cached"], index, [narrow])


@pytest.mark.slow
def test_in_a_browser_one_types_and_sees(serving: Server, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("NO BROWSER: the page was not opened in one; install chromium to run this test")
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(serving.url)
        assert browser.run("document.activeElement.id") == "caption"
        browser.type("drawing number 9")
        browser.press("Enter")
        browser.wait("document.readyState === 'complete' && document.images.length === 24")
        assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
        assert browser.run("document.getElementById('caption').value") == "drawing number 9"
        browser.run("document.querySelector('header a').click()")
        browser.wait(
            "document.readyState === 'complete' && document.getElementById('caption').value !== 'drawing number 9'"
        )
        for width, dark in ((1100, True), (360, False)):
            browser.open(f"{serving.url}/?q={quote_plus(HOSTILE)}", width=width, dark=dark)
            assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert browser.low_contrast() == []
            picture = np.asarray(Image.open(io.BytesIO(browser.picture())).convert("L"), float)
            assert picture.std() > 5
            assert np.median(picture) < 60 if dark else np.median(picture) > 200
        assert browser.run("window.harmed === undefined && document.scripts.length === 0")
        assert browser.complaints == []
        assert all(url.startswith(f"{serving.url}/") for url in browser.requests)
    finally:
        browser.close()


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(
    serving: Server,
    runs: dict[str, TrainedRun],
    world: World,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = serving.server_address[1]
    with pytest.raises(SystemExit) as ended:
        main([str(runs["hashed"].run), "--serve", "--data", str(world.shard), "--port", str(port)])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: --port {port}: .*; name another, or 0 for any", last)
