"""ONNX's data types by number, and what they are here. Imports neither torch nor onnx."""

from __future__ import annotations

import math

#: TensorProto.DataType -> torch's dtype
TORCH: dict[int, str] = {
    **{1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"},
    **{10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16"},
    **{17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz", 24: "float8_e8m0fnu"},
}
NUMBER = {name: number for number, name in TORCH.items()}

STRING = 8

#: types that lie packed in bytes, and that torch has no dtype for: number -> (name, bits)
PACKED: dict[int, tuple[str, int]] = {
    **{21: ("uint4", 4), 22: ("int4", 4), 23: ("float4_e2m1fn", 4), 25: ("uint2", 2), 26: ("int2", 2)},
    **{27: ("float6_e2m3fn", 6), 28: ("float6_e3m2fn", 6)},
}

_BITS = {"float64": 64, "int64": 64, "uint64": 64, "complex64": 64, "complex128": 128, "float32": 32, "int32": 32}
_BITS |= {"uint32": 32, "float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16}


def name_of(number: int) -> str:
    """The type's name, torch's where it has one.

    :raises KeyError: for strings, and for numbers that ONNX has not given away.
    """
    return TORCH[number] if number in TORCH else PACKED[number][0]


def stored_nbytes(number: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in raw_data.

    :raises KeyError: for strings, and for numbers that ONNX has not given away.
    """
    bits = PACKED[number][1] if number in PACKED else _BITS.get(TORCH[number], 8)
    return -(-math.prod(shape) * bits // 8)
