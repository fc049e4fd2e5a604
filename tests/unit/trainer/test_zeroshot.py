"""Zero-shot classification: its scores beside counts made otherwise, its prompts, and every shape of its data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lift_cache.errors import BadConfig, BadSource, MissingCaptions
from lift_trainer.cli import eval_main
from lift_trainer.evaluators.classification import Ranked, rank_classes
from lift_trainer.evaluators.labelled import Labelled, class_names, read_class_names
from lift_trainer.evaluators.protocol import Encoder
from lift_trainer.evaluators.result import Result, Subject
from lift_trainer.evaluators.templates import Templates
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.evaluators.zeroshot import ZeroShot, class_vectors, classify
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.rejects import Rejects
from tests.unit.trainer.conftest import Embedder, World, png, write_tar

SIDE = 16


def features(n: int, c: int, seed: int = 0, width: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors of images and classes, and the classes' numbers."""
    generator = np.random.default_rng(seed)
    x, w = generator.standard_normal((n, width)), generator.standard_normal((c, width))
    labels = generator.integers(0, c, n)
    return (
        x / np.linalg.norm(x, axis=1, keepdims=True),
        w / np.linalg.norm(w, axis=1, keepdims=True),
        labels,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("n", "c"), [(500, 12), (40, 5), (7, 2), (1, 30)])
def test_scores_are_those_of_scikit_learn(n: int, c: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    x, w, labels = features(n, c)
    ranked = ranked_by(x, w, labels)
    scores = x @ w.T
    chosen = scores.argmax(1)
    assert ranked.top(1).mean() == pytest.approx(metrics.accuracy_score(labels, chosen), abs=1e-9)
    for k in (2, 5):
        if k < c and c > 2:
            expected = metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(c))
            assert ranked.top(k).mean() == pytest.approx(expected, abs=1e-9)
    by_class = [ranked.top(1)[labels == label].mean() for label in np.unique(labels)]
    expected = metrics.recall_score(
        labels, chosen, average="macro", labels=np.unique(labels), zero_division=0
    )
    assert np.mean(by_class) == pytest.approx(expected, abs=1e-9)


def ranked_by(x: np.ndarray, w: np.ndarray, labels: np.ndarray) -> Ranked:
    every = torch.arange(len(w))
    return classify(torch.from_numpy(x), torch.from_numpy(w), every, torch.from_numpy(labels))


def test_ranks_equal_a_count_with_ties_and_duplicates() -> None:
    generator = np.random.default_rng(0)
    x, w = generator.integers(-2, 3, (60, 3)).astype(float), generator.integers(-2, 3, (9, 3)).astype(float)
    w[4] = w[7]
    labels = generator.integers(0, 9, 60)
    ranked = ranked_by(x, w, labels)
    for image, label in enumerate(labels):
        scores = [sum(a * b for a, b in zip(x[image], row, strict=True)) for row in w]
        wrong = [score for other, score in enumerate(scores) if other != label]
        assert ranked.rank[image] == 1 + sum(score >= scores[label] for score in wrong)
        assert ranked.margin[image] == scores[label] - max(wrong)
    assert (ranked.margin == 0).any()


def test_a_tie_with_a_wrong_class_and_what_is_no_number_are_wrong() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    nan = float("nan")
    scores = torch.tensor([[1.0, 1.0], [0.2, 0.2], [nan, 0.0], [0.0, nan]])
    assert rank_classes(scores, labels).top(5).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert rank_classes(scores, labels).top(1).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert rank_classes(torch.tensor([[0.5, nan]]), torch.tensor([0])).top(1).tolist() == [0.0]


def test_one_class_is_always_found() -> None:
    ranked = rank_classes(torch.tensor([[0.3]]), torch.tensor([0]))
    assert ranked.rank.tolist() == [1] and ranked.margin.tolist() == [np.inf]


def test_prompts_are_averaged_at_unit_length_and_brought_back_to_it() -> None:
    prompts = np.random.default_rng(1).standard_normal((3, 4, 5))
    prompts /= np.linalg.norm(prompts, axis=2, keepdims=True)
    found = class_vectors(torch.from_numpy(prompts)).numpy()
    for of_class, vector in zip(prompts, found, strict=True):
        expected = sum(of_class[1:], of_class[0]) / 4
        assert np.abs(vector - expected / np.sqrt((expected**2).sum())).max() < 1e-12


