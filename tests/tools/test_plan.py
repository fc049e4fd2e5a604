"""`lift-cache plan`: the figures that a decision rests on, before anything is spent."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cyclopts import App
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig
from lift_cache.keys import normalise
from lift_cache.recipe import Recipe
from lift_cache.terminal import run_command
from lift_cache.tools import costs
from lift_cache.tools.plan import plan
from lift_cache.tools.survey import ROW, DistinctRows, EstimatedCounter, TokenizerCounter, survey
from lift_embedder.cli import app as embed_app
from lift_embedder.recipes import NAMED
from lift_embedder.runtime import shield_imports
from lift_embedder.tokens import CaptionTokenizer

CAPTIONS = ["a dog chases the cat", "the cat", "a red circle above a blue square", "the  cat", "a dog"]
"""Four of them are distinct."""


def run(*argv: str) -> None:
    app = App(name="lift-cache")
    app.command(plan)
    run_command(app, ["plan", *argv], interrupted="")


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def no_model_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_HOME", str(tmp_path / "lift"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def made(*argv: str) -> dict[str, Any]:
        run(*argv, "--json")
        return json.loads(capsys.readouterr().out)

    return made


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def made(*argv: str) -> str:
        run(*argv)
        return " ".join(capsys.readouterr().out.split())

    return made


def tiny(*, before: str | None = None, after: str | None = None) -> Tokenizer:
    """A word-level tokenizer whose own template puts special tokens around a text."""
    special = [token for token in ("<unk>", before, after, "</s>") if token]
    words = "a the dog cat chases red blue circle square above query :".split()
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(special)
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=" ".join(part for part in (before, "$A", after) if part),
            special_tokens=[(token, vocabulary[token]) for token in (before, after) if token],
        )
    return tokenizer


def model_folder(path: Path, tokenizer: Tokenizer | None = None, **config: object) -> Path:
    path.mkdir(parents=True)
    shape = {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
    }
    (path / "config.json").write_text(json.dumps(shape | config))
    (tokenizer or tiny()).save(str(path / "tokenizer.json"))
    return path


# ---------------------------------------------------------------------------------------------- break-even


@pytest.mark.parametrize(
    ("model", "epochs"), [("e5-mistral", 61), ("qwen3-embedding", 61), ("qwen3-embedding-0.6b", 4)]
)
def test_a_7b_encoder_at_77_real_tokens_pays_after_61_epochs_and_a_06b_one_after_4(
    model: str, epochs: int
) -> None:
    once = float(costs.ENCODERS[model].shape.flops(77))
    assert round(once / costs.clip_training_flops("vit-b-16")) == epochs


@pytest.mark.parametrize(
    ("clip", "gflop"),
    # open_clip, docs/model_profile.csv, text_gflops: of the forward pass, the masked half of attention included
    [
        ("vit-s-16", 3.38),
        ("vit-b-32", 5.96),
        ("vit-b-16", 5.96),
        ("vit-l-14", 13.30),
        ("vit-h-14", 47.09),
        ("vit-bigg-14", 97.86),
    ],
)
def test_clips_text_towers_cost_what_open_clip_measures(clip: str, gflop: float) -> None:
    forward = replace(costs.CLIP_TEXT[clip], causal=False).flops(costs.CLIP_CONTEXT)
    assert float(forward) / 1e9 == pytest.approx(gflop, abs=0.006)


def test_a_repeated_caption_is_embedded_once_and_trained_on_every_time(
    tmp_path: Path, planned: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "once.txt").write_text("a dog runs\n")
    (tmp_path / "often.txt").write_text("a dog runs\n" * 8)
    once, often = planned(str(tmp_path / "once.txt")), planned(str(tmp_path / "often.txt"))
    assert often["captions"] == 8
    assert often["unique_share"] == 1 / 8
    assert often["compute"] == once["compute"]
    ratio = often["break_even"]["epochs_by_runs"]["1"] / once["break_even"]["epochs_by_runs"]["1"]
    assert ratio == pytest.approx(1 / 8)


def test_a_cache_that_is_reused_in_n_runs_pays_after_an_nth_of_the_epochs(
    source: str, planned: Callable[..., dict[str, Any]], said: Callable[..., str]
) -> None:
    found = planned(source, "--epochs", "2", "--runs", "5")["break_even"]
    epochs = found["epochs_by_runs"]
    assert epochs["5"] == pytest.approx(epochs["1"] / 5)
    assert found["share_of_joint"] == pytest.approx(epochs["1"] / 10)
    assert (
        f"for {epochs['1']:.2g} epochs; with the cache reused in 5 runs, {epochs['5']:.2g} epochs in each"
        in (said(source, "--runs", "5"))
    )
    less = f"For 100 epochs, it costs {100 / epochs['1']:.0f} times less."
    assert less in said(source, "--epochs", "100")


def test_the_plan_says_what_it_leaves_out(source: str, said: Callable[..., str]) -> None:
    assert "the image tower and the loss, the same on both sides" in said(source)


# ---------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("name", costs.ENCODERS)
def test_blocks_and_embeddings_add_up_to_the_published_parameter_count(name: str) -> None:
    encoder = costs.ENCODERS[name]
    outputs = 2 if name in ("mistral", "vicuna") else 1  # these two are published with an output projection
    pooling = (3 * 4096 * 32_768 + 4096 * 65_536 + 4096 * 16_384) if name == "nv-embed-v2" else 0
    added = encoder.shape.weights + outputs * encoder.vocabulary * encoder.dimensions + pooling
    # The rest are norms and biases; MiniLM also has position embeddings and a pooler that is not used.
    assert added == pytest.approx(encoder.parameters, rel=0.02 if name == "minilm" else 0.001)


@pytest.mark.parametrize("name", NAMED)
def test_every_recipe_of_the_server_can_be_planned_with_as_the_server_will_run_it(name: str) -> None:
    encoder, recipe = costs.ENCODERS[name], NAMED[name]
    assert encoder.max_tokens == recipe.max_tokens
    assert (encoder.dtype == "float32") == (recipe.dtype == "float32")
    assert recipe.model in (encoder.name, encoder.model)
    assert recipe.remote_code == ("--trust-remote-code" in encoder.serve)


@pytest.mark.parametrize("model", [*costs.ENCODERS, "intfloat/e5-mistral-7b-instruct"])
def test_the_next_commands_are_commands_of_the_embedder(
    model: str, source: str, planned: Callable[..., dict[str, Any]]
) -> None:
    serve, fill = planned(source, "--model", model, "--template", "query: {caption}", "--max-tokens", "64")[
        "next"
    ]
    _, bound, _ = embed_app.parse_args(shlex.split(serve)[1:], exit_on_error=False, print_error=False)
    config = bound.arguments["config"]
    assert (config.template, config.max_tokens) == ("query: {caption}", 64)
    assert config.model in NAMED or config.pooling == "last"
    _, bound, _ = embed_app.parse_args(shlex.split(fill)[1:], exit_on_error=False, print_error=False)
    assert bound.arguments["sources"] == (source,)


def test_a_folder_is_planned_with_by_its_own_config_and_tokenizer(
    tmp_path: Path, source: str, planned: Callable[..., dict[str, Any]]
) -> None:
    folder = model_folder(tmp_path / "mine")
    found = planned(source, "--model", str(folder))
    named = planned(source, "--model", "smollm2")
    assert found["encoder"]["block_weights"] == named["encoder"]["block_weights"]
    assert found["encoder"]["dimensions"] == 576
    assert found["tokens"]["exact"]
    assert found["tokens"]["total"] == sum(len(c.split()) + 1 for c in {normalise(c) for c in CAPTIONS})
    assert f"--model {folder}" in found["next"][0]


def test_a_bert_is_bidirectional_and_has_no_gate(tmp_path: Path) -> None:
    bert: dict[str, Any] = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": None,
        "vocab_size": 30_522,
    }
    found = costs.find_encoder(str(model_folder(tmp_path / "bert", **bert)))
    assert found.shape == costs.ENCODERS["minilm"].shape


# ---------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "around", [{}, {"before": "<s>"}, {"after": "</s>"}, {"before": "[CLS]", "after": "[SEP]"}]
)
@pytest.mark.parametrize("template", ["{caption}", "query : {caption} </s>"])
def test_tokens_are_counted_as_the_server_counts_them(
    around: dict[str, str], template: str, tmp_path: Path, recipe: Recipe
) -> None:
    shield_imports()
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny(**around)
    # What sentence encoders ship with; the server sets both aside as well.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>", unk_token="<unk>"
    )
    server = CaptionTokenizer(recipe.model_copy(update={"template": template, "max_tokens": 1000}), fast)
    texts = [normalise(caption) for caption in CAPTIONS]
    if template == "{caption}":
        texts.append("a </s> dog")  # the name of a special token is text
    counted = TokenizerCounter(tmp_path / "tokenizer.json", template)(texts)
    assert counted.tolist() == [len(tokens.ids) for tokens in server(texts)]


def test_the_tokenizer_of_a_prepared_model_is_used_for_its_name(
    tmp_path: Path, source: str, planned: Callable[..., dict[str, Any]]
) -> None:
    assert not planned(source, "--model", "smollm2")["tokens"]["exact"]
    folder = model_folder(tmp_path / "lift" / "models" / "smollm2-0.1.2")
    tokens = planned(source, "--model", "smollm2")["tokens"]
    assert tokens["exact"]
    assert str(folder) in tokens["counted"]


def test_the_tokenizer_in_the_hubs_cache_is_used_for_a_hub_model(
    tmp_path: Path, source: str, planned: Callable[..., dict[str, Any]]
) -> None:
    repository = tmp_path / "hub" / "models--intfloat--e5-mistral-7b-instruct"
    model_folder(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert planned(source, "--model", "e5-mistral")["tokens"]["exact"]


def test_an_estimate_is_called_one(source: str, said: Callable[..., str]) -> None:
    assert "estimated without the model's tokenizer" in said(source)
    assert EstimatedCounter("{caption}", 2)(["a dog runs, fast."]).tolist() == [2 + 6]
    assert EstimatedCounter("{caption}", 2)(["extraordinarily"]).tolist() == [2 + 2]


def test_without_the_tokenizers_library_a_name_is_estimated_and_a_folder_refused(
    tmp_path: Path,
    source: str,
    planned: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = model_folder(tmp_path / "mine")
    for library in ("tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, library, None)
    assert not planned(source)["tokens"]["exact"]
    with pytest.raises(SystemExit):
        run(source, "--model", str(folder))
    assert "install lift-cache[plan]" in capsys.readouterr().err


def test_captions_beyond_the_limit_are_counted_as_truncated_and_cost_no_more_than_the_limit(
    tmp_path: Path, planned: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(["dog " * n for n in (1, 2, 3, 4)]))
    tokens = planned(str(tmp_path / "captions.txt"), "--max-tokens", "5", "--model", "minilm")["tokens"]
    assert (tokens["truncated"], tokens["truncated_share"]) == (1, 0.25)
    assert tokens["total"] == 3 + 4 + 5 + 5
    assert tokens["longest"] == 6
    assert (tokens["p50"], tokens["p95"]) == (4, 6)
    assert tokens["histogram"] == [[1, 5, 3], [6, None, 1]]


# ---------------------------------------------------------------------------------------------- captions


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), max_size=60), st.integers(1, 400))
def test_distinct_captions_are_counted_exactly_however_little_memory_there_is(
    keys: list[tuple[int, int]], memory: int
) -> None:
    with DistinctRows(memory) as distinct:
        for high, low in keys:
            distinct.add(np.array([(high, low, high % 7, low)], ROW))
        parts = np.concatenate(list(distinct.parts()))
    assert sorted(parts.tolist()) == sorted({(high, low, high % 7, low) for high, low in keys})


def test_temporary_files_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with DistinctRows(memory=1) as distinct:
        distinct.add(np.zeros(3, ROW))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_no_room_for_temporary_files_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with DistinctRows(memory=1) as distinct, pytest.raises(BadConfig, match="set TMPDIR"):
        distinct.add(np.zeros(3, ROW))


def test_rows_that_cannot_be_used_are_counted_and_named_without_acting_on_the_terminal(
    tmp_path: Path, planned: Callable[..., dict[str, Any]], said: Callable[..., str]
) -> None:
    source = tmp_path / "[bold]captions.jsonl"
    source.write_text('{"caption": "a dog"}\n{"caption": " "}\n{"caption": 7}\n{"caption": "a cat"}\n')
    found = planned(str(source))
    assert (found["rows"], found["captions"], found["bad"]) == (4, 2, 2)
    assert found["first_bad"] == [f"{source}:2: the caption is empty", f"{source}:3: not text but int"]
    assert "[bold]captions" in said(str(source))


def test_a_caption_in_which_the_tokenizer_finds_nothing_is_left_out_as_the_server_leaves_it_out(
    tmp_path: Path,
) -> None:
    class Counter:
        said, exact = "", True

        def __call__(self, texts: Sequence[str]) -> np.ndarray:
            return np.array([0 if text == "?" else 3 for text in texts])

    (tmp_path / "captions.txt").write_text("a dog\n?\n")
    found = survey([str(tmp_path / "captions.txt")], Counter(), 77)
    assert (found.captions, found.unique, found.bad) == (1, 1, 1)
    assert found.first_bad[0].endswith(":2: the tokenizer finds no token in the caption")


def test_a_sample_reads_only_the_first_captions_and_says_so(
    tmp_path: Path, planned: Callable[..., dict[str, Any]], said: Callable[..., str]
) -> None:
    (tmp_path / "1.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "2.txt").write_bytes(b"\x1f\x8bbroken")
    found = planned(str(tmp_path), "--sample", "3")
    assert (found["captions"], found["sampled"]) == (3, True)
    assert "the first 3 of 2 files" in said(str(tmp_path), "--sample", "3")
    assert not planned(str(tmp_path / "1.txt"), "--sample", "3")["sampled"]


# ---------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("dtype", "dimensions"), [("float32", 384), ("float16", 384), ("float16", 1024), ("int8", 1024)]
)
def test_the_planned_bytes_are_those_of_a_real_cache_within_3_per_cent(
    dtype: str,
    dimensions: int,
    tmp_path: Path,
    recipe: Recipe,
    vectors: Callable[..., np.ndarray],
    planned: Callable[..., dict[str, Any]],
) -> None:
    captions = [f"a photo of {number} things, no {number * 7919} of them red" for number in range(4000)]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    made = vectors(len(captions), dimensions=dimensions)
    recipe = recipe.model_copy(update={"dimensions": dimensions})
    encoding = Encoding(dtype=dtype, dimensions=dimensions) if dtype != "int8" else Encoding.fit_int8(made)
    write_cache(tmp_path / "cache", recipe, encoding, captions, made)
    real = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    folder = model_folder(tmp_path / "model", hidden_size=dimensions, num_attention_heads=8)
    storage = planned(str(tmp_path / "captions.txt"), "--model", str(folder))["storage"]
    assert next(one["total"] for one in storage if one["dtype"] == dtype) == pytest.approx(real, rel=0.03)


# ---------------------------------------------------------------------------------------------- mistakes


def test_every_mistake_is_one_line(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    experts = model_folder(tmp_path / "experts", num_local_experts=8)
    no_shape = model_folder(tmp_path / "no-shape", hidden_size=None)
    no_tokenizer = model_folder(tmp_path / "no-tokenizer")
    (no_tokenizer / "tokenizer.json").unlink()
    bad_tokenizer = model_folder(tmp_path / "bad-tokenizer")
    (bad_tokenizer / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n\n")
    for argv, expected in {
        (): "name at least one source",
        (str(tmp_path / "none.txt"),): "no such file",
        (str(tmp_path / "blank.txt"),): "no caption",
        (source, "--model", "nothing"): "known without a download: smollm2",
        (source, "--model", str(tmp_path / "empty")): "config.json",
        (source, "--model", str(experts)): "mixture of experts",
        (source, "--model", str(no_shape)): "does not describe a transformer",
        (source, "--model", str(no_tokenizer)): "tokenizer.json is missing",
        (source, "--model", str(bad_tokenizer)): "is not a tokenizer",
        (source, "--gpu", "tpu"): "known are a100",
        (source, "--mfu", "40"): "at most 1",
        (source, "--clip", "rn50"): "known are vit-s-16",
        (source, "--template", "no caption"): "exactly once",
        (source, "--max-tokens", "1"): "at least 2",
        (source, "--sample", "0"): "at least 1",
        (source, "--epochs", "0"): "at least 1",
        (source, "--runs", "0"): "at least 1",
        (source, "--epochs", "many"): "--epochs",
    }.items():
        with pytest.raises(SystemExit) as ended:
            run(*argv)
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert error.startswith("error: ") or "--epochs" in argv
        assert expected in error
        assert error.count("\n") == 1, error
