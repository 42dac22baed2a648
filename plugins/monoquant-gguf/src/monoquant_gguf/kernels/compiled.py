"""The searches of :mod:`.lanes`, compiled by numba: same arguments, same bits, many times as fast.

Needs the extra ``fast``. Lanes are transposed and then searched as vectors (:mod:`.simd`), the sum of each in its
order. Without fastmath no product and sum are fused and nothing is reordered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from monoquant_gguf.kernels.compiled_fits import refined, scaled
from monoquant_gguf.kernels.jit import first_extreme, from_table, greater, helper, jit, smaller, to_level, transpose
from monoquant_gguf.kernels.lanes import TINY
from monoquant_gguf.kernels.simd import (
    ROW,
    WIDTH,
    load,
    load_row,
    magnitude,
    nowhere,
    root,
    some,
    splat,
    splat_like,
    splat_row,
    store,
    where,
)

__all__ = ["codebook", "descent", "ranged", "refined", "rounded", "scaled", "symmetric"]

_F = np.float32
_ZERO, _ONE, _TINY, _TENTH = _F(0), _F(1), _F(TINY), _F(0.1)
_NONE = np.zeros((0, 0), _F)  #: in place of weights: those that llama.cpp makes of the values


def symmetric(x: torch.Tensor, weights: torch.Tensor | None, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`monoquant_gguf.kernels.lanes.symmetric`."""
    scale, codes = np.empty(len(x), _F), np.empty(tuple(x.shape), np.int8)
    _symmetric(_array(x), _array(weights), _F(half), scale, codes)
    return torch.from_numpy(scale), torch.from_numpy(codes)


