"""What compiled kernels share: how they are compiled, and small steps on 16 lanes at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba.extending import register_jitable

from monoquant_core import compiling
from monoquant_gguf.kernels import simd
from monoquant_gguf.kernels.simd import ROW, WIDTH, load, magnitude, nearest, splat, splat_like, transpose_square, where

_Function = TypeVar("_Function", bound=Callable[..., Any])

_F = np.float32
_ZERO = _F(0)

#: of kernels, whose parts come from these files
jit = functools.partial(compiling.jit, helpers=(__file__, simd.__file__))


def helper(function: _Function) -> _Function:
    """A function that kernels call: it becomes part of each."""
    options = {"forceinline": True, "error_model": "numpy", "boundscheck": False}
    return cast("_Function", cast("Any", register_jitable)(**options)(function))


@helper
def smaller(a: Any, b: Any) -> Any:
    """The smaller of two; ``b`` where one is NaN."""
    return where(a < b, a, b)


@helper
def greater(a: Any, b: Any) -> Any:
    """The larger of two; ``b`` where one is NaN."""
    return where(a > b, a, b)


@helper
def to_level(value: Any, low: Any, high: Any) -> Any:
    """As ggml rounds, then within a range."""
    return smaller(greater(nearest(value), low), high)


@helper
def transpose(source: Any, start: int, starts: Any, out: Any) -> None:
    """Lanes from ``start`` as columns; where there are no more, the last one again."""
    last, n = source.shape[0] - 1, source.shape[1]
    for column in range(0, WIDTH, ROW):
        for j in range(ROW):
            starts[j] = min(start + column + j, last) * n
        for i in range(0, n, ROW):
            transpose_square(source, starts, i, out, i * WIDTH + column)


@helper
def first_extreme(x: Any) -> Any:
    """Largest magnitude of every lane, and its value; of several, the first."""
    size, value = splat(_ZERO), splat(_ZERO)
    for at in range(0, x.size, WIDTH):
        v = load(x, at)
        larger = magnitude(v) > size
        size, value = where(larger, magnitude(v), size), where(larger, v, value)
    return size, value


@helper
def from_table(value: Any, table: Any, middles: Any) -> Any:
    """The value of the table that is nearest, the larger one of two."""
    doubled, found = value + value, splat_like(value, table[0])
    for m in range(middles.size):
        found = where(doubled >= splat_like(value, middles[m]), splat_like(value, table[m + 1]), found)
    return found
