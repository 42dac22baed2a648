"""Vectors for numba: 16 float32 in registers, with the operators that searches in many lanes need.

LLVM makes vector instructions of inner loops only, and sums kept in arrays are stored and loaded again for every
element. Where vectors are values there is no inner loop, and the sum of a lane stays in its register. Every operation
is the single one of IEEE 754 in each lane; a processor with narrower registers takes several instructions for one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 16


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast("Callable[..., Any]", cast("Any", intrinsic)(function))


_FLOATS, _TRUTHS, _INTEGERS, _BYTES = (
    ir.VectorType(element, WIDTH) for element in (ir.FloatType(), ir.IntType(1), ir.IntType(32), ir.IntType(8))
)


class _Floats(types.Type):
    def __init__(self) -> None:
        super().__init__("monoquant.floats")


class _Truths(types.Type):
    def __init__(self) -> None:
        super().__init__("monoquant.truths")


FLOATS, TRUTHS = _Floats(), _Truths()


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@register_model(_Truths)
class _TruthsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _TRUTHS)


def _define(function: Callable[..., Any], kind: Any, result: Any, build: Callable[..., Any]) -> None:
    """What an operator of Python does with two vectors."""
    cases = [signature(result, kind, kind)]
    infer_global(function)(type(f"_{function.__name__}", (ConcreteTemplate,), {"cases": cases}))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return build(builder, *args)

    lower_builtin(function, kind, kind)(lower)


_define(operator.add, FLOATS, FLOATS, lambda builder, a, b: builder.fadd(a, b))
_define(operator.sub, FLOATS, FLOATS, lambda builder, a, b: builder.fsub(a, b))
_define(operator.mul, FLOATS, FLOATS, lambda builder, a, b: builder.fmul(a, b))
_define(operator.truediv, FLOATS, FLOATS, lambda builder, a, b: builder.fdiv(a, b))
_define(operator.lt, FLOATS, TRUTHS, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
_define(operator.le, FLOATS, TRUTHS, lambda builder, a, b: builder.fcmp_ordered("<=", a, b))
_define(operator.gt, FLOATS, TRUTHS, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_define(operator.ge, FLOATS, TRUTHS, lambda builder, a, b: builder.fcmp_ordered(">=", a, b))
_define(operator.eq, FLOATS, TRUTHS, lambda builder, a, b: builder.fcmp_ordered("==", a, b))
_define(operator.ne, FLOATS, TRUTHS, lambda builder, a, b: builder.fcmp_unordered("!=", a, b))
_define(operator.and_, TRUTHS, TRUTHS, lambda builder, a, b: builder.and_(a, b))
_define(operator.or_, TRUTHS, TRUTHS, lambda builder, a, b: builder.or_(a, b))


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_INTEGERS, [value] * WIDTH)


def _pointer(context: Any, builder: Any, sig: Any, args: Any, vector: ir.VectorType) -> Any:
    array, at, *_ = args
    data = context.make_array(sig.args[0])(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _read(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind = sig.args[0].dtype
    if kind == types.float32:
        return builder.load(_pointer(context, builder, sig, args, _FLOATS), align=4)
    codes = builder.load(_pointer(context, builder, sig, args, _BYTES), align=1)
    extend = builder.sext if kind == types.int8 else builder.zext
    return builder.sitofp(extend(codes, _INTEGERS), _FLOATS)


@_intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """16 elements of a contiguous array of float32, int8 or uint8, from a flat index on."""
    return FLOATS(array, types.intp), _read


@_intrinsic
def store(typing: Any, array: Any, at: Any, values: Any) -> Any:
    """The reverse of :func:`load`; to bytes, of whole numbers that they hold."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if array.dtype == types.float32:
            builder.store(args[2], _pointer(context, builder, sig, args, _FLOATS), align=4)
        else:
            codes = builder.trunc(builder.fptosi(args[2], _INTEGERS), _BYTES)
            builder.store(codes, _pointer(context, builder, sig, args, _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, FLOATS), build


@_intrinsic
def transpose_square(typing: Any, array: Any, starts: Any, at: Any, out: Any, to: Any) -> Any:
    """16 elements from ``starts[j] + at`` on, of each j, as columns: 256 float32 of ``out`` from ``to`` on."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, firsts, offset, target, first = args
        begins = context.make_array(starts)(context, builder, firsts).data
        rows = []
        for j in range(WIDTH):
            begin = builder.load(builder.gep(begins, [ir.Constant(ir.IntType(64), j)]))
            rows.append(_read(context, builder, sig, (source, builder.add(begin, offset))))
        for distance in (8, 4, 2, 1):
            # Swaps the upper right quarter of each square of twice the distance with the lower left one.
            for j in (j for j in range(WIDTH) if not j & distance):
                a, b = rows[j], rows[j + distance]
                low = [c if not c & distance else WIDTH + c - distance for c in range(WIDTH)]
                high = [c + distance if not c & distance else WIDTH + c for c in range(WIDTH)]
                rows[j], rows[j + distance] = (
                    builder.shuffle_vector(a, b, ir.Constant(_INTEGERS, mask)) for mask in (low, high)
                )
        data = context.make_array(out)(context, builder, target).data
        for i, row in enumerate(rows):
            place = builder.gep(data, [builder.add(first, ir.Constant(first.type, WIDTH * i))])
            builder.store(row, builder.bitcast(place, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, starts, types.intp, out, types.intp), build


@_intrinsic
def splat(typing: Any, value: Any) -> Any:
    """One float32 in every lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, undefined, _integers(0))

    return FLOATS(types.float32), build


@_intrinsic
def nearest(typing: Any, values: Any) -> Any:
    """Nearest integers, ties to even; of what is not small, the same nonsense as ggml's ``nearest_int``."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        magic = builder.bitcast(_integers(0x4B400000), _FLOATS)  # 1.5 * 2^23: the sum has the integer in its last bits
        bits = builder.bitcast(builder.fadd(args[0], magic), _INTEGERS)
        whole = builder.sub(builder.and_(bits, _integers(0x7FFFFF)), _integers(0x400000))
        return builder.sitofp(whole, _FLOATS)

    return FLOATS(FLOATS), build


@_intrinsic
def where(typing: Any, chosen: Any, a: Any, b: Any) -> Any:
    """``a`` in the lanes that are chosen, else ``b``."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(TRUTHS, a, a), build


@_intrinsic
def nowhere(typing: Any) -> Any:
    """False in every lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_TRUTHS, [0] * WIDTH)

    return TRUTHS(), build


@_intrinsic
def some(typing: Any, truths: Any) -> Any:
    """Whether a lane is true."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(WIDTH))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(WIDTH), 0))

    return types.boolean(TRUTHS), build


def _of_llvm(name: str) -> Any:
    def typed(typing: Any, values: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(_FLOATS, [_FLOATS])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
            return builder.call(function, args)

        return FLOATS(FLOATS), build

    return _intrinsic(typed)


magnitude = _of_llvm("fabs")  #: without the sign
root = _of_llvm("sqrt")  #: square root, rounded correctly