def descent(x: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`monoquant_gguf.kernels.lanes.descent`."""
    scale, codes = np.empty(len(x), _F), np.empty(tuple(x.shape), np.int8)
    _descent(_array(x), _F(half), scale, codes)
    return torch.from_numpy(scale), torch.from_numpy(codes)


def ranged(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    levels: int,
    first: float,
    step: float,
    steps: int,
    *,
    absolute: bool = False,
    guarded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`monoquant_gguf.kernels.lanes.ranged`."""
    scale, minimum, codes = np.empty(len(x), _F), np.empty(len(x), _F), np.empty(tuple(x.shape), np.uint8)
    factors = np.array([_F(first) + _F(step) * _F(k) + _F(levels) for k in range(steps + 1)], _F)
    _ranged(_array(x), _array(weights), _F(levels), factors, absolute, guarded, scale, minimum, codes)
    return torch.from_numpy(scale), torch.from_numpy(minimum), torch.from_numpy(codes)


def codebook(x: torch.Tensor, weights: torch.Tensor, values: tuple[float, ...], tries: int) -> torch.Tensor:
    """See :func:`monoquant_gguf.kernels.lanes.codebook`."""
    table, scale = np.array(values, _F), np.empty(len(x), _F)
    _codebook(_array(x), _array(weights), table, table[1:] + table[:-1], tries, scale)
    return torch.from_numpy(scale)


def rounded(
    x: torch.Tensor, scale: torch.Tensor, added: torch.Tensor | None, searched: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """See :func:`monoquant_gguf.kernels.lanes.rounded`."""
    codes = np.empty(tuple(x.shape), np.uint8 if low == 0 else np.int8)
    offsets = torch.zeros_like(scale) if added is None else added
    given = searched.contiguous().numpy().astype(codes.dtype, copy=False)
    _rounded(_array(x), scale.numpy(), offsets.numpy(), given, _F(low), _F(high), codes)
    return torch.from_numpy(codes)


def _array(x: torch.Tensor | None) -> np.ndarray[Any, Any]:
    return _NONE if x is None else x.contiguous().numpy()


@jit
def _symmetric(values: Any, weights: Any, half: Any, scales: Any, codes: Any) -> None:
    lanes, n = values.shape
    x, w, wx = np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F)
    found, starts = np.empty((3, WIDTH), _F), np.empty(ROW, np.int64)
    zero, lowest, highest = splat(_ZERO), splat(-half), splat(half - _ONE)
    row_lowest, row_highest = splat_row(-half), splat_row(half - _ONE)
    for start in range(0, lanes, WIDTH):
        transpose(values, start, starts, x)
        if weights.size:
            transpose(weights, start, starts, w)
        for at in range(0, x.size, WIDTH):
            if not weights.size:
                store(w, at, load(x, at) * load(x, at))
            store(wx, at, load(w, at) * load(x, at))
        size, extreme = first_extreme(x)
        best, scale, kept = zero, zero, zero
        for turn in range(19):
            step = 0 if turn == 0 else (turn - 10 if turn < 10 else turn - 9)
            inverse = splat(-(half + _TENTH * _F(step))) / extreme
            xl, ll = zero, zero
            for at in range(0, x.size, WIDTH):
                level = to_level(inverse * load(x, at), lowest, highest)
                xl = xl + load(wx, at) * level
                ll = ll + load(w, at) * level * level
            fit = xl / ll
            if turn == 0:
                scale, kept = where(ll != zero, fit, zero), inverse
                best = scale * xl
            else:
                better = (ll > zero) & (xl * xl > best * ll)
                scale, kept, best = (
                    where(better, fit, scale),
                    where(better, inverse, kept),
                    where(better, fit * xl, best),
                )
        store(found, 0, size)
        store(found, WIDTH, scale)
        store(found, 2 * WIDTH, kept)
        for j in range(min(WIDTH, lanes - start)):
            empty = found[0, j] < _TINY
            scales[start + j] = _ZERO if empty else found[1, j]
            by = splat_row(found[2, j])
            for at in range((start + j) * n, (start + j + 1) * n, ROW):
                level = to_level(by * load_row(values, at), row_lowest, row_highest)
                store(codes, at, row_lowest if empty else level)


@jit
def _descent(values: Any, half: Any, scales: Any, codes: Any) -> None:
    lanes, n = values.shape
    x, levels = np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F)
    found, starts = np.empty((2, WIDTH), _F), np.empty(ROW, np.int64)
    zero, lowest, highest = splat(_ZERO), splat(-half), splat(half - _ONE)
    for start in range(0, lanes, WIDTH):
        transpose(values, start, starts, x)
        size, extreme = first_extreme(x)
        inverse = lowest / extreme
        xl, ll = zero, zero
        for at in range(0, x.size, WIDTH):
            v = load(x, at)
            level = to_level(inverse * v, lowest, highest)
            store(levels, at, level)
            xl = xl + v * v * v * level
            ll = ll + v * v * level * level
        for _ in range(5):
            changed = nowhere()
            for at in range(0, x.size, WIDTH):
                v, level = load(x, at), load(levels, at)
                w = v * v
                other_xl, other_ll = xl - w * v * level, ll - w * level * level
                tried = to_level(v * other_ll / other_xl, lowest, highest)
                new_xl, new_ll = other_xl + w * v * tried, other_ll + w * tried * tried
                better = (other_xl > zero) & (tried != level) & (new_ll > zero)
                better = better & (new_xl * new_xl * ll > xl * xl * new_ll)
                store(levels, at, where(better, tried, level))
                xl, ll = where(better, new_xl, xl), where(better, new_ll, ll)
                changed = changed | better
            if not some(changed):
                break
        store(found, 0, size)
        store(found, WIDTH, where(ll > zero, xl / ll, zero))
        for j in range(min(WIDTH, lanes - start)):
            empty = found[0, j] < _TINY
            scales[start + j] = _ZERO if empty else found[1, j]
            for i in range(n):
                codes[start + j, i] = np.int8(-half if empty else levels[i * WIDTH + j])


@helper
def _range_weights(x: Any, w: Any) -> None:
    """See :func:`monoquant_gguf.kernels.lanes.range_weights`."""
    n = x.size // WIDTH
    mean = splat(_ZERO)
    if n == 32:
        for at in range(0, x.size, WIDTH):
            mean = mean + load(x, at) * load(x, at)
        mean = root(mean / splat(_F(32)))
    for at in range(0, x.size, WIDTH):
        store(w, at, mean + magnitude(load(x, at)))


@helper
def _error(scale: Any, level: Any, minimum: Any, x: Any, w: Any, absolute: bool) -> Any:
    difference = scale * level + minimum - x
    return w * (magnitude(difference) if absolute else difference * difference)


@helper
def _step(x: Any, inverse: Any, low: Any, top: Any, guarded: bool) -> Any:
    value, zero = inverse * (x - low), splat_like(x, _ZERO)
    if guarded:
        value = smaller(greater(value, zero), top)
    return to_level(value, zero, top)


