"""Searches of llama.cpp's quantizers for many sub-blocks at once, in torch: equal to its C code in every bit.

Sub-blocks are lanes: sums run over the elements of each one in order, as C's loops do, and every product, quotient and
sum is an operation of its own, as in code that is built without fused multiply-add. ``monoquant_gguf.kernels.compiled``
has the same functions for numba. x and weights are float32 ``[lanes, elements]``; codes are int32.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from monoquant_gguf.kernels.fits import refined, scaled
from monoquant_gguf.kernels.ordered import divide, first_extreme, nearest, ordered_sum, root, row_sums
from monoquant_gguf.kernels.simple import smallest

__all__ = ["codebook", "codebook_index", "descent", "positive", "ranged", "refined", "rounded", "scaled", "symmetric"]

TINY = 1e-15  #: largest magnitude of a sub-block that counts as zeros; GROUP_MAX_EPS in ggml

_Values = tuple[float, ...]


def symmetric(x: torch.Tensor, weights: torch.Tensor | None, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and codes ``-half..half - 1`` of every lane: 19 candidates, each refit (``make_qx_quants``).

    Lanes of zeros have scale 0 and code ``-half``.
    """
    x = x.t().contiguous()
    w = x * x if weights is None else weights.t().contiguous()
    wx = w * x
    amax, extreme = first_extreme(x)

    def attempt(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = nearest(inverse * x).clamp_(-half, half - 1)
        level = codes.float()
        return codes, ordered_sum(wx * level), ordered_sum(w * level * level)

    codes, xl, ll = attempt(divide(-half, extreme))
    scale = torch.where(ll != 0, xl / ll, 0.0)
    best = scale * xl
    for step in range(-9, 10):
        if step == 0:
            continue
        ends = -(np.float32(half) + np.float32(0.1) * np.float32(step))
        tried, xl, ll = attempt(divide(float(ends), extreme))
        better = (ll > 0) & (xl * xl > best * ll)
        codes = torch.where(better, tried, codes)
        scale = torch.where(better, xl / ll, scale)
        best = torch.where(better, scale * xl, best)
    empty = amax < TINY
    codes.masked_fill_(empty, -half)
    return torch.where(empty, 0.0, scale), codes.t().contiguous()


def descent(x: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and codes of every lane, one code after another changed where that helps (``make_q3_quants``).

    Lanes of zeros have scale 0 and code ``-half``.
    """
    x = x.t().contiguous()
    w = x * x
    wx = w * x
    amax, extreme = first_extreme(x)
    level = nearest(divide(-half, extreme) * x).clamp_(-half, half - 1).float()
    xl, ll = ordered_sum(wx * level), ordered_sum(w * level * level)
    for _ in range(5):
        changed = torch.zeros_like(amax, dtype=torch.bool)
        for i in range(len(x)):
            other_xl = xl - wx[i] * level[i]
            other_ll = ll - w[i] * level[i] * level[i]
            tried = nearest(x[i] * other_ll / other_xl).clamp_(-half, half - 1).float()
            new_xl, new_ll = other_xl + wx[i] * tried, other_ll + w[i] * tried * tried
            better = (other_xl > 0) & (tried != level[i]) & (new_ll > 0)
            better &= new_xl * new_xl * ll > xl * xl * new_ll
            level[i] = torch.where(better, tried, level[i])
            xl, ll = torch.where(better, new_xl, xl), torch.where(better, new_ll, ll)
            changed |= better
        if not bool(changed.any()):
            break
    empty = amax < TINY
    codes = level.to(torch.int32).masked_fill_(empty, -half)
    return torch.where(empty | ~(ll > 0), 0.0, xl / ll), codes.t().contiguous()


def range_weights(x: torch.Tensor) -> torch.Tensor:
    """Without importance: magnitudes, and in sub-blocks of 32 the root of their mean square more."""
    weights = x.abs()
    return weights.add_(root(row_sums(x * x) / 32).unsqueeze(1)) if x.shape[1] == 32 else weights


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
    """Scale, negated minimum and codes ``0..levels`` of every lane (``make_qkx2_quants`` and ``make_qkx3_quants``).

    Candidates ``first + step * k`` more than ``levels`` codes over the range, each refit for scale and minimum.

    :param weights: by default :func:`range_weights`.
    :param absolute: compare sums of magnitudes of errors, not of squares.
    :param guarded: clip before rounding.
    """
    low, high = smallest(x), x.amax(1)
    x, w = x.t().contiguous(), (range_weights(x) if weights is None else weights).t().contiguous()
    sum_w, sum_x = w[0].clone(), w[0] * x[0]
    for i in range(1, len(x)):
        sum_w += w[i]
        sum_x += w[i] * x[i]
    low = torch.where(low > 0, 0.0, low)
    start = low
    empty = high <= low

    def error(scale: torch.Tensor, level: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        difference = scale * level + minimum - x
        return ordered_sum(w * (difference.abs_() if absolute else difference * difference))

    inverse = divide(levels, high - low)
    scale = inverse.reciprocal()
    codes = nearest(inverse * (x - low)).clamp_(0, levels)
    best = error(scale, codes.float(), low)
    for k in range(steps + 1):
        numerator = np.float32(first) + np.float32(step) * np.float32(k) + np.float32(levels)
        inverse = divide(float(numerator), high - low)
        value = inverse * (x - low)
        if guarded:
            value = torch.where(value > 0, value.clamp(max=levels), 0.0)
        tried = nearest(value).clamp_(0, levels)
        level = tried.float()
        wl = w * level
        l1, l2, xl = ordered_sum(wl), ordered_sum(wl * level), ordered_sum(wl * x)
        determinant = sum_w * l2 - l1 * l1
        this_scale = (sum_w * xl - sum_x * l1) / determinant
        this_low = (l2 * sum_x - l1 * xl) / determinant
        positive = this_low > 0
        this_low = torch.where(positive, 0.0, this_low)
        this_scale = torch.where(positive, xl / l2, this_scale)
        this_error = error(this_scale, level, this_low)
        better = (determinant > 0) & (this_error < best)
        codes = torch.where(better, tried, codes)
        best = torch.where(better, this_error, best)
        scale = torch.where(better, this_scale, scale)
        low = torch.where(better, this_low, low)
    codes.masked_fill_(empty, 0)
    return torch.where(empty, 0.0, scale), -torch.where(empty, start, low), codes.t().contiguous()


def codebook(x: torch.Tensor, weights: torch.Tensor, values: _Values, tries: int) -> torch.Tensor:
    """Scale of every lane: ``2 * tries + 2`` candidates around the extreme, each refit (``quantize_row_iq4_nl_impl``).

    Lanes of zeros have scale 0.
    """
    x, w = x.t().contiguous(), weights.t().contiguous()
    amax, extreme = first_extreme(x)
    table = torch.tensor(values, dtype=torch.float32, device=x.device)

    def attempt(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        level = table[codebook_index(inverse * x, values)]
        wl = w * level
        return ordered_sum(wl * x), ordered_sum(wl * level)

    xl, ll = attempt((-extreme / table[0]).reciprocal())
    scale = torch.where(ll > 0, xl / ll, 0.0)
    best = scale * xl
    for k in range(-tries, tries + 1):
        xl, ll = attempt((k + table[0]) / extreme)
        better = (ll > 0) & (xl * xl > best * ll)
        scale = torch.where(better, xl / ll, scale)
        best = torch.where(better, scale * xl, best)
    return torch.where(amax < TINY, 0.0, scale)


def codebook_index(x: torch.Tensor, values: _Values) -> torch.Tensor:
    """Index of the nearest of ascending values, the larger one of two; int64."""
    doubled = x + x
    middles = torch.tensor([a + b for a, b in itertools.pairwise(values)], device=x.device)
    return torch.bucketize(doubled, middles.float(), right=True)


def positive(x: torch.Tensor, weights: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for the non-negative values of every lane, and codes ``0..levels`` (``make_qp_quants``)."""
    x, w = x.t().contiguous(), weights.t().contiguous()
    largest = torch.zeros_like(x[0])
    for row in x:
        largest = torch.where(largest > row, largest, row)
    inverse = divide(levels, largest)
    scale = inverse.reciprocal()

    def error(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        difference = x - scale * codes.float()
        return ordered_sum(w * difference * difference)

    best = error(scale, nearest(inverse * x) & 255)
    for k in range(-4, 5):
        if k == 0:
            continue
        numerator = np.float32(0.1) * np.float32(k) + np.float32(levels)
        tried = divide(float(numerator), largest)
        this = error(tried.reciprocal(), nearest(tried * x).clamp_(max=levels))
        better = this < best
        best, inverse = torch.where(better, this, best), torch.where(better, tried, inverse)
    level = nearest(inverse * x).clamp_(max=levels).float()
    wx = w * x
    xl, ll = ordered_sum(wx * level), ordered_sum(w * level * level)
    for _ in range(5):
        changed = torch.zeros_like(largest, dtype=torch.bool)
        for i in range(len(x)):
            other_xl = xl - wx[i] * level[i]
            other_ll = ll - w[i] * level[i] * level[i]
            tried = nearest(x[i] * other_ll / other_xl).clamp_(max=levels).float()
            new_xl, new_ll = other_xl + wx[i] * tried, other_ll + w[i] * tried * tried
            better = (other_xl > 0) & (other_ll > 0) & (tried != level[i])
            better &= new_xl * new_xl * ll > xl * xl * new_ll
            level[i] = torch.where(better, tried, level[i])
            xl, ll = torch.where(better, new_xl, xl), torch.where(better, new_ll, ll)
            changed |= better
        if not bool(changed.any()):
            break
    empty = largest < TINY
    codes = level.to(torch.int32).masked_fill_(empty, 0)
    return torch.where(empty | ~(ll > 0), 0.0, xl / ll), codes.t().contiguous()


def rounded(
    x: torch.Tensor, scale: torch.Tensor, added: torch.Tensor | None, searched: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """Codes of every lane: the nearest to its scale and what is added first, or those given where the scale is 0."""
    values = x if added is None else x + added.unsqueeze(1)
    codes = nearest(values / scale.unsqueeze(1)).clamp_(low, high)
    return torch.where(scale.unsqueeze(1) == 0, searched.to(codes.dtype), codes)
