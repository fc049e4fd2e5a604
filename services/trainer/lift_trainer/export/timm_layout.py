"""timm: `config.json` and `model.safetensors`, as `timm.create_model("local-dir:FOLDER")` reads them.

A linear head is the model's classifier. Other heads have no place in timm: their weights lie beside it in
`head.safetensors`, and the model gives pooled states.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

from lift_trainer.export.source import Encode, Source, timm_arguments
from lift_trainer.heads import build_head, unit_vectors
from lift_trainer.tensors import write_tensors

HEAD = "head.safetensors"


def head_is_classifier(source: Source) -> bool:
    return source.head == "linear" and source.tower.pooling != "class+mean"


def write(source: Source, folder: Path) -> None:
    tower = source.tower
    tensors = dict(tower.vit.state_dict())
    if head_is_classifier(source):
        tensors |= {f"head.{name}": value for name, value in tower.head.state_dict().items()}
    elif source.head != "none":
        write_tensors(folder / HEAD, tower.head.state_dict())
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(source), indent=2) + "\n")


def config(source: Source) -> dict[str, Any]:
    """timm's `config.json`: how to build the model, and how to prepare its images."""
    architecture, arguments = timm_arguments(source)
    classes = source.dimensions if head_is_classifier(source) else 0
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": source.tower.vit.embed_dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "lift",
            "num_classes": classes,
            "input_size": [3, source.image_size, source.image_size],
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": source.mean,
            "std": source.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def load(folder: Path) -> Encode:
    card = json.loads((folder / "lift.json").read_text())["image"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))
    head: torch.nn.Module = torch.nn.Identity()
    if (folder / HEAD).exists():
        head = build_head(card["head"], card["width"], card["dimensions"]).eval()
        head.load_state_dict(load_file(folder / HEAD))

    @torch.inference_mode()
    def encode(pixels_b3ss: torch.Tensor) -> torch.Tensor:
        states = model((pixels_b3ss / 255 - mean) / std)
        if card["pooling"] == "class+mean":
            states = torch.cat([states[:, 0], states[:, model.num_prefix_tokens :].mean(1)], 1)
        return unit_vectors(head(states))

    return encode


def usage(source: Source) -> str:
    """Python for the card: `image` is a PIL image, `vectors` comes out."""
    lines = [
        "import timm, torch",
        "from timm.data import create_transform, resolve_model_data_config",
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "transform = create_transform(**resolve_model_data_config(model))",
        'states = model(transform(image.convert("RGB"))[None])',
    ]
    if source.tower.pooling == "class+mean":
        lines.append("states = torch.cat([states[:, 0], states[:, model.num_prefix_tokens:].mean(1)], 1)")
    if source.head == "none" or head_is_classifier(source):
        return "\n".join([*lines, "vectors = torch.nn.functional.normalize(states, dim=-1)"])
    width, dimensions = source.tower.width, source.dimensions
    lines += ["", "from safetensors.torch import load_file"]
    if source.head == "mlp":
        lines.append(
            f"head = torch.nn.Sequential(torch.nn.Linear({width}, {dimensions}), torch.nn.GELU(), "
            f"torch.nn.Linear({dimensions}, {dimensions}))"
        )
    else:
        lines += [
            "from lift_trainer.heads import build_head",
            f'head = build_head("{source.head}", {width}, {dimensions}).eval()',
        ]
    return "\n".join(
        [
            *lines,
            f'head.load_state_dict(load_file("FOLDER/{HEAD}"))',
            "vectors = torch.nn.functional.normalize(head(states), dim=-1)",
        ]
    )


def notes(source: Source) -> str:
    if source.head == "none":
        return "There is no head: the model's output is the vector, but for its length."
    if head_is_classifier(source):
        return "The head is one matrix, and the model's classifier here: `num_classes` is the vector's width."
    return (
        f"timm's model is the tower; the head, `{source.head}`, lies beside it in `{HEAD}` with the names of its "
        "weights in `lift_trainer.heads`."
    )
