"""One export from beginning to end: written, loaded back by its own library, compared, published."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from lift_cache.errors import BadConfig, LiftError
from lift_cache.files import make_directory, rename, room_for, sync_directory, sync_file, temporary_name
from lift_trainer.export import huggingface_layout, onnx_layout, open_clip_layout, timm_layout
from lift_trainer.export.card import Check, readme, record, write_record, write_texts
from lift_trainer.export.source import Encode, Source

LayoutName = Literal["timm", "open_clip", "huggingface", "onnx"]

CHECKED_IMAGES = 4


@dataclass(frozen=True)
class Layout:
    library: str
    """As a model hub calls it."""
    packages: tuple[str, ...]
    """Needed to write it and to load it back; the one that loads it comes first."""
    tolerance: float
    write: Callable[[Source, Path], None]
    """Into a folder that has `lift.json`. Raises BadConfig: it cannot say this tower."""
    load: Callable[[Path], Encode]
    usage: Callable[[Source], str]
    notes: Callable[[Source], str]


LAYOUTS: dict[LayoutName, Layout] = {
    "timm": Layout(
        "timm", ("timm",), 1e-5, timm_layout.write, timm_layout.load, timm_layout.usage, timm_layout.notes
    ),
    "open_clip": Layout(
        "open_clip",
        ("open_clip_torch",),
        1e-5,
        open_clip_layout.write,
        open_clip_layout.load,
        open_clip_layout.usage,
        open_clip_layout.notes,
    ),
    "huggingface": Layout(
        "transformers",
        ("transformers",),
        1e-5,
        huggingface_layout.write,
        huggingface_layout.load,
        huggingface_layout.usage,
        huggingface_layout.notes,
    ),
    "onnx": Layout(
        "onnx",
        ("onnxruntime", "onnx", "onnxscript"),
        1e-4,
        onnx_layout.write,
        onnx_layout.load,
        onnx_layout.usage,
        onnx_layout.notes,
    ),
}


def export(source: Source, to: LayoutName, out: Path) -> Check:
    """Write `out`, which is then whole or not there.

    Raises:
        BadConfig: `out` exists, a package is missing, or the layout cannot say this tower.
        LiftError: what was written does not give the run's vectors when it is loaded back.
        CacheFull: no room.
    """
    layout, but_clip = LAYOUTS[to], to == "open_clip"
    _require_packages(to, layout.packages)
    if out.exists():
        raise BadConfig(f"--out {out} exists; name a folder that does not")
    make_directory(out.parent)
    folder = temporary_name(out)
    said = record(source, to, but_clip=but_clip)
    with room_for(out.parent):
        folder.mkdir()
        try:
            write_record(folder, said)
            write_texts(source, folder, but_clip=but_clip)
            with _silent():
                layout.write(source, folder)
                found = largest_difference(source, layout.load(folder))
            check = Check(
                f"{layout.packages[0]} {version(layout.packages[0])}", CHECKED_IMAGES, found, layout.tolerance
            )
            if not found <= layout.tolerance:
                raise LiftError(
                    f"--to {to}: loaded back by {check.library}, its vectors differ by {found:.1e} from the run's, "
                    f"more than {layout.tolerance:.0e}; nothing was written, use --to timm"
                )
            write_record(folder, said | {"check": asdict(check)})
            (folder / "README.md").write_text(
                readme(
                    source,
                    said,
                    library=layout.library,
                    usage=layout.usage(source),
                    notes=layout.notes(source),
                    check=check,
                )
            )
            for path in folder.iterdir():
                sync_file(path)
            sync_directory(folder)
            rename(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return check


def largest_difference(source: Source, encode: Encode) -> float:
    """Of any coordinate, over some images at once and one alone; NaN where a vector is not finite."""
    side = source.image_size
    pixels = torch.randint(
        0, 256, (CHECKED_IMAGES, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        expected = source.tower(pixels)
    found = torch.cat([encode(pixels[:-1]), encode(pixels[-1:])])
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max())


def _require_packages(to: str, packages: tuple[str, ...]) -> None:
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            raise BadConfig(
                f"--to {to} needs {package}, which is not installed: pip install 'lift-trainer[export]'"
            ) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Libraries report progress and deprecations of their own; what fails is an exception all the same."""
    said, before = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
