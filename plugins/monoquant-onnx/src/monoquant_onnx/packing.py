"""Codes and parameters as raw_data holds them: little-endian, several codes to a byte, the first in its low bits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from monoquant_core.encoding import ElementType, Encoding, param_shape
from monoquant_core.packing import pack_bits, unpack_bits
from monoquant_core.rows import Shape, chunk_shape, row_count, row_length
from monoquant_core.tensor import ParamValue, QuantizedTensor
from monoquant_onnx.layouts import Stored


def packed(tensor: QuantizedTensor, arrays: list[Stored]) -> Iterator[tuple[Stored, torch.Tensor]]:
    """Every array of a chunk, contiguous."""
    found = dict(_values("", tensor))
    for array in arrays:
        value = found[array.label]
        if 0 < array.bits < 8:
            yield array, pack_bits(value.reshape(-1), array.bits)
        elif array.bits > 8:
            yield array, value.to(getattr(torch, array.dtype)).contiguous()
        else:
            yield array, value.contiguous()


def unpacked(parts: dict[str, torch.Tensor], shape: Shape, encoding: Encoding, first_row: int) -> QuantizedTensor:
    """A chunk from its arrays by label, which may be flat.

    :param shape: of the whole tensor.
    """
    codes, bits = parts[""], encoding.element.bits
    if bits < 8 and codes.numel() == -(-math.prod(shape) * bits // 8):
        rows = row_count(shape)
    else:
        count = codes.numel() * 8 // bits if bits < 8 else codes.numel()
        rows = count // row_length(shape) if row_length(shape) else row_count(shape)
    return _tensor(parts, "", chunk_shape(shape, range(first_row, first_row + rows)), encoding)


def _values(label: str, tensor: QuantizedTensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield label, _raw(tensor.codes, tensor.encoding.element)
    for name, value in tensor.params().items():
        if isinstance(value, QuantizedTensor):
            yield from _values(f"{label}_{name}", value)
        else:
            spec = getattr(tensor.encoding, name)
            yield f"{label}_{name}", _raw(value, spec) if isinstance(spec, ElementType) else value


def _raw(codes: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Codes of less than a byte without their sign bits: two's complement, cut."""
    if element.bits < 8 and codes.dtype == torch.int8:
        return codes.view(torch.uint8) & (1 << element.bits) - 1
    return codes


def _tensor(parts: dict[str, torch.Tensor], label: str, shape: Shape, encoding: Encoding) -> QuantizedTensor:
    grid = param_shape(shape, encoding.block)
    params: dict[str, ParamValue] = {}
    for name, param in encoding.params():
        where = f"{label}_{name}"
        if isinstance(param, Encoding):
            params[name] = _tensor(parts, where, grid, param)
        elif isinstance(param, ElementType):
            params[name] = _decoded(parts[where], param, grid)
        else:
            params[name] = parts[where].reshape(grid)
    return QuantizedTensor(encoding, _decoded(parts[label], encoding.element, shape), **params)


def _decoded(raw: torch.Tensor, element: ElementType, shape: Shape) -> torch.Tensor:
    if element.bits > 8:
        return raw.reshape(shape).to(torch.int16 if element.signed else torch.int32)
    if element.bits == 8:
        return raw.reshape(shape)
    codes = unpack_bits(raw.reshape(-1), element.bits, math.prod(shape), signed=False)
    if element.kind == "int" and element.signed:
        half = 1 << element.bits - 1
        codes = (codes.view(torch.int8) ^ half) - half
    return codes.reshape(shape)
