"""The searches of :mod:`.lanes`, compiled by numba: same arguments, same bits, several times as fast.

Needs the extra ``fast``. A batch of lanes is transposed, so that loops over lanes become vector instructions while the
sum of every lane keeps its order. Without fastmath no product and sum are fused and nothing is reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch

from monoquant_gguf.kernels.lanes import TINY

LANES = 32  #: sub-blocks at a time: their values and weights stay in the first-level cache

_F, _I = np.float32, np.int32
_MAGIC, _ZERO, _TINY, _TENTH = _F(12582912.0), _F(0), _F(TINY), _F(0.1)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    def compiled(*, cache: bool) -> _Function:
        made = numba.njit(nogil=True, cache=cache, error_model="numpy", fastmath=False, boundscheck=False)(function)
        return cast("_Function", made)

    try:
        return compiled(cache=True)
    except RuntimeError:  # numba finds no folder that it may write to: it compiles in every process then
        return compiled(cache=False)


def symmetric(x: torch.Tensor, weights: torch.Tensor | None, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`monoquant_gguf.kernels.lanes.symmetric`."""
    values = x.contiguous().numpy()
    scale, codes = np.empty(len(x), _F), np.empty(values.shape, np.int8)
    used = (x * x if weights is None else weights.contiguous()).numpy()
    _symmetric(values, used, _I(half), scale, codes)
    return torch.from_numpy(scale), torch.from_numpy(codes)


