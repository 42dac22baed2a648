"""Better values in the same bytes: llama.cpp's choice, and others that replace it where their squared error is less.

The error is that of what is stored, float16 rounding included, weighted by importance where there is one. It is
compared block by block, so it is never above llama.cpp's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from monoquant_core.encoding import Encoding
from monoquant_gguf.blocks.parts import Parts, to_tensor
from monoquant_gguf.kernels import searched
from monoquant_gguf.kernels.lanes import codebook_index
from monoquant_gguf.kernels.simple import inverse, mxfp4, mxfp4_codes, signed_extreme
from monoquant_gguf.layouts import IQ4_VALUES, TERNARY, Layout

CANDIDATES = 6

#: the step that suits a unit normal best, by codes: J. Max, "Quantizing for minimum distortion" (1960), table II
_NORMAL_STEP = {4: 0.3352, 5: 0.1881, 8: 0.0308}
_FINEST = 0.85  #: of the coarsest candidate: the finest one is at most this

_HALF_MAX, _HALF_TINY = 65504.0, 2.0**-24


def quantize(layout: Layout, rows: torch.Tensor, importance: torch.Tensor | None, lanes: ModuleType) -> Parts:
    """Blocks of a type whose squared error is at most that of llama.cpp's.

    :param rows: float32 ``[rows, columns]``.
    :param importance: float32 ``[columns]``.
    """
    problem = _Problem.of(layout, rows, importance)
    start = searched.quantize(layout.name, rows, layout.block_size, importance, lanes)
    if start.scales is not None:
        return _refine(problem, start)
    return _best(problem, [start, *_OTHERS[layout.name](problem, start, lanes)])


@dataclasses.dataclass(frozen=True, slots=True)
class _Problem:
    """Values to be approximated by blocks of a type."""

    layout: Layout
    x: torch.Tensor  #: [blocks, elements]
    weights: torch.Tensor | None  #: of squared errors, [blocks, elements]; at most 1

    @classmethod
    def of(cls, layout: Layout, rows: torch.Tensor, importance: torch.Tensor | None) -> _Problem:
        x = rows.reshape(-1, layout.block_size)
        if importance is None:
            return cls(layout, x, None)
        weights = importance.expand(rows.shape).reshape(x.shape)
        largest = weights.amax(1, keepdim=True)
        return cls(layout, x, torch.where(largest > 0, weights / largest, 1.0))

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.weights is None else values * self.weights

    def errors(self, parts: Parts) -> torch.Tensor:
        """Squared errors of all elements, ``[blocks, elements]``, as float64: no sum of them loses or overflows."""
        difference = (to_tensor(parts, self.layout, tuple(self.x.shape)).dequantize() - self.x).double()
        return self.weighted(difference.square_())


def _best(problem: _Problem, options: Sequence[Parts]) -> Parts:
    """Of each block the option with the least error, the first of several."""
    kept, *others = options
    least = problem.errors(kept).sum(1)
    for other in others:
        error = problem.errors(other).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        kept = _merged(better, other, kept)
    return kept


def _merged(chosen: torch.Tensor, a: Parts, b: Parts) -> Parts:
    """Blocks of ``a`` where chosen, else of ``b``."""

    def pick(x: torch.Tensor | None, y: torch.Tensor | None) -> torch.Tensor | None:
        if x is None or y is None:
            return None
        return torch.where(chosen if x.ndim == 1 else chosen.unsqueeze(1), x, y)

    codes, d = pick(a.codes, b.codes), pick(a.d, b.d)
    assert codes is not None
    assert d is not None
    return Parts(codes, d, pick(a.scales, b.scales), pick(a.dmin, b.dmin), pick(a.mins, b.mins))


def _half(values: torch.Tensor) -> torch.Tensor:
    """To float16, within its finite range."""
    return values.nan_to_num_(0.0).clamp_(-_HALF_MAX, _HALF_MAX).to(torch.float16)


def _symmetric(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """Candidates from the scale that clips nothing to the one that suits a normal distribution; refit, the best."""
    x, element = problem.x, problem.layout.encoding_for(2).element
    low, high = element.code_range
    low = max(low, -127) if element.bits == 8 else low
    coarsest = signed_extreme(x) / (low if element.bits < 8 else -low)
    deviation = (x * x).mean(1).sqrt_()
    finest = torch.minimum(deviation * _NORMAL_STEP[element.bits], coarsest.abs() * _FINEST).copysign_(coarsest)
    first = inverse(coarsest)
    stride = (inverse(finest) - first) / (CANDIDATES - 1)
    wx = problem.weighted(x)
    best, scale = torch.full_like(coarsest, -1.0), torch.zeros_like(coarsest)
    for k in range(CANDIDATES):
        q = (x * (first + stride * k).unsqueeze(1)).round_().clamp_(low, high)
        xl, ll = (wx * q).sum(1), problem.weighted(q * q).sum(1)
        gain = torch.where(ll > 0, xl * xl / ll, -1.0)
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, xl / ll, scale)
    d = _half(scale)
    return [Parts(_codes(x, d, low, high).to(torch.int8), d)]


def _codes(x: torch.Tensor, d: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (x * inverse(d.float()).unsqueeze(1)).nan_to_num_(0.0).round_().clamp_(low, high)


def _ternary(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """The scale and the codes that suit each other, from two beginnings: the mean magnitude and half the largest."""
    options = []
    magnitude = problem.x.abs()
    for scale in (magnitude.mean(1), magnitude.amax(1) / 2):
        d = _half(scale)
        for _ in range(4):
            codes = _codes(problem.x, d, *TERNARY)
            xl, ll = (problem.weighted(problem.x) * codes).sum(1), problem.weighted(codes * codes).sum(1)
            d = torch.where(ll > 0, _half(xl / ll), d)
        options.append(Parts(_codes(problem.x, d, *TERNARY).to(torch.int8), d))
    return options


def _mxfp4(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """The powers of two beside llama.cpp's."""
    exponent = mxfp4(problem.x).d.to(torch.int32)
    return [mxfp4_codes(problem.x, (exponent + step).clamp_(0, 254)) for step in (1, -1)]


