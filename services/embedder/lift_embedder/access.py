"""Who may ask what: API keys with scopes, and the checks that keep web pages away from a server on localhost.

A page of any site can make a browser send requests to http://localhost:8080. It cannot read the answers, since no
CORS headers are sent, but it could write to the cache, or read it under a name of its own that resolves to
127.0.0.1 (DNS rebinding). Hence, in this order: Host → Origin → content type → key and scope.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from lift_cache.errors import BadConfig
from lift_embedder.answers import error_answer

log = logging.getLogger(__name__)

ENVIRONMENT = "LIFT_KEYS"
"""Environment variable with keys; the lines of a keys file, separated by newlines or `;`."""

SHORTEST_KEY = 16
"""Characters. Keys are looked up by a fast digest, so they must be random and not words."""

LOOK_AGAIN_SECONDS = 1.0
"""Between two looks at the keys file: how long a revoked key still opens."""


class Scope(enum.IntEnum):
    """What a key may do; each includes those below it."""

    READ = 1
    EMBED = 2
    ADMIN = 3


SCOPES: Mapping[str, Scope | None] = {
    "/livez": None,
    "/readyz": None,
    "/version": None,
    "/": Scope.READ,
    "/docs": Scope.READ,
    "/docs/oauth2-redirect": Scope.READ,
    "/openapi.json": Scope.READ,
    "/metrics": Scope.READ,
    "/v1/cache": Scope.READ,
    "/v1/models": Scope.READ,
    "/v1/stats": Scope.READ,
    "/v1/lookup": Scope.READ,
    "/v1/neighbours": Scope.READ,
    "/v1/embeddings": Scope.EMBED,
    "/v1/snapshots": Scope.EMBED,
    "/v1/admin/": Scope.ADMIN,
}
"""The scope that each path needs; None: no key at all. An entry that ends in `/` stands for all below it."""

_PREFIXES = tuple((path, scope) for path, scope in SCOPES.items() if path.endswith("/") and path != "/")


def scope_of(path: str) -> Scope | None:
    """The scope that a path needs. One that is in no entry needs READ, so that nothing is open by oversight."""
    if path in SCOPES:
        return SCOPES[path]
    return next((scope for prefix, scope in _PREFIXES if path.startswith(prefix)), Scope.READ)


def has_entry(path: str) -> bool:
    """Whether a path, or a route's template, is in the table."""
    return path in SCOPES or any(path.startswith(prefix) for prefix, _ in _PREFIXES)


# Listening


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone. Names other than localhost are not resolved."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_open_listening(host: str, keys: Keys | None, insecure: bool) -> None:
    """Raises BadConfig where everybody on the network could use and fill the cache, unless told to allow it."""
    if keys is not None or is_loopback(host):
        return
    if not insecure:
        raise BadConfig(
            f"--host {host} listens beyond this machine without API keys; name a --keys-file (lines NAME SCOPE "
            f"KEY), set {ENVIRONMENT}, or say --insecure"
        )
    log.warning(
        "listening on %s without API keys: whoever reaches it may read, fill and prune the cache", host
    )


# Keys


@dataclass(frozen=True)
class Key:
    """One API key; of the key itself only its SHA-256 is kept."""

    name: str
    scope: Scope
    digest: bytes = field(repr=False)


