"""A report is one safe file that says what was run, what came out beside chance, and shows it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.recipe import Recipe
from lift_trainer.config import TransformSpec
from lift_trainer.evaluators.items import Items
from lift_trainer.evaluators.result import Result, Subject, scored
from lift_trainer.report.chart import Line, line_chart, number, ticks
from lift_trainer.report.cli import main
from lift_trainer.report.geometry import lie
from lift_trainer.report.markup import Markup, tag
from lift_trainer.report.thumbnails import THUMBNAIL, thumbnail
from lift_trainer.transform import TextTransform
from tests.browser import BROWSER, Browser

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

SUBJECT = Subject(
    name="demo",
    checkpoint="runs/demo/checkpoints/step-001500",
    step=1500,
    snapshot="000001-0123456789abcdef",
    recipe=RECIPE.fingerprint,
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


def items(n: int, right: int, images: int | None = None) -> Items:
    """The first `right` of n are right; item i belongs to image i, or to one of so many."""
    return Items(
        image=tuple(i % (images or n) for i in range(n)), value=tuple(float(i < right) for i in range(n))
    )


def result(task: str, found: dict[str, Items], **fields: Any) -> Result:
    chance, blind = fields.pop("chance", {}), fields.pop("blind", {})
    given = {"protocol": "any-caption", "name": "test", "data": "d" * 32, "subject": SUBJECT} | fields
    return Result(task=task, scores=scored(found, chance=chance, blind=blind), items=found, **given)


def retrieval(
    n: int, gallery: Sequence[dict[str, Any]], right: tuple[int, int, int], **fields: Any
) -> Result:
    cutoffs = (1, 5, 10)
    found = {
        f"r@{k}_{direction}": items(n, count)
        for direction in ("image_to_text", "text_to_image")
        for k, count in zip(cutoffs, right, strict=True)
    }
    chance = {name: int(name[2:].partition("_")[0]) / n for name in found}
    return result("retrieval", found, chance=chance, details={"gallery": list(gallery)}, **fields)


def choices(shard: Path, right: Sequence[bool], **fields: Any) -> Result:
    """Two-way choices; caption i of `CAPTIONS` is the true one of item i."""
    found = Items(image=tuple(range(len(right))), value=tuple(map(float, right)))
    pairs = [
        {
            "score": "swap_att",
            "item": item,
            "image": {"sample": KEYS[item], "shard": str(shard)},
            "captions": [CAPTIONS[item % len(CAPTIONS)], f"not {item}"],
        }
        for item in range(len(right))
    ]
    beside: dict[str, Any] = {"chance": {"swap_att": 0.5}, "blind": {"swap_att": 0.55}}
    given = {"protocol": "two-way", "details": {"pairs": pairs}} | beside | fields
    return result("shapes", {"swap_att": found}, **given)


def make_run(
    path: Path,
    shard: Path,
    *,
    captions: Sequence[str] = CAPTIONS,
    keys: Sequence[str] = KEYS,
    right: tuple[int, int, int] = (18, 56, 79),
    floor: float = 2.4,
    images: int = 191,
    seed: int = 0,
    snapshot: str = "000001-0123456789abcdef",
    evaluated: bool = True,
    picks: Sequence[bool] = (),
    fields: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run whose gallery shows `captions` with images `keys` of `shard`, and whose two-way choices are `picks`."""
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
                "snapshot": snapshot,
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
            place = rng.choice([0, 0, 1, 2, 4, None])
            ranked = [
                {"sample": key, "shard": str(shard), "right": at == place, "score": 0.5 - at / 20}
                for at, key in enumerate(shown)
            ]
            gallery.append({"caption": caption, "images": ranked})
        retrieval(images, gallery, right, **(fields or {})).write(path / "eval")
        if picks:
            choices(shard, picks).write(path / "eval")
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
    run, permuted = new_run("demo"), new_run("permuted", right=(1, 4, 10), settings=control)
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


