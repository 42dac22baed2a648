"""Reading rows of a tensor from a file, in whatever order its elements lie there."""

from __future__ import annotations

import functools
import math

import torch

from monoquant_core import rows as r
from monoquant_core.containers.entries import TensorEntry, tensor_at
from monoquant_core.containers.reader import FileReader
from monoquant_core.scratch import Scratch
from monoquant_core.tensor import dtype_of

_WASTE = 2  #: a span is read at once when it is at most this many times as long as what is wanted of it
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # copies of all bits


def read_rows(
    reader: FileReader,
    name: str,
    entry: TensorEntry,
    rows: range,
    scratch: Scratch | None = None,
    slot: str = "source",
) -> torch.Tensor:
    """Rows of a tensor as one contiguous chunk of its rank, of ``entry.dtype``.

    :param slot: which of the worker's buffers to use; the chunk lives in it until its next use.
    :raises SourceError: when the file has changed, shrunk or cannot be read.
    """
    shape = r.chunk_shape(entry.shape, rows)
    dtype = dtype_of(entry.dtype)
    where = _where(name)
    strides = entry.strides
    if strides is None:
        row_bytes = r.row_length(entry.shape) * entry.itemsize
        chunk, memory = (scratch or Scratch()).take_to_read(slot, shape, dtype)
        reader.read_into(memory, entry.offset + rows.start * row_bytes, where)
        return chunk
    out = _take(scratch, slot, math.prod(shape) * entry.itemsize)
    carrier = _CARRIERS[entry.itemsize]
    # Axes from the farthest apart to the closest; what repeats (stride 0) is read once, and copied by broadcasting.
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    axes = [(1 if strides[axis] == 0 else shape[axis], strides[axis]) for axis in order]

    def gather(target: torch.Tensor, first: int, axes: list[tuple[int, int]]) -> None:
        span = 1 + sum((n - 1) * s for n, s in axes)
        if span > _WASTE * math.prod(n for n, _ in axes):
            for i in range(axes[0][0]):
                gather(target[i], first + i * axes[0][1], axes[1:])
            return
        data = _take(scratch, f"{slot}.span", span * entry.itemsize)
        reader.read_into(data.numpy().data, entry.offset + first * entry.itemsize, where)
        target.copy_(data.view(carrier).as_strided([n for n, _ in axes], [s for _, s in axes]))

    first = sum(i * s for i, s in zip(first_index(entry.shape, rows), strides, strict=True))
    gather(out.view(carrier).view(shape).permute(order), first, axes)
    chunk = out.view(dtype).view(shape)
    if entry.lazy == "conj":
        return chunk.conj_physical_()
    return chunk.neg_() if entry.lazy == "neg" else chunk


@functools.lru_cache(maxsize=256)
def _where(name: str) -> str:
    return tensor_at("", name).removeprefix(": ")


def first_index(shape: tuple[int, ...], rows: range) -> tuple[int, ...]:
    """Index of the first element of a chunk."""
    index = [0] * len(shape)
    left = rows.start
    for axis in range(len(shape) - 2, -1, -1):
        left, index[axis] = divmod(left, max(1, shape[axis]))
    return tuple(index)


def _take(scratch: Scratch | None, slot: str, nbytes: int) -> torch.Tensor:
    if scratch is None:
        return torch.empty(nbytes, dtype=torch.uint8)
    return scratch.take(slot, (nbytes,), torch.uint8)
