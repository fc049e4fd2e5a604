"""Who may use a server: the installed command, with keys, as another machine or a web page would see it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lift_cache.client import EmbeddingClient
from lift_cache.errors import BadConfig

KEYS = {"trainers": "r" * 24, "pipeline": "e" * 24, "operator": "a" * 24}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def test_beyond_this_machine_a_server_wants_keys(tmp_path: Path, embed_command: Any) -> None:
    done = embed_command(
        "serve", "--cache", tmp_path / "c", "--model", "minilm", "--host", "0.0.0.0", "--port", 0
    )
    assert done.returncode == 2 and not (tmp_path / "c").exists()
    assert done.stderr.startswith("error: --host 0.0.0.0") and "--insecure" in done.stderr


def test_a_bad_line_among_keys_is_named_and_no_key_shown(
    tmp_path: Path, embed_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_KEYS", f"trainers read {'s3cret' * 4};operator root {'s3cret' * 5}")
    done = embed_command("serve", "--cache", tmp_path / "c", "--model", "minilm", "--port", 0)
    assert done.returncode == 2 and "LIFT_KEYS entry 2" in done.stderr and "s3cret" not in done.stderr


def test_keys_open_what_their_scope_says_until_they_are_revoked(
    tmp_path: Path, serve: Callable[..., Any], wait_until: Any
) -> None:
    keys = tmp_path / "keys"
    scopes = {"trainers": "read", "pipeline": "embed", "operator": "admin"}
    keys.write_text("".join(f"{name} {scopes[name]} {key}\n" for name, key in KEYS.items()))
    os.chmod(keys, 0o600)  # noqa: PTH101
    server = serve("--engine", "transformers", "--keys-file", keys).wait_ready()
    caption = {"input": "a dog"}

    def status(method: str, path: str, name: str | None, body: Any = None) -> int:
        headers = bearer(name) if name else {}
        return httpx.request(method, server.url + path, headers=headers, json=body, timeout=60).status_code

    assert status("GET", "/livez", None) == status("GET", "/readyz", None) == 200
    for path in ("/", "/metrics", "/v1/cache", "/v1/stats", "/docs", "/openapi.json", "/no/such/path"):
        assert status("GET", path, None) == 401, path
    assert status("POST", "/v1/lookup", None, caption) == 401
    assert status("POST", "/v1/embeddings", "trainers", caption) == 403
    assert status("POST", "/v1/embeddings", "pipeline", caption) == 200
    assert status("POST", "/v1/lookup", "trainers", caption) == 200
    assert status("POST", "/v1/admin/seal", "pipeline") == 403
    assert status("POST", "/v1/admin/seal", "operator") == 200
    assert httpx.get(server.url, auth=("anyone", KEYS["trainers"])).status_code == 200

    with EmbeddingClient(server.url, api_key=KEYS["pipeline"]) as client:
        assert np.isfinite(client.embed(["a dog", "a cat"]).vectors).all()
    with EmbeddingClient(server.url, api_key="x" * 24) as client, pytest.raises(BadConfig) as refused:
        client.embed(["a dog"])
    assert "LIFT_API_KEY" in str(refused.value) and "x" * 24 not in str(refused.value)

    keys.write_text(f"operator admin {KEYS['operator']}\n")
    assert wait_until(lambda: status("GET", "/v1/cache", "pipeline") == 401, 10)
    assert status("GET", "/v1/cache", "operator") == 200

    log = server.log.read_text()
    assert '"key": "pipeline"' in log and not any(key in log for key in KEYS.values())


def test_a_page_of_another_site_cannot_use_a_server_on_this_machine(server: Any) -> None:
    def post(**headers: str) -> int:
        sent = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return httpx.post(f"{server.url}/v1/lookup", content=b'{"input": "a"}', headers=sent).status_code

    assert post() == 200 and post(origin=server.url) == 200
    assert post(host="rebound.example") == post(origin="https://evil.example") == 403
    assert post(sec_fetch_site="cross-site") == 403
    assert post(content_type="text/plain") == post(content_type="application/x-www-form-urlencoded") == 415
    answer = httpx.get(f"{server.url}/v1/cache", headers={"origin": server.url})
    assert not [name for name in answer.headers if name.startswith("access-control")]
