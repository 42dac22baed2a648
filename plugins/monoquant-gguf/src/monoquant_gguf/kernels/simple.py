"""Types whose codes follow from the extremes of a block, in torch: the same bytes as llama.cpp's C code.

Every function takes float32 ``[blocks, elements]``. Operations are single, in C's order: a product and a sum are two
roundings. Where an inverse is infinite, C's conversion of what is no small number to a byte gives 0, and so do these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from monoquant_core.blocks import SMALLEST_NORMAL, number
from monoquant_core.scratch import Scratch
from monoquant_gguf.blocks.parts import Parts
from monoquant_gguf.kernels.ordered import inverse

#: added before truncation, rounds halves away from zero as roundf does, for magnitudes up to 127
_HALF = 0.49999997


def signed_extreme(x: torch.Tensor) -> torch.Tensor:
    """The value of largest magnitude of every row; of several, the first."""
    high, low = x.amax(1), x.amin(1)
    extreme = torch.where(high >= -low, high, low)
    tied = ((high == -low) & (high > 0)).nonzero().view(-1)
    if len(tied):
        rows = x[tied]
        first = (rows.abs() == high[tied].unsqueeze(1)).to(torch.uint8).argmax(1, keepdim=True)
        extreme[tied] = rows.gather(1, first).view(-1)
    return extreme + 0.0  # of zeros, the positive one


def _magnitude(x: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    # Without the sign, floats are in the order of their bits; one maximum of integers takes half the time of two.
    bits = _buffer(x, scratch).view(torch.int32)
    return torch.bitwise_and(x.view(torch.int32), 0x7FFFFFFF, out=bits).amax(1).view(torch.float32)


def _buffer(x: torch.Tensor, scratch: Scratch, name: str = "steps") -> torch.Tensor:
    return scratch.take(f"gguf.{name}", x.shape, torch.float32, x.device)


def smallest(x: torch.Tensor) -> torch.Tensor:
    """The smallest value of every row; of zeros, the first, whose sign is stored."""
    low = x.amin(1)
    zero = (low == 0).nonzero().view(-1)
    if len(zero):
        rows = x[zero]
        first = (rows == 0).to(torch.uint8).argmax(1, keepdim=True)
        low[zero] = rows.gather(1, first).view(-1)
    return low


def _steps(x: torch.Tensor, d: torch.Tensor, scratch: Scratch, added: float = 0.0) -> torch.Tensor:
    """``x * (1 / d) + added``; 0 for what is not finite. Overwritten by the next."""
    ordinary = float(d.abs().amin()) >= SMALLEST_NORMAL
    factor = d.reciprocal() if ordinary else inverse(d)
    steps = torch.mul(x, factor.unsqueeze(1), out=_buffer(x, scratch))
    if added:
        steps += added
    return steps if ordinary else steps.masked_fill_(~steps.isfinite(), 0.0)


def _away_from_zero(steps: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Moved so that truncation rounds, halves away from zero."""
    return steps.add_(torch.sign(steps, out=_buffer(steps, scratch, "signs")), alpha=_HALF)


def q8_0(x: torch.Tensor, scratch: Scratch) -> Parts:
    """The largest magnitude becomes 127."""
    d = _magnitude(x, scratch) / number(127, x.device)
    steps = _away_from_zero(_steps(x, d, scratch), scratch)
    return Parts(steps.to(torch.int8), d.to(torch.float16))


def _symmetric(x: torch.Tensor, half: int, scratch: Scratch) -> Parts:
    d = signed_extreme(x) / -half
    codes = _steps(x, d, scratch, half + 0.5).to(torch.int8)
    return Parts(codes.clamp_(max=2 * half - 1).sub_(half), d.to(torch.float16))


def q4_0(x: torch.Tensor, scratch: Scratch) -> Parts:
    """The value of largest magnitude becomes -8."""
    return _symmetric(x, 8, scratch)


def q5_0(x: torch.Tensor, scratch: Scratch) -> Parts:
    """The value of largest magnitude becomes -16."""
    return _symmetric(x, 16, scratch)


def _range(x: torch.Tensor, levels: int, scratch: Scratch) -> Parts:
    low = smallest(x)
    d = (x.amax(1) - low) / number(levels, x.device) + 0.0
    above = torch.sub(x, low.unsqueeze(1), out=_buffer(x, scratch, "above"))
    codes = _steps(above, d, scratch, 0.5).to(torch.int8)
    return Parts(codes.clamp_(max=levels).view(torch.uint8), d.to(torch.float16), dmin=low.to(torch.float16))


def q4_1(x: torch.Tensor, scratch: Scratch) -> Parts:
    """From the smallest value, 0, to the largest, 15."""
    return _range(x, 15, scratch)


def q5_1(x: torch.Tensor, scratch: Scratch) -> Parts:
    """From the smallest value, 0, to the largest, 31."""
    return _range(x, 31, scratch)


def ternary(x: torch.Tensor, scratch: Scratch) -> Parts:
    """Nearest of -1, 0 and 1 times the largest magnitude."""
    d = _magnitude(x, scratch)
    return Parts(_away_from_zero(_steps(x, d, scratch), scratch).to(torch.int8), d.to(torch.float16))


#: halfway between the magnitudes of e2m1, in halves of its unit
_MXFP4_MIDDLES = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)


def mxfp4(x: torch.Tensor, scratch: Scratch) -> Parts:
    """The power of two that brings the largest magnitude to 4..8; nearest codes, the smaller magnitude of two."""
    largest = _magnitude(x, scratch)
    # From doubles, rounded once: what C's log2f returns next to powers of two.
    exponent = largest.double().log2().float().floor() + 125
    exponent = torch.where(largest > 0, exponent, 0.0).to(torch.int32) & 255  # a negative one wraps around, as in C
    return mxfp4_codes(x, exponent)


def mxfp4_codes(x: torch.Tensor, exponent: torch.Tensor) -> Parts:
    """Nearest codes to given exponents, int32 ``[blocks]`` of 0..254."""
    powers = torch.tensor([2.0 ** (e - 128) for e in range(255)], dtype=torch.float32, device=x.device)
    unit = powers[exponent]
    magnitude = x.abs()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for middle in _MXFP4_MIDDLES:
        codes += magnitude > (unit * middle).unsqueeze(1)
    codes |= ((x < 0) & (codes > 0)).to(torch.uint8) << 3
    return Parts(codes, exponent.to(torch.uint8))


SIMPLE: dict[str, Callable[[torch.Tensor, Scratch], Parts]] = {
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "TQ1_0": ternary,
    "TQ2_0": ternary,
    "MXFP4": mxfp4,
}
