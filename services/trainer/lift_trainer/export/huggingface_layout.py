"""transformers: a folder that `from_pretrained` loads.

With a linear head or none it is timm's own layout under a model type that transformers has
(`timm_wrapper`): no code in the folder. No image model of transformers has a two-layer, gated or
batch-normed projection, or pools class token ⊕ mean patch; for those the folder carries `modeling_lift.py`,
which `trust_remote_code=True` runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lift_trainer.export import timm_layout
from lift_trainer.export.source import Encode, Source, timm_arguments
from lift_trainer.heads import unit_vectors
from lift_trainer.tensors import write_tensors

CODE = "modeling_lift.py"


def needs_code(source: Source) -> bool:
    return source.head not in ("none", "linear") or source.tower.pooling == "class+mean"


def write(source: Source, folder: Path) -> None:
    (_write_with_code if needs_code(source) else _write_plain)(source, folder)
    size = source.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": source.mean,
        "image_std": source.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _write_plain(source: Source, folder: Path) -> None:
    timm_layout.write(source, folder)
    name = "TimmWrapperModel" if source.head == "none" else "TimmWrapperForImageClassification"
    config = {"model_type": "timm_wrapper", "architectures": [name]} | timm_layout.config(source)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_with_code(source: Source, folder: Path) -> None:
    architecture, arguments = timm_arguments(source)
    config = {
        "model_type": "lift_image",
        "architectures": ["LiftImageModel"],
        "auto_map": {
            "AutoConfig": "modeling_lift.LiftImageConfig",
            "AutoModel": "modeling_lift.LiftImageModel",
        },
        "dtype": "float32",
        "architecture": architecture,
        "model_args": arguments,
        "pooling": source.tower.pooling,
        "head": source.head,
        "width": source.tower.width,
        "dimensions": source.dimensions,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parts = {"vit": source.tower.vit, "head": source.tower.head}
    tensors = {
        f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()
    }
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)


def load(folder: Path) -> Encode:
    from transformers import TimmWrapperForImageClassification, TimmWrapperModel

    card = json.loads((folder / "lift.json").read_text())["image"]
    model: Any
    if (folder / CODE).exists():
        # The same code, but not by way of transformers' cache of code, which is the user's.
        from lift_trainer.export.modeling_lift import LiftImageModel

        model, part = LiftImageModel.from_pretrained(folder), "image_embeds"
    elif card["head"] == "linear":
        model, part = TimmWrapperForImageClassification.from_pretrained(folder), "logits"
    else:
        model, part = TimmWrapperModel.from_pretrained(folder), "pooler_output"
    model = model.eval()
    mean, std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))

    @torch.inference_mode()
    def encode(pixels_b3ss: torch.Tensor) -> torch.Tensor:
        return unit_vectors(getattr(model((pixels_b3ss / 255 - mean) / std), part))

    return encode


def usage(source: Source) -> str:
    """Python for the card: `image` is a PIL image, `vectors` comes out.

    CLIPImageProcessor resizes as evaluation does, to the last bit. AutoImageProcessor would take timm's for a
    folder without code, which resizes with Pillow.
    """
    if needs_code(source):
        load_it = 'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()'
        kind, take = "AutoModel", "vectors = model(**inputs).image_embeds"
    elif source.head == "linear":
        load_it = 'model = AutoModelForImageClassification.from_pretrained("FOLDER").eval()'
        kind = "AutoModelForImageClassification"
        take = "vectors = torch.nn.functional.normalize(model(**inputs).logits, dim=-1)"
    else:
        load_it = 'model = AutoModel.from_pretrained("FOLDER").eval()'
        kind, take = (
            "AutoModel",
            "vectors = torch.nn.functional.normalize(model(**inputs).pooler_output, dim=-1)",
        )
    return "\n".join(
        [
            "import torch",
            f"from transformers import {kind}, CLIPImageProcessor",
            "",
            load_it,
            'inputs = CLIPImageProcessor.from_pretrained("FOLDER")(image, return_tensors="pt")',
            take,
        ]
    )


def notes(source: Source) -> str:
    if not needs_code(source):
        return "No code comes with it: transformers runs timm's model of that name."
    return (
        f"**It runs code of this folder.** transformers has no image model with the head `{source.head}` over "
        f"pooling `{source.tower.pooling}`, so `{CODE}` defines one, on top of timm; `trust_remote_code=True` "
        "runs it. It is the folder's only code."
    )
