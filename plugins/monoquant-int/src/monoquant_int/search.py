"""The scale of least squared error, for many blocks at once.

For codes q the best scale is ``<x, q> / <q, q>``, and it leaves the error ``<x, x> - <x, q>^2 / <q, q>``. So every
candidate is refit to the codes it gives, and candidates are compared by the last term alone.

Every processor and accelerator adds up in another order. So that all find the same scale, what is summed lies on a grid
so coarse that the sums are exact in float64, and so fine that nothing is lost that counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monoquant_core.blocks import number, span
from monoquant_core.scratch import Scratch

CANDIDATES = 6

SPAN = 1 << 17  #: elements at a time: buffers of them stay in a cache, and threads seldom wait for each other

#: the step that suits a unit normal best, by bits: J. Max, "Quantizing for minimum distortion" (1960), table II
NORMAL_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}

FINEST = 0.85  #: of the coarsest candidate: the finest one is at most this, however flat the distribution


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
    """The scale for every row of ``matrix * unscale``.

    The first candidate is ``plain``, so that the result is never worse. The others go from ``coarsest`` to the scale
    that suits a normal distribution of the same variance, evenly in ``1 / scale``: rows with outliers are tried with
    much finer scales, too.

    :param matrix: float32 ``[blocks, elements]``.
    :param unscale: ``[blocks]``, powers of two that bring magnitudes to the order of one, and below 4.
    :param weights: of every squared error, ``[blocks, elements]``, at most 1; overwritten.
    :param plain: ``[blocks]``, positive: the scale that clips nothing.
    :param coarsest: ``[blocks]``; its sign is that of the candidates.
    """
    found = torch.empty_like(unscale)
    rows = max(1, span(SPAN, matrix.device) // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        part = slice(first, first + rows)
        x = scratch.take("int.x", matrix[part].shape, torch.float32, matrix.device)
        torch.mul(matrix[part], unscale[part].unsqueeze(1), out=x)
        weight = None if weights is None else weights[part]
        found[part] = _best_scales(x, weight, plain[part], coarsest[part], codes.of(part), bits, scratch)
    return found


def _best_scales(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    plain: torch.Tensor,
    coarsest: torch.Tensor,
    codes: Codes,
    bits: int,
    scratch: Scratch,
) -> torch.Tensor:
    q, product = (scratch.take(f"int.{name}", x.shape, torch.float32, x.device) for name in ("q", "product"))
    wide = scratch.take("int.wide", x.shape, torch.float64, x.device)
    unit = grid_unit(x.shape[1], bits)
    _to_grid(x, unit)
    squares = torch.sum(wide.copy_(_to_grid(torch.mul(x, x, out=product), unit)), 1).float()
    # Through float64, because float32 roots are not rounded correctly everywhere.
    deviation = (squares / number(x.shape[1], x.device)).double().sqrt_().float()
    finest = torch.minimum(deviation * NORMAL_STEP[bits], coarsest.abs() * FINEST).copysign_(coarsest)
    first, stride = coarsest.reciprocal(), (finest.reciprocal() - coarsest.reciprocal()) / (CANDIDATES - 2)
    inverse = torch.stack([plain.reciprocal(), *(first + stride * k for k in range(CANDIDATES - 1))])
    if codes.both_signs:
        inverse[2::2].neg_()
    wx = x
    if weight is not None:
        wx = scratch.take("int.wx", x.shape, torch.float32, x.device)
        _to_grid(torch.mul(x, _to_grid(weight, unit), out=wx), unit)
    xq, qq = torch.empty((2, CANDIDATES, len(x)), dtype=torch.float64, device=x.device)
    exact = weight is None and x.shape[1] << 2 * bits <= 1 << 24  # sums of squares of codes, in float32
    for k in range(CANDIDATES):
        torch.mul(x, inverse[k].unsqueeze(1), out=q).round_()
        codes.clip_(q)
        torch.sum(wide.copy_(torch.mul(wx, q, out=product)), 1, out=xq[k])
        torch.mul(q, q, out=product)
        if exact:
            qq[k] = product.sum(1)
        else:
            torch.sum(wide.copy_(product if weight is None else product.mul_(weight)), 1, out=qq[k])
    refit = xq / qq
    # NaN where all codes are 0. max, because argmax over a leading axis is ten times slower.
    best = (refit * xq).nan_to_num_(-1.0).max(0, keepdim=True).indices
    return torch.gather(refit, 0, best).squeeze(0).float()


def grid_unit(elements: int, bits: int) -> float:
    """Of the grid: sums of ``elements`` values, each the product of two codes or below it, are less than 2^53 units."""
    return 2.0 ** ((elements - 1).bit_length() + 2 * bits - 53)


def _to_grid(values: torch.Tensor, unit: float) -> torch.Tensor:
    """Round to multiples, in place. So are products with whole numbers, rounded to float32 as they are."""
    return values.mul_(1 / unit).round_().mul_(unit)
