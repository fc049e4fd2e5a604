"""Two captions share a key exactly when they would share a vector."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_cache.errors import BadCaption
from lift_cache.keys import caption_key, caption_keys, halves, normalise, sort_order

captions = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.split())


@given(captions)
def test_normalising_twice_changes_nothing(caption: str) -> None:
    assert normalise(normalise(caption)) == normalise(caption)


@given(captions)
def test_white_space_and_unicode_form_do_not_change_the_key(caption: str) -> None:
    spaced = "\t " + "  \n".join(caption.split()) + " "
    assert caption_key(spaced) == caption_key(caption)
    assert caption_key(unicodedata.normalize("NFD", caption)) == caption_key(
        unicodedata.normalize("NFC", caption)
    )


def test_the_key_of_a_caption_never_changes() -> None:
    # Literal on purpose: a change here would orphan every cache there is.
    assert caption_key("A red  circle\n") == caption_key("A red circle")
    assert caption_key("A red circle").hex() == "5229d05b81cfa12958b84fc67e5f9e3a"
    assert caption_key("Café").hex() == caption_key("Cafe\u0301").hex()


def test_case_and_punctuation_matter() -> None:
    assert len({caption_key(c) for c in ("a cat", "A cat", "a cat.", "a  cat !")}) == 4


@pytest.mark.parametrize("caption", ["", " \n\t", "\u2003", None, 3, b"bytes", "lone \ud800 surrogate"])
def test_what_is_not_a_caption_is_refused(caption: object) -> None:
    with pytest.raises(BadCaption):
        normalise(caption)


def test_a_bad_caption_in_a_list_is_named_by_position() -> None:
    with pytest.raises(BadCaption, match="caption 2: the caption is empty"):
        caption_keys(["one", "two", "  "])


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=50))
def test_the_halves_sort_as_the_bytes_do(raw: list[bytes]) -> None:
    keys = np.frombuffer(b"".join(raw), np.uint8).reshape(-1, 16)
    ordered = [key.tobytes() for key in keys[sort_order(keys)]]
    assert ordered == sorted(raw)
    high, low = halves(keys)
    assert [int(a) << 64 | int(b) for a, b in zip(high, low, strict=True)] == [int.from_bytes(k) for k in raw]
