"""Packing of one quantized Linear as compressed-tensors stores it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from monoquant_core.encoding import ElementType, Encoding, param_shape
from monoquant_core.exporters import Held, Output
from monoquant_core.packing import pack_bits, pack_words, unpack_bits, unpack_words
from monoquant_core.tensor import ParamValue, QuantizedTensor, dtype_of
from monoquant_safetensors import arguments as ct
from monoquant_safetensors.compressed_tensors import static_input


def pack(rows: QuantizedTensor, out: Output, held: Held) -> dict[str, torch.Tensor]:
    """The tensors of a chunk of whole rows."""
    prefix, encoding = out.name.removesuffix("weight"), rows.encoding
    bits = encoding.element.bits
    assert isinstance(rows.scale, torch.Tensor)
    scale = rows.scale.reshape(1) if encoding.tensor_wide else rows.scale
    parts = {f"{prefix}weight_scale": scale.contiguous()}
    if held.layout == ct.PACKED:
        parts[f"{prefix}weight_packed"] = pack_words(rows.codes, bits)
        parts[f"{prefix}weight_shape"] = _shape(out.shape)
    elif held.layout == ct.MXFP4:
        parts[f"{prefix}weight_packed"] = pack_bits(rows.codes, bits)
    elif held.layout == ct.INT:
        parts[out.name] = _signed(rows.codes, encoding.element)
    else:
        parts[out.name] = rows.codes.contiguous().view(torch.float8_e4m3fn)
    if isinstance(rows.zero_point, torch.Tensor) and isinstance(encoding.zero_point, ElementType):
        name = f"{prefix}weight_zero_point"
        if held.layout == ct.PACKED:
            parts[name] = pack_words(rows.zero_point, bits, dim=0)
        else:
            zero = rows.zero_point.reshape(scale.shape)
            parts[name] = _signed(zero, encoding.zero_point)
    activation = static_input(held)
    if activation is not None:
        scale_value, zero_value = ct.static_scale(activation)
        parts[f"{prefix}input_scale"] = torch.tensor([scale_value], dtype=torch.float64).to(dtype_of(out.dtype))
        if not activation.symmetric:
            parts[f"{prefix}input_zero_point"] = torch.tensor([zero_value], dtype=torch.int8)
    return parts


def unpack(parts: Mapping[str, torch.Tensor], out: Output, held: Held) -> QuantizedTensor:
    """Inverse of :func:`pack`, and what NVFP4 is. Parts may come flat."""
    encoding = held.encoding
    assert encoding is not None
    prefix, k = out.name.removesuffix("weight"), out.shape[1]
    element = encoding.element
    signed = element.kind == "int" and element.signed
    if held.layout in (ct.PACKED, ct.MXFP4, ct.NVFP4):
        stored = parts[f"{prefix}weight_packed"]
        words = held.layout == ct.PACKED
        stored = stored.reshape(-1, -(-k * element.bits // (32 if words else 8)))
        codes = (unpack_words if words else unpack_bits)(stored, element.bits, k, signed=signed)
    else:
        stored = parts[out.name].reshape(-1, k)
        codes = _unsigned(stored, element) if held.layout == ct.INT else stored.view(torch.uint8)
    grid = param_shape((codes.shape[0], k), encoding.block)
    stored_scale = parts[f"{prefix}weight_scale"].reshape(grid)
    scale: ParamValue = stored_scale
    if isinstance(encoding.scale, Encoding):  # NVFP4
        divisor = parts[f"{prefix}weight_global_scale"].reshape(1, 1)
        scale = QuantizedTensor(encoding.scale, stored_scale.view(torch.uint8), divisor.reciprocal())
    zero_point = None
    if isinstance(encoding.zero_point, ElementType):
        zero_point = parts[f"{prefix}weight_zero_point"]
        if held.layout == ct.PACKED:
            zero_point = unpack_words(zero_point.reshape(-1, grid[1]), element.bits, grid[0], dim=0)
        else:
            zero_point = _unsigned(zero_point, encoding.zero_point).reshape(grid)
    return QuantizedTensor(encoding, codes, scale, zero_point)


@functools.lru_cache(maxsize=64)
def _shape(shape: tuple[int, ...]) -> torch.Tensor:
    """The same for every chunk of a tensor, and to make one takes as long as to pack some."""
    return torch.tensor(shape, dtype=torch.int64)


def _signed(codes: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Codes as int8: compressed-tensors stores unsigned ones with half their range taken off."""
    if element.signed:
        return codes.contiguous()
    return (codes.to(torch.int16) - (1 << element.bits - 1)).to(torch.int8)


def _unsigned(stored: torch.Tensor, element: ElementType) -> torch.Tensor:
    if element.signed:
        return stored
    return (stored.to(torch.int16) + (1 << element.bits - 1)).to(torch.uint8)
