"""The functions of :mod:`.fits`, compiled by numba: same arguments, same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from monoquant_gguf.kernels.fits import CANDIDATES, FINEST, LEAST, MARGIN, MOST, Grid, Nested
from monoquant_gguf.kernels.jit import first_extreme, from_table, greater, helper, jit, smaller, transpose
from monoquant_gguf.kernels.simd import (
    ROW,
    WIDTH,
    load,
    load_row,
    magnitude,
    root,
    splat,
    splat_like,
    splat_row,
    store,
    where,
)

_F, _D = np.float32, np.float64
_ZERO, _ONE = _F(0), _F(1)
_MAGIC = _F(12582912.0)
_HALF_MAX, _HALF_NORMAL = _F(65504.0), _F(2.0**-14)
_MARGIN, _LEAST, _MOST, _FINEST = _F(MARGIN), _F(LEAST), _F(MOST), _F(FINEST)
_NONE = np.zeros((1, 0), _F)


def scaled(
    x: torch.Tensor, weights: torch.Tensor | None, codes: torch.Tensor, d: torch.Tensor, grid: Grid, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`monoquant_gguf.kernels.fits.scaled`."""
    codes, d = codes.contiguous().clone(), d.contiguous().clone()
    edge = grid.low if grid.low != -grid.high else grid.high
    given = _NONE if weights is None else weights.contiguous().numpy()
    _scaled(x.contiguous().numpy(), given, codes.numpy(), d.numpy(), _F(grid.low), _F(grid.high), _F(edge), _F(step))
    return codes, d