# ---------------------------------------------------------------------------------------------- prompts


def test_the_80_templates_are_those_that_open_clip_has_too() -> None:
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    expected = [template("tench") for template in metadata.OPENAI_IMAGENET_TEMPLATES]
    assert Templates.read("openai80").of("tench") == expected and len(expected) == 80
    assert Templates.read("openai80").name == "openai80"
    assert Templates.read("lift1").of("tench") == ["It is a photo of a tench"]


def test_a_file_of_templates_is_a_protocol_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "my own.txt"
    path.write_text("a {} here\n\n  one {}. \n")
    templates = Templates.read(str(path))
    assert templates.sentences == ("a {} here", "one {}.")
    path.write_text("a {} there\n")
    assert templates.name.startswith("my-own-") and templates.name != Templates.read(str(path)).name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a photo of a {}\nno place\n", r":2: 'no place' has 0 places for the name of a class"),
        (b"{} and {}\n", r":1: '\{\} and \{\}' has 2 places"),
        (b"\n \n", "no template in it"),
        (b"\xff{}", "not UTF-8"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_by_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(BadConfig, match=said):
        Templates.read(str(path))
    with pytest.raises(
        BadConfig, match="--prompts openai81: No such file or directory; give lift1 or openai80"
    ):
        Templates.read("openai81")


# ---------------------------------------------------------------------------------------------- data


def image_folder(root: Path, classes: Sequence[str], each: int = 2) -> Path:
    """As ImageNet's `val`: a folder per class."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"ILSVRC2012_val_{number}{i}.JPEG").write_bytes(png(10 * number + i))
    return root


WNIDS = ("n01440764", "n01443537", "n01484850")
NAMES = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great_white_shark"}


def test_imagenets_folders_and_its_class_index_are_read(tmp_path: Path) -> None:
    images = Labelled.open([str(image_folder(tmp_path / "val", WNIDS))], Rejects(0))
    assert images.classes == WNIDS and images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.index.where(5) == str(tmp_path / "val/n01484850/ILSVRC2012_val_21.JPEG")
    assert images.index.image_bytes(5) == png(21)
    index = tmp_path / "imagenet_class_index.json"
    index.write_text(json.dumps({str(i): [wnid, name] for i, (wnid, name) in enumerate(NAMES.items())}))
    assert class_names(images.classes, index) == ["tench", "goldfish", "great white shark"]
    index.write_text(json.dumps(NAMES))
    assert class_names(images.classes, index) == ["tench", "goldfish", "great white shark"]
    text = tmp_path / "synsets.txt"
    text.write_text("".join(f"{wnid} {name}\n" for wnid, name in NAMES.items()))
    assert class_names(images.classes, text) == ["tench", "goldfish", "great white shark"]


def test_shards_and_tables_name_the_class_in_a_field_and_their_order_does_not_matter(tmp_path: Path) -> None:
    rows = [(str(i), png(i), {"caption": "x", "label": "dog" if i % 3 else "big_cat"}) for i in range(6)]
    shard = write_tar(tmp_path / "a.tar", rows)
    images = Labelled.open([str(shard)], Rejects(0), label_field="label")
    assert images.classes == ("big_cat", "dog") and images.labels.tolist() == [0, 1, 1, 0, 1, 1]
    assert class_names(images.classes, None) == ["big cat", "dog"]
    turned = Labelled.open([str(write_tar(tmp_path / "b.tar", rows[::-1]))], Rejects(0), label_field="label")
    assert turned.classes == images.classes and turned.labels.tolist() == images.labels.tolist()[::-1]
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    table = tmp_path / "t.csv"
    table.write_text("image,label\n0.png,dog\n1.png,cat\n")
    assert Labelled.open([str(table)], Rejects(0), label_field="label").classes == ("cat", "dog")


def test_a_pattern_takes_the_class_out_of_a_caption(tmp_path: Path) -> None:
    captions = [
        ["a red circle left of a blue square", "a blue square right of a red circle"],
        ["a blue cross above a red circle"],
        ["a red cross below a red circle"],
    ]
    shard = write_tar(tmp_path / "a.tar", [(str(i), png(i), {"captions": c}) for i, c in enumerate(captions)])

    def opened(pattern: str) -> Labelled:
        return Labelled.open([str(shard)], Rejects(0), label_field="captions", label_pattern=pattern)

    colours, shapes = opened("red|blue"), opened("circle|square|cross")
    assert colours.classes == ("blue red", "red") and colours.labels.tolist() == [0, 0, 1]
    assert shapes.classes == ("circle cross", "circle square") and shapes.labels.tolist() == [1, 0, 0]
    assert colours.digest != shapes.digest
    with pytest.raises(
        BadSource, match=r"'a red cross below a red circle' has nothing of --label-pattern blue"
    ):
        opened("blue")
    with pytest.raises(BadSource, match=r"a.tar:0 has two classes \(left, right\)"):
        opened("left|right|above|below")
    with pytest.raises(BadConfig, match=r"--label-pattern \(: "):
        opened("(")


def test_data_that_are_not_labelled_are_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("0", png(0), {"label": ["dog", "cat"]})])
    with pytest.raises(BadSource, match=r"a.tar:0 has two classes \(dog, cat\); it needs one"):
        Labelled.open([str(shard)], Rejects(0), label_field="label")
    with pytest.raises(BadConfig, match=r"a.tar is a file: name the field .* by --label-field"):
        Labelled.open([str(shard)], Rejects(0))
    with pytest.raises(BadSource, match="nowhere: no such folder"):
        Labelled.open([str(tmp_path / "nowhere")], Rejects(0))
    with pytest.raises(BadSource, match="no folder in it; it needs one per class"):
        Labelled.open([str(tmp_path)], Rejects(0))
    (tmp_path / "empty" / "dog").mkdir(parents=True)
    with pytest.raises(BadSource, match="empty: no image in any folder of it"):
        Labelled.open([str(tmp_path / "empty")], Rejects(0))


def test_a_class_without_a_name_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match=r"class n01440764 has no name, only a number; give --classes FILE"):
        class_names(["n01440764"], None)
    names = tmp_path / "names.json"
    names.write_text('{"n01440764": "tench"}')
    with pytest.raises(BadSource, match=r"class 'n01443537' has no name in .*names.json; add it"):
        class_names(WNIDS, names)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "[1, 2]", "of another shape"),
        ("a.json", '{"0": ["n01", "a", "b"]}', "of another shape"),
        ("a.json", '{"0": ', "is it UTF-8, and whole"),
        ("a.json", '{"0": ["n01", "a"], "1": ["n01", "b"]}', "n01 is 'a' and 'b'; name it once"),
        ("a.txt", "n01 tench\nn02\n", r"a.txt:2: n02 has no name"),
    ],
)
def test_names_of_another_shape_are_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BadSource, match=said) as refused:
        read_class_names(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(BadSource, match=r"nowhere.json: No such file"):
        read_class_names(tmp_path / "nowhere.json")


# ---------------------------------------------------------------------------------------------- from end to end


class Named(Encoder):
    """Reads an image's red for what it is, and of a text whether it has a class's word in it."""

    image_size, max_pixels, batch_size = SIDE, 10_000, 2
    subject = Subject(name="named", checkpoint="none")

    def __init__(self, words: Sequence[str], captions: torch.Tensor | None = None) -> None:
        self.words, self.captions, self.asked = words, captions, list[str]()

    def embed_images(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        return self.features(views_n3ss)

    def features(self, views_n3ss: torch.Tensor) -> torch.Tensor:
        number = (views_n3ss[:, 0].float().mean((1, 2)) / 10).round().long()
        return torch.nn.functional.one_hot(number, len(self.words)).float()

    def embed_texts(self, captions: Sequence[str]) -> torch.Tensor:
        self.asked += captions
        rows = torch.tensor([[float(word in caption) for word in self.words] for caption in captions])
        return torch.nn.functional.normalize(rows, dim=-1)

    def mean_image(self) -> torch.Tensor | None:
        return None

    def mean_text(self) -> torch.Tensor | None:
        return self.captions


def plain(red: int) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (red, 0, 0)).save(out, "png")
    return out.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Four dogs, of which one looks like a cat; one cat; an empty folder; a broken bird."""
    root = tmp_path / "pets"
    for name, reds in {"bird": [], "cat": [10], "dog": [20, 20, 20, 10]}.items():
        (root / name).mkdir(parents=True)
        for number, red in enumerate(reds):
            (root / name / f"{number}.png").write_bytes(plain(red))
    (root / "bird" / "0.png").write_bytes(b"broken")
    return root


def test_a_result_holds_scores_per_image_and_per_class_and_what_was_left_out(pets: Path) -> None:
    encoder = Named(["bird", "cat", "dog"], torch.tensor([1.0, 0.0, 0.0]))
    rejects = Rejects(1)
    images = Labelled.open([str(pets)], rejects)
    task = ZeroShot("pets", images, class_names(images.classes, None), Templates.read("lift1"), rejects)
    result = task.evaluate(encoder)
    assert (result.task, result.protocol, result.name) == ("zeroshot", "lift1", "pets")
    assert result.scores["top1"].value == pytest.approx(4 / 5, abs=1e-9)
    assert result.scores["top5"].value == 1.0  # of three classes
    assert result.scores["per_class"].value == pytest.approx((1 + 3 / 4) / 2, abs=1e-9)
    assert {name: score.items for name, score in result.scores.items()} == dict.fromkeys(
        ("top1", "top5", "per_class"), 5
    )
    assert result.scores["top1"].chance == pytest.approx(1 / 3) and result.scores["top5"].chance == 1.0
    assert result.items["per_class"].group == (1, 2, 2, 2, 2)
    assert list(result.left_out) == [str(pets / "bird" / "0.png")] and result.details["of"] == 6
    assert result.details["classes_without_image"] == ["bird"]
    assert encoder.asked == ["It is a photo of a bird", "It is a photo of a cat", "It is a photo of a dog"]
    mean = np.full(3, 1 / 3)
    assert result.details["prompts_to_training_captions"]["distance"] == pytest.approx(
        np.linalg.norm(mean - [1, 0, 0]), abs=1e-6
    )
    assert result.details["prompts_to_training_captions"]["cosine"] == pytest.approx(1 / np.sqrt(3), abs=1e-6)
    assert Result.read(result.write(pets.parent / "eval")) == result
    assert task.evaluate(Named(["bird", "cat", "dog"])).details["prompts_to_training_captions"] is None


def test_two_classes_of_one_name_tie_and_are_told(pets: Path) -> None:
    names = pets.parent / "names.txt"
    names.write_text("bird thing\ncat cat\ndog cat\n")
    images = Labelled.open([str(pets)], rejects := Rejects(1))
    task = ZeroShot("pets", images, class_names(images.classes, names), Templates.read("lift1"), rejects)
    result = task.evaluate(Named(["thing", "cat", "dog"]))
    assert result.scores["top1"].value == 0.0 and result.details["ties"] >= 1
    assert result.details["classes_of_one_name"] == ["cat"]


def test_other_names_prompts_or_images_are_other_data_or_another_protocol(pets: Path) -> None:
    def result(names: Sequence[str], prompts: str = "lift1") -> Result:
        images = Labelled.open([str(pets)], rejects := Rejects(1))
        encoder = Named(["bird", "cat", "dog"])
        return ZeroShot("pets", images, names, Templates.read(prompts), rejects).evaluate(encoder)

    first = result(["bird", "cat", "dog"])
    assert first == result(["bird", "cat", "dog"])
    assert first.data != result(["bird", "tom cat", "dog"]).data
    assert first.protocol != result(["bird", "cat", "dog"], "openai80").protocol
    (pets / "dog" / "0.png").unlink()
    assert first.data != result(["bird", "cat", "dog"]).data


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def trained(world: World) -> World:
    train(prepare(world.config(epochs=1)))
    return world


def lift_eval(*argv: str) -> int:
    try:
        eval_main(list(argv))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_takes_prompts_through_the_runs_cache_and_says_what_is_missing(
    trained: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(trained.root / "drawings", ["0", "1", "2"])
    prompts = trained.root / "prompts.txt"
    prompts.write_text("drawing number {}\n")
    flags = ["zeroshot", "--run", str(trained.root / "run"), "--data", str(folder), "--prompts"]
    assert lift_eval(*flags, str(prompts)) == 0
    shown = capsys.readouterr()
    assert "zeroshot · drawings · prompts-" in shown.out and shown.out.splitlines()[2].endswith(" 6")
    (path,) = (trained.root / "run" / "eval").glob("zeroshot-drawings-prompts-*.json")
    result = Result.read(path)
    assert result.scores["top1"].low is not None and result.subject.recipe == trained.recipe.fingerprint
    # Through the cache, the transform of the run and their mean: the run itself says what its captions are.
    run = TrainedRun.open(trained.root / "run", "cpu")
    texts = run.embed_texts([f"drawing number {i}" for i in range(3)]).double().mean(0)
    training = run.mean_text()
    assert training is not None
    assert result.details["prompts_to_training_captions"]["distance"] == pytest.approx(
        float((texts - training.double()).norm()), abs=1e-6
    )
    assert lift_eval(*flags, "lift1") == 2
    assert (
        "('It is a photo of a 0', 'It is a photo of a 1', …) are not in snapshot" in capsys.readouterr().err
    )
    assert lift_eval(*flags, "lift2") == 2
    assert "--prompts lift2: No such file or directory; give lift1 or openai80" in capsys.readouterr().err


def test_prompts_that_the_cache_lacks_are_embedded_once(
    trained: World, embedder: Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(trained.root / "drawings", ["0", "1"])
    flags = ["zeroshot", "--run", str(trained.root / "run"), "--data", str(folder), "--prompts", "lift1"]
    for _ in range(2):
        assert lift_eval(*flags, "--server", embedder.url) == 0
        assert embedder.embedded == ["It is a photo of a 0", "It is a photo of a 1"]


def test_missing_prompts_are_said_before_an_image_is_read(trained: World) -> None:
    folder = image_folder(trained.root / "drawings", ["0", "1"])
    images = Labelled.open([str(folder)], rejects := Rejects(0))
    (folder / "0" / "ILSVRC2012_val_00.JPEG").write_bytes(b"broken")
    task = ZeroShot("drawings", images, images.classes, Templates.read("openai80"), rejects)
    with pytest.raises(MissingCaptions, match="160 of 160 captions"):
        task.evaluate(TrainedRun.open(trained.root / "run", "cpu"))


def test_scores_do_not_depend_on_the_batch_size(trained: World) -> None:
    folder = image_folder(trained.root / "drawings", [str(i) for i in range(20)])
    images = Labelled.open([str(folder)], rejects := Rejects(0))
    (trained.root / "prompts.txt").write_text("drawing number {}\n")
    templates = Templates.read(str(trained.root / "prompts.txt"))
    task = ZeroShot("drawings", images, images.classes, templates, rejects)
    found = [
        task.evaluate(TrainedRun.open(trained.root / "run", "cpu", batch_size=size)) for size in (1, 7, 40)
    ]
    for other in found[1:]:
        assert other.scores["top1"].value == pytest.approx(found[0].scores["top1"].value, abs=1e-4)
        assert other.data == found[0].data


def test_a_suite_of_classification_and_probes_is_one_command(
    trained: World, capsys: pytest.CaptureFixture[str]
) -> None:
    train_images = image_folder(trained.root / "some", ["0", "1"], each=4)
    test_images = image_folder(trained.root / "others", ["0", "1"], each=3)
    (trained.root / "prompts.txt").write_text("drawing number {}\n")
    suite = trained.root / "suite.yaml"
    suite.write_text(
        f"- task: zeroshot\n  data: {test_images}\n  prompts: {trained.root / 'prompts.txt'}\n"
        f"- task: probe\n  train: {train_images}\n  data: [{test_images}]\n  k: 3\n"
    )
    assert lift_eval("suite", str(suite), "--run", str(trained.root / "run"), "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["task"], sorted(r["scores"])) for r in results] == [
        ("zeroshot", ["per_class", "top1", "top5"]),
        ("probe", ["knn", "linear"]),
    ]
    assert results[1]["protocol"] == "knn3"


def test_unlabelled_data_and_unnamed_classes_end_in_one_line(
    trained: World, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["zeroshot", "--run", str(trained.root / "run"), "--data"]
    assert lift_eval(*flags, str(trained.shard)) == 2
    assert "is a file: name the field of its samples that holds their class" in capsys.readouterr().err
    assert lift_eval(*flags, str(image_folder(trained.root / "val", WNIDS))) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1 and "class n01440764 has no name, only a number" in shown[0]
