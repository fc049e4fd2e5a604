"""The study: its rules hold together, what is done is not done again, and a preview says that it is one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lift_cache.errors import BadConfig, BadSource
from lift_trainer.data import paraphrases
from lift_trainer.data.shards import DatasetWriter
from lift_trainer.evaluators.shapes import SPLITS, TASKS, open_shapes

BENCH = Path(__file__).resolve().parents[3] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The study's modules, which lie beside each other and are no package."""
    sys.path.insert(0, str(BENCH))
    try:
        import study
        import study_figures
        import study_report
        import study_rules
        import study_run

        yield SimpleNamespace(
            study=study, figures=study_figures, report=study_report, rules=study_rules, run=study_run
        )
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def rules(bench: SimpleNamespace) -> Any:
    return bench.rules.Study.read(BENCH / "study.yaml")


def result_of(
    run: Any, *, seen: float = 0.5, new: float = 0.5, long: float = 0.5, steps: int = 600
) -> dict[str, Any]:
    scores = {
        split: {
            variant: dict.fromkeys(TASKS, value)
            for variant, value in (("seen", seen), ("new", new), ("long", long))
        }
        for split in SPLITS
    }
    return {
        "run": run.name,
        "digest": run.digest,
        "settings": run.settings,
        "recipe": None,
        "parameters": 1000,
        "flops": {"step": 10**9, "embedding": 10**11},
        "curve": [{"step": step, "scores": scores} for step in (steps // 2, steps)],
        "blind": scores,
    }


# ------------------------------------------------------------------------------------------- the rules


def test_every_arm_can_be_trained_and_choices_are_among_the_first(
    bench: SimpleNamespace, rules: Any, tmp_path: Path
) -> None:
    for arm in rules.arms:
        for run in (
            bench.rules.Run.of(rules, arm, 1, 0.01, "reported"),
            bench.rules.Run.of(rules, arm, 0, 0.001, "validation"),
        ):
            config = bench.run.config_of(run, tmp_path, tmp_path / "run")
            assert config.lr == run.learning_rate and config.seed == run.seed
    assert rules.data["validation"]["seed"] != rules.data["reported"]["seed"]
    first = [*rules.arms][: rules.first]
    assert {arm for some in rules.families.values() for arm in some} <= {*first}


def test_a_comparison_of_an_arm_that_is_not_there_is_refused(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        (BENCH / "study.yaml").read_text().replace("over: joint, variant: seen", "over: jiont, variant: seen")
    )
    with pytest.raises(BadConfig, match=r"study.yaml: .*jiont: no such arm"):
        bench.rules.Study.read(path)


def test_what_is_left_comes_sweep_first_then_seed_by_seed(
    bench: SimpleNamespace, rules: Any, tmp_path: Path
) -> None:
    kept = bench.rules.Results(tmp_path, rules)
    first = [*rules.arms][: rules.first]
    stage = next(kept.stages())
    assert [run.name for run in stage.runs[: len(first)]] == [
        f"{arm}/lr{rules.learning_rates[0]:g}" for arm in first
    ]
    assert len(stage.runs) == 3 * len(first)
    with pytest.raises(BadConfig, match=r"ngram-hash: its learning rate is chosen by the sweep"):
        kept.reported("ngram-hash")
    for run in stage.runs:
        kept.put(run, result_of(run, seen=run.learning_rate))
    swept, reported = [*kept.stages()][:2]
    assert not swept.runs
    assert [run.name for run in reported.runs[: len(first)]] == [f"{arm}/0" for arm in first]
    assert {run.learning_rate for run in reported.runs} == {max(rules.learning_rates)}
    kept.put(reported.runs[0], result_of(reported.runs[0]))
    assert [run.name for run in [*kept.stages()][1].runs] == [run.name for run in reported.runs[1:]]


def test_the_sweep_looks_at_wordings_of_training_alone_and_takes_the_lower_rate_in_a_tie(
    bench: SimpleNamespace, rules: Any, tmp_path: Path
) -> None:
    kept = bench.rules.Results(tmp_path, rules)
    for run in kept.sweep("ngram-hash"):
        kept.put(run, result_of(run, seen=0.7, new=run.learning_rate))
    for run in kept.sweep("lift-smollm2-center-long"):
        kept.put(run, result_of(run, seen=1 - run.learning_rate, long=run.learning_rate))
    assert kept.validated("ngram-hash") == (min(rules.learning_rates), pytest.approx(0.7))
    assert kept.validated("lift-smollm2-center-long")[0] == max(rules.learning_rates)


def test_a_result_of_other_settings_is_refused_by_name(
    bench: SimpleNamespace, rules: Any, tmp_path: Path
) -> None:
    kept = bench.rules.Results(tmp_path, rules)
    run = kept.sweep("ngram-hash")[0]
    kept.put(run, result_of(run))
    assert kept.get(run)["run"] == run.name
    other = rules.model_copy(update={"training": {**rules.training, "steps": 1200}})
    changed = bench.rules.Run.of(other, "ngram-hash", 0, 0.001, "validation")
    with pytest.raises(BadConfig, match=r"lr0.001.json: made with training.steps = 600 instead of 1200"):
        kept.get(changed)
    (tmp_path / run.file).write_text("{}")
    with pytest.raises(BadSource, match=r"ngram-hash-lr0.001.json: not a result"):
        kept.get(run)


def test_an_unknown_run_is_one_line(bench: SimpleNamespace, rules: Any, tmp_path: Path) -> None:
    kept = bench.rules.Results(tmp_path, rules)
    with pytest.raises(BadConfig, match=r"--only clip/0: no such arm"):
        bench.study._named(kept, "clip/0")
    with pytest.raises(BadConfig, match=r"there are ngram-hash/lr0.001, ngram-hash/lr0.003"):
        bench.study._named(kept, "ngram-hash/lr5")


# ------------------------------------------------------------------------------------------- the verdict


@pytest.fixture
def finished(bench: SimpleNamespace, rules: Any, tmp_path: Path) -> Any:
    """All runs but the last seed of clip-mlp; fixed arms at 0.7 + seed/100, joint ones at 0.6 + seed/100."""
    kept = bench.rules.Results(tmp_path, rules)
    for arm in rules.arms:
        for run in kept.sweep(arm):
            kept.put(run, result_of(run, seen=0.9 if arm == "clip-mlp" else 0.5))
        for run in kept.reported(arm):
            level = 0.6 if arm.startswith("clip") else 0.7
            kept.put(run, result_of(run, seen=level + run.seed / 100, new=0.5 + (run.seed % 2) / 100))
    (tmp_path / "clip-mlp-seed4.json").unlink()
    return kept


def test_a_verdict_waits_for_all_seeds_and_the_arm_was_chosen_by_the_sweep(
    bench: SimpleNamespace, finished: Any
) -> None:
    made = bench.report.made_so_far(finished)
    first = next(bench.report.verdicts(finished, made))
    assert (first.over, first.seeds) == ("clip-mlp", 4)
    assert first.difference.mean == pytest.approx(0.1) and first.word == "not yet (4 of 5 seeds)"
    run = finished.reported("clip-mlp")[4]
    finished.put(run, result_of(run, seen=0.64))
    seen, new, *_ = bench.report.verdicts(finished, bench.report.made_so_far(finished))
    assert seen.word == "supported" and new.word == "open"


def test_runs_on_vectors_of_two_recipes_are_refused(bench: SimpleNamespace, finished: Any) -> None:
    run = finished.reported("lift-minilm-center")[1]
    finished.put(run, {**result_of(run), "recipe": "other"})
    with pytest.raises(
        BadSource, match=r"lift-minilm-center/1 and lift-minilm-center/0 were trained on vectors of two"
    ):
        bench.report.made_so_far(finished)


def test_the_figures_are_files_that_need_nothing_and_name_every_arm(
    bench: SimpleNamespace, finished: Any, rules: Any
) -> None:
    for draw, ending in ((bench.figures.figure, ""), (bench.figures.picture, r" \d\d")):
        drawn = draw(rules, bench.report.made_so_far(finished))
        assert re.findall(r"https?://[^\"]*", drawn) == ["http://www.w3.org/2000/svg"]
        assert not re.search(r"href|url\(|<script|@import", drawn)
        for arm in [*rules.arms][: rules.first]:
            assert re.search(f">{arm}{ending}</text>", drawn)


def test_the_picture_says_what_the_seeds_say_and_a_note_that_it_is_unfinished(
    bench: SimpleNamespace, finished: Any, rules: Any
) -> None:
    made = bench.report.made_so_far(finished)
    drawn = bench.figures.picture(rules, made)
    assert ">lift-minilm-center 72</text>" in drawn  # 70, 71, 72, 73, 74
    assert "mean and 95 % interval of 4 or 5 seeds" in drawn
    assert "UNFINISHED" in bench.figures.picture(rules, made, note="UNFINISHED: 1 run is left")


def test_names_are_moved_apart_in_their_order(bench: SimpleNamespace) -> None:
    found = bench.figures.spread({"a": 10.0, "b": 11.0, "c": 12.0, "d": 100.0}, 15)
    assert found == {"a": -4.0, "b": 11.0, "c": 26.0, "d": 100.0}


def test_embedding_is_paid_before_the_first_step_and_shared(bench: SimpleNamespace, rules: Any) -> None:
    result = result_of(bench.rules.Run.of(rules, "lift-smollm2-none", 0, 0.001, "reported"))
    assert bench.report.spent(result, 0, 1) == 1e11
    assert bench.report.spent(result, 10, 10) == 10 * 1e9 + 1e10
    assert bench.report.spent(result, 10, None) == 10 * 1e9


# ------------------------------------------------------------------------------------------- what was published


def test_what_the_docs_show_is_what_the_committed_runs_say(bench: SimpleNamespace, rules: Any) -> None:
    kept = bench.rules.Results(BENCH / "results" / "study", rules)
    made = bench.report.made_so_far(kept)
    assert list(made) == list(rules.arms) and {len(results) for results in made.values()} == {5}
    docs = BENCH.parent / "docs"
    assert (docs / "images" / "study.svg").read_text() == bench.figures.picture(rules, made)
    assert (docs / "images" / "study-curves.svg").read_text() == bench.figures.figure(rules, made)
    quoted = set((docs / "results.md").read_text().splitlines())
    rows = [str(one) for one in bench.report.verdicts(kept, made)]
    rows += [row for row in bench.report.tables(rules, made) if " (trained " in row]
    assert len(rows) == len(rules.comparisons) + len(rules.arms)
    assert [row for row in rows if row not in quoted] == []


# ------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name, seed in (("reported", 0), ("validation", 2)):
        (folder / name).mkdir()
        paraphrases.build(DatasetWriter(folder / name), size=32, seed=seed, train=64)
    return folder


@pytest.fixture
def small(rules: Any, tmp_path: Path) -> Path:
    """A study of two arms that needs no cache and takes seconds."""
    content = yaml.safe_load((BENCH / "study.yaml").read_text())
    content["data"] = {name: {**settings, "train": 64} for name, settings in content["data"].items()}
    content["training"] |= {"batch_size": 16, "steps": 4, "tower": "vit:width=32,depth=1,heads=1,patch=8"}
    content["score_every"] = 2
    content["arms"] = {name: content["arms"][name] for name in ("ngram-hash", "word-hash", "clip-linear")}
    content |= {"first": 3, "families": {}, "comparisons": []}
    content["preview"]["arms"] = ["word-hash", "clip-linear"]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_run_is_made_once_and_its_scores_are_those_of_the_evaluators(
    bench: SimpleNamespace,
    small: Path,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = tmp_path / "results"

    def make() -> str:
        bench.study.run(inputs=inputs, results=results, study=small, only=("word-hash/lr0.001",))
        return capsys.readouterr().out

    trained: list[Any] = []
    real = bench.run.opened
    monkeypatch.setattr(bench.run, "opened", lambda *given: trained.append(real(*given)) or trained[-1])
    assert "composition" in make()
    assert not any((inputs / "runs").iterdir())
    found = json.loads((results / "word-hash-lr0.001.json").read_text())
    assert [point["step"] for point in found["curve"]] == [2, 4]
    for split in SPLITS:
        for variant in paraphrases.VARIANTS:
            data = str(inputs / "validation" / f"{split}-{variant}-000.tar")
            result = open_shapes([data], split).evaluate(trained[-1])
            for task in TASKS:
                assert found["curve"][-1]["scores"][split][variant][task] == result.scores[task].value
                assert found["blind"][split][variant][task] == result.scores[task].blind
    swapped = found["curve"][-1]["scores"]["test"]["seen"]["swap_obj"]
    assert swapped == 0  # equal bags of words tie, and a tie is wrong
    assert "done before" in make()


@pytest.mark.slow
def test_the_study_says_its_hours_makes_what_is_left_and_then_has_nothing_left(
    bench: SimpleNamespace, small: Path, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(small.read_text())
    content |= {"arms": {"word-hash": content["arms"]["word-hash"]}, "first": 1}
    content["preview"]["arms"] = ["word-hash"]
    content |= {"learning_rates": [0.01, 0.001], "seeds": [3]}
    small.write_text(yaml.safe_dump(content))
    results = tmp_path / "results"
    bench.study.run(inputs=inputs, results=results, study=small, only=("word-hash/lr0.001",))
    capfd.readouterr()
    bench.study.run(inputs=inputs, results=results, study=small)
    said = capfd.readouterr().out
    assert "2 runs are left, about 0.0 hours" in said.splitlines()[0]
    assert re.findall(r"^word-hash/\S+(?=:)", said, re.MULTILINE) == ["word-hash/lr0.01", "word-hash/3"]
    bench.study.run(inputs=inputs, results=results, study=small)
    assert capfd.readouterr().out == "nothing is left to run\n"
    bench.study.report(out=tmp_path / "report", results=results, study=small)
    assert "UNFINISHED" not in capfd.readouterr().out
    (results / "word-hash-seed3.json").rename(results / "word-hash-seed4.json")
    with pytest.raises(BadConfig, match="no arm has been reported on yet"):
        bench.study.report(out=tmp_path / "report", results=results, study=small)


@pytest.mark.slow
def test_a_preview_says_so_first_and_last_and_in_the_figure(
    bench: SimpleNamespace, small: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.study.preview(inputs=inputs, results=tmp_path / "preview", study=small)
    said = capsys.readouterr().out.strip().splitlines()
    assert said[0].startswith("PREVIEW: ") and said[-3].startswith("PREVIEW: ")
    for name in ("study", "picture"):
        assert "PREVIEW: " in (tmp_path / "preview" / f"{name}.svg").read_text()
    assert (tmp_path / "preview" / "study.md").read_text().startswith("PREVIEW: ")
    long = json.loads((tmp_path / "preview" / "clip-linear-seed0.json").read_text())["curve"][0]["scores"][
        "test"
    ]
    assert "long" not in long  # its context would cut them off


def test_data_of_other_settings_are_refused(bench: SimpleNamespace, rules: Any, tmp_path: Path) -> None:
    run = bench.rules.Run.of(rules, "ngram-hash", 0, 0.001, "reported")
    with pytest.raises(BadSource, match=r"reported: made with version=None, and study.yaml says 1"):
        bench.run.perform(run, tmp_path, tmp_path)
    (tmp_path / "reported").mkdir()
    settings = {"version": 1, **rules.data["reported"], "train": 64}
    (tmp_path / "reported" / "dataset.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(BadSource, match=r"made with train=64, and study.yaml says 10000"):
        bench.run.perform(run, tmp_path, tmp_path)