def said(page: Path | str) -> str:
    """The text of a page, in one line."""
    content = page.read_text() if isinstance(page, Path) else page
    return re.sub(r"\s+", " ", " ".join(Reader(content).texts))


def test_scores_stand_beside_chance_and_beside_the_control(page: Path) -> None:
    text = said(page)
    for share in ("9.4 %", "29.3 %", "41.4 %", "0.5 %", "2.1 %", "5.2 %"):
        assert share in text
    assert "chance 0.5 % 2.6 % 5.2 %" in text
    assert "“test”, protocol any-caption." in text and "191 items" in text
    assert "drawn at random" in text
    assert RECIPE.fingerprint in text
    assert "torch 2.14.1" in text


def test_right_images_are_marked_by_a_word_not_by_colour_alone(new_run: MakeRun, page: Path) -> None:
    found = Result.read(next((page.parent / "demo/eval").glob("retrieval-*.json")))
    right = sum(image["right"] for shown in found.details["gallery"] for image in shown["images"])
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
    assert "What differs a b text transform center whiten:128" in said(out)
    assert out.read_text().count("<polyline") == 4  # two lines, wide and narrow
    header = said(out.read_text().partition("</header>")[0])
    assert "a: An image encoder" in header and "b: An image encoder" in header
    assert header.count("% b") == 2  # each headline has the second run's value under the first's


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
    assert "In training and on held-out data" in said(page)
    assert "scored: 384,000 images in" in said(page)


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
    assert f"{tmp_path}/a/run: 3 images in 100 s" in text


# ------------------------------------------------------------------------------------------ comparing


