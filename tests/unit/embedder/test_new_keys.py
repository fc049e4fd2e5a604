"""Fresh keys: random, kept, readable by nobody else, and what a server and its clients take."""

from __future__ import annotations

from pathlib import Path

import pytest

from lift_cache.client import EmbeddingClient
from lift_cache.errors import BadConfig
from lift_embedder.access import Keys, Scope
from lift_embedder.cli import main
from lift_embedder.new_keys import make_keys


def test_keys_open_what_they_are_for_and_stay_when_they_are_made_again(tmp_path: Path) -> None:
    wanted = {"fill": Scope.EMBED, "read": Scope.READ}
    assert make_keys(tmp_path / "keys", wanted) == ["fill", "read"]
    keys = Keys(tmp_path / "keys" / "server")
    first = (tmp_path / "keys" / "fill").read_text().strip()
    found = keys.find(first.encode())
    assert found is not None and (found.name, found.scope) == ("fill", Scope.EMBED)
    assert make_keys(tmp_path / "keys", wanted | {"admin": Scope.ADMIN}) == ["admin"]
    assert (tmp_path / "keys" / "fill").read_text().strip() == first
    assert len((tmp_path / "keys" / "server").read_text().splitlines()) == 3


def test_nobody_but_the_owner_reads_all_keys_and_nobody_but_the_group_one(tmp_path: Path) -> None:
    make_keys(tmp_path, {"fill": Scope.EMBED})
    assert (tmp_path / "server").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "fill").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["fill", "fill=all", "server=read", "../up=read", "=read"])
def test_a_name_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["keys", str(tmp_path / "keys"), "--name", name])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: --name") and said.count("\n") == 1
    assert not (tmp_path / "keys").exists()


def test_a_client_reads_its_key_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIFT_API_KEY", raising=False)
    monkeypatch.setenv("LIFT_API_KEY_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(BadConfig, match=r"LIFT_API_KEY_FILE .*nowhere: No such file"):
        EmbeddingClient("http://127.0.0.1:1")
    (tmp_path / "key").write_text("a-key-of-some-length\n")
    monkeypatch.setenv("LIFT_API_KEY_FILE", str(tmp_path / "key"))
    EmbeddingClient("http://127.0.0.1:1").close()