def refined(
    x: torch.Tensor, weights: torch.Tensor | None, start: Nested, grid: Grid, limits: tuple[int, int]
) -> Nested:
    """See :func:`monoquant_gguf.kernels.fits.refined`."""
    blocks, per = start.scales.shape
    codes, lanes = start.codes.contiguous().clone(), blocks * per
    #: d, scale, dmin and minimum of each lane; whole vectors
    params = torch.zeros(4, -(-lanes // WIDTH) * WIDTH)
    d, scales, dmin, mins = (row.view(blocks, per) for row in params[:, :lanes])
    d.copy_(start.d.unsqueeze(1))
    scales.copy_(start.scales)
    shifted = start.dmin is not None and start.mins is not None
    if start.dmin is not None and start.mins is not None:
        dmin.copy_(start.dmin.unsqueeze(1))
        mins.copy_(start.mins)
    table = np.array(grid.table, _F)
    _refined(
        x.contiguous().numpy(),
        _NONE if weights is None else weights.contiguous().numpy(),
        codes.numpy(),
        params.numpy(),
        per,
        shifted,
        np.array([grid.low, grid.high, *limits], _F),
        table,
        table[1:] + table[:-1],
    )
    return Nested(codes, d[:, 0], scales, dmin[:, 0] if shifted else None, mins if shifted else None)


@helper
def _half(value: Any) -> Any:
    """See :func:`monoquant_gguf.kernels.ordered.half`."""
    if value != value:  # noqa: PLR0124 - NaN
        return _ZERO
    value = min(max(value, -_HALF_MAX), _HALF_MAX)
    if abs(value) < _HALF_NORMAL:
        rounded = (abs(value) + _F(0.75)) - _F(0.75)  # the last bit of what is at 0.75 is worth 2^-24
        return -rounded if value < _ZERO else rounded
    bits = _F(value).view(np.int32)
    bits = (bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000)
    return np.int32(bits).view(np.float32)


@helper
def _inverse(value: Any) -> Any:
    """See :func:`monoquant_gguf.kernels.ordered.inverse`."""
    zero = splat(_ZERO)
    return where(value == zero, zero, splat(_ONE) / value)


@helper
def _clipped(value: Any, low: Any, high: Any) -> Any:
    """Within a range, NaN at its low end; then the nearest whole number, ties to even."""
    magic = splat_like(value, _MAGIC)
    return smaller(greater(value, low), high) + magic - magic


@helper
def _better(new: Any, old: Any) -> Any:
    return (new < old * splat(_MARGIN)) & (old > splat(_LEAST)) & (old < splat(_MOST))


@helper
def _errors(x: Any, w: Any, levels: Any, scale: Any, below: Any) -> Any:
    error = splat(_ZERO)
    for at in range(0, x.size, WIDTH):
        difference = load(levels, at) * scale - below - load(x, at)
        error = error + load(w, at) * (difference * difference)
    return error


@jit
def _scaled(
    values: Any, weights: Any, codes: Any, scales: Any, lowest: Any, highest: Any, edge: Any, step: Any
) -> None:
    lanes, n = values.shape
    x, w, wx, levels = np.empty(n * WIDTH, _F), np.ones(n * WIDTH, _F), np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F)
    now, new, starts = np.empty(WIDTH, _F), np.empty((3, WIDTH), _F), np.empty(ROW, np.int64)
    zero, low, high = splat(_ZERO), splat(lowest), splat(highest)
    for start in range(0, lanes, WIDTH):
        transpose(values, start, starts, x)
        transpose(codes, start, starts, levels)
        if weights.size:
            transpose(weights, start, starts, w)
        _, extreme = first_extreme(x)
        squares = zero
        for at in range(0, x.size, WIDTH):
            store(wx, at, load(w, at) * load(x, at))
            squares = squares + load(x, at) * load(x, at)
        coarsest = extreme / splat(edge)
        finest = smaller(root(squares / splat(_F(n))) * splat(step), magnitude(coarsest) * splat(_FINEST))
        first = _inverse(coarsest)
        stride = (_inverse(where(coarsest < zero, zero - finest, finest)) - first) / splat(_F(CANDIDATES - 1))
        best, fit = splat(-_ONE), zero
        for k in range(CANDIDATES):
            inverse = first + stride * splat(_F(k))
            xl, ll = zero, zero
            for at in range(0, x.size, WIDTH):
                q = _clipped(load(x, at) * inverse, low, high)
                xl, ll = xl + load(wx, at) * q, ll + load(w, at) * q * q
            gain = where(ll > zero, xl * xl / ll, splat(-_ONE))
            fit, best = where(gain > best, xl / ll, fit), where(gain > best, gain, best)
        store(new, 0, fit)
        for j in range(WIDTH):
            new[0, j] = _half(new[0, j])
            now[j] = scales[min(start + j, lanes - 1)]
        fit = load(new, 0)
        inverse, error = _inverse(fit), zero
        for at in range(0, x.size, WIDTH):
            v = load(x, at)
            difference = _clipped(v * inverse, low, high) * fit - v
            error = error + load(w, at) * (difference * difference)
        chosen = _better(error, _errors(x, w, levels, load(now, 0), zero))
        store(new, WIDTH, inverse)
        store(new, 2 * WIDTH, where(chosen, splat(_ONE), zero))
        for j in range(min(WIDTH, lanes - start)):
            if new[2, j] > _ZERO:
                scales[start + j] = new[0, j]
                by = splat_row(new[1, j])
                for at in range((start + j) * n, (start + j + 1) * n, ROW):
                    store(codes, at, _clipped(load_row(values, at) * by, splat_row(lowest), splat_row(highest)))


@helper
def _value(steps: Any, low: Any, high: Any, table: Any, middles: Any) -> Any:
    return from_table(steps, table, middles) if table.size else _clipped(steps, low, high)


@helper
def _accept(
    x: Any, w: Any, levels: Any, tried: Any, now: Any, new: Any, per: int, bounds: Any, table: Any, middles: Any
) -> None:
    """Take new parameters, ``[4, lanes]``, and their nearest levels where they are better; ``per`` lanes together."""
    scale, below = load(new, 0) * load(new, WIDTH), load(new, 2 * WIDTH) * load(new, 3 * WIDTH)
    inverse, low, high = _inverse(scale), splat(bounds[0]), splat(bounds[1])
    error = splat(_ZERO)
    for at in range(0, x.size, WIDTH):
        v = load(x, at)
        level = _value((v + below) * inverse, low, high, table, middles)
        store(tried, at, level)
        difference = level * scale - below - v
        error = error + load(w, at) * (difference * difference)
    store(new, 4 * WIDTH, error)
    old = load(now, 4 * WIDTH)
    if per > 1:
        for first in range(0, WIDTH, per):
            total, old_total = _ZERO, _ZERO
            for j in range(first, first + per):
                total += new[4, j]
                old_total += now[4, j]
            for j in range(first, first + per):
                new[6, j], new[7, j] = total, old_total
        chosen = _better(load(new, 6 * WIDTH), load(new, 7 * WIDTH))
    else:
        chosen = _better(error, old)
    for at in range(0, x.size, WIDTH):
        store(levels, at, where(chosen, load(tried, at), load(levels, at)))
    for at in range(0, 5 * WIDTH, WIDTH):
        store(now, at, where(chosen, load(new, at), load(now, at)))
    store(now, 5 * WIDTH, where(chosen, splat(_ONE), load(now, 5 * WIDTH)))


@helper
def _units(now: Any, new: Any, sums: Any, per: int, shifted: bool) -> None:
    """See :meth:`monoquant_gguf.kernels.fits._Refinement.units`."""
    for first in range(0, WIDTH, per):
        uu, ux, uv, vv, vx = _D(0), _D(0), _D(0), _D(0), _D(0)
        for j in range(first, first + per):
            s, m = _D(now[1, j]), _D(now[3, j])
            uu += s * s * _D(sums[1, j])
            ux += s * _D(sums[2, j])
            uv += s * m * _D(sums[0, j])
            vv += m * m * _D(sums[3, j])
            vx += m * _D(sums[4, j])
        d, dmin = ux / uu, _D(0)
        determinant = uu * vv - uv * uv
        if shifted and determinant > _D(0):
            d, dmin = (ux * vv - uv * vx) / determinant, (uv * ux - uu * vx) / determinant
        unit, below = _half(_F(d)), _half(_F(dmin))
        for j in range(first, first + per):
            new[0, j], new[1, j], new[2, j], new[3, j] = unit, now[1, j], below, now[3, j]


@helper
def _scales(now: Any, new: Any, sums: Any, bounds: Any, shifted: bool) -> None:
    """See :meth:`monoquant_gguf.kernels.fits._Refinement.scales`."""
    l1, l2, xl = load(sums, 0), load(sums, WIDTH), load(sums, 2 * WIDTH)
    sum_w, sum_x = load(sums, 3 * WIDTH), load(sums, 4 * WIDTH)
    d, s, dmin, m = load(now, 0), load(now, WIDTH), load(now, 2 * WIDTH), load(now, 3 * WIDTH)
    low, high = splat(bounds[2]), splat(bounds[3])
    if shifted:
        determinant = sum_w * l2 - l1 * l1
        solvable = determinant > splat(_ZERO)
        slope, below = (sum_w * xl - sum_x * l1) / determinant, (l1 * xl - l2 * sum_x) / determinant
        s = where(solvable, _clipped(slope / d, low, high), s)
        m = where(solvable, _clipped(below / dmin, low, high), m)
    else:
        s = _clipped(xl / l2 / d, low, high)
    store(new, 0, d)
    store(new, WIDTH, s)
    store(new, 2 * WIDTH, dmin)
    store(new, 3 * WIDTH, m)


@helper
def _sums(x: Any, w: Any, levels: Any, sums: Any) -> None:
    l1, l2, xl = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for at in range(0, x.size, WIDTH):
        level = load(levels, at)
        wl = load(w, at) * level
        l1, l2, xl = l1 + wl, l2 + wl * level, xl + wl * load(x, at)
    store(sums, 0, l1)
    store(sums, WIDTH, l2)
    store(sums, 2 * WIDTH, xl)


@helper
def _fixed_sums(x: Any, w: Any, sums: Any) -> None:
    sum_w, sum_x = splat(_ZERO), splat(_ZERO)
    for at in range(0, x.size, WIDTH):
        sum_w, sum_x = sum_w + load(w, at), sum_x + load(w, at) * load(x, at)
    store(sums, 3 * WIDTH, sum_w)
    store(sums, 4 * WIDTH, sum_x)


@helper
def _write(
    codes: Any, values: Any, first: int, last: int, inverse: Any, below: Any, bounds: Any, table: Any, middles: Any
) -> None:
    """Nearest codes of the elements of a lane; the table is that of indices."""
    low, high = splat_row(bounds[0]), splat_row(bounds[1])
    for at in range(first, last, ROW):
        steps = (load_row(values, at) + splat_row(below)) * splat_row(inverse)
        store(codes, at, _value(steps, low, high, table, middles))


@jit
def _refined(
    values: Any,
    weights: Any,
    codes: Any,
    params: Any,
    per: int,
    shifted: bool,
    bounds: Any,
    table: Any,
    middles: Any,
) -> None:
    lanes, n = values.shape
    x, w = np.empty(n * WIDTH, _F), np.ones(n * WIDTH, _F)
    levels, tried, starts = np.empty(n * WIDTH, _F), np.empty(n * WIDTH, _F), np.empty(ROW, np.int64)
    #: rows: d, scale, dmin, minimum, error, whether it has changed; then what belongs to whole blocks
    now, new, sums = np.zeros((6, WIDTH), _F), np.zeros((8, WIDTH), _F), np.empty((5, WIDTH), _F)
    indices = np.arange(table.size).astype(_F)
    for start in range(0, lanes, WIDTH):
        transpose(values, start, starts, x)
        transpose(codes, start, starts, levels)
        if weights.size:
            transpose(weights, start, starts, w)
        for i in range(levels.size if table.size else 0):
            levels[i] = table[int(levels[i])]
        for row in range(4):
            store(now, row * WIDTH, load(params, row * params.shape[1] + start))
        store(now, 5 * WIDTH, splat(_ZERO))
        _fixed_sums(x, w, sums)
        scale, below = load(now, 0) * load(now, WIDTH), load(now, 2 * WIDTH) * load(now, 3 * WIDTH)
        store(now, 4 * WIDTH, _errors(x, w, levels, scale, below))
        for turn in range(3):
            _sums(x, w, levels, sums)
            if turn == 1:
                _scales(now, new, sums, bounds, shifted)
            else:
                _units(now, new, sums, per, shifted)
            _accept(x, w, levels, tried, now, new, 1 if turn == 1 else per, bounds, table, middles)
        for row in range(4):
            store(params, row * params.shape[1] + start, load(now, row * WIDTH))
        store(new, 0, _inverse(load(now, 0) * load(now, WIDTH)))
        store(new, WIDTH, load(now, 2 * WIDTH) * load(now, 3 * WIDTH))
        for j in range(min(WIDTH, lanes - start)):
            if now[5, j] > _ZERO:
                first = (start + j) * n
                _write(codes, values, first, first + n, new[0, j], new[1, j], bounds, indices, middles)