def _range(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """Narrower ranges, refit for scale and minimum."""
    x, levels = problem.x, problem.layout.encoding_for(2).element.code_range[1]
    low, high = x.amin(1), x.amax(1)
    weights = torch.ones_like(x) if problem.weights is None else problem.weights
    options = []
    for k in range(CANDIDATES):
        width = (high - low) * (1 - 0.05 * k)
        d, minimum = width / levels, (high + low - width) / 2
        for _ in range(2):
            q = ((x - minimum.unsqueeze(1)) * inverse(d).unsqueeze(1)).round_().clamp_(0, levels)
            d, minimum = _line(x, q, weights, d, minimum)
        half, dmin = _half(d), _half(minimum)
        q = ((x - dmin.float().unsqueeze(1)) * inverse(half.float()).unsqueeze(1)).round_().clamp_(0, levels)
        options.append(Parts(q.nan_to_num_(0.0).to(torch.uint8), half, dmin=dmin))
    return options


def _line(
    x: torch.Tensor, q: torch.Tensor, weights: torch.Tensor, slope: torch.Tensor, intercept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and intercept of the line through ``(q, x)`` over the last axis; those given where there is none."""
    wq = weights * q
    w, wx = weights.sum(-1), (weights * x).sum(-1)
    l1, l2, xl = wq.sum(-1), (wq * q).sum(-1), (wq * x).sum(-1)
    determinant = w * l2 - l1 * l1
    solvable = determinant > 0
    a, b = (w * xl - wx * l1) / determinant, (l2 * wx - l1 * xl) / determinant
    return torch.where(solvable, a, slope), torch.where(solvable, b, intercept)


def _codebook(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """The search again, with weights that are those of the error."""
    weights = torch.ones_like(problem.x) if problem.weights is None else problem.weights
    d = _half(lanes.codebook(problem.x, weights, IQ4_VALUES, 7))
    codes = codebook_index(inverse(d.float()).unsqueeze(1) * problem.x, IQ4_VALUES)
    return [Parts(codes.to(torch.uint8), d), Parts(_iq4_codes(problem.x, start.d), start.d)]


def _iq4_codes(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return codebook_index(inverse(d.float()).unsqueeze(1) * x, IQ4_VALUES).to(torch.uint8)


_OTHERS: dict[str, Callable[[_Problem, Parts, ModuleType], list[Parts]]] = {
    "Q8_0": _symmetric,
    "Q4_0": _symmetric,
    "Q5_0": _symmetric,
    "Q4_1": _range,
    "Q5_1": _range,
    "TQ1_0": _ternary,
    "TQ2_0": _ternary,
    "MXFP4": _mxfp4,
    "IQ4_NL": _codebook,
}


def _refine(problem: _Problem, parts: Parts) -> Parts:
    """Types with nested scales: their units, then scales and minima, then the units again, fit to the codes."""
    nested = _Nested(problem)
    parts = nested.units(parts)
    parts = nested.scales(parts)
    return nested.units(parts)


class _Nested:
    """Blocks of sub-blocks; arrays are ``[blocks, sub-blocks, elements]``, or without the last axis."""

    def __init__(self, problem: _Problem) -> None:
        encoding = problem.layout.encoding_for(2)
        self.problem, self.element = problem, encoding.element
        self.size = encoding.block[-1]
        assert isinstance(encoding.scale, Encoding)
        self.limits = encoding.scale.element.code_range
        self.x = problem.x.view(len(problem.x), -1, self.size)
        self.weights = torch.ones_like(self.x) if problem.weights is None else problem.weights.view(self.x.shape)

    def units(self, parts: Parts) -> Parts:
        """``d`` and ``dmin`` of least squares for all other codes, where the error falls."""
        assert parts.scales is not None
        scaled = self._levels(parts.codes) * parts.scales.float().unsqueeze(2)
        u, x, w = scaled.flatten(1), self.x.flatten(1), self.weights.flatten(1)
        wu = w * u
        uu, ux = (wu * u).sum(1), (wu * x).sum(1)
        if parts.mins is None:
            d, dmin = ux / uu, None
        else:
            v = -parts.mins.float().unsqueeze(2).expand(self.x.shape).flatten(1)
            wv = w * v
            vv, uv, vx = (wv * v).sum(1), (wu * v).sum(1), (wv * x).sum(1)
            determinant = uu * vv - uv * uv
            solvable = determinant > 0
            both = (ux * vv - vx * uv) / determinant, (uu * vx - uv * ux) / determinant
            d = torch.where(solvable, both[0], ux / uu)
            dmin = _half(torch.where(solvable, both[1], 0.0))
        return self._accept(parts, dataclasses.replace(parts, d=_half(d), dmin=dmin), whole=True)

    def scales(self, parts: Parts) -> Parts:
        """Scales and minima of least squares for the codes, in their units, where the error falls."""
        assert parts.scales is not None
        level = self._levels(parts.codes)
        unit = parts.d.float().unsqueeze(1)
        low, high = self.limits
        if parts.mins is None or parts.dmin is None:
            wl = self.weights * level
            fit, mins = (wl * self.x).sum(2) / (wl * level).sum(2), None
        else:
            below = parts.dmin.float().unsqueeze(1)
            now = unit * parts.scales.float(), -below * parts.mins.float()
            fit, intercept = _line(self.x, level, self.weights, *now)
            mins = (-intercept / below).nan_to_num_(0.0).round_().clamp_(low, high).to(parts.mins.dtype)
        scales = (fit / unit).nan_to_num_(0.0).round_().clamp_(low, high).to(parts.scales.dtype)
        return self._accept(parts, dataclasses.replace(parts, scales=scales, mins=mins), whole=False)

    def _accept(self, old: Parts, new: Parts, *, whole: bool) -> Parts:
        """New parameters with their nearest codes, for the blocks or sub-blocks whose error they lower."""
        new = dataclasses.replace(new, codes=self._nearest(new))
        errors = [self.problem.errors(parts).view(self.x.shape).sum(2) for parts in (old, new)]
        if whole:
            return _merged(errors[1].sum(1) < errors[0].sum(1), new, old)
        better = errors[1] < errors[0]
        assert old.scales is not None
        assert new.scales is not None
        codes = torch.where(better.unsqueeze(2), new.codes.view(self.x.shape), old.codes.view(self.x.shape))
        mins = None if old.mins is None or new.mins is None else torch.where(better, new.mins, old.mins)
        scales = torch.where(better, new.scales, old.scales)
        return Parts(codes.view(old.codes.shape), old.d, scales, old.dmin, mins)

    def _levels(self, codes: torch.Tensor) -> torch.Tensor:
        if self.element.table is None:
            return codes.view(self.x.shape).float()
        return torch.tensor(self.element.table, device=codes.device)[codes.view(self.x.shape).to(torch.int64)]

    def _nearest(self, parts: Parts) -> torch.Tensor:
        assert parts.scales is not None
        scale = (parts.d.float().unsqueeze(1) * parts.scales.float()).unsqueeze(2)
        x = self.x
        if parts.dmin is not None and parts.mins is not None:
            x = x + (parts.dmin.float().unsqueeze(1) * parts.mins.float()).unsqueeze(2)
        steps = x * inverse(scale)
        if self.element.table is not None:
            return codebook_index(steps, IQ4_VALUES).to(parts.codes.dtype).view(parts.codes.shape)
        low, high = self.element.code_range
        return steps.nan_to_num_(0.0).round_().clamp_(low, high).to(parts.codes.dtype).view(parts.codes.shape)
