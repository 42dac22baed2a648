"""What a block of any type is made of, between its bytes and a QuantizedTensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from monoquant_core.encoding import Encoding, Param, param_shape
from monoquant_core.errors import EncodingError
from monoquant_core.tensor import ParamValue, QuantizedTensor, dtype_of
from monoquant_gguf.layouts import Layout


@dataclass(frozen=True, slots=True)
class Parts:
    """Fields of ``n`` blocks, one row for each; those that a type does not have are None."""

    codes: torch.Tensor  #: [n, elements], as in a QuantizedTensor
    d: torch.Tensor  #: [n], float16; of MXFP4 the code of a power of two
    scales: torch.Tensor | None = None  #: [n, sub-blocks], codes whose unit is ``d``
    dmin: torch.Tensor | None = None  #: [n], float16: what is added, or the unit of what is subtracted
    mins: torch.Tensor | None = None  #: [n, sub-blocks], codes whose unit is ``dmin``


def to_tensor(parts: Parts, layout: Layout, shape: tuple[int, ...]) -> QuantizedTensor:
    """Blocks as the tensor of ``shape`` that they are the rows of."""
    encoding = layout.encoding_for(len(shape))
    grid = param_shape(shape, encoding.block)
    scale = _param(encoding.scale, parts.d, parts.scales, grid)
    offset = None
    if parts.dmin is not None and encoding.offset is not None:
        # ggml subtracts what an encoding adds.
        added = parts.dmin if parts.mins is None else -parts.dmin
        offset = _param(encoding.offset, added, parts.mins, grid)
    return QuantizedTensor(encoding, parts.codes.reshape(shape), scale, None, offset)


def from_tensor(tensor: QuantizedTensor, layout: Layout) -> Parts:
    """Inverse of :func:`to_tensor`.

    :raises EncodingError: when the layout does not hold it.
    """
    if not layout.holds(tensor.encoding) or len(tensor.encoding.block) != len(tensor.shape):
        raise EncodingError(f"{layout.name} does not hold {tensor.encoding}")
    if tensor.shape[-1] % layout.block_size:
        raise EncodingError(f"{layout.name}: blocks of {layout.block_size} do not divide rows of {tensor.shape[-1]}")
    blocks = tensor.codes.numel() // layout.block_size
    d, scales = _fields(tensor.scale, blocks)
    codes = tensor.codes.reshape(blocks, layout.block_size)
    if tensor.offset is None:
        return Parts(codes, d, scales)
    dmin, mins = _fields(tensor.offset, blocks)
    return Parts(codes, d, scales, dmin if mins is None else -dmin, mins)


def pack_rows(rows: QuantizedTensor | torch.Tensor, layout: Layout) -> torch.Tensor:
    """See :func:`monoquant_gguf.blocks.pack`."""
    from monoquant_gguf.blocks.codecs import CODECS

    if isinstance(rows, torch.Tensor):
        if layout.encoding is not None:
            raise EncodingError(f"{layout.name} is not a type of floats")
        return rows.to(dtype_of(layout.dtype)).contiguous().view(torch.uint8).reshape(*rows.shape[:-1], -1)
    raw = CODECS[layout.name].join(from_tensor(rows, layout))
    return raw.reshape(*rows.shape[:-1], -1)


def unpack_rows(raw: torch.Tensor, layout: Layout, shape: tuple[int, ...]) -> QuantizedTensor | torch.Tensor:
    """See :func:`monoquant_gguf.blocks.unpack`."""
    from monoquant_gguf.blocks.codecs import CODECS

    blocks = math.prod(shape) // layout.block_size
    if (shape and shape[-1] % layout.block_size) or raw.numel() != blocks * layout.type_size:
        raise EncodingError(f"{layout.name}: {raw.numel()} bytes are not rows of shape {shape}")
    flat = raw.contiguous().view(torch.uint8)
    if layout.encoding is None:
        return _aligned(flat.reshape(-1)).view(dtype_of(layout.dtype)).reshape(shape)
    return to_tensor(CODECS[layout.name].split(flat.reshape(blocks, layout.type_size)), layout, shape)


def _aligned(raw: torch.Tensor) -> torch.Tensor:
    return raw.clone() if raw.storage_offset() % 8 else raw


def _param(spec: Param, unit: torch.Tensor, codes: torch.Tensor | None, grid: tuple[int, ...]) -> ParamValue:
    if codes is None:
        return unit.reshape(grid)
    assert isinstance(spec, Encoding)
    return QuantizedTensor(spec, codes.reshape(grid), unit.reshape(param_shape(grid, spec.block)))


def _fields(value: ParamValue, blocks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(value, torch.Tensor):
        return value.reshape(blocks), None
    assert isinstance(value.scale, torch.Tensor)
    return value.scale.reshape(blocks), value.codes.reshape(blocks, -1)
