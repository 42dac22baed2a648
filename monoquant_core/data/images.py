"""Samples from a folder of images, prepared by the user's own function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from monoquant_core.containers.entries import shown
from monoquant_core.data import Data, DataOptions, Recipient, chosen, preprocessor
from monoquant_core.errors import CalibrationError, SourceError
from monoquant_core.runners import Batch

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


def images(folder: Path, target: Recipient, options: DataOptions) -> Data:
    """Samples from the images of a folder and of the folders in it.

    The function of ``--preprocess`` gets each as a PIL image in RGB and gives a tensor, all of one shape.

    :raises CalibrationError: without such a function, without images, or without Pillow, which opens them.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise SourceError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))})")
    prepare = preprocessor(options)
    if prepare is None:
        raise CalibrationError(
            f"{folder}: images need --preprocess pkg.mod:function: a PIL image in, a tensor as the model takes it out",
            hint="it must do what was done in training: size, order of channels, normalization",
        )
    try:
        from PIL import Image
    except ImportError as exc:
        raise CalibrationError(f"{folder}: opening images needs Pillow", hint="pip install pillow") from exc
    inputs = [i.name for i in target.inputs if i.name != "**"]
    size = target.fixed_batch() or options.batch_size

    def load(path: Path) -> torch.Tensor:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
            raise SourceError(f"{path}: cannot be opened as an image: {shown(str(exc))}") from exc
        made: Any = prepare(image)
        if not isinstance(made, torch.Tensor):
            raise CalibrationError(f"{options.preprocess}: gives a {type(made).__name__} for {path}, no tensor")
        return made

    def batches() -> Iterator[Batch]:
        group: list[torch.Tensor] = []
        for i in chosen(len(files), options):
            group.append(load(files[i]))
            if group[-1].shape != group[0].shape:
                raise CalibrationError(
                    f"{options.preprocess}: gives {list(group[-1].shape)} for {files[i]}, after {list(group[0].shape)}",
                    hint="it must bring all images to one size",
                )
            if len(group) == size:
                yield _batch(group, inputs)
                group = []
        if group and target.fixed_batch() is None:
            yield _batch(group, inputs)

    return Data(str(folder), batches)


def _batch(group: list[torch.Tensor], inputs: list[str]) -> Batch:
    stacked = torch.stack(group)
    return {inputs[0]: stacked} if inputs else stacked
