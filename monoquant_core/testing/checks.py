"""What the kit asserts of one object, whatever made it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from monoquant_core.encoding import ElementType, Encoding, Param, param_shape
from monoquant_core.tensor import ParamValue, QuantizedTensor, decode, expand, param_values


def assert_sound(tensor: QuantizedTensor, encoding: Encoding, shape: tuple[int, ...], where: str) -> None:
    """The promised encoding and shape; codes in range and every parameter finite, nested ones included."""
    assert tensor.encoding == encoding, f"{where}: promised {encoding}, gave {tensor.encoding}"
    assert tensor.shape == tuple(shape), f"{where}: shape {tensor.shape}, wanted {tuple(shape)}"
    _assert_codes(tensor, encoding.codes_range, where)
    assert_finite(tensor, where)


def assert_finite(tensor: QuantizedTensor, where: str) -> None:
    """Every parameter and every value is a finite number."""
    for label, value in tensor.params().items():
        spec = getattr(tensor.encoding, label)
        assert param_values(value, spec).isfinite().all(), f"{where}: {label} is not finite"
    assert tensor.dequantize().isfinite().all(), f"{where}: dequantizes to NaN or infinity"


def _assert_codes(tensor: QuantizedTensor, limits: tuple[int, int], where: str) -> None:
    _assert_range(tensor.codes, limits, where)
    for label, value in tensor.params().items():
        spec = getattr(tensor.encoding, label)
        if isinstance(value, QuantizedTensor):
            _assert_codes(value, value.encoding.codes_range, f"{where}: {label}")
        elif isinstance(spec, ElementType) and value.numel():
            _assert_range(value, spec.code_range, f"{where}: {label}")


def _assert_range(codes: torch.Tensor, limits: tuple[int, int], where: str) -> None:
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        assert limits[0] <= low, f"{where}: code {low} is below {limits[0]}"
        assert high <= limits[1], f"{where}: code {high} is above {limits[1]}"


def half_step_excess(values: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """How far every element is beyond half a step of its block; not positive where its code is the nearest one.

    A step is the distance to the next value of the element type, so a code at the limit has none on its far side.
    Allowed on top is what rounding the parameters to their stored types can move: ``|code - zero_point|`` ulps of the
    scale, one of the offset, each level of nesting; and float32 arithmetic.
    """
    if tensor.codes.numel() == 0:
        return torch.zeros(0, dtype=torch.float64)
    encoding = tensor.encoding
    codes = _logical(tensor.codes, encoding.block)
    wanted = values.reshape(codes.shape).double()
    code_values = decode(codes, encoding.element).double()

    def spread(value: ParamValue | None, spec: Param | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A parameter and its uncertainty, for every element."""
        if value is None or spec is None:
            zero = torch.zeros((), dtype=torch.float64)
            return zero, zero
        grid = param_shape(tuple(codes.shape), encoding.block)
        exact, ulps = param_values(value, spec).double(), _uncertainty(value, spec)
        return tuple(expand(t.reshape(grid), tuple(codes.shape), encoding.block) for t in (exact, ulps))  # type: ignore[return-value]

    scale, scale_ulp = spread(tensor.scale, encoding.scale)
    zero_point, zero_ulp = spread(tensor.zero_point, encoding.zero_point)
    offset, offset_ulp = spread(tensor.offset, encoding.offset)
    stored = scale * (code_values - zero_point) + offset
    below, above = _gaps(code_values, encoding)
    upwards = torch.where(scale < 0, wanted < stored, wanted > stored)
    half_step = torch.where(upwards, above, below) / 2 * scale.abs()
    half_step = torch.where(torch.where(upwards, above, below).isinf(), math.inf, half_step)
    rounding = (code_values - zero_point).abs() * scale_ulp + scale.abs() * zero_ulp + offset_ulp
    arithmetic = 2**-21 * (wanted.abs() + stored.abs() + offset.abs() + (scale * zero_point).abs()) + 2**-149
    return (wanted - stored).abs() - half_step - rounding - arithmetic


def _logical(codes: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    if len(block) == codes.ndim:
        return codes
    return codes.reshape(-1) if len(block) == 1 else codes.flatten(1)


def _gaps(code_values: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to the next lower and the next higher value that a code can stand for; infinite at the limits."""
    low, high = encoding.codes_range
    reachable = decode(torch.arange(low, high + 1), encoding.element).double()
    reachable = torch.unique(reachable[reachable.isfinite()])
    at = torch.searchsorted(reachable, code_values)
    padded = torch.cat([torch.tensor([-math.inf]).double(), reachable, torch.tensor([math.inf]).double()])
    return code_values - padded[at], padded[at + 2] - code_values


def _uncertainty(value: ParamValue, spec: Param) -> torch.Tensor:
    """What rounding a parameter to its stored type can move it by, at most."""
    if isinstance(value, QuantizedTensor):
        encoding = value.encoding
        codes = _logical(value.codes, encoding.block)
        grid, shape = param_shape(tuple(codes.shape), encoding.block), tuple(codes.shape)
        scale = expand(param_values(value.scale, encoding.scale).double().reshape(grid), shape, encoding.block)
        ulps = expand(_uncertainty(value.scale, encoding.scale).reshape(grid), shape, encoding.block)
        below, above = _gaps(decode(codes, encoding.element).double(), encoding)
        step = torch.minimum(below, above) * scale.abs()
        total = step + decode(codes, encoding.element).double().abs() * ulps
        if value.offset is not None and encoding.offset is not None:
            moved = _uncertainty(value.offset, encoding.offset).reshape(grid)
            total = total + expand(moved, shape, encoding.block)
        return total
    if isinstance(spec, ElementType):
        if spec.kind == "int":  # integer zero points: codes are chosen for the rounded one
            return torch.zeros(value.shape, dtype=torch.float64)
        below, above = _gaps(decode(value, spec).double(), Encoding(spec, (1,), "float32"))
        return torch.minimum(below, above)
    info = torch.finfo(value.dtype)
    return value.double().abs() * info.eps + info.smallest_normal * info.eps


def assert_fingerprint(found: object, between: Callable[[], object] = lambda: None) -> None:
    """The optional ``fingerprint`` of a scheme or a format is a text, which stays the same whatever it did meanwhile.

    :param between: makes it work.
    """
    ask = getattr(found, "fingerprint", None)
    if ask is None:
        pytest.skip("has no fingerprint, so that runs with it are not resumed when they were interrupted")
    first = ask()
    assert isinstance(first, str), f"fingerprint: {first!r} is no text"
    between()
    assert ask() == first, "another fingerprint the second time"


def assert_satisfies(obj: object, protocol: type) -> None:
    """An object has every member of a Protocol, and its methods take the arguments that the core passes."""
    for name in _members(protocol):
        assert hasattr(obj, name), (
            f"{type(obj).__name__} has no {name!r}: see {protocol.__module__}.{protocol.__name__}"
        )
        wanted = getattr(protocol, name, None)
        if not inspect.isfunction(wanted):
            continue
        method = getattr(obj, name)
        assert callable(method), f"{type(obj).__name__}.{name} is not a method"
        arguments = [p for p in list(inspect.signature(wanted).parameters.values())[1:] if p.default is p.empty]
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as exc:
            expected = ", ".join(p.name for p in arguments)
            raise AssertionError(f"{type(obj).__name__}.{name} must take ({expected}): {exc}") from None


def _members(protocol: Any) -> list[str]:
    annotated = list(getattr(protocol, "__annotations__", {}))
    return annotated + [n for n, v in vars(protocol).items() if inspect.isfunction(v) and not n.startswith("_")]
