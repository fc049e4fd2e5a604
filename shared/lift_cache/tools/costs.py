"""What embedding costs before it is done: floating-point operations, GPU time, bytes, and the break-even.

A forward pass over n tokens (a multiply and an add are two operations; Kaplan et al., arXiv 2001.08361, §2.1
and table 1):

    F(n) = 2·W·n + 4·L·a·p(n)        W: weights of all L blocks, without input and output embeddings
                                     a: heads × head width
                                     p: pairs that attend, n·(n + 1)/2 when causal and n² otherwise

Norms, activations, softmax and the embedding look-up are left out. On both sides of the comparison the pairs that
attend are counted, as Kaplan et al. do, and not the whole square of a masked product (60.3 epochs below, not 60.9).

Training CLIP's text tower costs 3·F(77) a sample and epoch: the backward pass takes twice the forward pass, and
every caption is padded to CLIP's 77 tokens, all of which are computed (open_clip: `context_length` in its model
configs, `tokenize`). Embedding costs F(n) once for every distinct caption, n being its real tokens. So

    break-even epochs = mean F over distinct captions · distinct share / 3·F_clip(77)

ViT-B/16: W = 12 layers · 12·512² = 37.75 M, F = 2·37.75 M·77 + 4·12·512·3,003 = 5.887 GFLOP; ·3 = 17.66 GFLOP.
A 7 B encoder of Mistral's shape at 77 real tokens: W = 6.979 B, F = 1,074.8 + 1.6 = 1,076.4 GFLOP: 61 epochs.
Qwen3-Embedding-0.6B: W = 0.440 B, F = 67.8 + 0.7 = 68.5 GFLOP: 3.9 epochs.
Captions of 20 tokens take a quarter of that, and a cache that is reused in R runs one R-th for each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from lift_cache.encoding import Encoding
from lift_cache.errors import BadConfig, ModelNotFound
from lift_cache.index import INDEX_SCHEMA, prefix_bits
from lift_cache.segment import CAPTIONS_SCHEMA, vector_schema

CLIP_CONTEXT = 77
TRAINING_PASS = 3
"""A training step against a forward pass: one forward, two forward's worth of backward (Kaplan et al., §2.1)."""

MFU = 0.4
"""Share of the peak that is assumed to be reached. An assumption, not a measurement: large training runs report
0.46 (PaLM, arXiv 2204.02311, table 3); small models and short captions reach less."""

OTHER_MAX_TOKENS = 512
"""Limit for a model without a recipe of its own, as `lift-embed serve` has it."""


# ---------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True)
class Transformer:
    """The shape of a stack of transformer blocks, and what a forward pass through it costs.

    `attention` and `key_value` are heads × head width, of queries and of keys. A gated MLP has three matrices.
    `per_token` and `per_text` are operations beside the blocks: a pooling head, a projection.
    """

    layers: int
    width: int
    attention: int
    key_value: int
    mlp: int
    gated: bool = True
    causal: bool = True
    per_token: int = 0
    per_text: int = 0

    @property
    def weights(self) -> int:
        """Weights of all blocks: projections of attention and MLP, without biases, norms and embeddings."""
        attention = 2 * self.width * (self.attention + self.key_value)
        return self.layers * (attention + (3 if self.gated else 2) * self.width * self.mlp)

    def flops(self, tokens: int | np.ndarray) -> np.ndarray:
        """Operations of a forward pass over texts of so many tokens: int [n] to float64 [n]."""
        n = np.asarray(tokens, np.float64)
        pairs = n * (n + 1) / 2 if self.causal else n * n
        blocks = 2 * self.weights * n + 4 * self.layers * self.attention * pairs
        return np.asarray(blocks + self.per_token * n + self.per_text)


def clip_text(layers: int, width: int, embedding: int) -> Transformer:
    """CLIP's text tower: causal, an MLP of four times the width, a projection of one token's state."""
    return Transformer(layers, width, width, width, 4 * width, gated=False, per_text=2 * width * embedding)


