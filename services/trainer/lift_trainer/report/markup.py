"""HTML and SVG that cannot be written unescaped: text becomes markup only through `tag`."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

VOID = frozenset({"img", "meta", "link", "br", "input"})


class Markup(str):
    """Finished markup. Plain strings are text and get escaped."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """`tag("td", caption, class_="n")`; None and False attributes are left out, `_` in names becomes `-`."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(_text(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    return Markup("".join(_flat(children)))


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str | int | float):
            yield escape(_text(child))
        elif child is not None:
            yield from _flat(child)


def _text(value: str | int | float) -> str:
    """Coordinates to a hundredth; lone surrogates, which no file can hold, as a replacement character."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value).encode(errors="replace").decode()
