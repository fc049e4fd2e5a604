"""open_clip: `open_clip_config.json` and its weights, as `create_model("local-dir:FOLDER")` reads them.

open_clip's own image transformer ends in one matrix, so LIFT's head has no place in it. Its adapter for timm
has: `timm_proj: mlp` is Linear → GELU → Linear with 2·D hidden units. Here the hidden units beyond D have
zero weights, and a head that is one matrix is the adapter's `linear`. The adapter builds a tower from its
timm name alone, so the name has to say the shape, image size included.

open_clip wants a text tower. One that was trained with the images is exported with them; beside texts from a
cache stands a placeholder with a vocabulary of one, so that encoding text with it fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch

from lift_cache.errors import BadConfig
from lift_trainer.export.source import Encode, Source
from lift_trainer.tensors import write_tensors
from lift_trainer.text_towers import ClipTextTower

PLACEHOLDER = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def write(source: Source, folder: Path) -> None:
    """Raises BadConfig: the tower or its head cannot be said in open_clip's config."""
    vision, tensors = _image_side(source)
    text, text_tensors = _text_side(source)
    model: dict[str, Any] = {
        "embed_dim": source.dimensions,
        "vision_cfg": vision,
        "text_cfg": text,
        "custom_text": True,
    }
    scale = 0.0 if source.logit_scale is None else source.logit_scale
    tensors |= text_tensors | {"logit_scale": torch.tensor(scale)}
    if source.logit_bias is not None:
        model["init_logit_bias"] = source.logit_bias
        tensors["logit_bias"] = torch.tensor(source.logit_bias)
    prepare = {"mean": source.mean, "std": source.std, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model, "preprocess_cfg": prepare}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(folder / "open_clip_model.safetensors", tensors, {"format": "pt"})


def _image_side(source: Source) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tower, name = source.tower, source.architecture
    if name.startswith("vit:"):
        raise BadConfig(
            f"--to open_clip: it builds a tower by its timm name, and {name} has none; use --to timm"
        )
    if tower.pooling == "class+mean":
        raise BadConfig(
            "--to open_clip: it cannot pool class token and mean patch side by side; use --to timm"
        )
    with torch.device("meta"):
        theirs: Any = timm.create_model(name)
    if tuple(theirs.patch_embed.img_size) != (source.image_size, source.image_size):
        raise BadConfig(
            f"--to open_clip: it builds {name} for {theirs.patch_embed.img_size[0]} pixels, and this one was "
            f"trained at {source.image_size}; use --to timm"
        )
    pool = "token" if tower.pooling == "class" else "avg"
    theirs.reset_classifier(0, global_pool=pool)
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    tensors = dict(tower.vit.state_dict())
    if expected != {name: value.shape for name, value in tensors.items()}:
        raise BadConfig(
            f"--to open_clip: it builds {name} with other layers than were trained; use --to timm"
        )
    proj, bias, head = _projection(source)
    vision = {
        "timm_model_name": name,
        "timm_pool": pool,
        "timm_proj": proj,
        "timm_proj_bias": bias,
        "image_size": source.image_size,
    }
    named = {f"visual.trunk.{name}": value for name, value in tensors.items()}
    return vision, named | {f"visual.head.{name}": value for name, value in head.items()}


def _projection(source: Source) -> tuple[str, bool, dict[str, torch.Tensor]]:
    """open_clip's name for the head, whether its last layer has a bias, and its weights."""
    own = dict(source.tower.head.state_dict())
    match source.head:
        case "none":
            return "linear", False, {"proj.weight": torch.eye(source.dimensions)}
        case "linear":
            return "linear", True, {f"proj.{name}": value for name, value in own.items()}
        case "mlp":
            unused = torch.zeros_like
            first, offset, second = own["0.weight"], own["0.bias"], own["2.weight"]
            return (
                "mlp",
                True,
                {
                    "mlp.fc1.weight": torch.cat([first, unused(first)]),
                    "mlp.fc1.bias": torch.cat([offset, unused(offset)]),
                    "mlp.fc2.weight": torch.cat([second, unused(second)], 1),
                    "mlp.fc2.bias": own["2.bias"],
                },
            )
        case _:
            raise BadConfig(f"--to open_clip: it has no {source.head} head; use --to timm")


def _text_side(source: Source) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from open_clip.transformer import TextTransformer

    tower = source.texts[0].tower if len(source.texts) == 1 else None
    if isinstance(tower, ClipTextTower):
        shape, trained = tower.shape, tower.transformer
        config = {
            "context_length": shape.context,
            "vocab_size": trained.vocab_size,
            "width": shape.width,
            "heads": shape.heads,
            "layers": shape.depth,
        }
    else:
        config, trained = PLACEHOLDER, TextTransformer(**PLACEHOLDER, output_dim=source.dimensions)
        trained.requires_grad_(False).apply(_zero)
    return config, {f"text.{name}": value for name, value in trained.state_dict().items()}


def _zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.zero_()


def load(folder: Path) -> Encode:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    card = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    mean, std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))

    @torch.inference_mode()
    def encode(pixels_b3ss: torch.Tensor) -> torch.Tensor:
        return model.encode_image((pixels_b3ss / 255 - mean) / std, normalize=True)

    return encode


def usage(source: Source) -> str:
    """Python for the card: `image` is a PIL image, `vectors` comes out."""
    lines = [
        "import open_clip",
        "",
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")',
        "vectors = model.eval().encode_image(preprocess(image)[None], normalize=True)",
    ]
    if isinstance(source.texts[0].tower, ClipTextTower):
        lines += [
            'tokens = open_clip.get_tokenizer("local-dir:FOLDER")(["a red circle"])',
            "texts = model.encode_text(tokens, normalize=True)",
        ]
    return "\n".join(lines)


def notes(source: Source) -> str:
    head = {
        "none": "There was no head; `visual.head.proj` is the identity.",
        "linear": "The head is `visual.head.proj`.",
        "mlp": "The head is `visual.head.mlp`, twice as wide as it was trained: the hidden units beyond "
        f"{source.dimensions} are zero and add nothing.",
    }[source.head]
    if isinstance(source.texts[0].tower, ClipTextTower):
        return head
    return (
        f"{head} The text tower is a placeholder of zeros, with a vocabulary of one, because open_clip's models "
        "must have one: `encode_text` is of no use, texts are made as follows."
    )
