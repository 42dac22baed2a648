"""Rounding to integers, in torch. Imported when a tensor is quantized, not before.

A code is ``round_half_to_even(x * (1 / scale)) + zero_point`` in float32, with the scale as it is stored: what
``torch.fake_quantize_per_channel_affine`` computes. ``x / scale`` has other last bits, and so sometimes other codes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType

import torch

from monoquant_core.blocks import (
    absmax,
    absmax_scale,
    from_matrix,
    in_steps,
    number,
    power_of_two,
    tensor_magnitude,
    to_matrix,
)
from monoquant_core.compiling import compiled
from monoquant_core.encoding import FULL, Encoding, param_shape
from monoquant_core.errors import QuantizationError
from monoquant_core.model import TensorSpec
from monoquant_core.schemes import Context
from monoquant_core.scratch import WORK
from monoquant_core.tensor import QuantizedTensor
from monoquant_int import search as in_torch
from monoquant_int.quantizer import WORTH_COMPILING
from monoquant_int.search import Codes

COMPILED = "monoquant_int.compiled"

_TOUCHING = 5e-5  #: steps: more than float32 rounds, and too few to be seen


def quantize(rows: torch.Tensor, encoding: Encoding, context: Context, *, search: bool) -> QuantizedTensor:
    """Codes and parameters of a chunk.

    :param search: find the scale of least squared error, rather than the one at which no value is clipped.
    :raises QuantizationError: for NaN, infinity, and scales that their dtype cannot hold; names the tensor.
    """
    block, scratch = encoding.block, context.scratch
    halves = rows.dtype in (torch.float16, torch.bfloat16) and not search and encoding.zero_point is None
    if rows.dtype == torch.float32 or halves:
        values = rows.contiguous()
    else:
        values = scratch.take("int.values", rows.shape, torch.float32, rows.device).copy_(rows)
    codes = scratch.take("int.codes", rows.shape, torch.int8, rows.device)
    tensor_wide = context.absmax is not None and encoding.tensor_wide
    if tensor_wide:
        # The magnitude of the one block is known, so the rows of a chunk can be taken as they come.
        block = (1,) * (values.ndim - 1) + (FULL,)
    matrix, out = to_matrix(values, block), to_matrix(codes, block)
    chunk = _Chunk(matrix, block, rows, encoding, context)
    zero_point = None
    if encoding.zero_point is not None:
        scale, zero_point = chunk.asymmetric(search)
    elif search:
        scale = chunk.searched()
    else:
        scale = chunk.nearest(tensor_wide)
    chunk.round(scale, zero_point, out, clip=search)
    if out.data_ptr() != codes.data_ptr():
        from_matrix(out, codes, block)
    grid = param_shape(values.shape, encoding.block)
    if zero_point is None:
        return QuantizedTensor(encoding, codes, scale.view(grid))
    return QuantizedTensor(encoding, codes.view(torch.uint8), scale.view(grid), zero_point.to(torch.uint8).view(grid))


@dataclass(slots=True)
class _Chunk:
    """Rows that are being quantized. Its methods take and give one value per block: shape ``[blocks]``."""

    matrix: torch.Tensor  #: [blocks, elements of one]; float32, or a half for nearest()
    block: tuple[int, ...]  #: by which the rows became the matrix
    rows: torch.Tensor  #: as they were given
    encoding: Encoding
    context: Context

    def nearest(self, tensor_wide: bool) -> torch.Tensor:
        """The scale that gives the largest magnitude of a block, or of the whole tensor, the largest code."""
        stored = self.context.stored
        magnitude = absmax(self.matrix if stored is None else to_matrix(stored, self.block), self.context.scratch)
        return self._plain(tensor_magnitude(magnitude, self.rows, self.context) if tensor_wide else magnitude)

    def searched(self) -> torch.Tensor:
        """The scale of least squared error; a negative one gives the extreme of a block the code that has no twin."""
        largest, smallest = self.matrix.amax(1), self.matrix.amin(1)
        magnitude = torch.maximum(largest, -smallest)
        low, high = self.encoding.codes_range
        coarsest = magnitude / number(max(high, -low), magnitude.device)
        if high == -low:
            return self._search(magnitude, self._plain(magnitude), coarsest, Codes(low, high))
        coarsest = torch.where((largest > -smallest) == (high > -low), coarsest, -coarsest)
        # Two bits are so coarse that the other sign may be better all the same.
        codes = Codes(low, high, both_signs=self.encoding.element.bits == 2)
        return self._search(magnitude, self._plain(magnitude), coarsest, codes)

    def asymmetric(self, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of a range that holds every value, and zero. A search keeps the zero point."""
        largest, smallest = self.matrix.amax(1).clamp_(min=0), self.matrix.amin(1).clamp_(max=0)
        scale = self._plain(largest - smallest)
        low, high = self.encoding.codes_range
        zero_point = (low - in_steps(smallest.unsqueeze(1), scale).round_().view(-1)).clamp_(low, high)
        if search:
            codes = Codes((low - zero_point).unsqueeze(1), (high - zero_point).unsqueeze(1))
            scale = self._search(torch.maximum(largest, -smallest), scale, scale.float(), codes)
        return scale, zero_point

    def round(self, scale: torch.Tensor, zero_point: torch.Tensor | None, out: torch.Tensor, *, clip: bool) -> None:
        """Write codes, as the signed bytes that have their bits."""
        low, high = self.encoding.codes_range
        matrix = self.matrix
        steps = self.context.scratch.take(WORK, matrix.shape, torch.float32, matrix.device)
        in_steps(matrix, scale, out=steps).round_()
        if zero_point is not None:
            # Floats become signed bytes many times faster than unsigned ones; flipping the top bit adds 128.
            steps.add_((zero_point - 128).unsqueeze(1)).clamp_(low - 128, high - 128)
            out.copy_(steps).bitwise_xor_(-128)
        else:
            out.copy_(steps.clamp_(low, high) if clip else steps)

    def _plain(self, extent: torch.Tensor) -> torch.Tensor:
        """The scale at which no value is clipped."""
        low, high = self.encoding.codes_range
        if self.encoding.zero_point is None:
            return absmax_scale(extent, min(high, -low), self._dtype, self.rows, self.context)
        # Rounding the zero point may take half a step from either end, so the range has nothing to spare.
        return absmax_scale(extent, high - low, self._dtype, self.rows, self.context, beyond=_TOUCHING)

    @property
    def _dtype(self) -> str:
        assert isinstance(self.encoding.scale, str)
        return self.encoding.scale

    def _search(
        self, magnitude: torch.Tensor, plain: torch.Tensor, coarsest: torch.Tensor, codes: Codes
    ) -> torch.Tensor:
        """The best scale, in its dtype; ``plain`` for blocks of zeros, and where a scale would be subnormal."""
        searches = searches_for(self.context.spec, self.matrix.device)
        # Exact, and then no square of a value over- or underflows.
        power = power_of_two(magnitude)
        found: torch.Tensor = searches.best_scales(
            self.matrix,
            power.reciprocal(),
            self._weights(),
            plain.float() / power,
            coarsest / power,
            codes,
            self.encoding.element.bits,
            self.context.scratch,
        )
        scale = (found * power).to(plain.dtype)
        usable = scale.isfinite() & (scale.abs() >= torch.finfo(scale.dtype).tiny)
        return torch.where(usable, scale, plain)

    def _weights(self) -> torch.Tensor | None:
        """Importance of every element, ``[blocks, elements of one]``: at most 1, and 1 in blocks that have none."""
        importance, spec = self.context.importance, self.context.spec
        if importance is None:
            return None
        if importance.ndim > 1:  # of a stack of layers: those that the rows are of
            each = math.prod(spec.shape[1:-1])
            of = self.context.rows
            importance = importance[of.start // each : -(-of.stop // each)]
            flat = importance.to(self.rows.device, torch.float32).unsqueeze(1).expand(self.rows.shape)
            return _relative(to_matrix(flat, self.block))
        flat = self.rows.flatten(1) if spec.kind.startswith("conv") else self.rows
        inputs = spec.shape[0] if spec.transposed else flat.shape[-1]
        if importance.numel() != inputs:
            raise QuantizationError(
                f"{spec.name}: importance of {importance.numel()} inputs, where there are {inputs}",
                hint="calibrate the model that is quantized",
            )
        weights = importance.to(flat.device, torch.float32)
        if spec.transposed:
            weights = weights[self.context.rows.start : self.context.rows.stop].unsqueeze(1)
        weights = to_matrix(weights.expand(flat.shape).reshape(self.rows.shape), self.block)
        return _relative(weights)


def searches_for(spec: TensorSpec, device: torch.device) -> ModuleType:
    """What runs the search: once numba is there, it takes small tensors, too."""
    if device.type == "cpu" and (spec.numel >= WORTH_COMPILING or COMPILED in sys.modules):
        return compiled(COMPILED) or in_torch
    return in_torch


def _relative(weights: torch.Tensor) -> torch.Tensor:
    """At most 1 in each block, and 1 in blocks that have none."""
    largest = weights.amax(1, keepdim=True)
    return torch.where(largest > 0, weights / largest, 1.0)
