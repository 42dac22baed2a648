"""Rows: how a tensor is cut into chunks. Imports neither torch nor numpy.

The rows of a tensor are all its axes but the last, flattened; a vector and a scalar have one row. A chunk is a
range of rows that keeps the tensor's rank: one index before some axis, a range on it, everything after it. So the
chunks of a per-channel convolution ``[out, in, kh, kw]`` are multiples of ``in * kh`` rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from monoquant_core.encoding import FULL, Encoding
from monoquant_core.errors import EncodingError

Shape = tuple[int, ...]


def row_count(shape: Shape) -> int:
    """How many rows a tensor has."""
    return math.prod(shape[:-1])


def row_length(shape: Shape) -> int:
    """Elements in a row."""
    return shape[-1] if shape else 1


def all_rows(shape: Shape) -> range:
    """The range that is the whole tensor."""
    return range(row_count(shape))


@functools.lru_cache(maxsize=1024)
def chunk_shape(shape: Shape, rows: range) -> Shape:
    """Shape of the chunk that ``rows`` are, of the tensor's own rank.

    :raises EncodingError: when the range is outside the tensor or is not a box.
    """
    count = row_count(shape)
    if rows.step != 1 or not 0 <= rows.start <= rows.stop <= count:
        raise EncodingError(f"rows {rows.start}:{rows.stop} are outside a tensor of {count} rows")
    if len(rows) == count:
        return shape
    inner = 1  # rows below one index of the current axis
    for axis in range(len(shape) - 2, -1, -1):
        outer = inner * shape[axis]
        if rows.start // outer == (rows.stop - 1) // outer and len(rows) <= outer:
            if rows.start % inner or rows.stop % inner:
                break
            return (1,) * axis + (len(rows) // inner,) + shape[axis + 1 :]
        inner = outer
    raise EncodingError(f"rows {rows.start}:{rows.stop} of shape {shape} are not a range along one axis")


def chunks(shape: Shape, quantum: int, max_elements: int) -> Iterator[range]:
    """Cut a tensor into chunks of whole quanta, of about ``max_elements`` elements, in order.

    A chunk starts at a multiple of the quantum and, the last one apart, has a multiple of it. A tensor without
    elements is one empty chunk.

    :param quantum: rows that must stay together.
    """
    count = row_count(shape)
    if count == 0 or row_length(shape) == 0:
        yield range(count)
        return
    if quantum >= count:
        yield range(count)
        return
    limit = max(1, max_elements // row_length(shape))
    inner = 1
    for axis in range(len(shape) - 2, -1, -1):
        outer = inner * shape[axis]
        # The axis to range over: all of it no longer fits, and quanta start anew with each of its ranges.
        if axis == 0 or (outer > limit and outer % quantum == 0):
            unit = math.lcm(inner, quantum)
            step = min(max(limit // unit, 1) * unit, outer)
            for start in range(0, count, outer):
                for first in range(start, start + outer, step):
                    yield range(first, min(first + step, start + outer))
            return
        inner = outer


def block_rows(shape: Shape, block: tuple[int, ...]) -> int:
    """Rows that share a block's parameters: the smallest run of rows made of whole blocks.

    :param block: extents as in :class:`~monoquant_core.encoding.Encoding`; a rank-2 block of a tensor of higher
        rank counts rows of ``prod(shape[1:])`` elements, a rank-1 block is flattened.
    """
    if len(block) == len(shape):
        inner = 1
        quantum = 1
        for axis in range(len(shape) - 2, -1, -1):
            extent = shape[axis] if block[axis] == FULL else block[axis]
            if extent > 1:
                quantum = min(extent, shape[axis]) * inner
            inner *= shape[axis]
        return max(1, quantum)
    if len(block) == 2 < len(shape):
        extent = shape[0] if block[0] == FULL else block[0]
        return max(1, min(extent, shape[0]) * math.prod(shape[1:-1]))
    if len(block) == 1:
        whole = block[0] == FULL or row_length(shape) % block[0] != 0
        return max(1, row_count(shape)) if whole else 1
    raise EncodingError(f"block {block} has another rank than shape {shape}")


def quantum(shape: Shape, encoding: Encoding | None, *, tensor_wide: bool = False) -> int:
    """Rows that must be processed together for an encoding, its nested parameters included.

    :param tensor_wide: whether parameters of the whole tensor are known beforehand (from a first pass, or from a
        finished file), so that they do not force the tensor to be taken whole.
    """
    if encoding is None:
        return 1
    known = tensor_wide and encoding.tensor_wide
    own = 1 if known else block_rows(shape, encoding.block)
    return math.lcm(own, *(_nested(shape, encoding, p, tensor_wide) for _, p in encoding.params()))


def _nested(shape: Shape, parent: Encoding, param: object, tensor_wide: bool) -> int:
    if not isinstance(param, Encoding):
        return 1
    if tensor_wide and param.tensor_wide:
        return 1
    if len(param.block) == 1 or len(parent.block) != len(shape):
        return max(1, row_count(shape))  # blocks of a flattened parameter do not follow rows
    # A nested block counts parent blocks: along each axis it covers that many times as many elements.
    combined = tuple(
        FULL if FULL in (b, p) and b != 1 else p * b if p != FULL else FULL
        for b, p in zip(param.block, parent.block, strict=True)
    )
    return block_rows(shape, combined)


@dataclass(frozen=True, slots=True)
class RowMap:
    """A permutation of rows within consecutive blocks: output row ``i`` of a block is input row ``order[i]`` of it.

    It applies to codes and to per-row parameters alike, so finished files can be permuted without requantizing.

    :raises EncodingError: when ``order`` is not a permutation.
    """

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise EncodingError("a RowMap is a permutation of 0..n-1")

    @property
    def quantum(self) -> int:
        """Rows that must be read together."""
        return len(self.order)

    @property
    def inverse(self) -> RowMap:
        """The permutation that undoes this one."""
        return RowMap(tuple(sorted(range(len(self.order)), key=self.order.__getitem__)))
