"""The check of what was quantized against its source. Cheap enough to be always on: about ten passes over a chunk.

Every element is within half a step of its block, plus what rounding the parameters to their stored dtypes can move it:
as many units in the last place of the scale as the element is levels away from zero, one of the offset, and so on
through nested parameters. An element whose code is at the limit of its range may lie anywhere beyond it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from monoquant_core.encoding import ElementType, Encoding, Param, param_shape
from monoquant_core.metrics import Energies
from monoquant_core.reencode import flattened, run_length
from monoquant_core.scratch import WORK, Scratch
from monoquant_core.tensor import ParamValue, QuantizedTensor, decode, expand, param_values

#: mantissa bits and exponent of the smallest number; parameters are used as float32
_PRECISION = {"float16": (10, -24), "bfloat16": (7, -133), "float32": (23, -149), "float64": (23, -149)}

_INTEGERS = {
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF),
}

_ROUNDING = 2.0**-21  #: of the few float32 operations between an element and its code, relative to the largest level
_SEGMENT = 1 << 20  #: elements whose float32 sum of squares is exact enough, about six digits
_SMALL = 1e-36  #: squares of float32 values above this are float32 values of full precision
_TINY = 1e-25  #: sums of squares below this may have lost numbers whose squares are no float32


class Mismatch(Exception):
    """What is wrong with a chunk, and with which element."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.index = reason, index


class _Columns(NamedTuple):
    """Parameters as float32 ``[blocks, 1]``, beside values as ``[blocks, run]``."""

    run: int
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    offset: torch.Tensor | None


def check_quantized(
    x: torch.Tensor, q: QuantizedTensor, signal: float, scratch: Scratch, *, nearest: bool, keeps_zero: bool
) -> Energies:
    """Hold quantized rows against their source.

    :param x: float32, contiguous and finite, of the same shape.
    :param signal: its sum of squares.
    :param nearest: whether the scheme promises the nearest code, so that errors are bounded.
    :raises Mismatch: for a non-finite value, a code out of range, a lost block or an error that is too large.
    """
    if not x.numel():
        return Energies()
    _check_codes(q)
    columns = _columns(q)
    source = x.view(-1, columns.run)
    # Squares, because one pass over them finds the largest and another one the sum.
    square = _error(source, q, columns, scratch).square_()
    worst = square.amax(1)
    noise, peak = float(square.sum()), float(worst.amax())
    near = False
    if _TINY < noise < math.inf:
        peak = math.sqrt(peak)
        near = nearest and _clearly_near(q, columns, worst)
    else:  # the squares are no float32, or the values are not finite, or every value is exact
        error = _error(source, q, columns, scratch)
        peak = max(float(error.amax()), -float(error.amin()))
        if not math.isfinite(peak):  # also where a parameter is not finite, whatever the codes
            raise Mismatch("does not decode to a finite value", first_nonfinite(error))
        noise = square_sum(error, peak)
    if keeps_zero and not (nearest and _has_exact_zero(q.encoding)):  # else the nearest code to zero is that of zero
        _check_zeros(source, q, columns, scratch)
    if not near and peak > 0:
        _check_lost(source, columns)
        if nearest:
            _check_nearest(source, q, columns, scratch)
    return Energies(signal, noise, peak)


def check_params(q: QuantizedTensor) -> None:
    """Refuse parameters that are not finite.

    :raises Mismatch: naming the parameter.
    """
    for label, value in q.params().items():
        spec = getattr(q.encoding, label)
        if not bool(param_values(value, spec).isfinite().all()):
            raise Mismatch(f"a {label.replace('_', ' ')} of it is not finite")


def measure(reference: torch.Tensor, approx: torch.Tensor) -> Energies:
    """Signal and noise of two float32 tensors of one shape; ``approx`` is overwritten."""
    if not reference.numel():
        return Energies()
    error = torch.sub(reference, approx, out=approx)
    peak = max(float(error.amax()), -float(error.amin()))
    return Energies(square_sum(reference), square_sum(error, peak), peak)


