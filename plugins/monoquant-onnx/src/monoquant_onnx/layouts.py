"""How DequantizeLinear holds an encoding: types, axes, blocks and the opset that they need. Imports no torch.

``value = (code - zero_point) * scale``; the scale is a number, a vector along one axis, or, in blocks along one axis, a
tensor of the codes' rank (ONNX operators, DequantizeLinear; blocks since opset 21).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from monoquant_core.encoding import FULL, ElementType, Encoding, per_channel, per_tensor
from monoquant_core.reencode import can_reencode
from monoquant_core.rows import Shape, block_rows, row_count

#: element type -> TensorProto.DataType, and the opset whose DequantizeLinear takes it
ELEMENTS: dict[str, tuple[int, int]] = {
    **{"uint8": (2, 10), "int8": (3, 10), "uint16": (4, 21), "int16": (5, 21), "uint4": (21, 21), "int4": (22, 21)},
    **{"uint2": (25, 25), "int2": (26, 25), "float4_e2m1fn": (23, 23)},
    **{"float8_e4m3fn": (17, 19), "float8_e4m3fnuz": (18, 19), "float8_e5m2": (19, 19), "float8_e5m2fnuz": (20, 19)},
}
E8M0 = (
    "float8_e8m0fnu"  #: scales that are powers of two: through a Cast, as DequantizeLinear would answer in their type
)
E8M0_NUMBER, E8M0_OPSET = 24, 24
FLOAT = 1
AXIS_OPSET, BLOCK_OPSET = 13, 21
NO_KERNEL = {"float4_e2m1fn": "onnxruntime 1.32 has no CPU kernel for 4-bit floats: the file is for other runtimes"}


@dataclass(frozen=True, slots=True)
class Layout:
    """How DequantizeLinear takes the codes of a tensor."""

    axis: int | None  #: None: one scale for the whole tensor
    block_size: int  #: 0: one scale for each index of the axis
    grid: Shape  #: extents of the parameters as the encoding has them
    nested: Layout | None  #: of a scale that is itself quantized
    opset: int

    @property
    def params_shape(self) -> Shape:
        """Extents of the parameters as ONNX wants them."""
        if self.axis is None:
            return ()
        return self.grid if self.block_size else (self.grid[self.axis],)


@dataclass(frozen=True, slots=True)
class Stored:
    """One array in the file."""

    label: str  #: "", "_scale", "_zero_point", "_scale_scale": what its name adds to the tensor's
    number: int  #: TensorProto.DataType
    dtype: str  #: torch's, of the array in memory; bytes where codes are packed
    bits: int  #: of one code; 0 for floats
    shape: Shape  #: as ONNX has it
    rows: int  #: rows of the tensor that one record covers; 0: the whole tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return -(-math.prod(self.shape) * (self.bits or 32) // 8)


def layout_of(shape: Shape, encoding: Encoding) -> Layout | str:
    """The layout of a tensor, or why DequantizeLinear does not take it as it is."""
    element = encoding.element
    if element.name not in ELEMENTS:
        kinds = {"codebook": "codebooks", "int": f"integers of {element.bits} bits", "float": f"floats {element.name}"}
        return f"ONNX has no {kinds[element.kind]}"
    if encoding.offset is not None:
        return "DequantizeLinear has zero points and no offsets"
    if encoding.zero_point is not None and encoding.zero_point != element:
        return f"DequantizeLinear's zero points are codes of {element.name}, and these are {_name(encoding.zero_point)}"
    found = _axis(shape, encoding.block)
    if isinstance(found, str):
        return found
    axis, block, grid = found
    opset = max(ELEMENTS[element.name][1], AXIS_OPSET if axis is not None else 0, BLOCK_OPSET if block else 0)
    nested = None
    scale = encoding.scale
    if isinstance(scale, Encoding):
        inner = layout_of(grid, scale)
        if isinstance(inner, str):
            return f"scale: {inner}"
        if inner.nested is not None or isinstance(scale.scale, ElementType):
            return "scales nested twice"
        nested, opset = inner, max(opset, inner.opset)
        if not block and inner.axis is not None:  # the scale is a number or a vector there, and not of full rank
            return "a scale in blocks of a scale along one axis"
    elif isinstance(scale, ElementType):
        if scale.name != E8M0:
            return f"DequantizeLinear's scales are floats, and these are codes of {scale.name}"
        opset = max(opset, E8M0_OPSET)
    elif scale != "float32":
        return f"scales of {scale}"
    return Layout(axis, block, grid, nested, opset)


def suggestions(shape: Shape, encoding: Encoding) -> Iterator[Encoding]:
    """Encodings of the same codes that DequantizeLinear may take: float32 scales, blocks along one axis."""
    blocks = [encoding.block, per_tensor(len(shape)), *(per_channel(len(shape), axis) for axis in range(len(shape)))]
    if len(encoding.block) == len(shape):
        clamped = tuple(FULL if b == FULL or b >= n else b for b, n in zip(encoding.block, shape, strict=True))
        last = len(shape) - 1
        for axis in (last, *range(last)):
            blocks.append(tuple(b if i == axis else 1 for i, b in enumerate(clamped)))
        blocks.insert(1, clamped)
    scales = [encoding.scale]
    if isinstance(encoding.scale, str) and encoding.scale != "float32":
        scales = ["float32"]
    for block in blocks:
        for scale in scales:
            yield replace(encoding, block=block, scale=scale)
    if not isinstance(encoding.scale, str):
        for block in blocks:
            yield replace(encoding, block=block, scale="float32")


def repacked(shape: Shape, encoding: Encoding) -> tuple[Encoding, bool] | None:
    """The encoding of the same codes that DequantizeLinear takes, and whether it is exact; None if there is none."""
    for target in suggestions(shape, encoding):
        if target == encoding or isinstance(layout_of(shape, target), str):
            continue
        answer = can_reencode(encoding, target, shape)
        if answer in ("exact", "rounds"):
            return target, answer == "exact"
    return None


def stored_arrays(shape: Shape, encoding: Encoding, layout: Layout, *, gathered: bool = False) -> list[Stored]:
    """The arrays of a tensor, codes first.

    :param gathered: rows of the parameters are looked up together with rows of codes, so they keep their rank.
    """
    element, scale, total = encoding.element, encoding.scale, max(1, row_count(shape))
    arrays = [_codes("", element, shape, shape, 1, total)]
    rows = record_rows(shape, encoding.block)
    params = layout.grid if gathered and layout.axis is not None else layout.params_shape
    if isinstance(scale, Encoding):
        assert layout.nested is not None
        below = layout.nested.params_shape
        inner = total if layout.nested.axis is not None else 0
        arrays.append(_codes("_scale", scale.element, params, params, rows, total))
        arrays.append(Stored("_scale_scale", FLOAT, "float32", 0, below, inner))
        if scale.zero_point is not None:
            arrays.append(_codes("_scale_zero_point", scale.element, below, below, inner, total))
    elif isinstance(scale, ElementType):
        arrays.append(Stored("_scale", E8M0_NUMBER, "uint8", 8, params, rows))
    else:
        arrays.append(Stored("_scale", FLOAT, "float32", 0, params, rows))
    if encoding.zero_point is not None:
        arrays.append(_codes("_zero_point", element, params, params, rows, total))
    return arrays


def record_rows(shape: Shape, block: tuple[int, ...]) -> int:
    """Rows of a tensor that share one record of a parameter, records being equally long; 0: all of them."""
    if all(b == FULL for b in block):
        return 0
    total = max(1, row_count(shape))
    inner = block[1:-1]
    if any(b != FULL and n % b for b, n in zip(inner, shape[1:-1], strict=True)):
        return total  # a shorter last block on an inner axis
    return min(total, block_rows(shape, block))


def _codes(label: str, element: ElementType, shape: Shape, grid: Shape, rows: int, total: int) -> Stored:
    number, bits = ELEMENTS[element.name][0], element.bits
    if bits > 8:
        return Stored(label, number, element.name, bits, shape, rows)
    if bits == 8:
        signed = element.kind == "int" and element.signed
        return Stored(label, number, "int8" if signed else "uint8", bits, shape, rows)
    return Stored(label, number, "uint8", bits, shape, _byte_rows(rows, total, math.prod(grid), bits))


def _byte_rows(rows: int, total: int, elements: int, bits: int) -> int:
    """The smallest multiple of ``rows`` whose packed codes are whole bytes, in records that are equally long."""
    if rows == 0:
        return 0
    for count in (1, 2, 4):
        records = -(-total // (rows * count))
        if elements % records == 0 and elements // records * bits % 8 == 0:
            return rows * count
    return total


def _axis(shape: Shape, block: tuple[int, ...]) -> tuple[int | None, int, Shape] | str:
    """Axis, block size and extents of the parameters."""
    if len(block) != len(shape):
        return "groups that run over flattened axes"
    grid = tuple((1 if n else 0) if b == FULL else -(-n // b) for b, n in zip(block, shape, strict=True))
    if not math.prod(shape):
        return "a tensor without elements"
    if all(b == FULL for b in block):
        return None, 0, grid
    ones = [axis for axis, b in enumerate(block) if b == 1]
    others = [axis for axis, b in enumerate(block) if b != 1]
    if len(ones) == 1 and all(block[axis] == FULL for axis in others):
        return ones[0], 0, grid
    if len(others) == 1:
        (axis,) = others
        return axis, shape[axis] if block[axis] == FULL else block[axis], grid
    return "blocks along more than one axis"


def _name(param: object) -> str:
    return param.name if isinstance(param, ElementType) else str(param)
