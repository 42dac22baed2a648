"""Rounding to float8_e4m3fn, in torch. Imported when a tensor is quantized, not before.

A code is the bit pattern of ``x * (1 / scale)`` rounded half to even, as ``Tensor.to(torch.float8_e4m3fn)`` rounds it.
"""

from __future__ import annotations

import torch

from monoquant_core.blocks import absmax, absmax_scale, from_matrix, in_steps, tensor_magnitude, to_matrix
from monoquant_core.encoding import FULL, Encoding, param_shape
from monoquant_core.schemes import Context
from monoquant_core.scratch import WORK
from monoquant_core.tensor import QuantizedTensor

LARGEST = 448.0
BEYOND = 15.5  #: what exceeds 448 by less than half a step of 32 still rounds to it, and never to NaN


def quantize(rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
    """Codes and scales of a chunk: the largest magnitude of a block becomes 448.

    :raises QuantizationError: for NaN, infinity, and scales that their dtype cannot hold; names the tensor.
    """
    assert isinstance(encoding.scale, str)
    block, scratch = encoding.block, context.scratch
    values = rows if rows.dtype in (torch.float32, torch.float16, torch.bfloat16) else rows.to(torch.float32)
    values = values.contiguous()
    codes = scratch.take("float.codes", values.shape, torch.uint8, values.device)
    tensor_wide = context.absmax is not None and encoding.tensor_wide
    if tensor_wide:
        # The magnitude of the one block is known, so the rows of a chunk can be taken as they come.
        block = (1,) * (values.ndim - 1) + (FULL,)
    matrix, out = to_matrix(values, block), to_matrix(codes, block)
    magnitude = absmax(matrix if context.stored is None else to_matrix(context.stored, block), scratch)
    if tensor_wide:
        magnitude = tensor_magnitude(magnitude, rows, context)
    scale = absmax_scale(magnitude, LARGEST, encoding.scale, rows, context, beyond=BEYOND)
    steps = scratch.take(WORK, matrix.shape, torch.float32, matrix.device)
    out.view(torch.float8_e4m3fn).copy_(in_steps(matrix, scale, out=steps))
    if out.data_ptr() != codes.data_ptr():
        from_matrix(out, codes, block)
    return QuantizedTensor(encoding, codes, scale.view(param_shape(tuple(values.shape), encoding.block)))