def square_sum(values: torch.Tensor, peak: float = math.inf) -> float:
    """Sum of squares of float32 values; not finite exactly when one of them is not.

    :param peak: largest magnitude, if known: 0 needs no sum.
    """
    if peak == 0:
        return 0.0
    flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
    if len(flat) <= _SEGMENT:
        total = float(torch.dot(flat, flat))
    else:
        total = sum(float(torch.dot(s, s)) for s in _segments(flat))
    if _TINY < total < math.inf or not len(flat):
        return total
    return sum(float(s.cpu().double().square().sum()) for s in _segments(flat))


def magnitude(x: torch.Tensor, scratch: Scratch) -> float:
    """Largest absolute value of a float or complex tensor; NaN or infinity if it holds any.

    On the bit patterns: without the sign, floats are ordered as integers are, and NaN is the largest.
    """
    if not x.numel() or x.dtype == torch.float4_e2m1fn_x2 or not (x.is_floating_point() or x.is_complex()):
        return 0.0
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if x.dtype not in _INTEGERS:
        x = x.to(torch.float32)
    dtype, mask = _INTEGERS[x.dtype]
    bits = torch.bitwise_and(x.view(dtype), mask, out=scratch.take("check.bits", x.shape, dtype, x.device))
    return float(bits.amax().view(x.dtype))


def first_nonfinite(x: torch.Tensor) -> int:
    """Index of the first NaN or infinity, counting elements in order; 0 if there is none."""
    values = x if x.is_complex() or x.dtype in _INTEGERS else x.to(torch.float32)
    return int((~values.isfinite()).reshape(-1).to(torch.uint8).argmax())


def _columns(q: QuantizedTensor) -> _Columns:
    encoding, run = q.encoding, run_length(q.shape, q.encoding.block)
    zero_point = None if q.zero_point is None else _column(q.zero_point, encoding.zero_point, q, run)
    offset = None if q.offset is None else _column(q.offset, encoding.offset, q, run)
    return _Columns(run or 1, _column(q.scale, encoding.scale, q, run), zero_point, offset)


def _column(value: ParamValue, spec: Param | None, q: QuantizedTensor, run: int | None) -> torch.Tensor:
    """A parameter once per block, or, where blocks are no runs, once per element."""
    assert spec is not None
    values = param_values(value, spec)
    return values.reshape(-1, 1) if run is not None else _per_element(values, q).reshape(-1, 1)


