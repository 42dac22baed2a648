"""Samples for calibration, from what the user names: arrays, text, images, or code. Imports no torch until read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoquant_core import named_code
from monoquant_core.errors import CalibrationError, SourceError
from monoquant_core.runners import Batch, Input

if TYPE_CHECKING:
    import torch

ARRAYS = (".npz", ".npy", ".safetensors", ".pt", ".pth")
TEXTS = (".txt", ".jsonl")
SAMPLES, BATCH_SIZE = 256, 32
SEQUENCE = 512  #: tokens of a sample of text, unless the model or its tokenizer takes fewer

ACCEPTED = (
    f"{', '.join(ARRAYS)} (or FILE:KEY), {', '.join(TEXTS)} with a tokenizer, a folder of images with --preprocess, or "
    "pkg.mod:function that yields batches"
)
_KEYED = re.compile(r"(.+\.(?:npz|safetensors|pt|pth)):([^:/\\]+)")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How samples are taken. The same options and data give the same samples."""

    samples: int = SAMPLES  #: how many; fewer where there are not so many
    batch_size: int = BATCH_SIZE
    seed: int = 0  #: which ones, and in which order
    preprocess: str = ""  #: ``pkg.mod:function``: of each image, or of each batch of arrays
    tokenizer: str = ""  #: a tokenizer.json, or the folder that has one; "" is the model's own
    length: int = 0  #: tokens of a sample of text; 0 is up to 512


class Data:
    """Samples in batches, as often as they are asked for, always the same.

    :param name: for messages.
    :param make: gives the batches anew.
    :param notes: what the user should know of how the data is read.
    """

    def __init__(self, name: str, make: Callable[[], Iterable[Batch]], notes: Sequence[str] = ()) -> None:
        self.name, self._make, self.notes = name, make, tuple(notes)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._make())


@dataclass(frozen=True, slots=True)
class Recipient:
    """What samples are for: the model that takes them."""

    name: str  #: for messages
    inputs: Sequence[Input] = ()
    side_files: Mapping[str, Path] = field(default_factory=dict)  #: of a model folder: its tokenizer
    config: Mapping[str, Any] | None = None
    extra: Sequence[str] = ()  #: arrays that are taken along where there are any: ``labels``

    def fixed_batch(self) -> int | None:
        """The batch size that the model insists on, if it does."""
        shape = self.inputs[0].shape if self.inputs else None
        return shape[0] if shape else None


def batches_of(data: Any, target: Recipient, options: DataOptions) -> Iterable[Batch]:
    """Batches: those that the user gives, or of what a text or a path names, as :func:`open_data` reads it.

    :raises CalibrationError: for a single batch, and for what is none.
    """
    if isinstance(data, str | os.PathLike):
        return open_data(os.fspath(data), target, options)
    if hasattr(data, "shape") or isinstance(data, Mapping) or not hasattr(data, "__iter__"):
        raise CalibrationError(
            f"data is a list of batches, and this is one {type(data).__name__}", hint="give x.split(32), or [batch]"
        )
    batches: Iterable[Batch] = data
    return batches


def open_data(where: str, target: Recipient, options: DataOptions = DataOptions()) -> Data:
    """The samples that a text names, for a model.

    :raises SourceError: when the file cannot be read, or holds something else; names it.
    :raises CalibrationError: when it does not fit the model, or what reads it is not installed.
    """
    if options.samples < 1 or options.batch_size < 1:
        raise CalibrationError(f"{where}: samples and batch size are positive")
    keyed = _KEYED.fullmatch(where)
    if named_code.is_reference(where) and not (keyed and os.path.exists(keyed[1])):
        return Data(where, lambda: _of_function(where, options))
    path, key = (Path(keyed[1]), keyed[2]) if keyed and not os.path.lexists(where) else (Path(where), "")
    if not path.exists():
        raise SourceError(f"{where!r}: no such file or folder", hint=f"data is one of: {ACCEPTED}")
    if path.is_dir():
        from monoquant_core.data.images import images

        return images(path, target, options)
    suffix = path.suffix.lower()
    if suffix in TEXTS:
        from monoquant_core.data.text import texts

        return texts(path, target, options)
    if suffix in ARRAYS:
        from monoquant_core.data.arrays import arrays

        return arrays(path, key, target, options)
    raise SourceError(f"{path}: no reader for {suffix or 'a file without suffix'}", hint=f"data is one of: {ACCEPTED}")


def limited(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches up to a number of samples; the last one may be cut."""
    from monoquant_core.calibration import batch_size

    left = samples
    for batch in batches:
        size = batch_size(batch)
        yield batch if size <= left else cut(batch, slice(0, left), size)
        left -= min(size, left)
        if not left:
            return


def cut(batch: Any, part: slice, size: int) -> Any:
    """Some samples of a batch of ``size``: every tensor of that first extent is cut."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch[part] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {name: cut(value, part, size) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(cut(value, part, size) for value in batch)
    return batch


def chosen(total: int, options: DataOptions) -> list[int]:
    """Indices of the samples to take, in a random order that the seed decides."""
    import torch

    order: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed)).tolist()
    return order[: options.samples]


def preprocessor(options: DataOptions) -> Callable[[Any], Any] | None:
    """The user's function, if one is named.

    :raises SourceError: when there is none of that name.
    """
    if not options.preprocess:
        return None
    if not named_code.is_reference(options.preprocess):
        raise SourceError(f"{options.preprocess!r}: a preprocessing function is named pkg.mod:function")
    function = named_code.find(options.preprocess)
    if not callable(function):
        raise SourceError(f"{options.preprocess}: is a {type(function).__name__}, and no function")
    return lambda value: named_code.call(options.preprocess, function, value)


def in_batches(
    values: Mapping[str, torch.Tensor], target: Recipient, options: DataOptions
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of samples that are in memory; where the model insists on a batch size, whole ones only."""
    fixed = target.fixed_batch()
    size, total = fixed or options.batch_size, len(next(iter(values.values())))
    if fixed and total < fixed:
        raise CalibrationError(f"{target.name}: takes batches of {fixed} samples, and the data has {total}")
    for start in range(0, total, size):
        if fixed is None or start + size <= total:
            yield {name: value[start : start + size] for name, value in values.items()}


def _of_function(where: str, options: DataOptions) -> Iterator[Batch]:
    function = named_code.find(where)
    made: Any = named_code.call(where, function) if callable(function) else function
    if isinstance(made, str | bytes | Mapping) or not hasattr(made, "__iter__"):
        raise SourceError(f"{where}: gives a {type(made).__name__}, and batches are wanted: an iterable of tensors")
    iterator = iter(made)

    def batches() -> Iterator[Batch]:
        while (batch := named_code.call(where, lambda: next(iterator, None))) is not None:
            yield batch

    return limited(batches(), options.samples)
