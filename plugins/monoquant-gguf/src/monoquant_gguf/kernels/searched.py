"""Types whose scales llama.cpp searches for: its bytes, from the searches of ``lanes`` or of ``compiled``.

Functions take float32 ``[blocks, elements]`` and importance of the same shape, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

import torch

from monoquant_core.blocks import number
from monoquant_core.scratch import Scratch
from monoquant_gguf.blocks.parts import Parts
from monoquant_gguf.kernels import lanes as in_torch
from monoquant_gguf.kernels.lanes import TINY
from monoquant_gguf.kernels.ordered import divide, first_extreme, inverse, nearest, root, row_sums
from monoquant_gguf.kernels.simple import SIMPLE
from monoquant_gguf.layouts import IQ4_VALUES

Importance: TypeAlias = "torch.Tensor | None"
Quantize: TypeAlias = "Callable[[torch.Tensor, Importance, ModuleType], Parts]"

_REF = {15: (-1.0, 0.1, 20), 31: (-0.5, 0.1, 15)}  #: candidates without importance: first, step, steps
_IMPL = (-0.9, 0.05, 36)  #: and with it


def _sub(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.reshape(-1, size)


def _root(importance: torch.Tensor, variance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's weights: importance, with more for large values."""
    return importance * root(variance.unsqueeze(1) + x * x)


def _variance(x: torch.Tensor, factor: float) -> torch.Tensor:
    return row_sums(x * x) * factor


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes & 255


def _signed_bytes(codes: torch.Tensor) -> torch.Tensor:
    return _bytes(codes + 128) - 128


