"""Quantized tensors: an Encoding together with its data."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch

from monoquant_core.encoding import FULL, ElementType, Encoding, Param, param_shape
from monoquant_core.errors import EncodingError

CODE_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """Codes, one per element and never packed, with the parameters that decode them.

    :raises EncodingError: when data and encoding do not belong together.
    """

    encoding: Encoding
    codes: torch.Tensor  #: integer, of the tensor's own shape
    scale: ParamValue  #: ``param_shape(shape, block)``: floats, codes of an ElementType, or a tensor of its own
    zero_point: ParamValue | None = None
    offset: ParamValue | None = None

    def __post_init__(self) -> None:
        encoding, codes = self.encoding, self.codes
        expected = param_shape(tuple(codes.shape), encoding.block)
        if codes.dtype not in CODE_DTYPES:
            raise EncodingError(f"codes must be an integer tensor, got {codes.dtype}")
        _check_param("scale", self.scale, encoding.scale, expected)
        if self.zero_point is not None or encoding.zero_point is not None:
            _check_param("zero_point", self.zero_point, encoding.zero_point, expected)
        if self.offset is not None or encoding.offset is not None:
            _check_param("offset", self.offset, encoding.offset, expected)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that is encoded."""
        return tuple(self.codes.shape)

    def params(self) -> dict[str, ParamValue]:
        """The parameters that exist, by name."""
        values = {"scale": self.scale}
        if self.zero_point is not None:
            values["zero_point"] = self.zero_point
        if self.offset is not None:
            values["offset"] = self.offset
        return values

    def dequantize(self) -> torch.Tensor:
        """The float32 tensor these codes stand for: ``scale * (decode(code) - zero_point) + offset``, in that order."""
        enc, shape, block = self.encoding, self.shape, self.encoding.block
        if len(block) != len(shape):
            flat = self.codes.reshape(-1) if len(block) == 1 else self.codes.flatten(1)
            flattened = QuantizedTensor(enc, flat, self.scale, self.zero_point, self.offset)
            return flattened.dequantize().reshape(shape)
        grid = param_shape(shape, block)
        values = decode(self.codes, enc.element)
        if self.zero_point is not None and enc.zero_point is not None:
            values = _blockwise(torch.sub, values, param_values(self.zero_point, enc.zero_point).reshape(grid), block)
        values = _blockwise(torch.mul, values, param_values(self.scale, enc.scale).reshape(grid), block)
        if self.offset is not None and enc.offset is not None:
            values = _blockwise(torch.add, values, param_values(self.offset, enc.offset).reshape(grid), block)
        return values

    def equal(self, other: QuantizedTensor) -> bool:
        """Whether encoding, codes and every parameter are the same, bit for bit."""
        return (
            self.encoding == other.encoding
            and same_bits(self.codes, other.codes)
            and all(_same_param(value, other.params().get(label)) for label, value in self.params().items())
        )

    def to(self, device: str | torch.device) -> QuantizedTensor:
        """The same on another device."""
        moved = {label: value.to(device) for label, value in self.params().items()}
        return QuantizedTensor(self.encoding, self.codes.to(device), **moved)

    def clone(self) -> QuantizedTensor:
        """A copy that shares no memory, such as with a worker's scratch buffers."""
        copied = {label: value.clone() for label, value in self.params().items()}
        return QuantizedTensor(self.encoding, self.codes.clone(), **copied)


ParamValue: TypeAlias = "torch.Tensor | QuantizedTensor"


def decode(codes: torch.Tensor, element: ElementType) -> torch.Tensor:
    """float32 values of codes, scale and zero point aside."""
    if element.table is None:
        return codes.to(torch.float32)
    # Three times as fast as torch.take.
    index = codes.to(torch.int64).reshape(-1)
    return torch.index_select(_table(element, str(codes.device)), 0, index).view(codes.shape)