CLIP_TEXT: dict[str, Transformer] = {
    # open_clip, src/open_clip/model_configs/*.json: text_cfg layers and width, embed_dim; context_length 77.
    "vit-s-16": clip_text(12, 384, 384),
    "vit-b-32": clip_text(12, 512, 512),
    "vit-b-16": clip_text(12, 512, 512),
    "vit-l-14": clip_text(12, 768, 768),
    "vit-h-14": clip_text(24, 1024, 1024),
    "vit-bigg-14": clip_text(32, 1280, 1280),
}


def clip_training_flops(clip: str) -> float:
    """Operations that training CLIP's text tower takes for one sample and epoch. Raises BadConfig."""
    if clip not in CLIP_TEXT:
        raise BadConfig(f"--clip {clip}: known are {', '.join(CLIP_TEXT)}")
    return TRAINING_PASS * float(CLIP_TEXT[clip].flops(CLIP_CONTEXT))


# ---------------------------------------------------------------------------------------------- encoders


@dataclass(frozen=True, slots=True)
class Encoder:
    """What is known of a text encoder without its weights.

    `parameters` is the published count, None for a folder; `around` the special tokens that go around a text;
    `serve` what `lift-embed serve` is told about a model for which it has no recipe.
    """

    name: str
    model: str
    shape: Transformer
    vocabulary: int
    max_tokens: int
    around: int
    parameters: int | None = None
    dtype: str = "bfloat16"
    serve: tuple[str, ...] = ()

    @property
    def dimensions(self) -> int:
        return self.shape.width

    @property
    def served_as(self) -> str:
        """What `lift-embed serve --model` calls it."""
        return self.model if "--pooling" in self.serve else self.name


_MISTRAL_7B = Transformer(layers=32, width=4096, attention=4096, key_value=1024, mlp=14_336)

# NV-Embed-v2's latent attention (its modeling_nvembed.py, LatentAttentionModel; 512 latents, 8 heads of 4,096):
# every token passes to_q and to_out, 4,096 × 32,768, and a GEGLU of 4,096 × 32,768 and 16,384 × 4,096, and
# attends to 512 latents; keys and values of the latents, 4,096 × 65,536, are computed anew for every text.
_NV_EMBED = Transformer(
    layers=32,
    width=4096,
    attention=4096,
    key_value=1024,
    mlp=14_336,
    causal=False,
    per_token=2 * 4096 * (32_768 + 32_768 + 32_768 + 16_384) + 4 * 512 * 32_768,
    per_text=2 * 512 * 4096 * 65_536,
)
_POOL_LAST = ("--pooling", "last", "--end-token")