def descent(x: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`monoquant_gguf.kernels.lanes.descent`."""
    values = x.contiguous().numpy()
    scale, codes = np.empty(len(x), _F), np.empty(values.shape, np.int8)
    _descent(values, _I(half), scale, codes)
    return torch.from_numpy(scale), torch.from_numpy(codes)


def ranged(
    x: torch.Tensor,
    weights: torch.Tensor,
    levels: int,
    first: float,
    step: float,
    steps: int,
    *,
    absolute: bool = False,
    guarded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`monoquant_gguf.kernels.lanes.ranged`."""
    values = x.contiguous().numpy()
    scale, minimum, codes = np.empty(len(x), _F), np.empty(len(x), _F), np.empty(values.shape, np.uint8)
    factors = np.array([_F(first) + _F(step) * _F(k) + _F(levels) for k in range(steps + 1)], _F)
    _ranged(values, weights.contiguous().numpy(), _I(levels), factors, absolute, guarded, scale, minimum, codes)
    return torch.from_numpy(scale), torch.from_numpy(minimum), torch.from_numpy(codes)


def codebook(x: torch.Tensor, weights: torch.Tensor, values: tuple[float, ...], tries: int) -> torch.Tensor:
    """See :func:`monoquant_gguf.kernels.lanes.codebook`."""
    table = np.array(values, _F)
    scale = np.empty(len(x), _F)
    _codebook(x.contiguous().numpy(), weights.contiguous().numpy(), table, table[1:] + table[:-1], tries, scale)
    return torch.from_numpy(scale)


def rounded(
    x: torch.Tensor, scale: torch.Tensor, added: torch.Tensor | None, searched: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """See :func:`monoquant_gguf.kernels.lanes.rounded`."""
    codes = np.empty(tuple(x.shape), np.uint8 if low == 0 else np.int8)
    offsets = torch.zeros_like(scale) if added is None else added
    given = searched.contiguous().numpy().astype(codes.dtype, copy=False)
    _rounded(x.contiguous().numpy(), scale.numpy(), offsets.numpy(), given, _I(low), _I(high), codes)
    return torch.from_numpy(codes)


@_jit
def _nearest(value: Any) -> Any:
    return (_F(value + _MAGIC).view(np.int32) & _I(0x7FFFFF)) - _I(0x400000)


@_jit
def _clip(code: Any, low: Any, high: Any) -> Any:
    return min(max(code, low), high)


@_jit
def _transpose(source: Any, start: int, out: Any) -> None:
    """Lanes from ``start`` as columns; where there are no more, the last one again."""
    last = source.shape[0] - 1
    for j in range(LANES):
        row = min(start + j, last)
        for i in range(source.shape[1]):
            out[i, j] = source[row, i]


@_jit
def _extremes(x: Any, amax: Any, extreme: Any) -> None:
    for j in range(LANES):
        amax[j] = _ZERO
        extreme[j] = _ZERO
    for i in range(x.shape[0]):
        for j in range(LANES):
            size = abs(x[i, j])
            larger = size > amax[j]
            extreme[j] = x[i, j] if larger else extreme[j]
            amax[j] = size if larger else amax[j]


@_jit
def _symmetric(values: Any, weights: Any, half: Any, scales: Any, codes: Any) -> None:
    lanes, n = values.shape
    x, w = np.empty((n, LANES), _F), np.empty((n, LANES), _F)
    amax, extreme, inverse, kept = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    xl, ll, best, scale = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    for start in range(0, lanes, LANES):
        _transpose(values, start, x)
        _transpose(weights, start, w)
        _extremes(x, amax, extreme)
        for turn in range(19):
            step = 0 if turn == 0 else (turn - 10 if turn < 10 else turn - 9)
            ends = -(_F(half) + _TENTH * _F(step))
            for j in range(LANES):
                inverse[j] = ends / extreme[j]
                xl[j] = _ZERO
                ll[j] = _ZERO
            for i in range(n):
                for j in range(LANES):
                    level = _F(_clip(_nearest(inverse[j] * x[i, j]), -half, half - _I(1)))
                    xl[j] += w[i, j] * x[i, j] * level
                    ll[j] += w[i, j] * level * level
            for j in range(LANES):
                fit = xl[j] / ll[j]
                if turn == 0:
                    fit = fit if ll[j] != _ZERO else _ZERO
                better = turn == 0 or ((ll[j] > _ZERO) and (xl[j] * xl[j] > best[j] * ll[j]))
                scale[j] = fit if better else scale[j]
                best[j] = fit * xl[j] if better else best[j]
                kept[j] = inverse[j] if better else kept[j]
        for j in range(min(LANES, lanes - start)):
            empty = amax[j] < _TINY
            scales[start + j] = _ZERO if empty else scale[j]
            for i in range(n):
                codes[start + j, i] = -half if empty else _clip(_nearest(kept[j] * x[i, j]), -half, half - _I(1))


@_jit
def _descent(values: Any, half: Any, scales: Any, codes: Any) -> None:
    lanes, n = values.shape
    for lane in range(lanes):
        x, code = values[lane], codes[lane]
        amax, extreme = _ZERO, _ZERO
        for i in range(n):
            if abs(x[i]) > amax:
                amax, extreme = abs(x[i]), x[i]
        if amax < _TINY:
            scales[lane] = _ZERO
            code[:] = -half
            continue
        inverse = _F(-half) / extreme
        xl, ll = _ZERO, _ZERO
        for i in range(n):
            code[i] = _clip(_nearest(inverse * x[i]), -half, half - _I(1))
            w, level = x[i] * x[i], _F(code[i])
            xl += w * x[i] * level
            ll += w * level * level
        for _ in range(5):
            changed = False
            for i in range(n):
                w, level = x[i] * x[i], _F(code[i])
                other_xl = xl - w * x[i] * level
                if not other_xl > _ZERO:
                    continue
                other_ll = ll - w * level * level
                tried = _clip(_nearest(x[i] * other_ll / other_xl), -half, half - _I(1))
                if tried == code[i]:
                    continue
                level = _F(tried)
                other_xl += w * x[i] * level
                other_ll += w * level * level
                if other_ll > _ZERO and other_xl * other_xl * ll > xl * xl * other_ll:
                    code[i], xl, ll, changed = tried, other_xl, other_ll, True
            if not changed:
                break
        scales[lane] = xl / ll if ll > _ZERO else _ZERO


@_jit
def _ranged(  # noqa: PLR0912, PLR0915 - a call for each step would cost more than the step
    values: Any,
    weights: Any,
    levels: Any,
    factors: Any,
    absolute: bool,
    guarded: bool,
    scales: Any,
    minima: Any,
    codes: Any,
) -> None:
    lanes, n = values.shape
    x, w = np.empty((n, LANES), _F), np.empty((n, LANES), _F)
    tried = np.empty((n, LANES), _F)
    kept, kept_low, kept_guard = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, np.bool_)
    low, high, sum_w, sum_x = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    l1, l2, xl, inverse = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    scale, best, start_low = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    new_scale, new_low, error = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    solvable = np.empty(LANES, np.bool_)
    top, zero = _I(levels), _I(0)
    limit = _F(levels)
    for start in range(0, lanes, LANES):
        _transpose(values, start, x)
        _transpose(weights, start, w)
        for j in range(LANES):
            low[j] = x[0, j]
            high[j] = x[0, j]
            sum_w[j] = w[0, j]
            sum_x[j] = w[0, j] * x[0, j]
        for i in range(1, n):
            for j in range(LANES):
                low[j] = x[i, j] if x[i, j] < low[j] else low[j]
                high[j] = x[i, j] if x[i, j] > high[j] else high[j]
                sum_w[j] += w[i, j]
                sum_x[j] += w[i, j] * x[i, j]
        for j in range(LANES):
            low[j] = _ZERO if low[j] > _ZERO else low[j]
            start_low[j] = low[j]
            inverse[j] = limit / (high[j] - low[j])
            scale[j] = _F(1) / inverse[j]
            best[j] = _ZERO
            kept[j] = inverse[j]
            kept_low[j] = low[j]
            kept_guard[j] = False
        for i in range(n):
            for j in range(LANES):
                level = _F(_clip(_nearest(inverse[j] * (x[i, j] - low[j])), zero, top))
                difference = scale[j] * level + low[j] - x[i, j]
                best[j] += w[i, j] * (abs(difference) if absolute else difference * difference)
        for k in range(factors.shape[0]):
            for j in range(LANES):
                inverse[j] = factors[k] / (high[j] - low[j])
                l1[j] = _ZERO
                l2[j] = _ZERO
                xl[j] = _ZERO
                error[j] = _ZERO
            for i in range(n):
                for j in range(LANES):
                    value = inverse[j] * (x[i, j] - low[j])
                    if guarded:
                        value = (value if value < limit else limit) if value > _ZERO else _ZERO
                    level = _F(_clip(_nearest(value), zero, top))
                    tried[i, j] = level
                    wl = w[i, j] * level
                    l1[j] += wl
                    l2[j] += wl * level
                    xl[j] += wl * x[i, j]
            for j in range(LANES):
                determinant = sum_w[j] * l2[j] - l1[j] * l1[j]
                solvable[j] = determinant > _ZERO
                a = (sum_w[j] * xl[j] - sum_x[j] * l1[j]) / determinant
                b = (l2[j] * sum_x[j] - l1[j] * xl[j]) / determinant
                new_scale[j] = xl[j] / l2[j] if b > _ZERO else a
                new_low[j] = _ZERO if b > _ZERO else b
            for i in range(n):
                for j in range(LANES):
                    difference = new_scale[j] * tried[i, j] + new_low[j] - x[i, j]
                    error[j] += w[i, j] * (abs(difference) if absolute else difference * difference)
            for j in range(LANES):
                better = solvable[j] and error[j] < best[j]
                best[j] = error[j] if better else best[j]
                scale[j] = new_scale[j] if better else scale[j]
                kept[j] = inverse[j] if better else kept[j]
                kept_low[j] = low[j] if better else kept_low[j]
                kept_guard[j] = guarded if better else kept_guard[j]
                low[j] = new_low[j] if better else low[j]
        for j in range(min(LANES, lanes - start)):
            empty = high[j] <= start_low[j]
            scales[start + j] = _ZERO if empty else scale[j]
            minima[start + j] = -(start_low[j] if empty else low[j])
            for i in range(n):
                value = kept[j] * (x[i, j] - kept_low[j])
                if kept_guard[j]:
                    value = (value if value < limit else limit) if value > _ZERO else _ZERO
                codes[start + j, i] = zero if empty else _clip(_nearest(value), zero, top)


@_jit
def _codebook(values: Any, weights: Any, table: Any, middles: Any, tries: int, scales: Any) -> None:
    lanes, n = values.shape
    x, w = np.empty((n, LANES), _F), np.empty((n, LANES), _F)
    amax, extreme, inverse = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    xl, ll, best, scale = np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F), np.empty(LANES, _F)
    for start in range(0, lanes, LANES):
        _transpose(values, start, x)
        _transpose(weights, start, w)
        _extremes(x, amax, extreme)
        for turn in range(2 * tries + 2):
            for j in range(LANES):
                if turn == 0:
                    inverse[j] = _F(1) / (-extreme[j] / table[0])
                else:
                    inverse[j] = (_F(turn - 1 - tries) + table[0]) / extreme[j]
                xl[j] = _ZERO
                ll[j] = _ZERO
            for i in range(n):
                for j in range(LANES):
                    value = inverse[j] * x[i, j]
                    doubled = value + value
                    level = table[0]
                    for m in range(15):
                        level = table[m + 1] if doubled >= middles[m] else level
                    wl = w[i, j] * level
                    xl[j] += wl * x[i, j]
                    ll[j] += wl * level
            for j in range(LANES):
                if turn == 0:
                    scale[j] = xl[j] / ll[j] if ll[j] > _ZERO else _ZERO
                    best[j] = scale[j] * xl[j]
                elif ll[j] > _ZERO and xl[j] * xl[j] > best[j] * ll[j]:
                    scale[j] = xl[j] / ll[j]
                    best[j] = scale[j] * xl[j]
        for j in range(min(LANES, lanes - start)):
            scales[start + j] = _ZERO if amax[j] < _TINY else scale[j]


@_jit
def _rounded(values: Any, scale: Any, added: Any, searched: Any, low: Any, high: Any, codes: Any) -> None:
    lanes, n = values.shape
    for lane in range(lanes):
        by, plus = scale[lane], added[lane]
        if by == _ZERO:
            codes[lane] = searched[lane]
            continue
        for i in range(n):
            codes[lane, i] = _clip(_nearest((values[lane, i] + plus) / by), low, high)
