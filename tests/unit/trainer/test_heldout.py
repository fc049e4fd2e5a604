"""Held-out scores: that they are right, that training does not notice them, and which step was best."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch import nn

from lift_cache.errors import BadConfig, BadSource, CacheDamaged
from lift_trainer import heldout
from lift_trainer.distributed import mean, world_size
from lift_trainer.evaluators.captioned import open_captioned
from lift_trainer.evaluators.retrieval import CUTOFFS, DIRECTIONS, Retrieval
from lift_trainer.evaluators.tasks import open_tasks, read_suite
from lift_trainer.evaluators.trained import TrainedRun
from lift_trainer.heads import BatchNorm, HeadName
from lift_trainer.heldout import BETTER, EVALUATORS, Best, HeldOut
from lift_trainer.images import ImageStore, center_view
from lift_trainer.job import prepare
from lift_trainer.loop import train
from lift_trainer.losses import LossName, Mask, build_loss
from lift_trainer.model import LiftModel
from lift_trainer.rejects import Rejects
from lift_trainer.samples import Index, build_index
from lift_trainer.text import TextVectors, open_texts
from lift_trainer.text_towers import CachedTextTower
from lift_trainer.towers import build_tower
from lift_trainer.transform import TextTransform
from tests.conftest import DIMENSIONS
from tests.unit.trainer.conftest import SIDE, TOWER, World, png, write_tar


def build(
    *, caches: int = 1, head: HeadName = "none", loss: LossName = "infonce", mask: Mask = "none"
) -> LiftModel:
    torch.manual_seed(0)
    tower = build_tower(TOWER, SIDE, "learned:0.5", DIMENSIONS)
    texts = [CachedTextTower(DIMENSIONS, DIMENSIONS, head) for _ in range(caches)]
    return LiftModel(tower, texts, build_loss(loss, mask))


@dataclass(frozen=True)
class Data:
    """Held-out samples and all that belongs to them, to check scores by hand."""

    index: Index
    text: TextVectors
    transform: TextTransform

    def held_out(self, caches: int = 1, **changes: object) -> HeldOut:
        settings: dict[str, object] = {
            "device": torch.device("cpu"), "batch_size": 100, "image_size": SIDE, "max_pixels": 10**6,
        }  # fmt: skip
        return HeldOut(
            self.index, [self.text] * caches, [self.transform] * caches, Rejects(9), **settings | changes
        )

    def views(self) -> torch.Tensor:
        store = ImageStore(self.index, 10**6)
        return torch.stack([center_view(store.pixels(sample), SIDE) for sample in range(len(self.index))])

    def vectors(self) -> torch.Tensor:
        every = np.arange(len(self.index.captions))
        return self.transform(torch.from_numpy(np.ascontiguousarray(self.text.gather(every))))


@pytest.fixture
def data(world: World) -> Data:
    return opened(world, [str(world.shard)])


def opened(world: World, sources: list[str]) -> Data:
    index = build_index(sources, Rejects(9))
    (text,), index, _ = open_texts(index, caches=[str(world.cache)], overlay=world.root / "overlay")
    return Data(index, text, prepare(world.config("any", text_transform="center")).transforms[0])


# ------------------------------------------------------------------------------------------ training does not notice


def draw_from_everything(encoded: object) -> dict[str, float]:
    return {"drawn": random.random() + np.random.rand() + torch.rand(()).item()}


def train_a_little(data: Data, held_out: HeldOut | None) -> tuple[nn.Module, list[object]]:
    """Ten steps that draw from every stream and never set one, scored before each."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = build(head="linear")
    model.texts[0].head = nn.Sequential(
        nn.Linear(DIMENSIONS, DIMENSIONS), BatchNorm(DIMENSIONS), nn.Dropout(0.2)
    )
    model.train()
    model.texts[0].head[2].eval()  # a part that stays as it is
    model.texts[0].head.append(nn.Dropout(0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    views, vectors = data.views(), data.vectors()
    seen: list[object] = []
    for _ in range(10):
        if held_out is not None:
            held_out.scores(model)
        chosen = torch.randperm(len(views))[:8]
        noise = random.random() + np.random.rand()
        x = model.encode_images(views[chosen])
        y = model.encode_texts([vectors[data.index.pairs[data.index.first[chosen]]]])
        captions = torch.from_numpy(data.index.pairs[data.index.first[chosen]])
        loss = model.loss(x, y, captions).loss * (1 + noise)
        loss.backward()
        if held_out is not None:
            held_out.scores(model)
        seen += [loss.item(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        seen.append([module.training for module in model.modules()])
    seen += [random.random(), np.random.rand(), torch.rand(())]
    return model, seen


def equal(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def test_training_with_held_out_scores_and_without_is_bit_equal(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVALUATORS, "drawing", draw_from_everything)
    without, expected = train_a_little(data, None)
    scored, found = train_a_little(data, data.held_out(evaluators=["retrieval", "drawing"], batch_size=8))
    assert len(found) == len(expected) and all(map(equal, found, expected))
    buffers = scored.state_dict()
    assert any("running_mean" in name for name in buffers)
    assert all(torch.equal(value, buffers[name]) for name, value in without.state_dict().items())


def test_a_compiled_tower_is_not_compiled_anew_for_scores(data: Data) -> None:
    model, compiled = build(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        compiled.append(inputs)
        return graph.forward

    expected = data.held_out().scores(model)
    model.tower.compile(backend=backend)
    assert data.held_out().scores(model) == expected and not compiled
    model.encode_images(data.views()[:4])
    assert compiled


def scored(world: World, run: str) -> dict[int, dict[str, float]]:
    """Held-out lines of a run, by step."""
    lines = [json.loads(line) for line in (world.root / run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["held_out"] for line in lines if "held_out" in line}


def data_digest(world: World) -> str:
    return build_index([str(world.shard)], Rejects(0)).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"text_transform": "center"},
        {"text_head": "linear", "dimensions": 8, "captions": "all", "loss": "siglip", "cache_images": 0},
    ],
)
def test_a_run_with_held_out_scores_is_that_without_and_keeps_its_best_step(
    world: World, changes: dict[str, object]
) -> None:
    plain = train(prepare(world.config("plain", **changes)))
    watching = {"eval_data": [str(world.shard)], "eval_every": 2, "evaluators": ["retrieval"], "keep": 1}
    # The cosine falls where training helps, so an early step is best by it.
    watched = train(prepare(world.config("watched", best="negative", **changes, **watching)))
    expected, found = (load_file(run.checkpoint / "model.safetensors") for run in (plain, watched))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    scores = scored(world, "watched")
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    best = min(scores, key=lambda step: scores[step]["negative"])
    opened_again = Best.open(world.root / "watched", "negative", data=data_digest(world))
    assert opened_again.noted is not None and opened_again.noted.step == best
    kept = sorted(path.name for path in (world.root / "watched" / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{best:06d}", "step-000012"})


def alone_in_two(rank: int, directory: str, make: Callable[[], tuple[HeldOut, LiftModel]]) -> None:
    """Rank 0 scores while rank 1 is at the next exchange already."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    if rank == 0:
        held_out, model = make()
        (Path(directory) / "scores.json").write_text(json.dumps(held_out.scores(model)))
    assert world_size() == 2
    assert mean(torch.tensor(float(rank))).item() == 0.5
    dist.destroy_process_group()


@dataclass(frozen=True)
class Made:
    """Pickles into a new process."""

    data: Data

    def __call__(self) -> tuple[HeldOut, LiftModel]:
        return self.data.held_out(batch_size=8, positives=2), build(head="linear")


@pytest.mark.slow
def test_of_two_ranks_one_scores_by_itself_what_one_process_would(data: Data, tmp_path: Path) -> None:
    made = Made(data)
    torch.multiprocessing.spawn(alone_in_two, (str(tmp_path), made), nprocs=2)
    held_out, model = made()
    assert json.loads((tmp_path / "scores.json").read_text()) == held_out.scores(model)


# ------------------------------------------------------------------------------------------ the scores are right


@pytest.mark.parametrize(
    ("loss", "mask", "caches", "positives"),
    [
        ("infonce", "none", 1, 1),
        ("infonce", "caption+image", 2, 1),
        ("siglip", "caption", 1, 2),
        ("cosine", "none", 2, 5),
    ],
)
def test_one_batch_of_all_has_the_loss_that_training_would_compute(
    data: Data, loss: LossName, mask: Mask, caches: int, positives: int
) -> None:
    model = build(caches=caches, head="linear", loss=loss, mask=mask)
    scores = data.held_out(caches, positives=positives).scores(model)
    index, n = data.index, len(data.index)
    counts = index.caption_counts(np.arange(n))
    if positives == 1:  # which one is drawn is not for this test to say: take it from the source
        drawn = heldout._drawn(index, np.arange(n), 1)
    else:
        drawn = np.full((n, min(positives, counts.max())), -1)
        for sample in range(n):
            own = index.pairs[index.first[sample] : index.first[sample + 1]]
            drawn[sample, : len(own)] = own
    with torch.no_grad():
        x = model.encode_images(data.views())
        vectors = data.vectors()[drawn.clip(min=0)]
        y = torch.cat([tower(vectors) for tower in model.texts], 1)  # type: ignore[operator]
        captions = torch.from_numpy(np.concatenate([drawn] * caches, 1))
        if y.shape[1] == 1:
            y, captions = y[:, 0], captions[:, 0]
        expected = model.loss(x, y, captions, torch.arange(n))
    assert scores["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert scores["positive"] == pytest.approx(expected.positive.item(), abs=1e-6)
    assert scores["negative"] == pytest.approx(expected.negative.item(), abs=1e-6)


def test_whole_batches_count_and_their_order_is_that_of_no_run(data: Data) -> None:
    model = build()
    held_out = data.held_out(batch_size=8, memory=0.0)
    scores = held_out.scores(model)
    assert scores == held_out.scores(model) == data.held_out(batch_size=8, memory=1.0).scores(model)
    order = heldout.permutation(28, 0, heldout.ORDER)
    losses = []
    for start in (0, 8, 16):  # 28 images: four are left over
        samples = order[start : start + 8]
        captions = heldout._drawn(data.index, samples, 1)[:, 0]
        with torch.no_grad():
            x, y = model.encode_images(data.views()[samples]), data.vectors()[captions]
            losses.append(model.loss(x, y, torch.from_numpy(captions)).loss.item())
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert list(scores) == list(heldout.IN_BATCHES)


def test_an_equal_caption_and_any_caption_of_an_image_count_as_found(world: World) -> None:
    """Four pictures, two captions: whoever finds the caption of the same words has found it."""
    same = [(f"{i}", png(i), {"captions": [world.captions[i % 2]]}) for i in range(4)]
    data = opened(world, [str(write_tar(world.root / "same.tar", same))])
    vectors = data.vectors()

    class Knowing(LiftModel):
        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            which = [int((view == self.views).flatten(1).all(1).nonzero()[0, 0]) for view in pixels]
            return vectors[data.index.pairs[which]]

    model = build()
    model.__class__ = Knowing
    model.views = data.views()
    held_out = data.held_out(evaluators=["retrieval"])
    scores = held_out.scores(model)
    assert scores["r@1_image_to_text"] == scores["r@1_text_to_image"] == 1.0
    assert scores["retrieval/r@1_image_to_text"] == scores["retrieval/r@1_text_to_image"] == 1.0
    assert scores["positive"] == pytest.approx(1)


def test_retrieval_says_what_lift_eval_says_of_the_checkpoint(world: World) -> None:
    config = world.config(
        epochs=20,
        text_transform="center",
        precision="fp32",
        eval_data=[str(world.shard)],
        evaluators=["retrieval"],
    )
    train(prepare(config))
    captioned = open_captioned([str(world.shard)], Rejects(0))
    result = Retrieval("test", captioned, "any-caption").evaluate(TrainedRun.open(world.root / "run", "cpu"))
    scores = scored(world, "run")[60]
    for direction in DIRECTIONS:
        for cutoff in CUTOFFS:
            name = f"r@{cutoff}_{direction}"
            assert scores[f"retrieval/{name}"] == pytest.approx(result.scores[name].value)
    assert result.scores["r@10_image_to_text"].value > 0
    assert str(HeldOut.open(prepare(config))) == "28 images, 35 distinct captions, in batches of 8"


def test_a_suite_is_scored_on_the_way_as_afterwards_and_training_does_not_notice(world: World) -> None:
    samples = [
        (
            f"{i}",
            png(i),
            {"captions": [world.captions[i]], "negatives": {"swap_obj": world.captions[(i + 9) % 28]}},
        )
        for i in range(28)
    ]
    shard = write_tar(world.root / "negatives.tar", samples)
    suite = world.root / "suite.yaml"
    suite.write_text(
        f"- {{task: shapes, data: {shard}, name: test}}\n- {{task: retrieval, data: {world.shard}, protocol: lift}}\n"
    )
    watched = {"eval_data": [str(world.shard)], "eval_every": 5, "evaluators": ["retrieval", str(suite)]}
    best = "retrieval-train-lift/r@1_mean"
    train(prepare(world.config("run", epochs=4, precision="fp32", best=best, **watched)))
    train(prepare(world.config("plain", epochs=4, precision="fp32")))
    models = [TrainedRun.open(world.root / name, "cpu").model.state_dict() for name in ("run", "plain")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    scores = scored(world, "run")[12]
    noted = json.loads((world.root / "run" / "best.json").read_bytes())
    assert noted["metric"] == best and noted["better"] == "higher"
    assert noted["best"]["value"] == max(line[best] for line in scored(world, "run").values())
    wrong = prepare(world.config("wrong", best="retrieval-train-lift/r@7_mean", **watched))
    with pytest.raises(
        BadConfig, match=r"the suite has no such score; it has shapes-test-two-way/swap_obj, "
    ):
        train(wrong)
    for evaluator in open_tasks(read_suite(suite)):
        result = evaluator.evaluate(TrainedRun.open(world.root / "run", "cpu"))
        assert list(result.scores) == [*evaluator.scores]
        for name, score in result.scores.items():
            assert scores[f"{result.stem}/{name}"] == pytest.approx(score.value)
    assert "shapes-test-two-way/swap_obj" in scores and "retrieval-train-lift/r@1_mean" in scores


def test_every_score_is_known_to_be_better_high_or_low(data: Data) -> None:
    assert set(data.held_out(evaluators=list(EVALUATORS)).scores(build())) == set(BETTER)


def test_a_frozen_tower_runs_once_and_stays_in_evaluation_mode(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    expected = data.held_out().scores(model)
    model.tower.frozen = True
    model.train()
    calls = []
    features = model.tower.features
    monkeypatch.setattr(model.tower, "features", lambda pixels: calls.append(len(pixels)) or features(pixels))
    held_out = data.held_out(memory=1.0)
    for _ in range(3):
        assert held_out.scores(model) == pytest.approx(expected)
    assert calls == [28]
    assert model.training and model.tower.head.training and not model.tower.vit.training


# ------------------------------------------------------------------------------------------ what cannot be used


def test_a_broken_held_out_image_is_named_once_and_left_out(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        (f"{i:04d}", b"broken" if i == 3 else png(i), {"caption": world.captions[i]}) for i in range(9)
    ]
    shard = write_tar(world.root / "hurt.tar", samples)
    held_out = HeldOut.open(prepare(world.config(eval_data=[str(shard)])))
    scores = [held_out.scores(build()) for _ in range(2)]
    assert scores[0] == scores[1] and np.isfinite(scores[0]["loss"])
    assert capsys.readouterr().err.count(f"left out {shard}:0003") == 1
    strict = HeldOut.open(prepare(world.config(eval_data=[str(shard)], max_bad=0)))
    model = build().train()
    with pytest.raises(BadSource, match=r"hurt\.tar:0003: .* --max-bad 0"):
        strict.scores(model)
    assert model.training


def test_an_evaluator_or_score_that_does_not_exist_is_one_line(world: World) -> None:
    for changes, message in (
        ({"evaluators": ["zeroshot"]}, "--evaluators zeroshot: there is retrieval, or a suite file"),
        ({"evaluators": ["none.yaml"]}, "suite none.yaml: .*No such file"),
        ({"best": "accuracy"}, "--best accuracy: there is no such held-out score; there are loss, r@1_image"),
        (
            {"best": "shapes-test-two-way/mean"},
            "no such held-out score; .* with a suite file among --evaluators",
        ),
        ({"best": "retrieval/r@1_image_to_text"}, "is a score of --evaluators retrieval: give that too"),
    ):
        with pytest.raises(BadConfig, match=message):
            prepare(world.config(eval_data=[str(world.shard)], **changes))


# ------------------------------------------------------------------------------------------ the best step


def checkpoint(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_the_best_is_the_lowest_loss_or_the_highest_recall(tmp_path: Path) -> None:
    values = [2.0, float("nan"), 1.0, 1.0, 3.0]
    for metric, expected in (
        ("loss", [True, False, True, False, False]),
        ("positive", [True, False, False, False, True]),
    ):
        run = tmp_path / metric
        best = Best.open(run, metric)
        assert best.path is None
        noted = [best.note(step, {metric: value}, checkpoint(run, step)) for step, value in enumerate(values)]
        assert noted == expected
        again = Best.open(run, metric)
        assert again.noted == best.noted and again.path == best.path
        shown = json.loads((run / "best.json").read_text())
        assert shown["metric"] == metric and shown["best"]["step"] == expected.index(True, 2)
        assert shown["best"]["path"] == f"checkpoints/step-{shown['best']['step']:06d}"


def test_a_run_killed_between_a_note_and_its_checkpoint_has_the_best_before(tmp_path: Path) -> None:
    best = Best.open(tmp_path, "loss")
    best.note(10, {"loss": 2.0}, checkpoint(tmp_path, 10))
    best.note(20, {"loss": 1.0}, tmp_path / "checkpoints" / "step-000020")
    best = Best.open(tmp_path, "loss", step=15)
    assert best.path == tmp_path / "checkpoints" / "step-000010"
    assert best.note(20, {"loss": 1.0}, checkpoint(tmp_path, 20))
    assert Best.open(tmp_path, "loss", step=20).path == tmp_path / "checkpoints" / "step-000020"
    # Going on from before: what was noted later is noted again.
    assert Best.open(tmp_path, "loss", step=12).path == tmp_path / "checkpoints" / "step-000010"


def test_a_best_by_another_metric_or_on_other_data_is_begun_anew_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Best.open(tmp_path, "loss", data="a").note(1, {"loss": 2.0}, checkpoint(tmp_path, 1))
    assert Best.open(tmp_path, "positive", data="a").noted is None
    assert "is by loss and now positive counts: the best is looked for anew" in capsys.readouterr().err
    assert Best.open(tmp_path, "loss", data="b").noted is None
    assert "is of other held-out data" in capsys.readouterr().err
    assert Best.open(tmp_path, "loss", data="a").noted is not None and not capsys.readouterr().err
    with pytest.raises(BadConfig, match="--best accuracy: there is no such held-out score"):
        Best.open(tmp_path, "accuracy")


def test_a_copied_run_has_its_best_and_a_damaged_note_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Best.open(run, "loss").note(1, {"loss": 2.0}, checkpoint(run, 1))
    shutil.copytree(run, tmp_path / "copy")
    assert Best.open(tmp_path / "copy", "loss").path == tmp_path / "copy" / "checkpoints" / "step-000001"
    for damage in ("{", "[]", '{"metric": "loss"}', ""):
        (run / "best.json").write_text(damage)
        with pytest.raises(CacheDamaged, match=r"best\.json cannot be read .*; delete it"):
            Best.open(run, "loss")
