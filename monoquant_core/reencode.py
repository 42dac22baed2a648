"""The same codes with other parameters: finer blocks, another dtype, an offset in place of a zero point.

Importing this module imports no torch: a plan asks :func:`can_reencode`.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import TYPE_CHECKING, Literal, TypeAlias

from monoquant_core.encoding import FLOAT_BITS, FULL, ElementType, Encoding, Param, param_shape
from monoquant_core.errors import EncodingError

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import ParamValue, QuantizedTensor

Shape: TypeAlias = "tuple[int, ...]"

#: float dtypes that hold every value of another; values are float32 once decoded, so float32 loses nothing of float64
_HOLDS = {
    "float16": {"float16"},
    "bfloat16": {"bfloat16"},
    "float32": {"float16", "bfloat16", "float32", "float64"},
    "float64": set(FLOAT_BITS),
}


def can_reencode(source: Encoding, target: Encoding, shape: Shape) -> Literal["exact", "rounds"] | str:
    """Whether :func:`reencode` can turn one encoding of a tensor into the other, from shapes alone.

    :return: "exact" when every value stays the same, "rounds" when parameters are rounded, else the reason why not.
    """
    if source == target and _within(source, target):
        return "exact"
    if source.element != target.element:
        return f"codes of {source.element.name} are not codes of {target.element.name}"
    if not _within(source, target):
        return f"codes of {source} are not confined to {target.clip}"
    if not _refines(shape, source.block, target.block):
        return f"blocks of {target} are not parts of blocks of {source}"
    same_blocks = _same_blocks(shape, source.block, target.block)
    found = [_convertible("scale", source.scale, target.scale, same_blocks)]
    if source.zero_point is not None and target.zero_point is None and source.offset is None:
        if not isinstance(target.offset, str):
            return f"{target} has neither a zero point nor a float offset to hold the zero point of {source}"
        found.append("rounds")  # offset = -scale * zero_point
    else:
        for label in ("zero_point", "offset"):
            ours, theirs = getattr(source, label), getattr(target, label)
            if (ours is None) != (theirs is None):
                return f"{target} {'lacks the' if theirs is None else 'needs a'} {label} that {source} " + (
                    "has" if theirs is None else "does not have"
                )
            if ours is not None:
                found.append(_convertible(label, ours, theirs, same_blocks))
    return next((f for f in found if f not in ("exact", "rounds")), "rounds" if "rounds" in found else "exact")


def reencode(tensor: QuantizedTensor, encoding: Encoding) -> QuantizedTensor:
    """The same codes with the parameters of another encoding, rounded to nearest where its dtypes are narrower.

    ``tensor`` may be a chunk of whole blocks. Its codes are shared with the result.

    :raises EncodingError: when that cannot be; :func:`can_reencode` says so beforehand.
    """
    from monoquant_core.tensor import QuantizedTensor, param_values

    source, shape = tensor.encoding, tensor.shape
    answer = can_reencode(source, encoding, shape)
    if answer not in ("exact", "rounds"):
        raise EncodingError(answer)
    if source == encoding:
        return QuantizedTensor(encoding, tensor.codes, **tensor.params())
    params = {
        label: _convert(value, getattr(source, label), getattr(encoding, label), shape, source.block, encoding.block)
        for label, value in tensor.params().items()
        if getattr(encoding, label) is not None
    }
    if tensor.zero_point is not None and source.zero_point is not None and encoding.zero_point is None:
        # With the scale as it is stored, so that zero stays where it was.
        zero = param_values(tensor.zero_point, source.zero_point).reshape(param_shape(shape, source.block))
        zero = _spread(zero, shape, source.block, encoding.block)
        scale = param_values(params["scale"], encoding.scale).reshape(zero.shape)
        assert isinstance(encoding.offset, str)
        params["offset"] = (-scale * zero).to(_dtype(encoding.offset))
    return QuantizedTensor(encoding, tensor.codes, **params)


def lift(encoding: Encoding, rank: int, to_rank: int) -> Encoding:
    """The encoding of a tensor whose rows now belong to one of another rank: experts that were stacked, say."""
    if len(encoding.block) != rank or to_rank == rank:
        return encoding
    if to_rank > rank:
        block = (1,) * (to_rank - rank) + encoding.block
    elif all(b == 1 for b in encoding.block[: rank - to_rank]):
        block = encoding.block[rank - to_rank :]
    else:
        return encoding
    params = {
        label: lift(param, rank, to_rank) if isinstance(param, Encoding) else param
        for label, param in encoding.params()
    }
    return Encoding(encoding.element, block, clip=encoding.clip, **params)


@functools.lru_cache(maxsize=1024)
def run_length(shape: Shape, block: tuple[int, ...]) -> int | None:
    """Elements of a block where every block is a run of consecutive elements and all are equally long, else None."""
    flat, extents = flattened(shape, block)
    if math.prod(flat) == 0:
        return None
    run, partial = 1, False
    for n, b in zip(reversed(flat), reversed(extents), strict=True):
        if not partial:
            if n % b:
                return None
            run, partial = run * b, b < n
        elif b != 1 and n != 1:
            return None
    return run


def flattened(shape: Shape, block: tuple[int, ...]) -> tuple[Shape, Shape]:
    """Shape and block extents at the block's rank, with ``FULL`` and too large extents spelled out."""
    if len(block) == 1 and len(shape) != 1:
        shape = (math.prod(shape),)
    elif len(block) == 2 < len(shape):
        shape = (shape[0], math.prod(shape[1:]))
    if len(shape) != len(block):
        raise EncodingError(f"block {block} has another rank than shape {shape}")
    return shape, tuple(n if b == FULL else min(b, n) for n, b in zip(shape, block, strict=True))


