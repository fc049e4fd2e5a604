"""Who is let in: keys and their scopes, and what keeps web pages away from a server on localhost."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Scope

from lift_cache.errors import BadConfig
from lift_embedder import access
from lift_embedder.access import Access, Key, Keys, has_entry, is_loopback, refuse_open_listening

READER, WRITER, ADMIN = "reader-0123456789", "writer-0123456789", "admin-0123456789"
ENTRIES = f"page read {READER}; trainer embed {WRITER}; ops admin {ADMIN}"

Ask = Callable[..., httpx.Response]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def answering(app: Any) -> Ask:
    """Ask an application for one thing."""

    def ask(method: str, path: str, headers: Any = None, **content: Any) -> httpx.Response:
        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
                return await client.request(method, path, headers=headers, **content)

        return asyncio.run(main())

    return ask


def guarded(keys: Keys | None, *, loopback: bool = True, allowed_hosts: tuple[str, ...] = ()) -> Ask:
    """An application that says whom it sees, behind Access."""
    app = FastAPI(docs_url=None, openapi_url=None)

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def seen(request: Request) -> dict[str, Any]:
        state = request.state
        return {"key": getattr(state, "key", None), "scope": getattr(state, "scope", None)}

    app.add_middleware(Access, keys=keys, loopback=loopback, allowed_hosts=allowed_hosts)
    return answering(app)


@pytest.fixture
def keys() -> Keys:
    return Keys(None, ENTRIES)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


# Scopes

NEEDED = {
    "read": [
        *(("GET", path) for path in ("/", "/docs", "/openapi.json", "/metrics")),
        *(("GET", path) for path in ("/v1/cache", "/v1/models", "/v1/stats", "/no/such/path", "/v1/admin")),
        *(("POST", path) for path in ("/v1/lookup", "/v1/neighbours")),
    ],
    "embed": [("POST", "/v1/embeddings"), ("POST", "/v1/snapshots")],
    "admin": [
        *(("POST", f"/v1/admin/{what}") for what in ("seal", "compact", "gc", "snapshots/keep", "new")),
        ("DELETE", "/v1/admin/snapshots/s-1"),
    ],
}


@pytest.mark.parametrize(
    ("needed", "method", "path"), [(scope, *request) for scope, many in NEEDED.items() for request in many]
)
def test_a_key_reaches_what_its_scope_includes_and_no_more(
    needed: str, method: str, path: str, keys: Keys
) -> None:
    ask = guarded(keys, loopback=False)
    order = ["read", "embed", "admin"]
    for scope, key in zip(order, (READER, WRITER, ADMIN), strict=True):
        answer = ask(method, path, bearer(key))
        if order.index(scope) >= order.index(needed):
            assert answer.status_code == 200
        else:
            assert refusal(answer) == (403, "insufficient_scope")
            assert f"scope {needed}" in answer.json()["error"]["message"]
    assert refusal(ask(method, path)) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/version"])
def test_probes_need_no_key(path: str, keys: Keys) -> None:
    assert guarded(keys, loopback=False)("GET", path).status_code == 200


def routes_without_an_entry(app: FastAPI) -> list[str]:
    """Paths of routes that the table of scopes does not name."""
    return [route.path for route in app.routes if not has_entry(route.path)]  # type: ignore[attr-defined]


def test_a_route_that_the_table_does_not_name_is_found() -> None:
    app = FastAPI(redoc_url=None)
    assert routes_without_an_entry(app) == []
    for path in ("/v1/embeddings", "/v1/admin/snapshots/{id}", "/v1/admin", "/v1/embeddings/{more}", "/new"):
        app.get(path)(lambda: None)
    assert routes_without_an_entry(app) == ["/v1/admin", "/v1/embeddings/{more}", "/new"]


def test_a_newline_behind_a_path_does_not_lower_the_scope_that_it_needs(keys: Keys) -> None:
    app = FastAPI()
    app.post("/v1/embeddings")(lambda: "embedded")
    assert (
        answering(app)("POST", "/v1/embeddings%0A").json() == "embedded"
    )  # the router takes it for the route
    app = FastAPI()
    app.post("/v1/embeddings")(lambda: "embedded")
    app.add_middleware(Access, keys=keys, loopback=False)
    assert refusal(answering(app)("POST", "/v1/embeddings%0A", bearer(READER))) == (404, "not_found")


def test_routes_and_logs_learn_whose_key_it_was(keys: Keys) -> None:
    ask = guarded(keys, loopback=False)
    assert ask("GET", "/", bearer(WRITER)).json() == {"key": "trainer", "scope": access.Scope.EMBED}
    assert guarded(None)("GET", "/").json() == {"key": None, "scope": access.Scope.ADMIN}


# Keys as they are presented


def test_a_browser_may_present_a_key_as_the_password_of_any_user(keys: Keys) -> None:
    ask = guarded(keys, loopback=False)
    for user in ("", "anybody", "läft"):
        credentials = base64.b64encode(f"{user}:{READER}".encode()).decode()
        for scheme in ("Basic", "basic"):
            answer = ask("GET", "/", {"Authorization": f"{scheme} {credentials}"})
            assert answer.json()["key"] == "page"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong-0123456789ab",
        f"Bearer {READER}x",
        f"Bearer {READER[:-1]}",
        f"Token {READER}",
        READER,
        "Basic",
        "Basic %%%",
        "Basic " + base64.b64encode(READER.encode()).decode(),
        "Basic " + base64.b64encode(f"{READER}:".encode()).decode(),
        "Bearer \xe4",
    ],
)
def test_anything_else_is_told_how_to_present_a_key(value: str, keys: Keys) -> None:
    answer = guarded(keys, loopback=False)("GET", "/", [(b"Authorization", value.encode("latin-1"))])
    assert refusal(answer) == (401, "invalid_api_key")
    # One challenge a line: browsers do not look behind a comma, and would not ask for a password.
    assert answer.headers.get_list("www-authenticate") == ['Basic realm="lift", charset="UTF-8"', "Bearer"]


def test_a_header_that_decides_may_come_only_once(keys: Keys) -> None:
    ask = guarded(keys, loopback=False)
    twice = [("Authorization", f"Bearer {READER}"), ("Authorization", f"Bearer {ADMIN}")]
    assert refusal(ask("GET", "/", twice)) == (400, "invalid_request")
    assert ask("GET", "/", [*twice[:1], ("Accept", "a"), ("Accept", "b")]).status_code == 200


# Keys as they are kept


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the cluster\n\n  page   read\t{READER}\n#gone embed {WRITER}\nops ADMIN {ADMIN}\n")
    file.chmod(0o600)
    keys = Keys(file, f"trainer embed {WRITER}")
    found = [keys.find(key.encode()) for key in (READER, WRITER, ADMIN)]
    assert [(key.name, key.scope.name) for key in found if key] == [
        ("page", "READ"),
        ("trainer", "EMBED"),
        ("ops", "ADMIN"),
    ]
    assert Keys.load(None, " ;\n") is None


def test_nothing_that_is_printed_or_kept_shows_a_key(tmp_path: Path, keys: Keys) -> None:
    found = keys.find(READER.encode())
    kept = repr(vars(keys).get("_keys")) + repr(keys) + repr(found) + str(vars(found))
    assert READER not in kept
    assert "digest" not in repr(found)


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        (f"page read {READER}\nother read\n", 2, "three"),
        (f"page read {READER} more\n", 1, "three"),
        (f"page {READER} read\n", 1, "read, embed or admin"),
        (f"# a\npage write {READER}\n", 2, "read, embed or admin"),
        ("page read short-0123456\n", 1, "16 or more"),
        ("page read ümlaut-0123456789\n", 1, "ASCII"),
        (f"pa/ge read {READER}\n", 1, "letters, digits"),
        (f"page read {READER}\npage embed {WRITER}\n", 2, "name is there already"),
        (f"page read {READER}\nother embed {READER}\n", 2, "key is there already"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_not_quoted(
    lines: str, line: int, what: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(lines)
    with pytest.raises(BadConfig, match=what) as refused:
        Keys(file)
    message = str(refused.value)
    assert f"{file} line {line}:" in message and "\n" not in message
    assert READER not in message and WRITER not in message


@settings(max_examples=40)
@given(st.lists(st.lists(st.text("xyzXYZ§", min_size=6, max_size=20), max_size=4), max_size=4))
def test_no_mistake_in_the_environment_shows_a_word_of_it(entries: list[list[str]]) -> None:
    with pytest.raises(BadConfig) as refused:
        Keys(None, ";".join(" ".join(words) for words in entries))
    assert not any(word in str(refused.value) for words in entries for word in words)


def test_a_keys_file_without_keys_or_that_is_missing_does_not_start_an_open_server(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for file in (empty, tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(BadConfig, match=str(file)):
            Keys.load(file)


def test_a_keys_file_that_others_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"page read {READER}\n")
    file.chmod(0o640)
    Keys(file)
    assert "may be read by others" in caplog.text
    caplog.clear()
    file.chmod(0o600)
    Keys(file)
    assert not caplog.records


def test_a_key_is_revoked_and_another_added_while_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "LOOK_AGAIN_SECONDS", 0.0)
    file = tmp_path / "keys"

    def write(text: str) -> None:
        """As editors and mounted secrets do: another file takes the place of this one."""
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(file)

    write(f"page read {READER}\n")
    ask = guarded(Keys(file), loopback=False)

    def status(key: str) -> int:
        return ask("GET", "/", bearer(key)).status_code

    assert (status(READER), status(WRITER)) == (200, 401)
    write(f"trainer embed {WRITER}\n")
    assert (status(READER), status(WRITER)) == (401, 200)
    with file.open("a") as same_file:
        same_file.write(f"page read {READER}\n")
    assert (status(READER), status(WRITER)) == (200, 200)

    for broken in (lambda: write("page"), file.unlink):  # what was in force stays, and the log says why
        caplog.clear()
        broken()
        assert (status(READER), status(WRITER)) == (200, 200)
        assert str(file) in caplog.text and "stay in use" in caplog.text

    write("# everybody's key is revoked\n")
    assert (status(READER), status(WRITER)) == (401, 401)


def test_the_keys_file_is_not_looked_at_for_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"page read {READER}\n")
    keys = Keys(file)
    monkeypatch.setattr(access, "_stamp", lambda _: pytest.fail("looked at"))
    for _ in range(10):
        assert keys.find(READER.encode())


# Web pages


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8080"]
)
def test_this_machine_is_addressed_by_its_own_names(host: str) -> None:
    assert guarded(None)("GET", "/", {"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example:8080",
        "localhost:8080@evil.example",
        "localhost:evil",
        "[::1].evil.example",
        "10.0.0.1",
        "0.0.0.0",
    ],
)
@pytest.mark.parametrize("with_keys", [False, True])
def test_a_name_that_was_made_to_point_at_this_machine_gets_nothing(
    host: str, with_keys: bool, keys: Keys
) -> None:
    ask = guarded(keys if with_keys else None)
    for path in ("/", "/v1/cache", "/livez", "/version"):
        assert refusal(ask("GET", path, {"Host": host, **bearer(ADMIN)})) == (403, "host_refused")


def test_further_names_are_allowed_with_or_without_their_port() -> None:
    ask = guarded(None, allowed_hosts=("Embed.Example", "other.example:8443"))
    for host in ("embed.example", "embed.example:8080", "other.example:8443", "localhost"):
        assert ask("GET", "/", {"Host": host}).status_code == 200
    for host in ("other.example", "other.example:1", "x.embed.example"):
        assert refusal(ask("GET", "/", {"Host": host})) == (403, "host_refused")
    through_a_proxy = {"Host": "127.0.0.1:8080", "Origin": "https://embed.example"}
    assert ask("GET", "/", through_a_proxy).status_code == 200


def test_beyond_loopback_every_name_will_do(keys: Keys) -> None:
    answer = guarded(keys, loopback=False)("GET", "/", {"Host": "embed.example", **bearer(READER)})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://evil.example:8080"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://localhost"},
        {"Origin": "null"},
        {"Origin": "localhost:8080"},
        {"Origin": "chrome-extension://localhost:8080"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    ],
)
@pytest.mark.parametrize("with_keys", [False, True])
def test_pages_of_other_sites_are_refused(headers: dict[str, str], with_keys: bool, keys: Keys) -> None:
    """Also with a key: a browser that was once given a password adds it to what other pages make it send."""
    ask = guarded(keys if with_keys else None, loopback=not with_keys)
    for method, path in (("GET", "/v1/cache"), ("POST", "/v1/snapshots")):
        answer = ask(method, path, {**headers, **bearer(ADMIN)})
        assert refusal(answer) == (403, "origin_refused")


def test_the_servers_own_page_may_ask() -> None:
    ask = guarded(None)
    for host in ("localhost:8080", "[::1]:8080"):
        own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert ask("POST", "/v1/neighbours", own, json={}).status_code == 200


def test_a_link_on_another_site_may_open_the_page_and_do_nothing_else() -> None:
    followed = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert guarded(None)("GET", "/", followed).status_code == 200
    assert refusal(guarded(None)("POST", "/v1/snapshots", followed)) == (403, "origin_refused")


def test_no_answer_ever_invites_other_sites(keys: Keys) -> None:
    for origin in ("http://evil.example", "http://localhost:8080"):
        for method in ("GET", "POST", "OPTIONS"):
            preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = guarded(None)(method, "/v1/embeddings", preflight)
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/json;charset=utf-8",
        "application/vnd.apache.arrow.stream",
    ],
)
def test_bodies_are_json_or_arrow(kind: str) -> None:
    assert guarded(None)("POST", "/v1/embeddings", {"Content-Type": kind}, content=b"{}").status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "text/plain;application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/json, text/plain",
        "",
    ],
)
def test_what_a_form_of_any_site_could_send_is_refused(kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    for method in ("POST", "DELETE"):
        answer = guarded(None)(method, "/v1/admin/gc", headers, content=b'{"dry_run": false}')
        assert refusal(answer) == (415, "unsupported_content_type")
        assert "application/json" in answer.json()["error"]["message"]


def test_a_request_without_a_body_needs_no_content_type() -> None:
    assert guarded(None)("POST", "/v1/snapshots").status_code == 200
    assert guarded(None)("DELETE", "/v1/admin/snapshots/s-1").status_code == 200


def test_a_websocket_gets_past_none_of_these_checks_since_it_is_closed() -> None:
    sent: list[Message] = []

    async def app(*_: Any) -> None:
        raise AssertionError

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "websocket", "path": "/", "headers": []}
    asyncio.run(Access(app, None, loopback=True)(scope, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


# Listening


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"])
def test_this_machine_alone_may_be_served_without_keys(host: str) -> None:
    assert is_loopback(host)
    refuse_open_listening(host, None, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "embed.example", "127.1", "fe80::1"])
def test_beyond_it_a_server_does_not_listen_without_keys_unless_told_so(
    host: str, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BadConfig, match=r"--keys-file.*--insecure") as refused:
        refuse_open_listening(host, None, insecure=False)
    assert "\n" not in str(refused.value)
    refuse_open_listening(host, keys, insecure=False)
    assert not caplog.records
    refuse_open_listening(host, None, insecure=True)
    assert "without API keys" in caplog.text


def test_keys_are_ordered_by_what_they_may_do() -> None:
    assert access.Scope.READ < access.Scope.EMBED < access.Scope.ADMIN
    assert Key("a", access.Scope.READ, b"").scope < access.Scope.EMBED
