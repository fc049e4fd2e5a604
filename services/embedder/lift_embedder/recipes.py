"""Named recipes: how each known text encoder is meant to be used on a caption.

Captions are documents, never queries: where a model distinguishes the two, its document side is used, which
for every model below means no instruction. Sources are the models' own cards and papers:

- `minilm`: sentence-transformers/all-MiniLM-L6-v2, `modules.json`, `1_Pooling/config.json` and
  `sentence_bert_config.json`: mean pooling, L2 norm, 256 tokens.
- `smollm2`: HuggingFaceTB/SmolLM2-135M-Instruct. Not an embedding model; see `SMOLLM2_END_TOKEN`.
- `smollm2-random`: the same network and tokenizer with random weights: what is left of a language model that knows
  nothing, as a control.
- `e5-mistral`: intfloat/e5-mistral-7b-instruct and arXiv 2401.00368 §3.1: an end token is appended and its
  last-layer state is the embedding; "no need to add instruction for retrieval documents"; 4,096 tokens.
- `linq`: Linq-AI-Research/Linq-Embed-Mistral, and `sfr`: Salesforce/SFR-Embedding-Mistral: E5-Mistral's
  scheme, with an end token from the tokenizer itself.
- `qwen3-embedding`: Qwen/Qwen3-Embedding-8B and arXiv 2506.05176 §2: last-token state; the tokenizer's
  template closes every text with <|endoftext|>, which is not its `eos_token` (QwenLM/Qwen3-Embedding#122,
  ggml-org/llama.cpp#14314); documents carry no instruction; 8,192 tokens as in the card's examples; trained so
  that a vector can be cut to 32 dimensions and more.
- `nv-embed-v2`: nvidia/NV-Embed-v2 and arXiv 2405.17428: latent-attention pooling in the model's own code,
  bidirectional; passages carry no instruction; its code always appends an end token.
- `mistral` (mistralai/Mistral-7B-v0.1) and `vicuna` (lmsys/vicuna-7b-v1.5): raw decoders, read at an end token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lift_cache.errors import BadConfig
from lift_cache.recipe import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["cls", "last", "mean", "model"]

SMOLLM2_END_TOKEN = True
"""A causal state at the last word is mostly about that word: captions that end alike look alike. The state at
an end token, the same token for every caption, has to stand for what came before it."""

DEFAULT_MAX_TOKENS = 512
"""For a model without a named recipe; captions are far shorter."""


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """What a model's authors prescribe; `Recipe` adds the revisions that were found."""

    name: str
    model: str
    dtype: Dtype
    pooling: Pooling
    end_token: bool
    max_tokens: int
    normalize: bool = True
    template: str = "{caption}"
    remote_code: bool = False
    quantization: str | None = None
    shorter: bool = False
    "The first dimensions of a vector are a vector themselves (Matryoshka)."


NAMED: dict[str, NamedRecipe] = {
    named.name: named
    for named in (
        NamedRecipe(
            "smollm2", "smollm2", "bfloat16", "last", SMOLLM2_END_TOKEN, 512, quantization="gguf:Q4_1"
        ),
        NamedRecipe("smollm2-random", "smollm2-random", "bfloat16", "last", SMOLLM2_END_TOKEN, 512),
        NamedRecipe("minilm", "minilm", "float32", "mean", True, 256),
        NamedRecipe("e5-mistral", "intfloat/e5-mistral-7b-instruct", "float16", "last", True, 4096),
        NamedRecipe("linq", "Linq-AI-Research/Linq-Embed-Mistral", "float16", "last", True, 4096),
        NamedRecipe("sfr", "Salesforce/SFR-Embedding-Mistral", "float16", "last", True, 4096),
        NamedRecipe(
            "qwen3-embedding", "Qwen/Qwen3-Embedding-8B", "bfloat16", "last", True, 8192, shorter=True
        ),
        NamedRecipe("nv-embed-v2", "nvidia/NV-Embed-v2", "float16", "model", True, 4096, remote_code=True),
        NamedRecipe("mistral", "mistralai/Mistral-7B-v0.1", "bfloat16", "last", True, 512),
        NamedRecipe("vicuna", "lmsys/vicuna-7b-v1.5", "float16", "last", True, 512),
    )
}


class RecipeOptions(BaseModel):
    """Changes to a named recipe, or the recipe of a model that has none. Unset: the base's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: Dtype | None = None
    "Compute dtype."
    pooling: Pooling | None = None
    "How token states become one vector; `model` leaves it to the model's own code."
    end_token: bool | None = None
    "Close every input with an end token; required for last-token pooling unless refused by `--no-end-token`."
    template: str | None = None
    "Text around `{caption}`: an instruction or a prompt."
    max_tokens: int | None = None
    "Tokens per input, special tokens included; longer captions are truncated and marked so."
    truncation: Literal["right", "left"] | None = None
    "Side of an over-long caption that is cut."
    normalize: bool | None = None
    "Scale vectors to unit length."

    def chosen(self) -> dict[str, Any]:
        return self.model_dump(include=set(RecipeOptions.model_fields), exclude_none=True)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the model's own files say."""

    revision: str
    tokenizer_revision: str
    code_revision: str | None
    dimensions: int
    context_tokens: int
    "Longest input the model takes, in tokens."


def build_recipe(
    named: NamedRecipe | None,
    model: str,
    facts: ModelFacts,
    options: RecipeOptions,
    *,
    declared: bool = False,
) -> Recipe:
    """Join what the authors prescribe, what the files say and what the user asked for.

    Inputs stay one token below the model's context: vLLM never finishes a request that fills it exactly.

    Raises:
        BadConfig: a model without a named recipe and without `--pooling`; last-token pooling without a
            decision on the end token; a value that the model cannot take.
    """
    longest = facts.context_tokens - 1
    fields: dict[str, Any] = {
        "dtype": "float32",
        "end_token": None,
        "normalize": True,
        "template": "{caption}",
    }
    if named is not None:
        fields |= {
            "dtype": named.dtype,
            "pooling": named.pooling,
            "end_token": named.end_token,
            "normalize": named.normalize,
            "template": named.template,
            "quantization": named.quantization,
        }
    fields["max_tokens"] = min(named.max_tokens if named else DEFAULT_MAX_TOKENS, longest)
    fields |= options.chosen()

    if "pooling" not in fields:
        raise BadConfig(f"{model} has no named recipe: say how it pools with --pooling cls, last or mean")
    if fields["end_token"] is None:
        if fields["pooling"] == "last":
            raise BadConfig(
                f"last-token pooling of {model} without an end token reads mostly the caption's last word; "
                "choose --end-token, or --no-end-token to insist"
            )
        fields["end_token"] = fields["pooling"] != "model"
    if not 2 <= fields["max_tokens"] <= longest:
        raise BadConfig(f"--max-tokens {fields['max_tokens']}: {model} takes 2 to {longest} tokens")
    if fields["template"].count("{caption}") != 1:
        raise BadConfig(f"--template {fields['template']!r} needs {{caption}} exactly once")
    return Recipe(
        model=model,
        revision=facts.revision,
        code_revision=facts.code_revision,
        tokenizer_revision=facts.tokenizer_revision,
        dimensions=facts.dimensions,
        declared=declared,
        **fields,
    )