class Keys:
    """The keys of one server: from a file, from the environment, or both.

    The file is looked at again at most once a second, when a key is presented, and read again when it has
    changed: a key is revoked by taking its line out. That needs no signal to be sent, which a mounted secret
    could not do. A changed file that cannot be used leaves the keys as they were, with an error in the log.
    """

    def __init__(self, file: Path | None, environment: str = "") -> None:
        """Args:
            environment: value of LIFT_KEYS.

        Raises:
            BadConfig: naming file and line, never a key.
        """
        self._file, self._environment = file, environment
        self._stamp = _stamp(file)
        self._keys = self._read()
        if not self._keys:
            raise BadConfig(f"{file or ENVIRONMENT}: no key in it; write lines NAME SCOPE KEY")
        self._look_again_at = time.monotonic() + LOOK_AGAIN_SECONDS

    @classmethod
    def load(cls, file: Path | None, environment: str = "") -> Keys | None:
        """None when there is neither a file nor anything in the environment. Raises BadConfig."""
        return cls(file, environment) if file is not None or environment.strip(" \t\r\n;") else None

    def __repr__(self) -> str:
        return f"Keys({len(self._keys)})"

    def find(self, presented: bytes) -> Key | None:
        """The key that this is. Takes the same time for every key that is or is not there."""
        self._look_again()
        digest = hashlib.sha256(presented).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _look_again(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._look_again_at:
            return
        self._look_again_at = now + LOOK_AGAIN_SECONDS
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._read()
        except BadConfig as error:
            log.error("%s; the keys that were read before stay in use", error)
        else:
            log.info("the keys were read again", extra={"keys": len(self._keys)})

    def _read(self) -> tuple[Key, ...]:
        lines: list[tuple[str, str]] = []
        if self._file is not None:
            try:
                text = self._file.read_text("utf-8")
                mode = self._file.stat().st_mode
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not text"
                raise BadConfig(f"keys file {self._file}: {why}") from None
            if mode & 0o077:
                log.warning("keys file %s may be read by others; chmod 600 it", self._file)
            lines += [
                (f"keys file {self._file} line {n}", line) for n, line in enumerate(text.splitlines(), 1)
            ]
        entries = re.split(r"[;\n]", self._environment)
        lines += [(f"{ENVIRONMENT} entry {n}", line) for n, line in enumerate(entries, 1)]
        return _parsed(lines)


def _parsed(lines: list[tuple[str, str]]) -> tuple[Key, ...]:
    """Keys of lines, each with where it stands. Nothing of a line is quoted: any word of it may be the key."""
    keys: list[Key] = []
    names: dict[str, str] = {}
    digests: dict[bytes, str] = {}
    for where, line in lines:
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 3:
            raise BadConfig(f"{where}: {len(words)} words instead of three, NAME SCOPE KEY")
        name, scope, key = words
        if scope.upper() not in Scope.__members__:
            raise BadConfig(f"{where}: the second word must be read, embed or admin")
        if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()):
            raise BadConfig(f"{where}: a key is {SHORTEST_KEY} or more ASCII characters")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise BadConfig(
                f"{where}: a name is 1 to 64 letters, digits and . _ -, since it goes into the log"
            )
        digest = hashlib.sha256(key.encode()).digest()
        for what, seen, one in (("name", names, name), ("key", digests, digest)):
            if one in seen:
                raise BadConfig(f"{where}: this {what} is there already, at {seen[one]}")  # type: ignore[index]
        names[name] = digests[digest] = where
        keys.append(Key(name, Scope[scope.upper()], digest))
    return tuple(keys)


def _stamp(file: Path | None) -> tuple[int, int, int] | None:
    """What changes when a file does, or when another takes its place."""
    if file is None:
        return None
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


# Requests


DECISIVE = frozenset({b"host", b"origin", b"sec-fetch-site", b"content-type", b"authorization"})
"""Headers that are decided by, and so may come only once."""

CONTENT_TYPES = frozenset({b"application/json", b"application/vnd.apache.arrow.stream"})
"""Of bodies. A web form can send neither, and a script of another site not without asking first."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""The usual ones; other addresses of 127.0.0.0/8 are also this machine."""


