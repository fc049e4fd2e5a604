"""The text side: a head over cached vectors, or CLIP's text transformer, trained with the images.

The transformer and its tokenizer are open_clip's. transformers' CLIPTextModel is the same network, but its
tokenizer has to be fetched from a hub, while open_clip's wheel carries the vocabulary, and three small
packages (ftfy, regex, wcwidth) are all it adds to what timm needs anyway. It is imported only when a text
tower is built, or text cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lift_cache.errors import BadConfig
from lift_trainer.config import HeadName, TextShape
from lift_trainer.heads import build_head, unit_vectors

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

CACHED_WORDS = 1_000_000
"""Words whose encoding a tokenizer keeps (some 150 MB)."""


class CachedTextTower(nn.Module):
    """Vectors from the cache, after the text transform, through a head."""

    def __init__(self, width: int, dimensions: int, head: HeadName) -> None:
        """
        Raises:
            BadConfig: head `none`, and the widths differ.
        """
        super().__init__()
        self.dimensions = dimensions
        self.trains = head != "none"
        self.head = build_head(head, width, dimensions)

    def forward(self, vectors_bw: torch.Tensor) -> torch.Tensor:
        """float32 [B, width], unit length → unit vectors, float32 [B, D]; head `none` returns its input.

        Several texts per image, [B, P, width], become [B, P, D].
        """
        if not self.trains:
            return vectors_bw
        return unit_vectors(self.head(vectors_bw.flatten(0, -2))).unflatten(0, vectors_bw.shape[:-1])


class ClipTextTower(nn.Module):
    """CLIP's text transformer (Radford et al. 2021): causal, the state at the end token, a linear projection."""

    def __init__(self, dimensions: int, shape: TextShape = TextShape()) -> None:
        """Fresh weights, from torch's global generator. Raises BadConfig: open_clip is not installed."""
        super().__init__()
        transformer, tokenizer = _open_clip()
        self.shape, self.dimensions, self.trains = shape, dimensions, True
        self.transformer = transformer.TextTransformer(
            context_length=shape.context,
            vocab_size=tokenizer.SimpleTokenizer().vocab_size,
            width=shape.width,
            layers=shape.depth,
            heads=shape.heads,
            output_dim=dimensions,
        )

    def forward(self, tokens_bl: torch.Tensor) -> torch.Tensor:
        """int64 [B, context] → unit vectors, float32 [B, D]; [B, P, context] → [B, P, D]."""
        return unit_vectors(self.transformer(tokens_bl.flatten(0, -2))).unflatten(0, tokens_bl.shape[:-1])

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.transformer.set_grad_checkpointing(True)


class Tokens(NamedTuple):
    ids: torch.Tensor
    """int64 [n, context]: start, the caption, end, zeros."""
    lengths: torch.Tensor
    """int64 [n]: tokens of each caption with start and end, before it was cut to the context."""


class Tokenizer:
    """CLIP's byte-pair encoding, lower case. Works offline and pickles into worker processes."""

    def __init__(self, context: int = TextShape.context) -> None:
        """Raises BadConfig: open_clip is not installed."""
        self.context = context
        self._bpe: SimpleTokenizer | None = None
        self._encoding()

    def __call__(self, captions: Sequence[str]) -> Tokens:
        bpe = self._encoding()
        ids = torch.zeros(len(captions), self.context, dtype=torch.int64)
        lengths = torch.empty(len(captions), dtype=torch.int64)
        for row, caption in enumerate(captions):
            tokens = bpe.encode(caption)
            lengths[row] = len(tokens) + 2
            kept = [bpe.sot_token_id, *tokens[: self.context - 2], bpe.eot_token_id]
            ids[row, : len(kept)] = torch.tensor(kept)
        return Tokens(ids, lengths)

    def _encoding(self) -> SimpleTokenizer:
        # open_clip's keeps every word it ever saw, which over a billion captions would fill the memory.
        if self._bpe is None or len(self._bpe.cache) > CACHED_WORDS:
            self._bpe = _open_clip()[1].SimpleTokenizer()
        return self._bpe

    def __getstate__(self) -> dict[str, int]:
        return {"context": self.context}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.context, self._bpe = state["context"], None


def _open_clip():  # type: ignore[no-untyped-def]
    """open_clip's modules `transformer` and `tokenizer`. Raises BadConfig."""
    try:
        from open_clip import tokenizer, transformer
    except ImportError:
        raise BadConfig(
            "a trained text tower needs open_clip, which is not installed: pip install open_clip_torch==3.3.0"
        ) from None
    return transformer, tokenizer
