"""The search of :mod:`.search`, compiled by numba: same bits, a block at a time in a core's nearest cache.

Needs the extra ``fast``. Without fastmath no product and sum are fused, and every operation is the single one of
IEEE 754 that torch's is. Only the terms of sums may change places, so that they become vectors: these sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from monoquant_core.compiling import jit
from monoquant_core.scratch import Scratch
from monoquant_int.search import CANDIDATES, FINEST, NORMAL_STEP, Codes, grid_unit

_F, _D = np.float32, np.float64
_FINEST, _STRIDES, _NONE = _F(FINEST), _F(CANDIDATES - 2), np.zeros((0, 0), _F)


def best_scales(
    matrix: torch.Tensor,
    unscale: torch.Tensor,
    weights: torch.Tensor | None,
    plain: torch.Tensor,
    coarsest: torch.Tensor,
    codes: Codes,
    bits: int,
    scratch: Scratch,
) -> torch.Tensor:
    """See :func:`monoquant_int.search.best_scales`; nothing is overwritten."""
    found = np.empty(len(matrix), _F)
    unit = grid_unit(matrix.shape[1], bits)
    _best_scales(
        _array(matrix),
        _array(unscale),
        _NONE if weights is None else _array(weights),
        _array(plain),
        _array(coarsest),
        _ends(codes.low),
        _ends(codes.high),
        codes.both_signs,
        _F(NORMAL_STEP[bits]),
        _F(unit),
        _F(1 / unit),
        found,
    )
    return torch.from_numpy(found)


def _array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return x.contiguous().numpy()


def _ends(codes: torch.Tensor | int) -> np.ndarray[Any, Any]:
    """Of all blocks as ``[1]``, or of each."""
    return np.array([codes], _F) if isinstance(codes, int) else codes.contiguous().view(-1).numpy()


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast("Callable[..., Any]", cast("Any", intrinsic)(function))


@_intrinsic
def _plus(typing: Any, total: Any, term: Any) -> Any:
    """A sum that is exact whatever the order of its terms, which the compiler may choose."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fadd(*args, flags=["reassoc"])

    return types.float64(types.float64, types.float64), build


@_intrinsic
def _whole(typing: Any, value: Any) -> Any:
    """The nearest whole number, of two the even one."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(args[0].type, [args[0].type])
        return builder.call(builder.module.declare_intrinsic("llvm.rint", (kind.return_type,), kind), args)

    return types.float32(types.float32), build


@jit
def _best_scales(
    matrix: Any,
    unscale: Any,
    weights: Any,
    plain: Any,
    coarsest: Any,
    lows: Any,
    highs: Any,
    both_signs: bool,
    normal_step: Any,
    unit: Any,
    units: Any,
    found: Any,
) -> None:
    blocks, n = matrix.shape
    x, w, wx = np.empty(n, _F), np.empty(n, _F), np.empty(n, _F)
    weighted = weights.size > 0
    for block in range(blocks):
        row, by = matrix[block], unscale[block]
        squares = _D(0)
        for i in range(n):
            v = _whole(row[i] * by * units) * unit
            x[i] = v
            squares = _plus(squares, _D(_whole(v * v * units) * unit))
        if weighted:
            given = weights[block]
            for i in range(n):
                v = _whole(given[i] * units) * unit
                w[i] = v
                wx[i] = _whole(x[i] * v * units) * unit
        deviation = np.sqrt(_F(squares) / _F(n))
        coarse, low, high = coarsest[block], lows[block % lows.size], highs[block % highs.size]
        finest = np.copysign(min(deviation * normal_step, abs(coarse) * _FINEST), coarse)
        first = _F(1) / coarse
        stride = (_F(1) / finest - first) / _STRIDES
        best, scale = _D(-1), _D(np.nan)
        for k in range(CANDIDATES):
            inverse = _F(1) / plain[block] if k == 0 else first + stride * _F(k - 1)
            if both_signs and k > 0 and k % 2 == 0:
                inverse = -inverse
            xq, qq = _D(0), _D(0)
            if weighted:
                for i in range(n):
                    q = _whole(x[i] * inverse)
                    q = low if q < low else q
                    q = high if q > high else q
                    xq = _plus(xq, _D(wx[i] * q))
                    qq = _plus(qq, _D(q * q * w[i]))
            else:
                for i in range(n):
                    q = _whole(x[i] * inverse)
                    q = low if q < low else q
                    q = high if q > high else q
                    xq = _plus(xq, _D(x[i] * q))
                    qq = _plus(qq, _D(q * q))
            fit = xq / qq
            if fit * xq > best:
                best, scale = fit * xq, fit
        found[block] = _F(scale)
