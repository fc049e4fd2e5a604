"""Captions to token ids, as the recipe says, in one place for every engine.

Engines get ids, never text: so all engines see the same input, truncation is counted exactly, and the end
token is never what is cut. A special token's name inside a caption ("[SEP]", "<|im_end|>") is text like any
other; only a template may hold special tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lift_cache.errors import BadCaption, BadConfig
from lift_cache.recipe import Recipe

NO_TOKEN = "the tokenizer finds no token in the caption"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One input of the engine."""

    ids: list[int]
    truncated: bool


class CaptionTokenizer:
    """Applies a recipe's template, special tokens, end token and truncation.

    Args:
        tokenizer: a Hugging Face tokenizer backed by the `tokenizers` library.

    Raises:
        BadConfig: the recipe wants an end token and the tokenizer has none, or the special tokens and the
            template leave no room for a caption.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.recipe = recipe
        opening, closing = special_tokens_around(tokenizer) if recipe.special_tokens else ([], [])
        if recipe.end_token and not closing:
            if tokenizer.eos_token_id is None:
                raise BadConfig(f"the tokenizer of {recipe.model} has no end token; use --no-end-token")
            closing = [tokenizer.eos_token_id]
        self._opening = opening
        self._closing = closing if recipe.end_token else []
        self._room = recipe.max_tokens - len(self._opening) - len(self._closing)
        self._prefix_chars = recipe.template.index("{caption}")
        template = recipe.template.replace("{caption}", "")
        around = len(tokenizer(template, add_special_tokens=False)["input_ids"])
        if self._room - around < 1:
            raise BadConfig(
                f"--max-tokens {recipe.max_tokens} leaves no room for a caption: the template takes {around} "
                f"tokens and special tokens {len(self._opening) + len(self._closing)}"
            )
        # `split_special_tokens` is a setting of the whole tokenizer, and threads share it: one for each value.
        marked = copy.deepcopy(tokenizer)
        self._tokenizer = tokenizer
        as_text = _encode(tokenizer, [template], split=True)[0]
        self._marked = marked if _encode(marked, [template], split=False)[0] != as_text else None
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._unknown = (tokenizer.unk_token_id, tokenizer.unk_token)
        self.vocabulary = len(tokenizer)

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        """As `each`, of captions that all have tokens. Raises BadCaption naming the position of one that has none."""
        rows = []
        for i, row in enumerate(self.each(captions)):
            if row is None:
                raise BadCaption(f"caption {i}: {NO_TOKEN}")
            rows.append(row)
        return rows

    def each(self, captions: Sequence[str]) -> list[Tokens | None]:
        """Token ids of normalised captions, at most `recipe.max_tokens` each; None where a caption has no token."""
        if not captions:
            return []
        texts = [self.recipe.template.replace("{caption}", caption) for caption in captions]
        if self._marked is None:
            rows = _encode(self._tokenizer, texts, split=True)
        else:
            rows = _encode(self._marked, texts, split=False)
            for i, caption in enumerate(captions):
                if self._names_special(texts[i], len(caption), *rows[i]):
                    rows[i] = self._in_parts(self._marked, caption)
        return [self._fit(caption, *row) for caption, row in zip(captions, rows, strict=True)]

    def _names_special(
        self, text: str, caption_chars: int, ids: list[int], spans: list[tuple[int, int]]
    ) -> bool:
        """Whether a template that was filled in has special tokens where the caption is."""
        start, stop = self._prefix_chars, self._prefix_chars + caption_chars
        unknown, name = self._unknown  # also what words outside the vocabulary become
        return any(
            begin < stop
            and end > start
            and token in self._special
            and (token != unknown or text[begin:end].strip() == name)
            for token, (begin, end) in zip(ids, spans, strict=True)
        )

    def _in_parts(self, marked: Any, caption: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The template's special tokens, and none in the caption. Joints may differ from those of one whole text."""
        prefix, suffix = self.recipe.template.split("{caption}")
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for text, at, tokenizer in (
            (prefix, 0, marked),
            (caption, len(prefix), self._tokenizer),
            (suffix, len(prefix) + len(caption), marked),
        ):
            part, where = _encode(tokenizer, [text], split=tokenizer is self._tokenizer)[0]
            ids += part
            spans += [(at + begin, at + end) for begin, end in where]
        return ids, spans

    def _fit(self, caption: str, ids: list[int], spans: list[tuple[int, int]]) -> Tokens | None:
        if not ids:
            return None
        excess = len(ids) - self._room
        if excess > 0:
            ids = self._cut(ids, spans, len(caption), excess)
        return Tokens([*self._opening, *ids, *self._closing], truncated=excess > 0)

    def _cut(
        self, ids: list[int], spans: list[tuple[int, int]], caption_chars: int, excess: int
    ) -> list[int]:
        """Drop `excess` tokens from the caption's own, so that the words of a template stay whole."""
        start, stop = self._prefix_chars, self._prefix_chars + caption_chars
        first = next(i for i, (_, end) in enumerate(spans) if end > start)
        last = next((i for i, (begin, _) in enumerate(spans) if begin >= stop), len(ids))
        if self.recipe.truncation == "right":
            return (ids[: max(last - excess, first)] + ids[last:])[: self._room]
        return (ids[:first] + ids[min(first + excess, last) :])[-self._room :]


def _encode(
    tokenizer: Any, texts: list[str], *, split: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """(ids, spans in characters) of each text; `split` makes special tokens in it ordinary text."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=split,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
    )
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after every text, by its own template."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i], full[i + len(bare) :]
    raise BadConfig("the tokenizer changes a text's own tokens when it adds special ones; it cannot be used")
