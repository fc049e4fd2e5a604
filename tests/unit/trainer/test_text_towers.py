"""The text side: cached vectors through a head, or CLIP's transformer and tokenizer."""

from __future__ import annotations

import pickle
import socket
import sys

import pytest
import torch

from lift_cache.errors import BadConfig
from lift_trainer.heads import unit_vectors
from lift_trainer.text_towers import CachedTextTower, ClipTextTower, TextShape, Tokenizer

SMALL = TextShape(context=9, width=16, depth=2, heads=2)


def test_cached_vectors_without_a_head_are_kept_to_the_bit() -> None:
    vectors = unit_vectors(torch.randn(3, 6))
    tower = CachedTextTower(6, 6, "none")
    assert tower(vectors) is vectors and not tower.trains and not list(tower.parameters())


def test_cached_vectors_through_a_head_are_unit_vectors_with_a_gradient() -> None:
    tower = CachedTextTower(6, 4, "mlp")
    out = tower(unit_vectors(torch.randn(3, 6)))
    assert out.shape == (3, 4) and out.requires_grad and tower.trains
    assert out.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_several_texts_per_image_are_so_many_texts_also_to_a_batch_norm() -> None:
    tower, vectors = CachedTextTower(6, 4, "sharelock").eval(), unit_vectors(torch.randn(3, 2, 6))
    assert torch.equal(tower(vectors), tower(vectors.view(6, 6)).view(3, 2, 4))


def test_without_open_clip_a_text_tower_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("open_clip", "open_clip.tokenizer", "open_clip.transformer"):
        monkeypatch.setitem(sys.modules, name, None)
    for build in (lambda: ClipTextTower(8, SMALL), Tokenizer):
        with pytest.raises(BadConfig, match="pip install open_clip_torch"):
            build()


def test_a_shape_that_cannot_be_is_refused() -> None:
    for shape in ({"width": 30, "heads": 4}, {"context": 2}, {"depth": 0}):
        with pytest.raises(ValueError, match="the context must be at least 3 and the width a multiple"):
            TextShape(**shape)


class TestClip:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("open_clip")

    def test_the_tower_gives_unit_vectors_also_under_autocast_and_with_checkpointing(self) -> None:
        tokens = Tokenizer(SMALL.context)(["a red circle", "a blue square left of a green one"]).ids
        tower = ClipTextTower(8, SMALL)
        plain = tower(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            cast = tower(tokens)
        assert plain.shape == (2, 8) and cast.dtype == torch.float32
        assert torch.allclose(cast, plain, atol=0.05)
        plain.sum().backward()
        expected = tower.transformer.token_embedding.weight.grad.clone()
        tower.zero_grad()
        tower.checkpoint_gradients()
        tower(tokens).sum().backward()
        assert torch.allclose(tower.transformer.token_embedding.weight.grad, expected, atol=1e-6)

    def test_several_captions_per_image_are_so_many_captions(self) -> None:
        tower = ClipTextTower(8, SMALL).eval()
        ids = Tokenizer(SMALL.context)(["one", "two", "three", "four"]).ids
        with torch.inference_mode():
            assert torch.equal(tower(ids.view(2, 2, -1)), tower(ids).view(2, 2, 8))

    def test_a_caption_is_seen_up_to_its_end_and_no_further(self) -> None:
        tower, tokenize = ClipTextTower(8, SMALL).eval(), Tokenizer(SMALL.context)
        ids = tokenize(["a red circle"]).ids
        other = ids.clone()
        other[0, 7] = 5  # beyond the end token
        with torch.inference_mode():
            assert torch.allclose(tower(ids), tower(other), atol=1e-6)
            assert not torch.allclose(tower(ids), tower(tokenize(["a blue circle"]).ids), atol=1e-3)

    def test_the_default_shape_is_clips_beside_vit_b16(self) -> None:
        tower = ClipTextTower(512)
        assert sum(p.numel() for p in tower.parameters()) == 63_428_096

    def test_the_tokenizer_is_clips_and_says_how_long_a_caption_was(self) -> None:
        import open_clip

        captions = ["A photo of a cat.", "", "two words &amp; more", "long " * 90, "Ünïcode 🦊"]
        tokenize = pickle.loads(pickle.dumps(Tokenizer()))
        tokens = tokenize(captions)
        assert torch.equal(tokens.ids, open_clip.tokenize(captions))
        assert tokens.lengths.tolist()[:2] == [8, 2] and tokens.lengths[3] == 92 > tokenize.context

    def test_the_tokenizer_asks_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*given: object, **more: object) -> None:
            raise AssertionError("the network was asked")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        assert Tokenizer(SMALL.context)(["a red circle"]).ids.shape == (1, 9)
