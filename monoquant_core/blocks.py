"""Blocks of a chunk as rows of a matrix, and scales that fit them: what quantizers share, those of plugins too.

A block is an :class:`~monoquant_core.encoding.Encoding`'s: extents per axis; rank 1 flattens the tensor, rank 2
flattens all axes but the first. Where a chunk is contiguous and its blocks are parts of rows, nothing is copied.
No result depends on how a tensor was cut into chunks.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from monoquant_core.encoding import FULL
from monoquant_core.errors import EncodingError, QuantizationError
from monoquant_core.rows import row_length
from monoquant_core.tensor import dtype_of

if TYPE_CHECKING:
    from monoquant_core.schemes import Context
    from monoquant_core.scratch import Scratch

SMALLEST_NORMAL = 2.0**-126  #: of float32; below it and above its reciprocal, ``1 / x`` overflows or loses bits

#: how far a value may exceed the largest of integer codes: below half a step, so that it still rounds to that code
HALF_STEP = 0.498

#: elements that an accelerator works on at a time: many enough that starting operations takes no time to speak of
DEVICE_SPAN = 1 << 24


def to_matrix(values: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """``[blocks, elements of one]``, in the order of a block's parameters; a view where the strides allow it.

    :raises EncodingError: when a block extent does not divide its axis.
    """
    if len(block) != values.ndim:
        values = values.reshape(-1) if len(block) == 1 else values.flatten(1)
    *outer, size = block
    if values.is_contiguous() and outer.count(1) == len(outer):
        length = values.shape[-1] if size == FULL else size
        if length and values.shape[-1] % length == 0:
            return values.view(-1, length)
    blocks = _blocks_first(values, block)
    return blocks.reshape(math.prod(blocks.shape[: len(block)]), -1)


def from_matrix(matrix: torch.Tensor, out: torch.Tensor, block: tuple[int, ...]) -> None:
    """Inverse of :func:`to_matrix`: write every element to its place in ``out``, a contiguous tensor."""
    if len(block) != out.ndim:
        out = out.view(-1) if len(block) == 1 else out.flatten(1)
    blocks = _blocks_first(out, block)
    blocks.copy_(matrix.view(blocks.shape))


def absmax(matrix: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
    """Largest magnitude of every row, float32 ``[rows]``; not finite exactly where something in the row is not."""
    if matrix.dtype in (torch.float16, torch.bfloat16):
        # Without the sign bit, halves are in the order of their bits; integer maxima are several times faster.
        out = None if scratch is None else scratch.take("blocks.bits", matrix.shape, torch.int16, matrix.device)
        return torch.bitwise_and(matrix.view(torch.int16), 0x7FFF, out=out).amax(1).view(matrix.dtype).float()
    return torch.maximum(matrix.amax(1), matrix.amin(1).neg_()).float()


def tensor_magnitude(magnitude: torch.Tensor, rows: torch.Tensor, context: Context) -> torch.Tensor:
    """``context.absmax``, the magnitude of the whole tensor, as a float32 ``[1]``.

    :param magnitude: of blocks of the chunk, to see that it is the same tensor.
    :raises QuantizationError: when the chunk holds NaN, infinity or a larger value.
    """
    assert context.absmax is not None
    known = magnitude.new_full((1,), context.absmax)
    if not float(magnitude.amax()) <= float(known):
        check_finite(rows, context)
        raise QuantizationError(
            f"{context.spec.name}: a value exceeds {context.absmax}, the largest that the tensor had before",
            hint="the input changed while it was read; run again",
        )
    return known


def power_of_two(magnitude: torch.Tensor) -> torch.Tensor:
    """The power of two at or below each float32 magnitude, kept where it and its reciprocal are normal numbers.

    Multiplying by the reciprocal is exact, and brings a block of any magnitude to the order of one.
    """
    bits = magnitude.view(torch.int32) & 0x7F800000
    return bits.view(torch.float32).clamp_(SMALLEST_NORMAL, 1 / SMALLEST_NORMAL)


def absmax_scale(
    magnitude: torch.Tensor,
    largest: float,
    dtype: str,
    rows: torch.Tensor,
    context: Context,
    *,
    beyond: float = HALF_STEP,
) -> torch.Tensor:
    """``magnitude / largest`` rounded to ``dtype``: the scale that gives the largest value of a block the largest code.

    Where rounding would leave that value ``beyond`` or more above the largest code, it is the next number above. A
    block of zeros has scale 1. So every scale is positive and finite.

    :param magnitude: of the blocks of a chunk, float32, as :func:`absmax` gives it.
    :param largest: the value of the largest code.
    :param rows: the chunk, for messages.
    :raises QuantizationError: for NaN and infinity, and for a scale that ``dtype`` cannot hold; names the tensor.
    """
    smallest, greatest = magnitude.aminmax()
    low, high = float(smallest), float(greatest)
    if not math.isfinite(high):
        check_finite(rows, context)
        raise QuantizationError(f"{context.spec.name}: its values span more than float32 holds", hint=_keep(context))
    scale = (magnitude / number(largest, magnitude.device)).to(dtype_of(dtype))
    limits = torch.finfo(scale.dtype)
    roomy = largest * (1 + limits.eps / 2) <= largest + beyond
    if roomy and largest * limits.tiny <= low and high < largest * limits.max:
        return scale
    exact = scale.dtype == torch.float32  # every float32 is a multiple of the smallest; a half that small loses much
    held = scale.float()
    lost = ~held.isfinite() | ((held == 0) & (magnitude > 0) & (not exact))
    if bool(lost.any()):
        raise QuantizationError(
            f"{context.spec.name}: values of magnitude {float(magnitude[lost][0]):.3g} need a scale that {dtype} "
            "cannot hold",
            hint=f"use {'float32' if dtype == 'bfloat16' else 'bfloat16 or float32'} scales, or {_keep(context)}",
        )
    power = power_of_two(magnitude)  # so that products of subnormal numbers do not lose the fraction that decides
    short = magnitude / power > held / power * (largest + beyond)
    bits = scale.view(torch.int32 if exact else torch.int16)
    bits += short.to(bits.dtype)
    return scale.masked_fill_(magnitude == 0, 1.0)


def check_finite(rows: torch.Tensor, context: Context) -> None:
    """Refuse a chunk with values that are not finite in float32. To be called once :func:`absmax` shows that there are.

    :raises QuantizationError: naming the tensor, the index of the first such value, and the value.
    """
    flat, spec = rows.reshape(-1), context.spec
    bad = ~flat.to(torch.float32).isfinite()
    if not bool(bad.any()):
        return
    position = int(bad.to(torch.uint8).argmax())
    value, position = float(flat[position]), position + context.rows.start * row_length(spec.shape)
    index: list[int] = []
    for extent in reversed(spec.shape):
        position, at = divmod(position, extent)
        index.insert(0, at)
    what = "is beyond float32" if math.isfinite(value) else "is not a finite number"
    raise QuantizationError(f"{spec.name}{index}: {value} {what}", hint=f"repair the checkpoint, or {_keep(context)}")


def in_steps(matrix: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``matrix * (1 / scale)`` in float32: every row by its own scale, or all rows by one.

    Not ``matrix / scale``, which is slower and has other last bits.

    :param scale: ``[rows]`` or ``[1]``, of any sign, not zero.
    """
    steps = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device) if out is None else out
    held = scale.float().unsqueeze(1)
    smallest, greatest = held.aminmax()
    low, high = float(smallest), float(greatest)
    if low < 0:
        low, high = (float(end) for end in held.abs().aminmax())
    if low < SMALLEST_NORMAL or high > 1 / SMALLEST_NORMAL:
        power = power_of_two(held)
        return torch.mul(matrix, power.reciprocal(), out=steps).mul_((held / power).reciprocal_())
    if matrix.dtype == torch.float32:
        return torch.mul(matrix, held.reciprocal(), out=steps)
    return steps.copy_(matrix).mul_(held.reciprocal())  # faster than one multiplication of two dtypes


@functools.lru_cache(maxsize=256)
def number(value: float, device: torch.device) -> torch.Tensor:
    """A float32 to divide by, on the device of what is divided.

    Division by a Python number, or by one that lies elsewhere, is on accelerators multiplication by its reciprocal:
    other bits.
    """
    return torch.tensor(value, dtype=torch.float32, device=device)


def span(elements: int, device: torch.device) -> int:
    """How many elements to work on at a time, where that changes no bit: as given, or more on an accelerator.

    :param elements: whose buffers stay in the cache of a processor's core.
    """
    return elements if device.type == "cpu" else DEVICE_SPAN


def _blocks_first(values: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """A view: which block along every axis, then where in it along every axis."""
    split: list[int] = []
    for n, b in zip(values.shape, block, strict=True):
        extent = n if b == FULL else b
        if extent == 0 or n % extent:
            raise EncodingError(f"blocks of {block} do not divide shape {tuple(values.shape)}")
        split += (n // extent, extent)
    order = range(2 * len(block))
    return values.view(split).permute(*order[::2], *order[1::2])


def _keep(context: Context) -> str:
    return f"leave the tensor as it is: --keep '{context.spec.name}'"
