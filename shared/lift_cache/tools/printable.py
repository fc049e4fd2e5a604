"""Text that others wrote, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape what a terminal would act on instead of showing it: control characters, escape sequences, marks that
    turn the direction of writing (`\x1b`, `\u202e`). Spaces and letters of every script stay as they are.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
