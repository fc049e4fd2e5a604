"""A set of keys that is not Python's own must still be a set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_cache.keys import caption_key
from lift_embedder import keyset
from lift_embedder.keyset import KeySet

# Few distinct halves, so that keys share their first or their last eight bytes.
KEYS = st.builds(bytes.__add__, *[st.sampled_from([bytes(8), b"\x00" * 7 + b"\x01", b"\xff" * 8])] * 2)


@given(st.lists(KEYS))
def test_it_answers_as_a_python_set_does(keys: list[bytes]) -> None:
    ours, theirs = KeySet(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyset, "FRESH", 2)
        for key in keys:
            assert ours.add(key) == (key not in theirs)
            theirs.add(key)
            assert len(ours) == len(theirs)


def test_it_forgets_nothing_when_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyset, "FRESH", 64)
    keys = [caption_key(f"caption {i}") for i in range(5000)]
    seen = KeySet()
    assert all(seen.add(key) for key in keys)
    assert not any(seen.add(key) for key in keys)
    assert len(seen._sorted) < 10