ENCODERS: dict[str, Encoder] = {
    encoder.name: encoder
    for encoder in (
        # Shapes: each model's config.json on the hub. Parameters: the totals of its safetensors files, as the
        # hub and MTEB's model cards (embeddings-benchmark/mteb, n_parameters) give them.
        Encoder(
            "smollm2",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            Transformer(layers=30, width=576, attention=576, key_value=192, mlp=1536),
            vocabulary=49_152,
            max_tokens=512,
            around=1,
            parameters=134_515_008,
        ),
        Encoder(
            "smollm2-random",
            "smollm2-random",
            Transformer(layers=30, width=576, attention=576, key_value=192, mlp=1536),
            vocabulary=49_152,
            max_tokens=512,
            around=1,
            parameters=134_515_008,
        ),
        Encoder(
            "minilm",
            "sentence-transformers/all-MiniLM-L6-v2",
            Transformer(
                layers=6, width=384, attention=384, key_value=384, mlp=1536, gated=False, causal=False
            ),
            vocabulary=30_522,
            max_tokens=256,
            around=2,
            parameters=22_713_216,
            dtype="float32",
        ),
        Encoder(
            "e5-mistral",
            "intfloat/e5-mistral-7b-instruct",
            _MISTRAL_7B,
            vocabulary=32_000,
            max_tokens=4096,
            around=2,
            parameters=7_110_660_096,
        ),
        Encoder(
            "linq",
            "Linq-AI-Research/Linq-Embed-Mistral",
            _MISTRAL_7B,
            vocabulary=32_000,
            max_tokens=4096,
            around=2,
            parameters=7_110_000_000,
        ),
        Encoder(
            "sfr",
            "Salesforce/SFR-Embedding-Mistral",
            _MISTRAL_7B,
            vocabulary=32_000,
            max_tokens=4096,
            around=2,
            parameters=7_110_000_000,
        ),
        Encoder(
            "qwen3-embedding",
            "Qwen/Qwen3-Embedding-8B",
            Transformer(layers=36, width=4096, attention=4096, key_value=1024, mlp=12_288),
            vocabulary=151_665,
            max_tokens=8192,
            around=1,
            parameters=7_567_295_488,
        ),
        Encoder(
            "qwen3-embedding-4b",
            "Qwen/Qwen3-Embedding-4B",
            Transformer(layers=36, width=2560, attention=4096, key_value=1024, mlp=9728),
            vocabulary=151_665,
            max_tokens=OTHER_MAX_TOKENS,
            around=1,
            parameters=4_021_774_336,
            serve=_POOL_LAST,
        ),
        Encoder(
            "qwen3-embedding-0.6b",
            "Qwen/Qwen3-Embedding-0.6B",
            Transformer(layers=28, width=1024, attention=2048, key_value=1024, mlp=3072),
            vocabulary=151_669,
            max_tokens=OTHER_MAX_TOKENS,
            around=1,
            parameters=595_776_512,
            serve=_POOL_LAST,
        ),
        Encoder(
            "nv-embed-v2",
            "nvidia/NV-Embed-v2",
            _NV_EMBED,
            vocabulary=32_000,
            max_tokens=4096,
            around=2,
            parameters=7_850_000_000,
            serve=("--trust-remote-code",),
        ),
        Encoder(
            "mistral",
            "mistralai/Mistral-7B-v0.1",
            _MISTRAL_7B,
            vocabulary=32_000,
            max_tokens=512,
            around=2,
            parameters=7_241_732_096,
        ),
        Encoder(
            "vicuna",
            "lmsys/vicuna-7b-v1.5",
            Transformer(layers=32, width=4096, attention=4096, key_value=4096, mlp=11_008),
            vocabulary=32_000,
            max_tokens=512,
            around=2,
            parameters=6_738_415_616,
        ),
    )
}

_GATED_WITH_GELU = ("gemma", "modernbert")
"""Model types whose gated MLP does not show in the activation's name; elsewhere SiLU means gated."""

_BIDIRECTIONAL = ("bert", "roberta", "electra", "mpnet", "nomic")


def find_encoder(model: str) -> Encoder:
    """The encoder behind a name, a hub id or a folder with config.json.

    Raises:
        ModelNotFound: none of these.
        BadConfig: a folder whose config.json does not describe a dense transformer.
    """
    for encoder in ENCODERS.values():
        if model in (encoder.name, encoder.model):
            return encoder
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ModelNotFound(
            f"--model {model}: no folder of that name; known without a download: {', '.join(ENCODERS)}"
        )
    return _encoder_of(folder)


