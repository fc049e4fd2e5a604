"""A page on this machine where one types a caption and sees the nearest images, checkpoints side by side.

The standard library's server, on loopback alone. A page of another origin is refused, be it that its name resolves to
this address (by Host) or that it asks for ours (by Sec-Fetch-Site). There is no script, and nothing outside is
referenced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote_plus, urlsplit

from PIL import Image

from lift_cache.errors import LiftError
from lift_cache.keys import normalise
from lift_trainer.formats import BROKEN
from lift_trainer.report.markup import Child, Markup, join, tag
from lift_trainer.report.nearest import Near, Nearest
from lift_trainer.report.page import STYLES, document
from lift_trainer.report.thumbnails import redrawn
from lift_trainer.sampling import GALLERY, permutation

ADDRESS = "127.0.0.1"
HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""Names of this machine; an SSH tunnel keeps them."""

SHOWN = 12
EXAMPLES = 6
LONGEST = 2000
"""Characters of a caption."""

SECONDS = 30
"""That a connection may stay silent."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, nearest: Nearest, port: int) -> None:
        """
        Args:
            port: 0: any free one.

        Raises:
            OSError: the port is taken.
        """
        super().__init__((ADDRESS, port), _Handler)
        self.nearest = nearest
        self.picture = lru_cache(maxsize=4096)(self._picture)

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}"

    def _picture(self, sample: int) -> tuple[str, bytes]:
        return redrawn(self.nearest.index.image_bytes(sample))


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS
    server_version, sys_version = "lift-report", ""

    def do_GET(self) -> None:
        host = re.sub(r":\d+$", "", self.headers.get("Host", "")).lower()
        from_elsewhere = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if host not in HOSTS or from_elsewhere:
            self._answer(
                HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this page is for this machine alone\n"
            )
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            self._page(parse_qs(asked.query).get("q", [""])[0])
        elif asked.path == "/favicon.ico":
            self._answer(HTTPStatus.NO_CONTENT, "image/x-icon", b"")
        elif image := re.fullmatch(r"/image/(\d{1,12})", asked.path):
            self._image(int(image[1]))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n")

    def _page(self, caption: str) -> None:
        nearest, caption = self.server.nearest, caption[:LONGEST]
        content = document(
            "Nearest images – LIFT",
            _form(nearest, caption),
            _sides(nearest, caption, nearest.ask(caption, SHOWN)) if caption else None,
            images="'self'",
            forms="'self'",
        )
        self._answer(HTTPStatus.OK, "text/html; charset=utf-8", content.encode())

    def _image(self, sample: int) -> None:
        if sample >= len(self.server.nearest.index):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"no such image\n")
            return
        try:
            kind, data = self.server.picture(sample)
        except (*BROKEN, Image.DecompressionBombError):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"this image cannot be read any more\n")
            return
        self._answer(HTTPStatus.OK, f"image/{kind}", data, keep="private, max-age=3600")

    def _answer(self, status: HTTPStatus, kind: str, content: bytes, keep: str = "no-store") -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", keep),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Captions that are typed stay off the terminal."""


# ---------------------------------------------------------------------------------------------- the page


def _form(nearest: Nearest, caption: str) -> Markup:
    index = nearest.index
    examples = [index.captions[i] for i in permutation(len(index.captions), 0, GALLERY)[:EXAMPLES].tolist()]
    return tag(
        "header",
        tag("p", "LIFT", class_="eyebrow"),
        tag("h1", "Nearest images"),
        tag(
            "form",
            tag("label", "Caption", for_="caption"),
            tag(
                "div",
                tag(
                    "input",
                    id="caption",
                    name="q",
                    value=caption,
                    maxlength=LONGEST,
                    autocomplete="off",
                    autofocus=not caption,
                    required=True,
                ),
                tag("button", "Find", type="submit"),
                class_="ask",
            ),
            action="/",
            method="get",
            role="search",
        ),
        tag(
            "p",
            "Captions of the images, to begin with: ",
            [
                [", " if place else None, tag("a", example, href=f"/?q={quote_plus(example)}")]
                for place, example in enumerate(examples)
            ],
            class_="note",
        ),
    )


def _sides(nearest: Nearest, caption: str, found: Sequence[Sequence[Near] | LiftError]) -> Markup:
    own = normalise(caption) if caption.strip() else None
    sides: list[Child] = []
    for place, (side, near) in enumerate(zip(nearest.sides, found, strict=True)):
        if isinstance(near, LiftError):
            answer = tag("p", str(near), class_="trouble", role="alert")
        else:
            cards = [_card(rank, one, nearest.captions(one.image), own) for rank, one in enumerate(near, 1)]
            answer = join(
                tag("p", f"The first {len(near)} of {side.images:,} images.", class_="note"),
                tag("ol", cards, class_="near"),
            )
        key = tag("span", class_=f"key run{place % STYLES}")
        sides.append(tag("section", tag("h2", key, side.name), answer))
    return tag("div", sides, class_="sides")


def _card(rank: int, near: Near, captions: Sequence[str], own: str | None) -> Markup:
    right = own in captions
    return tag(
        "li",
        tag(
            "figure",
            tag(
                "span",
                tag("img", src=f"/image/{near.image}", alt=captions[0]),
                class_="frame",
                title=captions[0],
            ),
            tag("figcaption", f"✓ {rank}" if right else str(rank), tag("small", f"{near.cosine:.3f}")),
        ),
        class_="right" if right else None,
    )
