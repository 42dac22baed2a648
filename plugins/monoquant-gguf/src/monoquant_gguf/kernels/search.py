"""Better values in the same bytes: llama.cpp's choice, and others that replace it where their squared error is less.

The error is that of what is stored, float16 rounding included, weighted by importance where there is one. It is
compared block by block, so it is never above llama.cpp's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from monoquant_core.blocks import number
from monoquant_core.encoding import Encoding
from monoquant_core.scratch import Scratch
from monoquant_gguf.blocks.parts import Parts, to_tensor
from monoquant_gguf.kernels import searched
from monoquant_gguf.kernels.fits import CANDIDATES, Grid, Nested
from monoquant_gguf.kernels.lanes import codebook_index
from monoquant_gguf.kernels.ordered import folded_sum, inverse
from monoquant_gguf.kernels.simple import mxfp4, mxfp4_codes
from monoquant_gguf.layouts import IQ4_VALUES, TERNARY, Layout

#: the step that suits a unit normal best: J. Max, "Quantizing for minimum distortion" (1960), table II
NORMAL_STEP = {"Q4_0": 0.3352, "Q5_0": 0.1881, "Q8_0": 0.0308}

_HALF_MAX, _HALF_TINY = 65504.0, 2.0**-24


def quantize(
    layout: Layout,
    rows: torch.Tensor,
    importance: torch.Tensor | None,
    lanes: ModuleType,
    scratch: Scratch | None = None,
) -> Parts:
    """Blocks of a type whose squared error is at most that of llama.cpp's.

    :param rows: float32 ``[rows, columns]``.
    :param importance: float32 ``[columns]``.
    """
    problem = _Problem.of(layout, rows, importance)
    start = searched.quantize(layout.name, rows, layout.block_size, importance, lanes, scratch)
    if start.scales is not None:
        return _refined(problem, start, lanes)
    if layout.name in NORMAL_STEP:
        return _scaled(problem, start, lanes)
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
        """Squared errors of all blocks, as float64: no sum of them loses or overflows."""
        difference = (to_tensor(parts, self.layout, tuple(self.x.shape)).dequantize() - self.x).double()
        return _sums(self.weighted(difference.square_()))


def _best(problem: _Problem, options: Sequence[Parts]) -> Parts:
    """Of each block the option with the least error, the first of several."""
    kept, *others = options
    least = problem.errors(kept)
    for other in others:
        error = problem.errors(other)
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


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Of every block, in an order that is the same everywhere."""
    return folded_sum(values.t())


def _half(values: torch.Tensor) -> torch.Tensor:
    """To float16, within its finite range."""
    return values.nan_to_num_(0.0).clamp_(-_HALF_MAX, _HALF_MAX).to(torch.float16)


def _scaled(problem: _Problem, start: Parts, lanes: ModuleType) -> Parts:
    """Types with one scale for a block."""
    low, high = problem.layout.encoding_for(2).element.code_range
    grid = Grid(-high if high == 127 else low, high)
    step = NORMAL_STEP[problem.layout.name]
    codes, d = lanes.scaled(problem.x, problem.weights, start.codes, start.d.float(), grid, step)
    return Parts(codes, d.to(torch.float16))


def _refined(problem: _Problem, start: Parts, lanes: ModuleType) -> Parts:
    """Types with nested scales."""
    encoding = problem.layout.encoding_for(2)
    assert isinstance(encoding.scale, Encoding)
    assert start.scales is not None
    grid = Grid(*encoding.element.code_range, encoding.element.table or ())
    shape = -1, encoding.block[-1]
    weights = None if problem.weights is None else problem.weights.reshape(shape)
    nested = Nested(
        start.codes.view(torch.int8).view(shape),
        start.d.float(),
        start.scales.float(),
        None if start.dmin is None else start.dmin.float(),
        None if start.mins is None else start.mins.float(),
    )
    found: Nested = lanes.refined(problem.x.view(shape), weights, nested, grid, encoding.scale.element.code_range)
    return Parts(
        found.codes.view(start.codes.dtype).view(start.codes.shape),
        found.d.to(torch.float16),
        found.scales.to(start.scales.dtype),
        None if found.dmin is None else found.dmin.to(torch.float16),
        None if found.mins is None else found.mins.to(start.scales.dtype),
    )


def _codes(x: torch.Tensor, d: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (x * inverse(d.float()).unsqueeze(1)).nan_to_num_(0.0).round_().clamp_(low, high)


def _ternary(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """The scale and the codes that suit each other, from two beginnings: the mean magnitude and half the largest."""
    options = []
    magnitude = problem.x.abs()
    for scale in (_sums(magnitude) / magnitude.shape[1], magnitude.amax(1) / 2):
        d = _half(scale)
        for _ in range(4):
            codes = _codes(problem.x, d, *TERNARY)
            xl, ll = _sums(problem.weighted(problem.x) * codes), _sums(problem.weighted(codes * codes))
            d = torch.where(ll > 0, _half(xl / ll), d)
        options.append(Parts(_codes(problem.x, d, *TERNARY).to(torch.int8), d))
    return options


def _mxfp4(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """The powers of two beside llama.cpp's."""
    exponent = mxfp4(problem.x, Scratch()).d.to(torch.int32)
    return [mxfp4_codes(problem.x, (exponent + step).clamp_(0, 254)) for step in (1, -1)]


def _range(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """Narrower ranges, refit for scale and minimum."""
    x, levels = problem.x.t().contiguous(), problem.layout.encoding_for(2).element.code_range[1]
    low, high = x.amin(0), x.amax(0)
    weights = torch.ones_like(x) if problem.weights is None else problem.weights.t().contiguous()
    w, wx = folded_sum(weights), folded_sum(weights * x)
    options = []
    for k in range(CANDIDATES):
        width = (high - low) * (1 - 0.05 * k)
        d, minimum = width / number(levels, x.device), (high + low - width) / 2
        for _ in range(2):
            q = ((x - minimum) * inverse(d)).round_().clamp_(0, levels)
            wq = weights * q
            l1, l2, xl = folded_sum(wq), folded_sum(wq * q), folded_sum(wq * x)
            determinant = w * l2 - l1 * l1
            solvable = determinant > 0
            d = torch.where(solvable, (w * xl - wx * l1) / determinant, d)
            minimum = torch.where(solvable, (l2 * wx - l1 * xl) / determinant, minimum)
        half, dmin = _half(d), _half(minimum)
        q = ((x - dmin.float()) * inverse(half.float())).round_().clamp_(0, levels)
        options.append(Parts(q.nan_to_num_(0.0).to(torch.uint8).t().contiguous(), half, dmin=dmin))
    return options


def _codebook(problem: _Problem, start: Parts, lanes: ModuleType) -> list[Parts]:
    """The search again, with weights that are those of the error."""
    weights = torch.ones_like(problem.x) if problem.weights is None else problem.weights
    d = _half(lanes.codebook(problem.x, weights, IQ4_VALUES, 7))
    codes = codebook_index(inverse(d.float()).unsqueeze(1) * problem.x, IQ4_VALUES)
    return [Parts(codes.to(torch.uint8), d), Parts(_iq4_codes(problem.x, start.d), start.d)]


def _iq4_codes(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return codebook_index(inverse(d.float()).unsqueeze(1) * x, IQ4_VALUES).to(torch.uint8)


_OTHERS: dict[str, Callable[[_Problem, Parts, ModuleType], list[Parts]]] = {
    "Q4_1": _range,
    "Q5_1": _range,
    "TQ1_0": _ternary,
    "TQ2_0": _ternary,
    "MXFP4": _mxfp4,
    "IQ4_NL": _codebook,
}
