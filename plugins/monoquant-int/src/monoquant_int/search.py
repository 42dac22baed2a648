"""The scale of least squared error, for many blocks at once.

For codes q the best scale is ``<x, q> / <q, q>``, and it leaves the error ``<x, x> - <x, q>^2 / <q, q>``. So every
candidate is refit to the codes it gives, and candidates are compared by the last term alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monoquant_core.scratch import Scratch

CANDIDATES = 6

SPAN = 1 << 16  #: elements to search at a time: three float32 buffers of them stay in a core's cache

#: the step that suits a unit normal best, by bits: J. Max, "Quantizing for minimum distortion" (1960), table II
NORMAL_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}

_SEGMENT = 1 << 14  #: elements that are summed in one go; torch divides longer sums among its threads

_FINEST = 0.85  #: of the coarsest candidate: the finest one is at most this, however flat the distribution


@dataclass(frozen=True, slots=True)
class Codes:
    """Smallest and largest code, zero point subtracted: of all blocks, or of each as ``[blocks, 1]``."""

    low: torch.Tensor | int
    high: torch.Tensor | int
    both_signs: bool = False  #: whether to try every other candidate with the other sign

    def of(self, part: slice) -> Codes:
        """Those of some blocks."""
        low, high = (end[part] if isinstance(end, torch.Tensor) else end for end in (self.low, self.high))
        return Codes(low, high, self.both_signs)

    def clip_(self, values: torch.Tensor) -> None:
        """Bring values into the range."""
        if isinstance(self.low, torch.Tensor) and isinstance(self.high, torch.Tensor):
            torch.clamp(values, self.low, self.high, out=values)
        elif isinstance(self.low, int) and isinstance(self.high, int):
            values.clamp_(self.low, self.high)


def best_scale(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    plain: torch.Tensor,
    coarsest: torch.Tensor,
    codes: Codes,
    bits: int,
    scratch: Scratch,
) -> torch.Tensor:
    """The scale for every row of ``x``, whose order of magnitude should be that of one.

    The first candidate is ``plain``, so that the result is never worse. The others go from ``coarsest`` to the scale
    that suits a normal distribution of the same variance, evenly in ``1 / scale``: rows with outliers are tried with
    much finer scales, too.

    :param x: float32 ``[blocks, elements]``.
    :param weight: of every squared error, ``[blocks, elements]``.
    :param plain: ``[blocks]``, positive: the scale that clips nothing.
    :param coarsest: ``[blocks]``; its sign is that of the candidates.
    """
    q, product = (scratch.take(f"int.{name}", x.shape, torch.float32, x.device) for name in ("q", "product"))
    deviation = _sums(torch.mul(x, x, out=product), x.new_empty(len(x))).div_(x.shape[1]).sqrt_()
    finest = torch.minimum(deviation * NORMAL_STEP[bits], coarsest.abs() * _FINEST).copysign_(coarsest)
    first, stride = coarsest.reciprocal(), (finest.reciprocal() - coarsest.reciprocal()) / (CANDIDATES - 2)
    inverse = torch.stack([plain.reciprocal(), *(first + stride * k for k in range(CANDIDATES - 1))])
    if codes.both_signs:
        inverse[2::2].neg_()
    wx = x if weight is None else torch.mul(x, weight, out=scratch.take("int.wx", x.shape, torch.float32, x.device))
    xq, qq = x.new_empty(2, CANDIDATES, len(x))
    for k in range(CANDIDATES):
        torch.mul(x, inverse[k].unsqueeze(1), out=q).round_()
        codes.clip_(q)
        _sums(torch.mul(wx, q, out=product), xq[k])
        torch.mul(q, q, out=product)
        _sums(product if weight is None else product.mul_(weight), qq[k])
    refit = xq / qq
    # NaN where all codes are 0. max, because argmax over a leading axis is ten times slower.
    best = (refit * xq).nan_to_num_(-1.0).max(0, keepdim=True).indices
    return torch.gather(refit, 0, best).squeeze(0)


def _sums(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The sum of every row, in an order that depends on nothing but the length of the rows."""
    if values.shape[1] <= _SEGMENT:
        return torch.sum(values, 1, out=out)
    torch.sum(values[:, :_SEGMENT], 1, out=out)
    for start in range(_SEGMENT, values.shape[1], _SEGMENT):
        out += values[:, start : start + _SEGMENT].sum(1)
    return out
