"""ONNX: `model.onnx`, uint8 pixels in, unit vectors out, any number of images at a time.

Scaling, pixel statistics, head and normalisation are part of the graph.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lift_trainer.export.source import Encode, Source

MODEL = "model.onnx"
OPSET = 18
MOST_INSIDE = 1_800_000_000
"""Bytes of weights in the model file itself: protobuf ends at 2 GiB. More go to `model.onnx.data`."""


def write(source: Source, folder: Path) -> None:
    import onnx

    weights = sum(tensor.nbytes for tensor in source.tower.state_dict().values())
    pixels = torch.zeros(2, 3, source.image_size, source.image_size, dtype=torch.uint8)
    program = torch.onnx.export(
        source.tower,
        (pixels,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["vectors"],
        dynamic_shapes=({0: torch.export.Dim("images")},),
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with this machine's paths
    card = (folder / "lift.json").read_text()
    program.model.metadata_props["lift"] = json.dumps(json.loads(card), separators=(",", ":"))
    program.save(folder / MODEL, external_data=weights > MOST_INSIDE)
    onnx.checker.check_model(folder / MODEL)


def load(folder: Path) -> Encode:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])

    def encode(pixels_b3ss: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["vectors"], {"pixels": pixels_b3ss.numpy()})[0])

    return encode


def usage(source: Source) -> str:
    """Python for the card: `image` is a PIL image, `vectors` comes out."""
    size = source.image_size
    return "\n".join(
        [
            "import numpy as np, onnxruntime",
            "",
            "short = min(image.size)",
            f"sides = [int({size} * side / short) for side in image.size]",
            'image = image.convert("RGB").resize(sides, 3)  # bicubic',
            f"left, top = (round((side - {size}) / 2) for side in sides)",
            f"image = image.crop((left, top, left + {size}, top + {size}))",
            "pixels = np.asarray(image).transpose(2, 0, 1)[None]  # uint8 [1, 3, height, width]",
            'session = onnxruntime.InferenceSession("FOLDER/model.onnx")',
            '(vectors,) = session.run(["vectors"], {"pixels": pixels})',
        ]
    )


def notes(source: Source) -> str:
    return (
        "Input `pixels`, uint8 [images, 3, size, size]; output `vectors`, float32 [images, dimensions], unit "
        "length. `lift.json` is also in the file's metadata, under `lift`."
    )
