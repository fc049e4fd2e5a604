"""A cache can be checked against an engine: captions are embedded again and compared with what is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_cache.bulk import write_cache
from lift_cache.cli import main
from lift_cache.client import EmbeddingClient
from lift_cache.reader import CacheReader

CAPTIONS = [f"{animal} number {i} sleeps" for animal in ("cat", "dog", "owl") for i in range(10)]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    try:
        main(["verify", *argv])
    except SystemExit as ended:
        return int(str(ended.code)), "".join(capsys.readouterr())
    return 0, "".join(capsys.readouterr())


def test_a_sample_is_embedded_again_and_has_to_agree(
    server: Any, serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddingClient(server.url) as client:
        client.embed(CAPTIONS)
        client.snapshot()
    cache = tmp_path / "copy"
    shutil.copytree(server.cache, cache, ignore=shutil.ignore_patterns("live", "writer.lock"))
    status, said = run(capsys, str(cache), "--sample", "30", "--server", server.url)
    assert status == 2 and "answered from its cache" in said
    other = serve("--engine", "transformers", cache=tmp_path / "empty").wait_ready()
    status, said = run(capsys, str(cache), "--sample", "30", "--server", other.url, "--json")
    assert status == 0, said
    sample = json.loads(said)["sample"]
    assert sample["rows"] == 30 and sample["token_counts_equal"]
    assert 0.9999 < sample["min_cosine"] <= 1.0000001
    assert '"verified"' in (cache / "provenance.json").read_text()

    reader = CacheReader(cache)
    rows = reader.lookup(np.concatenate(list(reader.iter_keys())))
    turned = reader.encoding.decode(reader.gather(np.roll(rows, 1)))
    captions = [f"{caption} again" for caption in reader.captions(rows)]
    write_cache(tmp_path / "wrong", reader.recipe, reader.encoding, captions, turned, reader.tokens(rows))
    status, said = run(capsys, str(tmp_path / "wrong"), "--sample", "30", "--server", other.url)
    assert status == 1 and "gives other vectors for this recipe" in said