def _encoder_of(folder: Path) -> Encoder:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        config = {**config, **config.get("text_config", {})}
        kind, heads = str(config["model_type"]), int(config["num_attention_heads"])
        if any("expert" in name and value for name, value in config.items()):
            raise BadConfig(
                f"{path}: a mixture of experts, whose cost is not that of its weights; "
                "choose a dense model to plan with"
            )
        width = int(config["hidden_size"])
        head = int(config.get("head_dim") or width // heads)
        shape = Transformer(
            layers=int(config["num_hidden_layers"]),
            width=width,
            attention=heads * head,
            key_value=int(config.get("num_key_value_heads") or heads) * head,
            mlp=int(config["intermediate_size"]),
            gated=config.get("hidden_act") in ("silu", "swish") or kind.startswith(_GATED_WITH_GELU),
            causal=not any(part in kind for part in _BIDIRECTIONAL),
        )
        return Encoder(
            name=str(folder),
            model=str(folder),
            shape=shape,
            vocabulary=int(config["vocab_size"]),
            max_tokens=min(OTHER_MAX_TOKENS, int(config["max_position_embeddings"]) - 1),
            around=1 if shape.causal else 2,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            serve=_POOL_LAST if shape.causal else ("--pooling", "mean"),
        )
    except OSError as error:
        raise BadConfig(
            f"{path}: {error.strerror or error}; name a folder with config.json and tokenizer.json"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfig(
            f"{path} does not describe a transformer that can be planned for ({error!r}); "
            f"name one of {', '.join(ENCODERS)}"
        ) from None


# ---------------------------------------------------------------------------------------------- GPUs

GPUS: dict[str, float] = {
    # Peak dense bfloat16 TFLOP/s, from the makers' data sheets; NVIDIA prints twice that, "with sparsity".
    "a100": 312,  # NVIDIA A100 data sheet
    "h100": 989.4,  # NVIDIA H100 data sheet, SXM: 1,979 sparse
    "h100-pcie": 756,  # NVIDIA H100 data sheet, PCIe: 1,513 sparse
    "h200": 989.4,  # NVIDIA H200 data sheet: 1,979 sparse
    "b200": 2250,  # NVIDIA Blackwell data sheet: 4.5 PFLOP/s sparse
    "l4": 121,  # NVIDIA L4 data sheet: 242 sparse
    "l40s": 362,  # NVIDIA L40S data sheet: 733 sparse
    "rtx-4090": 165.2,  # NVIDIA Ada GPU architecture white paper, FP32 accumulate
    "mi300x": 1307,  # AMD Instinct MI300X data sheet
}


def gpu_hours(flops: float, gpu: str, mfu: float) -> float:
    """Hours that one GPU takes at a share `mfu` of its peak. Raises BadConfig: unknown GPU, share not in (0, 1]."""
    if gpu not in GPUS:
        raise BadConfig(f"--gpu {gpu}: known are {', '.join(GPUS)}")
    if not 0 < mfu <= 1:
        raise BadConfig(f"--mfu {mfu:g}: a share of the GPU's peak, above 0 and at most 1")
    return flops / (GPUS[gpu] * 1e12 * mfu) / 3600


# ---------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a sealed cache with one snapshot. `rows`: keys, token counts, flags and checksums."""

    dtype: str
    vectors: int
    rows: int
    captions: int
    index: int

    @property
    def total(self) -> int:
        return self.vectors + self.rows + self.captions + self.index


def storage(captions: int, text_bytes: int, dimensions: int) -> list[Storage]:
    """What distinct captions take on disk, for each encoding, from the columns of the files themselves.

    Args:
        captions: distinct captions.
        text_bytes: UTF-8 bytes of their normalised texts.
        dimensions: length of a vector.

    Left out: some kilobytes for each segment, and what is not sealed yet while a cache is filled.
    """
    bits = _bits(vector_schema(Encoding(dtype="float32", dimensions=dimensions))) - 32 * dimensions
    table = (8 if captions >= 2**32 else 4) << prefix_bits(captions)
    index = _bits(INDEX_SCHEMA) * captions // 8 + table
    texts = _bits(CAPTIONS_SCHEMA) * captions // 8 + text_bytes
    return [
        Storage(dtype, size * dimensions * captions, bits * captions // 8, texts, index)
        for dtype, size in (("float32", 4), ("float16", 2), ("int8", 1))
    ]


def _bits(schema: pa.Schema) -> int:
    """Bits a row of the columns takes; of texts, only their offsets."""
    return sum(_width(field.type) for field in schema)


def _width(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    return 64 if pa.types.is_large_string(kind) else kind.bit_width