def _per_element(values: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    flat, extents = flattened(q.shape, q.encoding.block)
    return expand(values.reshape(param_shape(q.shape, q.encoding.block)), flat, extents)


def _buffer(scratch: Scratch, run: int, like: torch.Tensor) -> torch.Tensor:
    return scratch.take(WORK, (like.numel() // run, run), torch.float32, like.device)


def _levels(q: QuantizedTensor, columns: _Columns, scratch: Scratch) -> torch.Tensor:
    """``decode(code) - zero_point`` as ``[blocks, run]``, in the check's buffer."""
    codes, table = q.codes.reshape(-1, columns.run), q.encoding.element.table
    values = _buffer(scratch, columns.run, codes)
    if table is None:
        values.copy_(codes)
    else:
        _look_up(_table(q.encoding.element, "values", str(codes.device)), codes, values, scratch)
    return values if columns.zero_point is None else values.sub_(columns.zero_point)


def _decoded(q: QuantizedTensor, columns: _Columns, scratch: Scratch) -> torch.Tensor:
    """``q.dequantize()``, bit for bit, as ``[blocks, run]`` in the check's buffer."""
    values = _levels(q, columns, scratch).mul_(columns.scale)
    return values if columns.offset is None else values.add_(columns.offset)


def _error(source: torch.Tensor, q: QuantizedTensor, columns: _Columns, scratch: Scratch) -> torch.Tensor:
    """``source - q.dequantize()``, up to a last bit, in the check's buffer."""
    if columns.offset is not None:
        values = _decoded(q, columns, scratch)
        return torch.sub(source, values, out=values)
    levels = _levels(q, columns, scratch)
    return torch.addcmul(source, levels, columns.scale, value=-1, out=levels)  # one pass in place of two


def _look_up(table: torch.Tensor, codes: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    index = scratch.take("check.index", (codes.numel(),), torch.int64, codes.device)
    index.view(codes.shape).copy_(codes)
    # Three times as fast as torch.take.
    torch.index_select(table, 0, index, out=out.view(-1))
    return out


def _check_lost(source: torch.Tensor, columns: _Columns) -> None:
    lost = columns.scale == 0
    if columns.offset is None and bool(lost.any()):
        lost = lost & (source != 0)
        if bool(lost.any()):
            raise Mismatch("is not zero, and its block got a zero scale", int(lost.view(-1).to(torch.uint8).argmax()))


def _has_exact_zero(encoding: Encoding) -> bool:
    return encoding.offset is None and (encoding.zero_point is None or isinstance(encoding.zero_point, ElementType))


def _check_zeros(source: torch.Tensor, q: QuantizedTensor, columns: _Columns, scratch: Scratch) -> None:
    moved = (source == 0) & (_decoded(q, columns, scratch) != 0)
    if bool(moved.any()):
        raise Mismatch("is zero and does not stay zero", int(moved.view(-1).to(torch.uint8).argmax()))


def _check_codes(q: QuantizedTensor) -> None:
    low, high = q.encoding.codes_range
    limits = torch.iinfo(q.codes.dtype)
    if low <= limits.min and limits.max <= high:
        return
    found = int(q.codes.amin()), int(q.codes.amax())
    if found[0] < low or found[1] > high:
        raise Mismatch(f"codes {found[0]}..{found[1]} are outside {low}..{high} of {q.encoding.element.name}")


def _clearly_near(q: QuantizedTensor, columns: _Columns, worst: torch.Tensor) -> bool:
    """Whether no element of a uniform encoding is further than half a step, which decides most chunks.

    :param worst: largest squared error of each block, or of each element.
    """
    if q.encoding.element.table is not None:
        return False
    low, high = q.encoding.codes_range
    bound, scale = 0.5 + (high - low + 1) * _ROUNDING / 2, columns.scale.view(-1)
    # Not where the squares of scales are so small that they say nothing.
    return float(torch.addcmul(worst, scale, scale, value=-bound * bound).amax()) < -_SMALL


def _check_nearest(source: torch.Tensor, q: QuantizedTensor, columns: _Columns, scratch: Scratch) -> None:
    """The bound of the module's docstring, for every element."""
    element, (run, scale, zero, offset) = q.encoding.element, columns
    low, high = _limits(q.encoding)
    step = scale.abs()
    # Elements beyond the limits count as if they lay on them; a scale of zero has no limits.
    ends = [(v if zero is None else v - zero) * scale for v in (low, high)]
    if offset is not None:
        ends = [end + offset for end in ends]
    smallest = torch.minimum(*ends).masked_fill(step == 0, -math.inf)
    largest = torch.maximum(*ends).masked_fill(step == 0, math.inf)
    error = scratch.take("check.error", source.shape, torch.float32, source.device)
    work = scratch.take("check.work", source.shape, torch.float32, source.device)
    torch.clamp(source, min=smallest, max=largest, out=error)
    levels = _levels(q, columns, scratch)
    torch.mul(levels, scale, out=work)
    error.sub_(work if offset is None else work.add_(offset))
    allowed = step * (max(abs(low), abs(high), high - low) * _ROUNDING)
    if offset is not None:
        allowed += offset.abs() * _ROUNDING + _unit_column(q, "offset")
    if isinstance(q.encoding.zero_point, str | Encoding):
        allowed += step * _unit_column(q, "zero_point")
    if element.table is None:
        error.abs_()
        allowed += step * 0.5
    else:
        error.mul_(scale.sign())
        _look_up(_table(element, "down", str(work.device)), q.codes, work, scratch)
        below = torch.add(error, work.mul_(step), out=work).neg_()
        half = scratch.take("check.half", source.shape, torch.float32, source.device)
        _look_up(_table(element, "up", str(work.device)), q.codes, half, scratch)
        error = torch.maximum(error.sub_(half.mul_(step)), below, out=error)
    error.sub_(levels.abs_().mul_(_unit_column(q, "scale")).add_(allowed))
    if float(error.amax()) > 0:
        index = int(error.view(-1).argmax())
        value, got = float(source.view(-1)[index]), float(_decoded(q, columns, scratch).view(-1)[index])
        raise Mismatch(f"became {got:.6g} from {value:.6g}, where a step is {float(step[index // run]):.4g}", index)


def _limits(encoding: Encoding) -> tuple[float, float]:
    """Smallest and largest level of the codes in use."""
    low, high = encoding.codes_range
    if encoding.element.table is None:
        return float(low), float(high)
    values = [v for v in encoding.element.table[low : high + 1] if math.isfinite(v)]
    return min(values), max(values)


def _unit_column(q: QuantizedTensor, label: str) -> torch.Tensor:
    unit = _unit(q.params()[label], getattr(q.encoding, label))
    if run_length(q.shape, q.encoding.block) is not None:
        return unit.reshape(-1, 1)
    return _per_element(unit, q).reshape(-1, 1)


def _unit(value: ParamValue, spec: Param) -> torch.Tensor:
    """How far rounding to its stored form may have moved a parameter: a unit in its last place."""
    if isinstance(value, QuantizedTensor):
        return _nested_unit(value)
    if isinstance(spec, ElementType):
        return _gap(value, spec)
    assert isinstance(spec, str)
    bits, smallest = _PRECISION[spec]
    return value.to(torch.float32).abs().mul_(2.0**-bits).clamp_(min=2.0**smallest)


def _nested_unit(value: QuantizedTensor) -> torch.Tensor:
    """One step of the nested codes, and what the nested parameters' own rounding adds."""
    encoding = value.encoding
    params = {k: _per_element(param_values(v, getattr(encoding, k)), value) for k, v in value.params().items()}
    units = {k: _per_element(_unit(v, getattr(encoding, k)), value) for k, v in value.params().items()}
    flat, _ = flattened(value.shape, value.encoding.block)
    levels = decode(value.codes, encoding.element).reshape(flat)
    if "zero_point" in params:
        levels = levels - params["zero_point"]
    unit = _gap(value.codes.reshape(flat), encoding.element) * params["scale"].abs() + levels.abs() * units["scale"]
    return unit + units["offset"] if "offset" in units else unit


def _gap(codes: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Distance from each value to its further neighbour."""
    if element.table is None:
        return torch.ones(codes.shape, device=codes.device)
    halves = torch.maximum(_table(element, "up", str(codes.device)), _table(element, "down", str(codes.device)))
    return torch.take(halves * 2, codes.to(torch.int64))


@functools.lru_cache(maxsize=64)
def _table(element: ElementType, what: str, device: str) -> torch.Tensor:
    """Per code: its value, or half the distance to the next value ``up`` or ``down``, 0 where there is none."""
    assert element.table is not None
    if what == "values":
        return torch.tensor(element.table, dtype=torch.float32, device=device)
    ordered = sorted({v for v in element.table if math.isfinite(v)})
    place = {v: i for i, v in enumerate(ordered)}
    step = 1 if what == "up" else -1
    halves = []
    for v in element.table:
        i = place.get(v, -1)
        inside = i >= 0 and 0 <= i + step < len(ordered)
        halves.append(abs(ordered[i + step] - v) / 2 if inside else 0.0)
    return torch.tensor(halves, dtype=torch.float32, device=device)


def _segments(flat: torch.Tensor) -> list[torch.Tensor]:
    return [flat[i : i + _SEGMENT] for i in range(0, len(flat), _SEGMENT)]
