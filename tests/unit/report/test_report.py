"""A report is one safe file that says what was run, what came out beside chance, and shows it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.recipe import Recipe
from lift_trainer.report.chart import Line, line_chart, number, ticks
from lift_trainer.report.cli import main
from lift_trainer.report.gallery import THUMBNAIL, thumbnail
from lift_trainer.report.markup import Markup, tag
from lift_trainer.report.page import wilson

# ------------------------------------------------------------------------------------------ made-up runs

CAPTIONS = [
    "a sailboat",
    "hot pepper",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</style><script src='https://evil.example/x.js'></script>",
    "emoji 🐢 turtle, très lent & <b>bold</b>",
    "ünïcode 漢字 עברית",
    "x" * 400,
    "treasure chest",
    "roller coaster",
    "lone surrogate \ud800",
    "axe",
]

RECIPE = Recipe(
    model="SmolLM2-135M-Instruct",
    revision="sha256:" + "5e" * 32,
    dtype="bfloat16",
    tokenizer_revision="sha256:" + "a1" * 32,
    end_token=True,
    pooling="last",
    max_tokens=77,
    normalize=True,
    dimensions=576,
)

KEYS = [f"{index:04}" for index in range(20)]
MakeRun = Callable[..., Path]


def write_shard(path: Path, images: int = 20) -> Path:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(images):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
            for name, data in ((f"{index:04}.png", buffer.getvalue()), (f"{index:04}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def recalls(*values: float) -> dict[str, float]:
    return dict(zip(("r@1", "r@5", "r@10"), values, strict=True))


def make_run(
    path: Path,
    shard: Path,
    *,
    captions: Sequence[str] = CAPTIONS,
    keys: Sequence[str] = KEYS,
    scores: tuple[float, float, float] = (0.094, 0.293, 0.414),
    floor: float = 2.4,
    items: int = 191,
    seed: int = 0,
    evaluated: bool = True,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run whose gallery shows `captions` with images `keys` of `shard`."""
    rng = random.Random(seed)
    config = {
        "data": ["data/emoji/train-*.tar"],
        "cache": "runs/demo/cache",
        "text_transform": "center",
        "text_control": "none",
        "tower": "vit:width=128,depth=4,heads=4,patch=8",
        "image_size": 64,
        "pos_embed": "learned:0.5",
        "loss": "infonce",
        "mask": "caption",
        "batch_size": 256,
        "epochs": 10,
        "steps": None,
        "lr": 1e-3,
        "warmup": "5%",
        "weight_decay": 0.2,
        "precision": "bf16",
        "run": str(path),
        "seed": seed,
    } | (settings or {})
    state = {
        "step": 1500,
        "total_steps": 1500,
        "version": 2,
        "texts": [
            {
                "dimensions": 576,
                "snapshot": "000001-0123456789abcdef",
                "recipe": None if config["text_control"] == "ngram-hash" else RECIPE.model_dump(mode="json"),
            }
        ],
        "libraries": {"torch": "2.14.1", "timm": "1.0.31"},
    }
    checkpoint = path / "checkpoints" / "step-001500"
    checkpoint.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "checkpoints" / "latest").write_text("step-001500\n")
    (checkpoint / "state.json").write_text(json.dumps(state))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(10, 1501, 10):
            loss = floor + (5.5 - floor) * math.exp(-step / 420) + rng.gauss(0, 0.06)
            point = {"step": step, "epoch": 0, "samples": step * 256, "loss": loss, "time_s": step * 0.14}
            file.write(json.dumps(point) + "\n")
        file.write('{"step": 1510, "lo')
    if evaluated:
        gallery = []
        for caption in captions:
            shown = rng.sample(list(keys), 5)
            right = rng.choice([0, 0, 1, 2, 4, None])
            images = [
                {"sample": key, "shard": str(shard), "right": at == right, "score": 0.5 - at / 20}
                for at, key in enumerate(shown)
            ]
            gallery.append({"caption": caption, "images": images})
        result = {
            "task": "retrieval",
            "protocol": "any-caption",
            "items": items,
            "captions": items,
            "chance": recalls(1 / items, 5 / items, 10 / items),
            "text_to_image": recalls(*scores),
            "image_to_text": recalls(*(score * 0.93 for score in scores)),
            "gallery": gallery,
            "checkpoint": str(checkpoint),
            "snapshot": "000001-0123456789abcdef",
            "recipe": RECIPE.fingerprint,
            "text_control": config["text_control"],
        }
        (path / "eval").mkdir()
        (path / "eval" / "retrieval-test.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def new_run(tmp_path: Path) -> MakeRun:
    shard = write_shard(tmp_path / "test-000.tar")

    def make(name: str, **options: Any) -> Path:
        return make_run(tmp_path / name, shard, **options)

    return make


# ------------------------------------------------------------------------------------------ tools

ALLOWED = set(
    "html head meta title style body main header section footer h1 h2 h3 p b small dl dt dd div span br table thead "
    "tbody tr th td svg line rect polyline circle text ul ol li figure figcaption img details summary".split()
)


class Reader(HTMLParser):
    """Elements, attributes and text as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def report(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says; an error is part of it."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        assert ended.code in (0, None, 2)
    said = capsys.readouterr()
    return said.out + said.err


@pytest.fixture
def page(new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    control = {"text_control": "permuted"}
    out = tmp_path / "report.html"
    run, permuted = new_run("demo"), new_run("permuted", scores=(0.005, 0.02, 0.05), settings=control)
    said = report(run, "--baseline", f"control <i>=/{permuted}", "-o", out, capsys=capsys)
    assert said.startswith(str(out))
    return out


# ------------------------------------------------------------------------------------------ a safe, single file


def test_hostile_captions_are_shown_as_text(page: Path) -> None:
    read = Reader(page.read_text())
    assert {element for element, _ in read.elements} <= ALLOWED
    text = " ".join(read.texts)
    for caption in CAPTIONS:
        assert caption.encode(errors="replace").decode() in text
    assert "control <i>" in text
    for _, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]


def test_nothing_outside_the_file_is_referenced_and_the_policy_forbids_it(page: Path) -> None:
    content = page.read_text()
    read = Reader(content)
    links = [
        attributes[name] for _, attributes in read.elements for name in ("src", "href") if name in attributes
    ]
    assert len(links) == 5 * len(CAPTIONS)
    assert all(link and re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", link) for link in links)
    style = re.search(r"<style>(.*?)</style>", content, re.DOTALL)
    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert style and policy
    assert "url(" not in style[1] and "@import" not in style[1]
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"style-src 'sha256-{digest}'" in policy
    assert len(content) < 2_000_000


@given(st.text(), st.text())
def test_text_and_attributes_come_back_from_the_markup_as_they_were(text: str, value: str) -> None:
    text, value = (each.replace("\r", "").replace("\0", "") for each in (text, value))
    markup = tag("p", text, title=value)
    inside = re.fullmatch(r'<p title="([^"<>]*)">([^<>]*)</p>', markup)
    assert inside
    assert (unescape(inside[1]), unescape(inside[2])) == tuple(
        each.encode(errors="replace").decode() for each in (value, text)
    )
    assert tag("p", Markup("<b>done</b>")) == "<p><b>done</b></p>"


def test_images_are_drawn_anew_small_and_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (900, 600), (255, 0, 0, 0)).save(buffer, "PNG", pnginfo=None)
    uri = thumbnail(buffer.getvalue() + b"<script>hidden</script>")
    head, _, data = uri.partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64"
    assert max(picture.size) == THUMBNAIL
    assert np.asarray(picture).min() > 250


# ------------------------------------------------------------------------------------------ what it says


def test_scores_stand_beside_chance_and_beside_the_control(page: Path) -> None:
    text = re.sub(r"\s+", " ", " ".join(Reader(page.read_text()).texts))
    assert "demo 9.4 % 29.3 % 41.4 % control <i> 0.5 % 2.0 % 5.0 % chance 0.5 % 2.6 % 5.2 %" in text
    assert "191 images, 191 captions" in text
    assert "drawn at random" in text
    assert RECIPE.fingerprint in text
    assert "torch 2.14.1" in text


def test_right_images_are_marked_by_a_word_not_by_colour_alone(new_run: MakeRun, page: Path) -> None:
    result = json.loads((page.parent / "demo/eval/retrieval-test.json").read_text())
    right = sum(image["right"] for shown in result["gallery"] for image in shown["images"])
    texts = Reader(page.read_text()).texts
    assert texts.count("✓ right") == right > 0


def test_cache_counts_come_from_the_snapshot_and_from_the_fill(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 576)).astype(np.float32)
    tokens, truncated = np.array([4, 5, 6], np.int32), np.array([False, True, False])
    encoding = Encoding(dimensions=576)
    snapshot = write_cache(tmp_path / "cache", RECIPE, encoding, ["a", "b", "c"], vectors, tokens, truncated)
    counts = {"rows": 1300, "captions": 1234, "unique": 3, "cached": 0, "embedded": 3, "tokens": 15}
    summary = tmp_path / "fill.json"
    summary.write_text(json.dumps(counts | {"truncated": 1, "rejected": 66, "seconds": 1.5}))
    out = tmp_path / "report.html"
    report(
        new_run("demo"), "--cache", tmp_path / "cache", "--fill-summary", summary, "-o", out, capsys=capsys
    )
    text = " ".join(Reader(out.read_text()).texts)
    for part in ("captions read 1,234", "rejected 66", "tokens 15 (5.0 each)", "truncated 1", snapshot.id):
        assert part in text


def test_several_runs_share_one_page_and_what_differs_is_listed(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    report(new_run("a"), new_run("b", settings={"text_transform": "whiten:128"}), "-o", out, capsys=capsys)
    text = re.sub(r"\s+", " ", " ".join(Reader(out.read_text()).texts))
    assert "What differs a b text transform center whiten:128" in text
    assert out.read_text().count("<polyline") == 4  # two lines, wide and narrow


def test_held_out_losses_are_a_curve_beside_that_of_training(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored, out = new_run("scored"), tmp_path / "report.html"
    held_out = [
        {"step": step, "held_out": {"loss": loss, "r@1_image_to_text": 0.1}}
        for step, loss in ((500, 4.5), (1000, 4.25), (1250, None), (1500, 4.125))
    ]
    lines = (scored / "metrics.jsonl").read_text().splitlines()
    (scored / "metrics.jsonl").write_text("\n".join([*map(json.dumps, held_out), *lines]) + "\n")
    report(scored, "--baseline", new_run("plain"), "-o", out, capsys=capsys)
    page = out.read_text()
    assert page.count("<polyline") == 6  # three lines, wide and narrow
    assert page.count("scored, held out from 4.5 to 4.12") == 2
    assert "<title>scored, held out · step 1,250" not in page
    text = re.sub(r"\s+", " ", " ".join(Reader(page).texts))
    assert "Loss in training and on held-out data" in text
    assert "scored: 384,000 images in" in text


def test_runs_of_one_name_are_told_apart_and_a_resumed_run_counts_all_its_time(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        new_run(f"{folder}/run")
    metrics = tmp_path / "a/run/metrics.jsonl"
    lines = [
        {"step": step, "samples": step, "loss": 1.0, "time_s": time}
        for step, time in ((1, 30), (2, 60), (3, 40))
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "report.html"
    report(tmp_path / "a/run", "--baseline", tmp_path / "b/run", "-o", out, capsys=capsys)
    text = " ".join(Reader(out.read_text()).texts)
    assert f"{tmp_path}/b/run" in text
    assert f"{tmp_path}/a/run: 3 images in 100 s." in text


def test_a_page_is_the_same_again_byte_for_byte(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = page.with_name("again.html")
    runs = page.parent / "demo", "--baseline", f"control <i>=/{page.parent / 'permuted'}"
    report(*runs, "-o", again, capsys=capsys)
    assert again.read_bytes() == page.read_bytes()


# ------------------------------------------------------------------------------------------ mistakes


def test_each_mistake_is_one_line_that_says_what_to_do(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, plain = new_run("good"), new_run("plain", evaluated=False)
    other = new_run("other", items=100)
    lost = new_run("lost", keys=[f"lost{key}" for key in KEYS])
    broken = new_run("broken")
    (broken / "eval/retrieval-test.json").write_text('{"task": "retrieval"}')
    cut = new_run("cut")
    (cut / "config.json").write_text("{")
    mistakes: list[tuple[list[str | Path], str]] = [
        ([], "name at least one run"),
        ([good, "--basline", good], "--basline"),
        ([tmp_path], f"{tmp_path} is no training run (no config.json)"),
        ([plain], f"{plain} has no evaluation; first: lift-eval retrieval --run {plain}"),
        ([good, "--baseline", other], "has items=191"),
        ([lost], "no image with key 'lost"),
        ([broken], "retrieval-test.json: protocol: Field required"),
        ([cut], "config.json: not JSON"),
        ([good, "--cache", tmp_path / "no-cache"], "no-cache"),
        ([good, "--fill-summary", tmp_path / "none.json"], "none.json: No such file or directory"),
    ]
    for arguments, message in mistakes:
        said = report(*arguments, "-o", tmp_path / "report.html", capsys=capsys)
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "report.html").exists()
    (tmp_path / "test-000.tar").rename(tmp_path / "moved.tar")
    assert "no such shard; run lift-report where lift-eval ran" in report(good, capsys=capsys)


# ------------------------------------------------------------------------------------------ numbers and lines


@given(st.floats(-1e6, 1e6), st.floats(0.1, 1e6), st.integers(1, 12))
def test_ticks_are_round_inside_and_about_as_many_as_asked(low: float, span: float, about: int) -> None:
    high = low + span
    found = ticks(low, high, about)
    assert 1 <= len(found) <= about + 1
    step = found[1] - found[0] if len(found) > 1 else span
    assert all(low - step * 1e-6 <= tick <= high + step * 1e-6 for tick in found)


def test_charts_survive_one_point_flat_lines_and_long_runs() -> None:
    for points in ([(5, 1.0)], [(0, 2.0), (10, 2.0)], [(step, math.sin(step)) for step in range(100_000)]):
        chart = line_chart([Line("a", points, "run0")], x_name="step", y_name="loss", width=360, height=260)
        assert "nan" not in chart
        assert len(chart) < 60_000
    assert [number(value) for value in (0, 0.35, 5, 12_500)] == ["0", "0.35", "5", "12,500"]


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_interval_holds_its_share(n: int, share: float) -> None:
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1


# ------------------------------------------------------------------------------------------ a real browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[list[str]]:
    if BROWSER is None:
        pytest.skip("NO BROWSER: the report was not opened in one; install chromium to run this test")
    quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-quic"
    flags = f"--headless --no-sandbox --disable-gpu --no-first-run --enable-logging=stderr {quiet}"
    yield [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]


def test_a_browser_shows_it_in_light_and_dark_without_a_complaint(page: Path, browse: list[str]) -> None:
    middles = []
    for scheme, flag in (("light", "1"), ("dark", "0")):
        picture = page.with_name(f"{scheme}.png")
        browser = subprocess.run(
            [
                *browse,
                f"--blink-settings=preferredColorScheme={flag}",
                f"--screenshot={picture}",
                "--window-size=800,2400",
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "CONSOLE" not in browser.stderr  # where a blocked style, script or request would be named
        pixels = np.asarray(Image.open(picture).convert("L"), float)
        assert pixels.std() > 5  # something is drawn
        middles.append(float(np.median(pixels)))
    assert middles[0] > 200
    assert middles[1] < 60
