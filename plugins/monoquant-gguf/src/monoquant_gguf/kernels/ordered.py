"""Operations of float32 in torch whose every bit is defined: sums in order, one rounding for each step."""

from __future__ import annotations

import torch

from monoquant_core.blocks import number

_MAGIC = 12582912.0  #: 1.5 * 2^23: the sum with it has an integer in its last bits
_HALF_MAX = 65504.0


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Nearest integers, ties to even; of what is not small, the same nonsense that C gets."""
    if not x.is_cpu:
        x = torch.where(x.isnan(), 0.0, x)  # what the bits of NaN give on processors; accelerators have other ones
    return ((x + _MAGIC).view(torch.int32) & 0x7FFFFF) - 0x400000


def divide(of: float, x: torch.Tensor) -> torch.Tensor:
    """``of / x``, rounded once: of a Python number torch would take the reciprocal first."""
    return number(of, x.device) / x


def inverse(d: torch.Tensor) -> torch.Tensor:
    """``1 / d``, and 0 for 0."""
    return torch.where(d == 0, 0.0, d.reciprocal())


def root(x: torch.Tensor) -> torch.Tensor:
    """Square roots, rounded correctly, which those of float32 in torch are not."""
    return x.double().sqrt_().float()


def half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float16 within its finite range, 0 for NaN; as float32."""
    return x.nan_to_num(0.0).clamp_(-_HALF_MAX, _HALF_MAX).to(torch.float16).float()


def clip(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Within a range, NaN at its low end."""
    x = torch.where(x > low, x, low)
    return torch.where(x < high, x, high)


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums over the leading axis, one after another."""
    total = torch.zeros_like(x[0])
    for row in x:
        total += row
    return total


def folded_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums over the leading axis, of a power of two elements: one half is added to the other until one is left."""
    while len(x) > 1:
        middle = len(x) // 2
        x = x[:middle] + x[middle:]
    return x[0]


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums over the last axis, one after another."""
    return ordered_sum(x.movedim(-1, 0).contiguous())


def first_extreme(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitude and value of the element of largest magnitude along the leading axis; the first of several."""
    largest = torch.zeros_like(x[0])
    value = torch.zeros_like(largest)
    for row in x:
        size = row.abs()
        larger = size > largest
        value = torch.where(larger, row, value)
        largest = torch.where(larger, size, largest)
    return largest, value