def expand(param: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """Repeat a per-block parameter over the elements of its blocks."""
    for axis, (n, b) in enumerate(zip(shape, block, strict=True)):
        if b == FULL or param.shape[axis] == 1:
            param = param.expand(*param.shape[:axis], n, *param.shape[axis + 1 :])
        elif b > 1:
            param = param.repeat_interleave(b, dim=axis).narrow(axis, 0, n)
    return param


def param_values(value: ParamValue, spec: Param) -> torch.Tensor:
    """float32 values of a parameter, of whatever kind it is."""
    if isinstance(value, QuantizedTensor):
        return value.dequantize()
    return decode(value, spec) if isinstance(spec, ElementType) else value.float()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, unlike ``torch.equal``, for which -0.0 is 0.0 and NaN is not NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_set_to(b) and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg():
        return True
    compare = _memcmp()
    if compare is None or not (a.is_cpu and b.is_cpu):
        return torch.equal(as_bytes(a), as_bytes(b))
    x, y = _in_order(a), _in_order(b)
    return compare(x.data_ptr(), y.data_ptr(), x.nbytes) == 0  # forty times as fast as torch.equal


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor, uint8 ``[nbytes]``, in the order of its elements; a copy only where it has gaps."""
    x = _in_order(x).detach()
    # Not view(-1): a single element counts as contiguous with any stride, and keeps it.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its elements one after another in memory, as they are."""
    if x.is_contiguous() and not x.is_conj() and not x.is_neg():
        return x
    return x.resolve_conj().resolve_neg().contiguous()


@functools.cache
def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise EncodingError(f"torch {torch.__version__} has no dtype {name!r}")
    return dtype


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Inverse of :func:`dtype_of`."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _memcmp() -> Callable[[int, int, int], int] | None:
    """C's own, where its library can be found."""
    try:
        call = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).memcmp
    except (OSError, TypeError, AttributeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return cast("Callable[[int, int, int], int]", call)


@functools.lru_cache(maxsize=64)
def _table(element: ElementType, device: str) -> torch.Tensor:
    return torch.tensor(element.table, dtype=torch.float32, device=device)


def _blockwise(
    op: Callable[..., torch.Tensor], values: torch.Tensor, param: torch.Tensor, block: tuple[int, ...]
) -> torch.Tensor:
    """``op(values, expanded param)`` in place on fresh values, without expanding where a view will do."""
    *outer, n = values.shape
    size = block[-1]
    if size not in (1, FULL) and size < n and n % size == 0 and all(b == 1 for b in block[:-1]):
        op(values.view(*outer, n // size, size), param.unsqueeze(-1), out=values.view(*outer, n // size, size))
        return values
    return op(values, expand(param, tuple(values.shape), block), out=values)


def _check_param(label: str, value: ParamValue | None, spec: Param | None, expected: tuple[int, ...]) -> None:
    if value is None or spec is None:
        raise EncodingError(f"{label}: data and encoding disagree on whether there is one")
    if isinstance(value, QuantizedTensor) != isinstance(spec, Encoding):
        raise EncodingError(f"{label}: data and encoding disagree on nesting")
    if isinstance(value, QuantizedTensor):
        if value.encoding != spec:
            raise EncodingError(f"{label}: encoded as {value.encoding}, declared {spec}")
        if value.shape != expected:  # also where its blocks run over the flattened parameter
            raise EncodingError(f"{label}: expected shape {expected}, got {value.shape}")
        return
    if tuple(value.shape) != expected:
        raise EncodingError(f"{label}: expected shape {expected}, got {tuple(value.shape)}")
    if isinstance(spec, ElementType) and value.dtype not in CODE_DTYPES:
        raise EncodingError(f"{label}: codes of {spec.name} must be integers, got {value.dtype}")
    if isinstance(spec, str) and dtype_name(value.dtype) != spec:
        raise EncodingError(f"{label}: declared {spec}, got {dtype_name(value.dtype)}")


def _same_param(a: ParamValue, b: ParamValue | None) -> bool:
    if isinstance(a, QuantizedTensor):
        return isinstance(b, QuantizedTensor) and a.equal(b)
    return isinstance(b, torch.Tensor) and same_bits(a, b)
