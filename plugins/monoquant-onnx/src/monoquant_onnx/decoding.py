"""What DequantizeLinear makes of constants, as the IR has it. Imports no torch."""

from __future__ import annotations

import math

from monoquant_core import encoding as e
from monoquant_core.errors import EncodingError
from monoquant_onnx.data import BiasData, Data, QuantizedData, is_zero, reshaped

#: element types of codes by name
ELEMENTS = {
    element.name: element
    for element in (
        *(e.INT8, e.UINT8, e.INT4, e.UINT4, e.INT2, e.UINT2, e.integer(16), e.integer(16, signed=False)),
        *(e.FLOAT8_E4M3FN, e.FLOAT8_E5M2, e.FLOAT4_E2M1FN),
    )
}


def encoded(
    codes: Data, scale: Data, zero_point: Data | None, axis: int, block_size: int
) -> QuantizedData | BiasData | None:
    """What DequantizeLinear makes of constants; None when the IR has no such encoding. 32-bit biases become floats."""
    rank = len(codes.shape)
    if codes.dtype == "int32" and not block_size and zero_point is None:
        return _bias(codes, scale)
    element = ELEMENTS.get(codes.dtype)
    if element is None or not codes.shape or block_size < 0 or not scale.dtype.startswith(("float", "bfloat")):
        return None
    block = _block(scale.shape, rank, axis, block_size)
    grid = e.param_shape(codes.shape, block)
    if (scale.shape != grid) if block_size else (math.prod(scale.shape) != math.prod(grid) or len(scale.shape) > 1):
        return None
    where = _in_shape(scale, grid)
    if where is None:
        return None
    if zero_point is not None and math.prod(zero_point.shape) != math.prod(grid):
        return None
    zeros, shift = _zero_points(element, zero_point, grid)
    if shift:
        element = e.integer(element.bits, signed=False)
    param: e.Param = where.encoding if isinstance(where, QuantizedData) else where.dtype
    if param == e.FLOAT8_E8M0FNU.name:
        param = e.FLOAT8_E8M0FNU
    unsigned = element.kind == "int" and not element.signed
    try:
        found = e.Encoding(element, block, param, zero_point=element if unsigned else None)
        found.check_weight()
    except EncodingError:
        return None
    return QuantizedData(codes, where, zeros, found, shift)


def _bias(codes: Data, scale: Data) -> BiasData | None:
    count = math.prod(scale.shape)
    if len(codes.shape) != 1 or count not in (1, codes.shape[0]) or scale.dtype not in e.FLOAT_BITS:
        return None
    return BiasData(codes, scale)


def _block(scale: tuple[int, ...], rank: int, axis: int, block_size: int) -> tuple[int, ...]:
    """What shares a scale, as DequantizeLinear has it."""
    if block_size:
        return tuple(block_size if i == axis % rank else 1 for i in range(rank))
    return e.per_tensor(rank) if math.prod(scale) == 1 else e.per_channel(rank, axis)


def _zero_points(element: e.ElementType, given: Data | None, grid: tuple[int, ...]) -> tuple[Data | None, int]:
    """Zero points that there really are, and what makes them and their codes unsigned."""
    if given is None or element.kind != "int":
        return None, 0
    zeros = reshaped(given, grid)
    if not element.signed:
        return zeros, 0
    # onnxruntime's tools write zero points that are 0.
    return (None, 0) if is_zero(zeros) else (zeros, 1 << element.bits - 1)


def _in_shape(scale: Data, grid: tuple[int, ...]) -> Data | None:
    """A scale in the shape that its blocks have; nested ones that ONNX has as a vector, too."""
    if not isinstance(scale, QuantizedData):
        return reshaped(scale, grid)
    if scale.shape == grid:
        return scale
    inner = scale.encoding
    if any(b != e.FULL for b in inner.block):
        return None
    block = e.per_tensor(len(grid))
    small = e.param_shape(grid, block)
    zeros = reshaped(scale.zero_point, small) if scale.zero_point is not None else None
    lifted = e.Encoding(inner.element, block, inner.scale, inner.zero_point)
    return QuantizedData(reshaped(scale.codes, grid), reshaped(scale.scale, small), zeros, lifted, scale.shift)