def _rounded(
    x: torch.Tensor,
    d: torch.Tensor,
    scales: torch.Tensor,
    searched: torch.Tensor,
    lanes: ModuleType,
    low: int,
    high: int,
    dmin: torch.Tensor | None = None,
    mins: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes to the scales as they are stored; where a scale is zero, those of the search."""
    scale = (d.float().unsqueeze(1) * scales.float()).view(-1)
    added = None if dmin is None or mins is None else (dmin.float().unsqueeze(1) * mins.float()).view(-1)
    values = x.view(len(scale), -1)
    codes: torch.Tensor = lanes.rounded(values, scale, added, searched.reshape(values.shape), low, high)
    return codes.view(x.shape)


def _with_minima(
    x: torch.Tensor, importance: Importance, lanes: ModuleType, size: int, levels: int, limit: int
) -> Parts:
    """Q2_K, Q4_K and Q5_K: 16 or 8 scales and minima, whose codes are ``0..limit``."""
    blocks = len(x)
    sub = _sub(x, size)
    if importance is None:
        candidates = _REF.get(levels, (-0.5, 0.1, 15))
        scale, minimum, searched = lanes.ranged(sub, None, levels, *candidates, absolute=size == 16)
        scale, minimum = scale.view(blocks, -1), minimum.view(blocks, -1)
        d, scales = _largest_first(scale, limit, wraps=size == 16)
        dmin, mins = _largest_first(minimum, limit, wraps=size == 16)
    else:
        variance = _variance(x, (1 if size == 16 else 2) / 256)
        weights = _sub(_root(importance, variance, x), size)
        scale, minimum, searched = lanes.ranged(sub, weights, levels, *_IMPL, guarded=True)
        scale, minimum = scale.view(blocks, -1), minimum.view(blocks, -1)
        total = row_sums(weights).view(blocks, -1)
        d, scales = in_torch.positive(scale, total, limit)
        dmin, mins = in_torch.positive(minimum, total, limit)
    d, dmin = d.to(torch.float16), dmin.to(torch.float16)
    codes = _rounded(x, d, scales, searched, lanes, 0, levels, dmin, mins)
    return Parts(codes.to(torch.uint8), d, scales.to(torch.uint8), dmin, mins.to(torch.uint8))


def _largest_first(values: torch.Tensor, limit: int, *, wraps: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest becomes ``limit``; unit and codes."""
    largest = values.amax(1).clamp_(min=0) + 0.0
    factor = torch.where(largest > 0, divide(limit, largest), 0.0).unsqueeze(1)
    codes = _bytes(nearest(factor * values))
    codes = codes & limit if wraps else codes.clamp_(max=limit)
    return largest / number(limit, values.device), codes


def _q2_k(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> Parts:
    return _with_minima(x, importance, lanes, 16, 3, 15)


def _q4_k(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> Parts:
    return _with_minima(x, importance, lanes, 32, 15, 63)


def _q5_k(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> Parts:
    return _with_minima(x, importance, lanes, 32, 31, 63)


def _largest_scale(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitude and value of the scale of largest magnitude of every block."""
    return first_extreme(scale.t().contiguous())


def _q3_k(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> Parts:
    blocks, sub = len(x), _sub(x, 16)
    if importance is None:
        scale, searched = lanes.descent(sub, 4)
        scale = scale.view(blocks, 16)
        _, extreme = _largest_scale(scale)
        factor = divide(-32, extreme)
        codes = _signed_bytes(nearest(factor.unsqueeze(1) * scale)).clamp_(-32, 31)
        empty = extreme == 0
        scales = codes.masked_fill_(empty.unsqueeze(1), -32)
        d = torch.where(empty, 0.0, factor.reciprocal()).to(torch.float16)
    else:
        weights = _sub(_root(importance, _variance(x, 2 / 256), x), 16)
        scale, searched = lanes.symmetric(sub, weights, 4)
        unit, scales = in_torch.symmetric(scale.view(blocks, 16), row_sums(weights).view(blocks, 16), 32)
        d = unit.to(torch.float16)
    codes = _rounded(x, d, scales, searched, lanes, -4, 3)
    return Parts(codes.to(torch.int8), d, scales.to(torch.int8))


def _q6_k(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> Parts:
    blocks, sub = len(x), _sub(x, 16)
    scale, searched = lanes.symmetric(sub, None if importance is None else _sub(importance, 16), 32)
    scale = scale.view(blocks, 16)
    magnitude, extreme = _largest_scale(scale)
    factor = divide(-128, extreme)
    empty = magnitude < TINY
    scales = nearest(factor.unsqueeze(1) * scale).clamp_(max=127)
    scales = _signed_bytes(scales).masked_fill_(empty.unsqueeze(1), 0)
    d = torch.where(empty, 0.0, factor.reciprocal()).to(torch.float16)
    codes = _rounded(x, d, scales, searched, lanes, -32, 31).masked_fill_(empty.unsqueeze(1), -32)
    return Parts(codes.to(torch.int8), d, scales.to(torch.int8))


def _iq4(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of 32 elements each."""
    weights = x * x if importance is None else _root(importance, _variance(x, 2 / x.shape[1]), x)
    sub = _sub(x, 32)
    return sub, lanes.codebook(sub, _sub(weights, 32), IQ4_VALUES, 7)


def _iq4_nl(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> Parts:
    _, scale = _iq4(x, importance, lanes)
    codes = in_torch.codebook_index(inverse(scale).unsqueeze(1) * x, IQ4_VALUES)
    return Parts(codes.to(torch.uint8), scale.to(torch.float16))


def _iq4_xs(x: torch.Tensor, importance: Importance, lanes: ModuleType) -> Parts:
    sub, scale = _iq4(x, importance, lanes)
    scale = scale.view(len(x), -1)
    _, extreme = _largest_scale(scale)
    d = -extreme / 32
    scales = nearest(inverse(d).unsqueeze(1) * scale).clamp_(-32, 31)
    unit = d.unsqueeze(1) * scales.float()
    codes = in_torch.codebook_index(inverse(unit).view(-1, 1) * sub, IQ4_VALUES)
    return Parts(codes.view(len(x), -1).to(torch.uint8), d.to(torch.float16), scales.to(torch.int8))


def _weighted_symmetric(x: torch.Tensor, weights: torch.Tensor, lanes: ModuleType, half: int) -> Parts:
    scale, codes = lanes.symmetric(x, weights, half)
    return Parts(codes.to(torch.int8), scale.to(torch.float16))


def _weighted_range(x: torch.Tensor, weights: torch.Tensor, lanes: ModuleType, levels: int) -> Parts:
    scale, minimum, codes = lanes.ranged(x, weights, levels, *_IMPL, guarded=True)
    return Parts(codes.to(torch.uint8), scale.to(torch.float16), dmin=(-minimum).to(torch.float16))


_SEARCHED: dict[str, Quantize] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}

_WEIGHTED = {
    "Q4_0": (_weighted_symmetric, 8),
    "Q5_0": (_weighted_symmetric, 16),
    "Q4_1": (_weighted_range, 15),
    "Q5_1": (_weighted_range, 31),
}


def quantize(
    name: str,
    rows: torch.Tensor,
    size: int,
    importance: Importance,
    lanes: ModuleType,
    scratch: Scratch | None = None,
) -> Parts:
    """llama.cpp's blocks of a type.

    :param rows: float32 ``[rows, columns]``, whole rows of the tensor.
    :param size: elements of a block.
    :param importance: float32 ``[columns]``.
    :param lanes: :mod:`.lanes`, or :mod:`.compiled`.
    :param scratch: of the worker.
    """
    blocks = rows.reshape(-1, size)
    if name in SIMPLE and (importance is None or name not in _WEIGHTED):
        return SIMPLE[name](blocks, scratch or Scratch())
    if name in _WEIGHTED:
        assert importance is not None
        weighted, codes = _WEIGHTED[name]
        # Here, and only here, the variance is that of a whole row.
        variance = row_sums(rows * rows) / number(rows.shape[1], rows.device)
        return weighted(blocks, _root(importance, variance, rows).view(-1, size), lanes, codes)
    wide = None if importance is None else importance.expand(rows.shape).reshape(-1, size)
    return _SEARCHED[name](blocks, wide, lanes)