@jit
def _ranged(
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
    x, w, tried = np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F)
    kept, starts = np.empty((5, WIDTH), _F), np.empty(ROW, np.int64)
    zero, top = splat(_ZERO), splat(levels)
    for start in range(0, lanes, WIDTH):
        transpose(values, start, starts, x)
        if weights.size:
            transpose(weights, start, starts, w)
        else:
            _range_weights(x, w)
        low, high, sum_w = load(x, 0), load(x, 0), load(w, 0)
        sum_x = sum_w * low
        for at in range(WIDTH, x.size, WIDTH):
            v, u = load(x, at), load(w, at)
            low, high = smaller(v, low), greater(v, high)
            sum_w, sum_x = sum_w + u, sum_x + u * v
        low = where(low > zero, zero, low)
        start_low, inverse = low, top / (high - low)
        scale, best, used, used_low = splat(_ONE) / inverse, zero, inverse, low
        clipped = nowhere()
        for at in range(0, x.size, WIDTH):
            v = load(x, at)
            best = best + _error(scale, _step(v, inverse, low, top, False), low, v, load(w, at), absolute)
        for factor in factors:
            inverse = splat(factor) / (high - low)
            l1, l2, xl = zero, zero, zero
            for at in range(0, x.size, WIDTH):
                v = load(x, at)
                level = _step(v, inverse, low, top, guarded)
                store(tried, at, level)
                wl = load(w, at) * level
                l1, l2, xl = l1 + wl, l2 + wl * level, xl + wl * v
            determinant = sum_w * l2 - l1 * l1
            new_scale = (sum_w * xl - sum_x * l1) / determinant
            new_low = (l2 * sum_x - l1 * xl) / determinant
            positive = new_low > zero
            new_scale, new_low = where(positive, xl / l2, new_scale), where(positive, zero, new_low)
            error = zero
            for at in range(0, x.size, WIDTH):
                error = error + _error(new_scale, load(tried, at), new_low, load(x, at), load(w, at), absolute)
            better = (determinant > zero) & (error < best)
            best, scale = where(better, error, best), where(better, new_scale, scale)
            used, used_low = where(better, inverse, used), where(better, low, used_low)
            low = where(better, new_low, low)
            clipped = clipped | better
        empty = high <= start_low
        store(kept, 0, where(empty, zero, scale))
        store(kept, WIDTH, where(empty, start_low, low))
        store(kept, 2 * WIDTH, used)
        store(kept, 3 * WIDTH, used_low)
        store(kept, 4 * WIDTH, where(empty, splat(-_ONE), where(clipped, splat(_ONE), zero)))
        for j in range(min(WIDTH, lanes - start)):
            scales[start + j], minima[start + j] = kept[0, j], -kept[1, j]
            by, under = splat_row(kept[2, j]), splat_row(kept[3, j])
            guard = guarded and kept[4, j] > _ZERO
            for at in range((start + j) * n, (start + j + 1) * n, ROW):
                level = _step(load_row(values, at), by, under, splat_row(levels), guard)
                store(codes, at, splat_row(_ZERO) if kept[4, j] < _ZERO else level)


@jit
def _codebook(values: Any, weights: Any, table: Any, middles: Any, tries: int, scales: Any) -> None:
    lanes, n = values.shape
    x, w = np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F)
    found, starts = np.empty(WIDTH, _F), np.empty(ROW, np.int64)
    zero, first = splat(_ZERO), splat(table[0])
    for start in range(0, lanes, WIDTH):
        transpose(values, start, starts, x)
        transpose(weights, start, starts, w)
        size, extreme = first_extreme(x)
        best, scale = zero, zero
        for turn in range(2 * tries + 2):
            if turn == 0:
                inverse = splat(_ONE) / ((zero - extreme) / first)
            else:
                inverse = splat(_F(turn - 1 - tries) + table[0]) / extreme
            xl, ll = zero, zero
            for at in range(0, x.size, WIDTH):
                v = load(x, at)
                level = from_table(inverse * v, table, middles)
                wl = load(w, at) * level
                xl, ll = xl + wl * v, ll + wl * level
            better = ll > zero
            if turn > 0:
                better = better & (xl * xl > best * ll)
            scale = where(better, xl / ll, scale)
            best = where(better, scale * xl, best)
        store(found, 0, where(size < splat(_TINY), zero, scale))
        for j in range(min(WIDTH, lanes - start)):
            scales[start + j] = found[j]


@jit
def _rounded(values: Any, scale: Any, added: Any, searched: Any, low: Any, high: Any, codes: Any) -> None:
    lanes, n = values.shape
    lowest, highest = splat_row(low), splat_row(high)
    for lane in range(lanes):
        by, plus = splat_row(scale[lane]), splat_row(added[lane])
        if scale[lane] == _ZERO:
            codes[lane] = searched[lane]
            continue
        for at in range(lane * n, lane * n + n, ROW):
            store(codes, at, to_level((load_row(values, at) + plus) / by, lowest, highest))
