"""Making a cache of vectors that other software embedded."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cyclopts import App

from lift_cache import files
from lift_cache.bulk import write_cache
from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, BadSource, CacheFull, LiftError, RecipeMismatch
from lift_cache.keys import caption_keys
from lift_cache.reader import CacheReader
from lift_cache.recipe import Recipe
from lift_cache.tools import vector_files
from lift_cache.tools.export import export_parquet
from lift_cache.tools.importing import Declared, Fields, Import, import_command, import_vectors
from lift_cache.verify import verify
from lift_cache.writer import CacheWriter

Vectors = Callable[..., np.ndarray]
D = 24
DECLARED = Declared(model="someone/model")


def names(n: int, start: int = 0) -> list[str]:
    return [f"a caption with the number {i}" for i in range(start, start + n)]


def parquet(path: Path, captions: Sequence[object], vectors: Sequence[object], **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = columns.pop("kind", pa.list_(pa.float32()))
    text, vector = columns.pop("text", "caption"), columns.pop("vector", "embedding")
    table = {
        text: pa.array(captions),
        vector: pa.array([None if v is None else list(v) for v in vectors], kind),
    }
    pq.write_table(pa.table({**table, **columns}), path, write_page_checksum=True)
    return path


def stored(cache: Path, captions: list[str]) -> np.ndarray:
    reader = CacheReader(cache)
    return reader.gather(reader.lookup(caption_keys(captions)), check=True)


def listed(result: Import) -> list[dict[str, str]]:
    assert result.list_file is not None
    return [json.loads(line) for line in Path(result.list_file).read_text().splitlines()]


# Captions and vectors side by side


@pytest.mark.parametrize("kind", ["list", "fixed", "large", "half", "double", "npz"])
def test_vectors_of_every_form_are_read_as_they_are(kind: str, tmp_path: Path, vectors: Vectors) -> None:
    drawn, out = vectors(9_000), tmp_path / "cache"
    if kind == "npz":
        source = tmp_path / "a.npz"
        np.savez(source, caption=np.array(names(9_000)), vectors=drawn)
    else:
        types = {
            "list": pa.list_(pa.float32()),
            "fixed": pa.list_(pa.float32(), D),
            "large": pa.large_list(pa.float32()),
            "half": pa.list_(pa.float16()),
            "double": pa.list_(pa.float64()),
        }
        values = drawn.astype(np.float16) if kind == "half" else drawn
        source = parquet(tmp_path / "a.parquet", names(9_000), values, kind=types[kind])
    result = import_vectors([str(source)], out, DECLARED)
    assert (result.rows, result.imported, result.captions, result.rejected) == (9_000, 9_000, 9_000, 0)
    np.testing.assert_array_equal(stored(out, names(9_000)), drawn.astype(np.float16))
    assert CacheReader(out).captions(np.arange(9_000)) != []
    assert result.list_file is None and not list(tmp_path.glob("*.jsonl"))
    assert verify(out).problems == []


def test_the_recipe_is_what_was_said_and_marked_declared(
    tmp_path: Path, vectors: Vectors, recipe: Recipe
) -> None:
    source = parquet(tmp_path / "a.parquet", names(5), vectors(5))
    said = Declared(model="m", revision="abc", compute_dtype="float16", pooling="last", max_tokens=77)
    import_vectors([str(source)], tmp_path / "cache", said, store="float32")
    reader = CacheReader(tmp_path / "cache")
    made = reader.recipe
    assert made.declared
    assert (made.model, made.revision, made.dtype, made.pooling) == ("m", "abc", "float16", "last")
    assert (made.max_tokens, made.dimensions) == (77, D)
    assert reader.encoding == Encoding(dtype="float32", dimensions=D)
    assert reader.manifest.provenance == ({"imported": "a.parquet"},)

    import_vectors([str(source)], tmp_path / "exact", recipe)
    assert CacheReader(tmp_path / "exact").recipe == recipe.model_copy(update={"declared": True})
    with pytest.raises(RecipeMismatch, match="declared"):
        CacheWriter.open(tmp_path / "exact", recipe)


def test_an_imported_cache_can_be_filled_further(tmp_path: Path, vectors: Vectors) -> None:
    source = parquet(tmp_path / "a.parquet", names(5), vectors(5))
    import_vectors([str(source)], tmp_path / "cache", DECLARED)
    with CacheWriter.open(tmp_path / "cache") as writer:
        assert writer.contains(caption_keys(names(6))).tolist() == [True] * 5 + [False]


def test_what_was_exported_is_imported_as_it_was(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    tokens = np.arange(50)
    original = tmp_path / "original"
    write_cache(original, recipe, Encoding(dimensions=D), names(50), vectors(50), tokens, tokens > 40)
    export_parquet(str(original), tmp_path / "a.parquet")
    import_vectors([str(tmp_path / "a.parquet")], tmp_path / "again", recipe)
    a, b = CacheReader(original), CacheReader(tmp_path / "again")
    rows = a.lookup(caption_keys(names(50))), b.lookup(caption_keys(names(50)))
    np.testing.assert_array_equal(a.gather(rows[0]), b.gather(rows[1]))
    assert a.tokens(rows[0]).tolist() == b.tokens(rows[1]).tolist() == tokens.tolist()
    assert a.truncated(rows[0]).tolist() == b.truncated(rows[1]).tolist()


def test_bad_rows_are_left_out_listed_and_counted_and_the_rest_goes_in(
    tmp_path: Path, vectors: Vectors
) -> None:
    good = [*vectors(8)]
    rows: list[object] = [*good]
    rows[1] = good[1][:-1]
    rows[2] = np.zeros(D)
    rows[3] = np.where(np.arange(D) == 3, np.nan, good[3])
    rows[4] = None
    rows[5] = good[5] * 1e6
    captions: list[str | None] = [*names(8)]
    captions[6] = None
    captions[7] = "   "
    source = parquet(tmp_path / "a.parquet", captions, rows)
    dry = import_vectors([str(source)], tmp_path / "cache", DECLARED, dry_run=True)
    assert (dry.rows, dry.imported, dry.rejected) == (8, 1, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet"]

    result = import_vectors([str(source)], tmp_path / "cache", DECLARED)
    assert (result.rows, result.imported, result.captions, result.rejected) == (8, 1, 1, 7)
    reasons = {int(line["where"].rpartition(":")[2]): line["reason"] for line in listed(result)}
    assert reasons == {
        2: f"a vector of length {D - 1}, not {D}",
        3: "the vector is zero",
        4: "the vector has a value that is not finite",
        5: f"a vector of length 0, not {D}",
        6: "the vector has a value beyond the range of float16",
        7: "a caption must be text, not NoneType",
        8: "the caption is empty",
    }
    assert result.list_file == str(tmp_path / "cache.left-out.jsonl")
    assert all(line["where"].startswith(f"{source}:") for line in listed(result))
    np.testing.assert_array_equal(stored(tmp_path / "cache", names(1)), good[0][None].astype(np.float16))


def test_of_equal_captions_the_first_counts_across_files_and_segments(
    tmp_path: Path, vectors: Vectors
) -> None:
    drawn = vectors(12)
    a = parquet(tmp_path / "a.parquet", names(6), drawn[:6])
    b = parquet(tmp_path / "b.parquet", [" a caption  with the number 0", *names(5, 5)], drawn[6:])
    result = import_vectors([str(a), str(b)], tmp_path / "cache", DECLARED)
    assert (result.imported, result.captions) == (12, 10)
    first = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    np.testing.assert_array_equal(stored(tmp_path / "cache", names(10)), drawn[first].astype(np.float16))


def test_columns_are_found_or_the_error_says_which_there_are(tmp_path: Path, vectors: Vectors) -> None:
    source = parquet(
        tmp_path / "a.parquet", names(5), vectors(5), text="re_caption", vector="features", other=[1] * 5
    )
    cases = (
        (
            Fields(),
            r"no column 'caption' or .*; it has re_caption, features, other: name one with --caption-field",
        ),
        (Fields(caption="re_caption"), r"no column 'embedding' or .*: name one with --vector-field"),
        (Fields(caption="re_caption", vector="other"), r"column 'other' is int64, not lists of floats"),
        (Fields(caption="nope"), r"no column 'nope'; it has"),
    )
    for fields, said in cases:
        with pytest.raises(BadSource, match=said):
            import_vectors([str(source)], tmp_path / "cache", DECLARED, fields=fields)
    fields = Fields(caption="re_caption", vector="features")
    assert import_vectors([str(source)], tmp_path / "cache", DECLARED, fields=fields).captions == 5


def test_npz_files_that_cannot_be_used_say_why(tmp_path: Path, vectors: Vectors) -> None:
    drawn, texts = vectors(5), np.array(names(5))
    cases: list[tuple[dict[str, np.ndarray], str]] = [
        ({"caption": texts.astype(object), "vectors": drawn}, "holds Python objects, which are not opened"),
        ({"caption": texts, "vectors": np.asfortranarray(drawn)}, "Fortran order"),
        ({"caption": texts[:4], "vectors": drawn}, "4 captions and 5 vectors"),
        ({"caption": texts, "vectors": drawn[0]}, "not floats"),
        ({"caption": np.arange(5), "vectors": drawn}, "not a list of texts"),
        ({"caption": texts, "states": drawn}, "it has caption, states: name one with --vector-field"),
    ]
    for arrays, said in cases:
        np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(BadSource, match=said):
            import_vectors([str(tmp_path / "a.npz")], tmp_path / "cache", DECLARED)
    np.savez_compressed(tmp_path / "a.npz", caption=texts, vectors=drawn)
    assert import_vectors([str(tmp_path / "a.npz")], tmp_path / "cache", DECLARED).captions == 5


@pytest.mark.parametrize("name", ["a.parquet", "a.npz"])
def test_a_broken_source_is_an_error_and_leaves_no_cache(name: str, tmp_path: Path, vectors: Vectors) -> None:
    drawn = vectors(9_000)
    good = parquet(tmp_path / "0.parquet", names(10), drawn[:10])
    if name == "a.npz":
        np.savez(tmp_path / name, caption=np.array(names(9_000)), vectors=drawn)
    else:
        parquet(tmp_path / name, names(9_000), drawn)
    whole = (tmp_path / name).read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 3 : len(whole) // 3 + 4000] = b"\xff" * 4000
    for data in (whole[: len(whole) // 2], b"", bytes(middle)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadSource, match=str(tmp_path / name)):
            import_vectors([str(good), str(tmp_path / name)], tmp_path / "cache", DECLARED)
        assert not (tmp_path / "cache").exists()


def test_when_no_row_can_be_imported_there_is_no_cache(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a.parquet", names(2), [np.zeros(D)] * 2)
    with pytest.raises(
        BadSource, match=r"no row of a\.parquet can be imported \(.*a\.parquet:1: the vector is zero"
    ):
        import_vectors([str(source)], tmp_path / "cache", DECLARED)
    assert not (tmp_path / "cache").exists()
    source = parquet(tmp_path / "b.parquet", [], [], kind=pa.list_(pa.float32()))
    with pytest.raises(BadSource, match="there is no vector in the sources"):
        import_vectors([str(source)], tmp_path / "cache", DECLARED)


def test_only_a_new_cache_is_made(tmp_path: Path, recipe: Recipe, vectors: Vectors) -> None:
    source = parquet(tmp_path / "a.parquet", names(2), vectors(2))
    write_cache(tmp_path / "cache", recipe, Encoding(dimensions=D), names(3), vectors(3))
    with pytest.raises(BadConfig, match="choose an empty or new directory"):
        import_vectors([str(source)], tmp_path / "cache", DECLARED)
    assert len(CacheReader(tmp_path / "cache")) == 3
    with pytest.raises(BadConfig, match="--model"):
        import_vectors([str(source)], tmp_path / "new", Declared())
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path / "a.parquet", names(50), vectors(50))
    monkeypatch.setattr(files, "free_bytes", lambda _: 100)
    with pytest.raises(CacheFull, match="an import of 50 rows"):
        import_vectors([str(source)], tmp_path / "cache", DECLARED)
    assert not (tmp_path / "cache").exists()


# The LIFT authors' layout

FIRST, SECOND = "train-00000-of-03550", "train-00001-of-03550"


def authors_layout(root: Path, captions_of: dict[str, list[str]], drawn: dict[str, np.ndarray]) -> None:
    """`caption_embeddings/<shard>/<number>.parquet` and `raw_captions/<shard>.parquet`; the names of images
    begin again in every shard."""
    for name, captions in captions_of.items():
        keys = [f"{i + 1:012}" for i in range(len(captions))]
        for number, start in enumerate(range(0, len(captions), 100)):
            stop = min(start + 100, len(captions))
            parquet(
                root / "caption_embeddings" / name / f"{number}.parquet",
                [f"{key}.jpg" for key in keys[start:stop]],
                drawn[name][start:stop],
                text="key",
            )
        metadata = pa.table({"key": keys, "org_caption": captions, "extension": ["jpg"] * len(keys)})
        (root / "raw_captions").mkdir(exist_ok=True)
        pq.write_table(metadata, root / "raw_captions" / f"{name}.parquet")


@pytest.fixture
def authors(tmp_path: Path, vectors: Vectors) -> dict[str, np.ndarray]:
    drawn = {FIRST: vectors(250, 1), SECOND: vectors(130, 2)}
    authors_layout(tmp_path, {FIRST: names(250), SECOND: names(130, 1000)}, drawn)
    return drawn


def joined(tmp_path: Path, out: str = "cache", **options: object) -> Import:
    return import_vectors(
        [str(tmp_path / "caption_embeddings")],
        tmp_path / out,
        DECLARED,
        metadata=tmp_path / str(options.pop("metadata", "raw_captions")),
        fields=Fields(caption="org_caption"),
        **options,  # type: ignore[arg-type]
    )


def test_every_vector_of_the_authors_layout_gets_the_caption_of_its_image(
    tmp_path: Path, authors: dict[str, np.ndarray]
) -> None:
    result = joined(tmp_path)
    assert (result.rows, result.imported, result.captions) == (380, 380, 380)
    assert (result.rejected, result.unmatched_vectors, result.unmatched_captions) == (0, 0, 0)
    for name, captions in ((FIRST, names(250)), (SECOND, names(130, 1000))):
        np.testing.assert_array_equal(stored(tmp_path / "cache", captions), authors[name].astype(np.float16))


def test_what_has_no_partner_is_counted_and_listed_on_both_sides(
    tmp_path: Path, authors: dict[str, np.ndarray]
) -> None:
    metadata = tmp_path / "raw_captions" / f"{FIRST}.parquet"
    table = pq.read_table(metadata)
    pq.write_table(table.slice(10), metadata)  # ten images lose their caption
    (tmp_path / "caption_embeddings" / SECOND / "1.parquet").unlink()  # thirty captions lose their vector
    dry = joined(tmp_path, dry_run=True)
    result = joined(tmp_path)
    for one in (dry, result):
        assert (one.rows, one.imported, one.rejected) == (350, 340, 0)
        assert (one.unmatched_vectors, one.unmatched_captions) == (10, 30)
    lines = listed(result)
    assert len(lines) == 40
    first = tmp_path / "caption_embeddings" / FIRST / "0.parquet"
    assert lines[0] == {"where": f"{first}:1", "reason": f"{metadata} names no image '000000000001.jpg'"}
    second = tmp_path / "raw_captions" / f"{SECOND}.parquet"
    assert lines[-1] == {"where": f"{second}:130", "reason": "no vector of an image named '000000000130'"}
    assert dry.list_file is None


def test_files_that_were_cut_short_and_bad_rows_do_not_hold_up_the_others(
    tmp_path: Path, authors: dict[str, np.ndarray]
) -> None:
    folder = tmp_path / "caption_embeddings" / FIRST
    (folder / "1.parquet").write_bytes((folder / "1.parquet").read_bytes()[:500])
    drawn = [*authors[FIRST][200:250]]
    drawn[3] = np.full(D, np.nan)
    parquet(folder / "2.parquet", [f"{i + 1:012}.jpg" for i in range(200, 250)], drawn, text="key")
    result = joined(tmp_path)
    assert (result.imported, result.rejected, result.unmatched_captions) == (279, 2, 100)
    reasons = {line["where"]: line["reason"] for line in listed(result)}
    assert "not readable as Parquet" in reasons[str(folder / "1.parquet")]
    assert reasons[f"{folder / '2.parquet'}:4"] == "the vector has a value that is not finite"


def test_an_image_with_two_captions_is_not_guessed_and_one_written_twice_counts_once(
    tmp_path: Path, authors: dict[str, np.ndarray]
) -> None:
    metadata = tmp_path / "raw_captions" / f"{FIRST}.parquet"
    table = pq.read_table(metadata)
    again = table.slice(0, 2)
    other = again.set_column(1, "org_caption", pa.array([again["org_caption"][0].as_py(), "something else"]))
    pq.write_table(pa.concat_tables([table, other]), metadata)
    # The authors' loader rolls over: the first batch of a shard is embedded once more at the end.
    folder = tmp_path / "caption_embeddings" / FIRST
    (folder / "3.parquet").write_bytes((folder / "0.parquet").read_bytes())
    result = joined(tmp_path)
    assert (result.rows, result.imported, result.captions) == (480, 478, 379)
    assert (result.rejected, result.unmatched_captions) == (2, 0)
    assert {line["reason"] for line in listed(result)} == {
        f"{metadata} has no caption of '000000000002.jpg', or several"
    }


def test_one_metadata_file_serves_one_folder_or_names_with_folders(
    tmp_path: Path, authors: dict[str, np.ndarray]
) -> None:
    with pytest.raises(
        BadSource, match=rf"'000000000001\.jpg' is in the folders {FIRST} and {SECOND}; give --metadata"
    ):
        joined(tmp_path, metadata=f"raw_captions/{FIRST}.parquet")
    assert not (tmp_path / "cache").exists()
    tables = [pq.read_table(tmp_path / "raw_captions" / f"{name}.parquet") for name in (FIRST, SECOND)]
    whole = [
        f"{name}/{key}.jpg"
        for name, table in zip((FIRST, SECOND), tables, strict=True)
        for key in table["key"].to_pylist()
    ]
    captions = pa.concat_tables(tables)["org_caption"]
    pq.write_table(pa.table({"filename": whole, "org_caption": captions}), tmp_path / "all.parquet")
    result = joined(tmp_path, metadata="all.parquet")
    assert (result.captions, result.unmatched_captions) == (380, 0)
    np.testing.assert_array_equal(
        stored(tmp_path / "cache", names(130, 1000)), authors[SECOND].astype(np.float16)
    )


def test_a_folder_without_metadata_is_found_before_anything_is_read(
    tmp_path: Path, authors: dict[str, np.ndarray]
) -> None:
    (tmp_path / "raw_captions" / f"{SECOND}.parquet").unlink()
    with pytest.raises(BadSource, match=rf"{SECOND}: its captions should be in .*{SECOND}\.parquet"):
        joined(tmp_path)
    with pytest.raises(BadSource, match="no such file"):
        joined(tmp_path, metadata="nowhere")
    with pytest.raises(BadSource, match="are folders of Parquet files"):
        import_vectors(
            [str(tmp_path / "x.parquet")], tmp_path / "c", DECLARED, metadata=tmp_path / "raw_captions"
        )


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).normal(size=(8_000, 2_048)).astype(np.float32)  # 66 MB
    np.savez(tmp_path / "a.npz", caption=np.array(names(8_000)), vectors=drawn)
    column = pa.FixedSizeListArray.from_arrays(pa.array(drawn.reshape(-1)), 2_048)
    table = pa.table({"caption": names(8_000), "embedding": column})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=8_000)
    pq.write_table(table, tmp_path / "many.parquet", row_group_size=500)
    del table, column, drawn
    for name in ("a.npz", "one.parquet", "many.parquet"):
        rows, most, before = 0, 0, pa.total_allocated_bytes()
        tracemalloc.start()
        for batch in vector_files.vector_rows(tmp_path / name, None, None):
            rows += len(batch)
            most = max(most, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows == 8_000
        assert most < 45e6, name


# The command


def run(*argv: str) -> int:
    app = App()
    app.command(import_command, name="import")
    return app(["import", *argv], exit_on_error=False, print_error=False, result_action="return_value")


def test_the_command_says_in_json_what_it_did_and_its_status_whether_all_went_in(
    tmp_path: Path, vectors: Vectors, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = vectors(5)
    source = str(parquet(tmp_path / "a.parquet", names(5), drawn))
    assert (
        run(
            source,
            "--out",
            str(tmp_path / "a"),
            "--model",
            "m",
            "--max-tokens",
            "77",
            "--normalized",
            "--json",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["captions"] == 5
    made = CacheReader(tmp_path / "a").recipe
    assert (made.model, made.max_tokens, made.normalize, made.declared) == ("m", 77, True, True)

    drawn[2] = 0
    parquet(tmp_path / "a.parquet", names(5), drawn)
    recipe.save(tmp_path / "recipe.json")
    exact = ("--recipe", str(tmp_path / "recipe.json"))
    assert run(source, "--out", str(tmp_path / "b"), *exact, "--left-out", str(tmp_path / "bad")) == 1
    assert "1 rejected" in capsys.readouterr().out
    assert json.loads((tmp_path / "bad").read_text())["reason"] == "the vector is zero"
    assert run(source, "--out", str(tmp_path / "c"), *exact, "--dry-run") == 1
    assert capsys.readouterr().out.startswith(
        "dry run, nothing was written: 5 rows, 4 of them can be imported"
    )
    for wrong in ((*exact, "--model", "m"), ("--model", "m", "--template", "no caption")):
        with pytest.raises(LiftError):
            run(source, "--out", str(tmp_path / "d"), *wrong)
    with pytest.raises(BadConfig, match="at least one source"):
        run("--out", str(tmp_path / "d"), "--model", "m")
    assert not (tmp_path / "d").exists()
