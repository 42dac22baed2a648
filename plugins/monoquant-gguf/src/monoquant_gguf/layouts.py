"""ggml's types as encodings: one row each. Imports no torch.

Names, numbers and block sizes are those of ggml (``ggml.h``, ``ggml-common.h``). ggml subtracts a minimum where an
encoding adds an offset: the float16 beside the minima is stored with the other sign, which is exact.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from monoquant_core.encoding import (
    FLOAT4_E2M1FN,
    FLOAT8_E8M0FNU,
    INT4,
    INT8,
    UINT2,
    UINT4,
    ElementType,
    Encoding,
    Param,
    codebook,
    integer,
)

#: ggml-common.h, kvalues_iq4nl
IQ4_VALUES = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)

IQ4 = codebook("iq4_nl", IQ4_VALUES)
INT2, INT3, INT5, INT6 = (integer(bits) for bits in (2, 3, 5, 6))
UINT5, UINT6 = integer(5, signed=False), integer(6, signed=False)
TERNARY = (-1, 1)  #: the two-bit codes that TQ1_0 and TQ2_0 hold


@dataclass(frozen=True)
class Layout:
    """A ggml type: how many elements share a block, how many bytes it takes, and what it means."""

    name: str  #: ggml's: "Q4_K"
    ggml_type: int
    block_size: int  #: elements in a block; 1 for floats
    type_size: int  #: bytes of a block
    encoding: Encoding | None  #: of a matrix; None for floats
    dtype: str  #: torch's name of what it dequantizes to

    @property
    def bits_per_weight(self) -> float:
        """Bits for one element, parameters included."""
        return self.type_size * 8 / self.block_size

    def holds(self, encoding: Encoding) -> bool:
        """Whether it stores exactly this."""
        return self.encoding is not None and encoding == self.encoding_for(len(encoding.block))

    def encoding_for(self, ndim: int) -> Encoding:
        """The encoding of a tensor of ``ndim`` axes: blocks run along the last one.

        :raises ValueError: for the floats, which have none.
        """
        if self.encoding is None:
            raise ValueError(f"{self.name} is a float type")
        return _of_rank(self.encoding, ndim)

    def row_bytes(self, row: int) -> int:
        """Bytes of a row of so many elements.

        :raises ValueError: when its blocks do not divide the row.
        """
        if row % self.block_size:
            raise ValueError(f"blocks of {self.block_size} ({self.name}) do not divide rows of {row}")
        return row // self.block_size * self.type_size


@functools.lru_cache(maxsize=256)
def _of_rank(encoding: Encoding, ndim: int) -> Encoding:
    def lift(param: Param | None) -> Param | None:
        return _of_rank(param, ndim) if isinstance(param, Encoding) else param

    block = (*(1,) * (ndim - 1), encoding.block[-1])
    scale = lift(encoding.scale)
    assert scale is not None
    return replace(encoding, block=block, scale=scale, offset=lift(encoding.offset))


def _nested(element: ElementType, count: int) -> Encoding:
    """Scales of ``count`` blocks, which are themselves codes with one float16."""
    return Encoding(element, (1, count), "float16")


def _float(name: str, ggml_type: int, size: int, dtype: str) -> Layout:
    return Layout(name, ggml_type, 1, size, None, dtype)


def _blocks(name: str, ggml_type: int, elements: int, size: int, encoding: Encoding) -> Layout:
    return Layout(name, ggml_type, elements, size, encoding, "float32")


def _plain(element: ElementType, *, offset: bool = False) -> Encoding:
    return Encoding(element, (1, 32), "float16", offset="float16" if offset else None)


_K4, _K16 = _nested(UINT6, 8), _nested(UINT4, 16)
_TERNARY = Encoding(INT2, (1, 256), "float16", clip=TERNARY)

LAYOUTS: tuple[Layout, ...] = (
    _float("F32", 0, 4, "float32"),
    _float("F16", 1, 2, "float16"),
    _float("BF16", 30, 2, "bfloat16"),
    _blocks("Q8_0", 8, 32, 34, _plain(INT8)),
    _blocks("Q4_0", 2, 32, 18, _plain(INT4)),
    _blocks("Q4_1", 3, 32, 20, _plain(UINT4, offset=True)),
    _blocks("Q5_0", 6, 32, 22, _plain(INT5)),
    _blocks("Q5_1", 7, 32, 24, _plain(UINT5, offset=True)),
    _blocks("Q2_K", 10, 256, 84, Encoding(UINT2, (1, 16), _K16, offset=_K16)),
    _blocks("Q3_K", 11, 256, 110, Encoding(INT3, (1, 16), _nested(INT6, 16))),
    _blocks("Q4_K", 12, 256, 144, Encoding(UINT4, (1, 32), _K4, offset=_K4)),
    _blocks("Q5_K", 13, 256, 176, Encoding(UINT5, (1, 32), _K4, offset=_K4)),
    _blocks("Q6_K", 14, 256, 210, Encoding(INT6, (1, 16), _nested(INT8, 16))),
    _blocks("IQ4_NL", 20, 32, 18, Encoding(IQ4, (1, 32), "float16")),
    _blocks("IQ4_XS", 23, 256, 136, Encoding(IQ4, (1, 32), _nested(INT6, 8))),
    _blocks("TQ1_0", 34, 256, 54, _TERNARY),
    _blocks("TQ2_0", 35, 256, 66, _TERNARY),
    _blocks("MXFP4", 39, 32, 17, Encoding(FLOAT4_E2M1FN, (1, 32), FLOAT8_E8M0FNU)),
)

QUANTIZED: tuple[Layout, ...] = tuple(layout for layout in LAYOUTS if layout.encoding is not None)

_BY_NAME = {layout.name.lower(): layout for layout in LAYOUTS}
_BY_TYPE = {layout.ggml_type: layout for layout in LAYOUTS}


def by_name(name: str) -> Layout:
    """The type of that name, in any case.

    :raises KeyError: for a type that is not in the table.
    """
    return _BY_NAME[name.lower()]


def by_type(ggml_type: int) -> Layout:
    """The type of that number of ggml's.

    :raises KeyError: for a type that is not in the table.
    """
    return _BY_TYPE[ggml_type]


def layouts_for(encoding: Encoding) -> list[Layout]:
    """Every type that stores exactly this, in the order of the table."""
    return [layout for layout in QUANTIZED if layout.holds(encoding)]


def float_layout(dtype: str) -> Layout | None:
    """The float type of torch's dtype of that name, where ggml has it."""
    return next((layout for layout in LAYOUTS if layout.encoding is None and layout.dtype == dtype), None)