def test_results_of_another_protocol_or_on_other_items_stand_in_a_table_of_their_own(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, alike = new_run("one"), new_run("alike", right=(20, 60, 80))
    strict = new_run("strict", fields={"protocol": "lift"})
    fewer = new_run("fewer", images=100, fields={"data": "e" * 32})
    out = tmp_path / "report.html"
    report(one, alike, strict, fewer, "-o", out, capsys=capsys)
    sections = [part for part in out.read_text().split("<section>") if "protocol" in part]
    assert len(sections) == 3
    told = [said(part) for part in sections]
    assert "protocol any-caption" in told[0] and "one" in told[0] and "alike" in told[0]
    assert "strict" not in told[0] and "fewer" not in told[0]
    assert "protocol lift" in told[1] and "strict" in told[1] and "alike" not in told[1]
    assert "eeeeeeeeeeee" in told[2] and "100 items" in told[2] and "alike" not in told[2]


def test_a_difference_is_marked_only_where_its_interval_excludes_zero(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    first, better, same = (
        new_run(name, right=right)
        for name, right in (("first", (10, 50, 100)), ("better", (10, 52, 150)), ("same", (10, 50, 100)))
    )
    report(first, better, same, "-o", out, capsys=capsys)
    table = re.search(r'<table class="differences">(.*?)</table>', out.read_text(), re.DOTALL)
    assert table
    _, better_row, same_row = table[1].split("<tr>")[1:]
    assert better_row.count("▲ +26.2") == 2  # both directions, of 191
    assert better_row.count("▲") == 2 and "+1.0" in better_row and "▼" not in better_row
    assert "▲" not in same_row and "▼" not in same_row and same_row.count("+0.0") >= 6


def test_hard_negatives_stand_beside_their_blind_score(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    report(new_run("a", picks=[True] * 15 + [False] * 5), "-o", out, capsys=capsys)
    text = said(out)
    assert "Hard negatives: shapes" in text and "protocol two-way" in text
    assert "swap att 20 items" in text
    assert "75.0 %" in text and "blind 55.0, +20.0" in text


def test_what_was_left_out_and_counted_stands_beside_the_scores_by_name(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    left_out = {"test-000.tar:0007": "not an image", "test-000.tar:<b>8</b>": "cut short"}
    report(new_run("a", picks=[True], fields={"left_out": left_out}), "-o", out, capsys=capsys)
    text = said(out)
    assert "2 images or rows could not be used and were left out." in text
    assert "left out test-000.tar:0007: not an image; test-000.tar:<b>8</b>: cut short" in text


def test_a_released_file_stands_beside_runs_with_what_is_known_of_it(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "clip.pt.eval", tmp_path / "report.html"
    retrieval(191, [], (9, 30, 60)).write(folder)
    report(new_run("ours"), folder, "-o", out, capsys=capsys)
    text = said(out)
    assert "clip.pt 31.4 % 31.4 % not known" in text
    assert "Difference from ours, in points" in text
    report(folder, "-o", out, capsys=capsys)
    assert "Released: runs/demo/checkpoints/step-001500." in said(out)


# ------------------------------------------------------------------------------------------ the gallery


def test_pairs_where_runs_differ_and_where_both_fail_are_drawn_with_a_seed(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lift, clip = [True] * 10 + [False] * 10, [False] * 8 + [True] * 2 + [False] * 10
    runs = new_run("lift", picks=lift), new_run("clip", picks=clip)
    pages = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        report(*runs, "--seed", seed, "-o", tmp_path / f"{name}.html", capsys=capsys)
        pages.append((tmp_path / f"{name}.html").read_text())
    assert pages[0] == pages[1] != pages[2]
    kinds = pages[0].split('<ul class="pairs">')[1:]
    differ, both = (kind.split("</ul>")[0].split("<li>")[1:] for kind in kinds)
    assert len(differ) == len(both) == 6
    text = said(pages[0])
    assert "lift and clip differ 8 of 20 pairs" in text and "Both fail 10 of 20 pairs" in text
    for pair in differ:
        true, false = pair.split('<div class="option false">')
        assert ">lift</span>" in true and ">clip</span>" in false
        assert ">clip</span>" not in true
    for pair in both:
        true, false = pair.split('<div class="option false">')
        assert "picked by" not in true
        assert ">lift</span>" in false and ">clip</span>" in false
    shown = [int(number) for page in pages for number in re.findall(r"not (\d+)", page)]
    assert {lift[number] and clip[number] for number in shown} == {False}


def test_one_run_by_itself_shows_where_it_is_right_and_where_wrong(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    report(new_run("lift", picks=[True] * 18 + [False] * 2), "-o", out, capsys=capsys)
    assert "lift is right 18 of 20 pairs" in said(out)
    assert "lift is wrong 2 of 20 pairs" in said(out)


# ------------------------------------------------------------------------------------------ cost and geometry


def test_cost_stands_beside_score_counted_where_the_settings_say(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    small = new_run("small", settings={"tower": "vit:width=32,depth=2,heads=2,patch=16"})
    unknown = new_run("unknown", settings={"tower": "a-tower-of-tomorrow"})
    large = new_run("large", settings={"tower": "vit:width=32,depth=8,heads=2,patch=16"})
    report(small, large, unknown, "-o", out, capsys=capsys)
    row = {
        name: re.search(rf"{name} 41\.4 % 41\.4 % 384k (\S+ \S+)", said(out))
        for name in ("small", "large", "unknown")
    }
    assert row["small"] and row["large"] and row["unknown"]
    few, many = float(row["small"][1].split()[0]), float(row["large"][1].split()[0])
    assert row["small"][1].endswith("TFLOP") and many > 2 * few
    assert row["unknown"][1] == "not known"
    assert "not known its cache is not at hand" in said(out)
    assert "Loss by training operations" in said(out)  # of those that are known


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_how_vectors_lie_is_what_a_second_way_of_counting_says(offset: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8)) * np.linspace(2, 0.1, 8) + offset
    found = lie(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(40) for j in range(40) if i != j]
    values = np.linalg.eigvalsh(np.cov(unit.T))[::-1]
    shares = values / values.sum()
    assert found.cosine == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found.leading[0] == pytest.approx(shares[0], abs=1e-12) and found.leading[1] == pytest.approx(1)
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert (found.cosine > 0.9) == (offset > 0)


def test_equal_vectors_have_one_direction() -> None:
    same = lie(np.ones((5, 3)))
    assert (same.cosine, same.effective_rank) == (pytest.approx(1), 1.0)


def test_anisotropy_is_told_before_and_after_the_transform(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 576)).astype(np.float32) + 3
    made = write_cache(
        tmp_path / "cache", RECIPE, Encoding(dimensions=576), [f"caption {i}" for i in range(60)], vectors
    )
    run = new_run("run", snapshot=made.id, settings={"cache": "/where/it/was"})
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    transform = TextTransform(TransformSpec.parse("center"), torch.from_numpy(unit.mean(0)))
    transform.save(run / "checkpoints/step-001500/text-transform.safetensors")
    out = tmp_path / "report.html"
    report(run, "-o", out, capsys=capsys)
    assert "as stored" not in said(out)
    report(run, "--cache", tmp_path / "cache", "-o", out, capsys=capsys)
    text = said(out)
    assert "Of any two of 60 captions of the cache" in text  # the data of training are not here
    assert re.search(r"SmolLM2-135M-Instruct, as stored 0\.9\d\d", text)
    assert re.search(r"after center run -?0\.0\d\d", text)


# ------------------------------------------------------------------------------------------ the same again


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
    lost = new_run("lost", keys=[f"lost{key}" for key in KEYS])
    broken = new_run("broken")
    (broken / "eval/retrieval-test.json").write_text('{"task": "retrieval", "protocol": "any-caption"}')
    cut = new_run("cut")
    (cut / "config.json").write_text("{")
    mistakes: list[tuple[list[str | Path], str]] = [
        ([], "name at least one run"),
        ([good, "--basline", good], "--basline"),
        ([tmp_path], f"{tmp_path} is no training run (no config.json)"),
        ([plain], f"{plain} has no evaluation; first: lift-eval retrieval --run {plain}"),
        ([lost], "no image with key 'lost"),
        ([broken], "retrieval-test.json: name: Field required; evaluate again"),
        ([good, "--data", "x.tar"], "add --serve"),
        ([good, "--serve"], "--serve needs images: --data SHARDS"),
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
    assert [number(value) for value in (0, 0.35, 5, 1250, 12_500, 3e15)] == "0 0.35 5 1,250 12.5k 3P".split()


# ------------------------------------------------------------------------------------------ a real browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("NO BROWSER: the report was not opened in one; install chromium to run this test")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.mark.slow
def test_a_browser_shows_it_in_light_and_dark_and_on_a_phone_without_a_complaint(
    new_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], browser: Browser
) -> None:
    out = tmp_path / "report.html"
    runs = [
        new_run(name, picks=[flip] * 10 + [False] * 10) for name, flip in (("lift", True), ("clip", False))
    ]
    report(*runs, "--baseline", new_run("a-control-with-a-long-name"), "-o", out, capsys=capsys)
    for width, dark in ((1100, False), (1100, True), (360, False), (360, True)):
        browser.open(out.as_uri(), width=width, dark=dark)
        assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert browser.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert browser.low_contrast() == []
        picture = Image.open(io.BytesIO(browser.picture())).convert("L")
        assert width - 20 <= picture.width <= width  # without the scrollbar
        assert picture.height > 3000
        pixels = np.asarray(picture, float)
        # Something is drawn in every part of the page, not only at its top.
        assert all(part.std() > 3 for part in np.array_split(pixels, 8))
        assert np.median(pixels) < 60 if dark else np.median(pixels) > 200
    assert browser.complaints == []
    assert {url for url in browser.requests if not url.startswith("data:image/")} == {out.as_uri()}
    assert browser.run("window.harmed === undefined && document.scripts.length === 0")