def _refines(shape: Shape, source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether every target block lies inside one source block."""
    if math.prod(shape) == 0:
        return True
    if len(source) == len(target):
        flat, ours = flattened(shape, source)
        _, theirs = flattened(shape, target)
        return all(a == n or a % b == 0 for n, a, b in zip(flat, ours, theirs, strict=True))
    runs = run_length(shape, source), run_length(shape, target)
    return runs[0] is not None and runs[1] is not None and runs[0] % runs[1] == 0


def _same_blocks(shape: Shape, source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(source) == len(target) and flattened(shape, source) == flattened(shape, target)


def _within(source: Encoding, target: Encoding) -> bool:
    (low, high), (smallest, largest) = source.codes_range, target.codes_range
    return target.clip is None or smallest <= low <= high <= largest


def _convertible(label: str, source: Param, target: Param, same_blocks: bool) -> str:
    if isinstance(target, str):
        if isinstance(source, str):
            return "exact" if source in _HOLDS[target] else "rounds"
        if isinstance(source, ElementType):
            return "exact" if all(_representable(v, target) for v in _values(source)) else "rounds"
        return "exact" if target in ("float32", "float64") else "rounds"
    if isinstance(target, Encoding):
        if source == target and same_blocks:
            return "exact"
        return f"{label}: nested parameters cannot be made of others ({_name(source)} to {_name(target)})"
    if isinstance(source, ElementType):
        (low, high), (smallest, largest) = source.code_range, target.code_range
        if source == target or (source.kind == target.kind == "int" and smallest <= low and high <= largest):
            return "exact"
    return f"{label}: {_name(source)} cannot be stored as {target.name}"


def _name(param: Param) -> str:
    return param.name if isinstance(param, ElementType) else str(param)


def _values(element: ElementType) -> tuple[float, ...]:
    if element.table is not None:
        return tuple(v for v in element.table if math.isfinite(v))
    return tuple(float(v) for v in element.code_range)


def _representable(value: float, dtype: str) -> bool:
    try:
        if dtype == "bfloat16":
            packed = struct.pack("<f", value)
            return packed[:2] == b"\0\0" and struct.unpack("<f", packed)[0] == value
        code = {"float16": "<e", "float32": "<f", "float64": "<d"}[dtype]
        return bool(struct.unpack(code, struct.pack(code, value))[0] == value)
    except OverflowError:
        return False


def _dtype(name: str) -> torch.dtype:
    from monoquant_core.tensor import dtype_of

    return dtype_of(name)


def _convert(
    value: ParamValue, source: Param, target: Param, shape: Shape, blocks: tuple[int, ...], finer: tuple[int, ...]
) -> ParamValue:
    from monoquant_core.tensor import QuantizedTensor, param_values

    if isinstance(value, QuantizedTensor):
        if isinstance(target, Encoding):
            return value
        value, source = value.dequantize(), "float32"
    if isinstance(target, str) and source != target:
        value = param_values(value, source).to(_dtype(target))
    return _spread(value.reshape(param_shape(shape, blocks)), shape, blocks, finer)


def _spread(param: torch.Tensor, shape: Shape, blocks: tuple[int, ...], finer: tuple[int, ...]) -> torch.Tensor:
    """The parameter of finer blocks: each takes that of the block it lies in."""
    import torch

    grid = param_shape(shape, finer)
    if len(blocks) != len(finer):
        runs, fine = run_length(shape, blocks), run_length(shape, finer)
        if runs is None or fine is None:  # no elements
            return param.reshape(grid)
        return param.reshape(-1).repeat_interleave(runs // fine).reshape(grid)
    flat, ours = flattened(shape, blocks)
    _, theirs = flattened(shape, finer)
    for axis, (n, a, b) in enumerate(zip(flat, ours, theirs, strict=True)):
        if a != b and n:
            owner = torch.arange(grid[axis], device=param.device).mul_(b).div_(a, rounding_mode="floor")
            param = param.index_select(axis, owner)
    return param.reshape(grid)