class Access:
    """ASGI middleware: 400, 401, 403 or 415 before any of a body is read.

    Requests that are let in have their scope in `scope["state"]["scope"]` and their key's name in
    `scope["state"]["key"]`. Where there are no keys, they have Scope.ADMIN and no name; on paths that need no
    key, where there are keys, neither.

    Args:
        keys: None lets everybody in.
        loopback: the server listens on this machine alone; then Host must be a name of it.
        allowed_hosts: further names of this server, with or without port, for Host and Origin.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys | None, *, loopback: bool, allowed_hosts: Collection[str] = ()
    ) -> None:
        self.app, self._keys, self._loopback = app, keys, loopback
        self._names = frozenset(name.lower() for name in allowed_hosts)

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            return await (self.app if refusal is None else refusal)(scope, receive, send)
        if scope["type"] == "websocket":  # there are none here; and none gets past these checks
            return await send({"type": "websocket.close", "code": 1008})
        await self.app(scope, receive, send)

    def _refusal(self, scope: Connection) -> Response | None:
        headers = dict(scope["headers"])
        if len(headers) != len(scope["headers"]):
            names = [name for name, _ in scope["headers"]]
            for name in DECISIVE & headers.keys():
                if names.count(name) > 1:
                    return error_answer(400, f"{name.decode()}: sent more than once", "invalid_request")
        path: str = scope["path"]
        if not path.isprintable():
            # Routes match a path with a newline at its end (the `$` of a regular expression); the table does not.
            return error_answer(404, "no such path", "not_found")
        host = headers.get(b"host", b"")
        if self._loopback and not _is_named(host, self._names):
            text = "Host: this server is localhost; further names are given with --allowed-hosts"
            return error_answer(403, text, "host_refused")
        origin = headers.get(b"origin")
        if origin is not None and not _same_site(origin, host, self._names):
            text = "Origin: pages of other sites may not use this server; its names are given with --allowed-hosts"
            return error_answer(403, text, "origin_refused")
        if headers.get(b"sec-fetch-site") == b"cross-site" and not _follows_link(scope["method"], headers):
            return error_answer(403, "pages of other sites may not use this server", "origin_refused")
        if scope["method"] not in ("GET", "HEAD") and not _typed(headers):
            text = "Content-Type: a body is application/json or application/vnd.apache.arrow.stream"
            return error_answer(415, text, "unsupported_content_type")
        state = scope.setdefault("state", {})
        if self._keys is None:
            state["scope"] = Scope.ADMIN
            return None
        needed = scope_of(path)
        if needed is None:
            return None
        presented = _presented(headers.get(b"authorization", b""))
        key = self._keys.find(presented) if presented else None
        if key is None:
            return _unknown(bool(presented))
        state["key"], state["scope"] = key.name, key.scope
        if key.scope < needed:
            text = (
                f"{path} needs a key with scope {needed.name.lower()}; this one has {key.scope.name.lower()}"
            )
            return error_answer(403, text, "insufficient_scope")
        return None


def _unknown(presented: bool) -> Response:
    text = "this is not one of the server's keys" if presented else "this needs a key"
    answer = error_answer(401, f"{text}; send Authorization: Bearer KEY", "invalid_api_key")
    # Two lines, since browsers take a line to be one challenge; the first is for them.
    answer.raw_headers += [
        (b"www-authenticate", b'Basic realm="lift", charset="UTF-8"'),
        (b"www-authenticate", b"Bearer"),
    ]
    return answer


def _presented(authorization: bytes) -> bytes:
    """The key of a header: a Bearer token, or the password of Basic, with any user name. Empty: none."""
    scheme, _, value = authorization.partition(b" ")
    scheme = scheme.lower()
    if scheme == b"bearer":
        return value.strip()
    if scheme == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _is_named(host: bytes, names: frozenset[str]) -> bool:
    """Whether a Host is this machine, on any port, or one of some names."""
    whole = host.decode("latin-1").lower()
    name, _, port = whole.rpartition(":") if not whole.endswith("]") else (whole, "", "")
    if not name:
        name, port = whole, ""
    if port and not port.isdecimal():
        return False
    return name in LOCAL_NAMES or name in names or whole in names or is_loopback(name)


def _same_site(origin: bytes, host: bytes, names: frozenset[str]) -> bool:
    """Whether an Origin is this server as the client addresses it, or one of some names."""
    scheme, _, name = origin.decode("latin-1").lower().partition("://")
    return scheme in ("http", "https") and (name == host.decode("latin-1").lower() or name in names)


def _follows_link(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Somebody opens a link to the page in a window: nothing is changed, and the linking site sees nothing."""
    return (
        method == "GET"
        and headers.get(b"sec-fetch-mode") == b"navigate"
        and headers.get(b"sec-fetch-dest") == b"document"
    )


def _typed(headers: Mapping[bytes, bytes]) -> bool:
    """A body says what it is, and so does whoever speaks of its type. Without either there is nothing to check."""
    said = headers.get(b"content-type")
    if said is None:
        return headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
    return said.partition(b";")[0].strip().lower() in CONTENT_TYPES
