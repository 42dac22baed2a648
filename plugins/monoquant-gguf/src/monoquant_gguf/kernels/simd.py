"""Vectors for numba: float32 in registers, with the operators that searches in many lanes need.

LLVM makes vector instructions of inner loops only, and sums kept in arrays are stored and loaded again for every
element. Where vectors are values there is no inner loop, and the sum of a lane stays in its register. Every operation
is the single one of IEEE 754 in each lane; a processor with narrower registers takes several instructions for one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

ROW = 16  #: elements of a vector along a row: no sub-block has fewer

#: Lanes of a vector across rows. Two registers of AVX-512 for one, so that one is worked on while the other waits;
#: narrower registers are two for 16 lanes already, and there are fewer of them.
WIDTH = 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast("Callable[..., Any]", cast("Any", intrinsic)(function))


class _Vector(types.Type):
    def __init__(self, name: str, element: ir.Type, width: int) -> None:
        self.width, self.llvm = width, ir.VectorType(element, width)
        super().__init__(f"monoquant.{name}{width}")

    def like(self, element: ir.Type) -> ir.VectorType:
        return ir.VectorType(element, self.width)


class _Floats(_Vector):
    def __init__(self, width: int) -> None:
        super().__init__("floats", _F32, width)


class _Truths(_Vector):
    def __init__(self, width: int) -> None:
        super().__init__("truths", ir.IntType(1), width)


_FLOATS = {width: _Floats(width) for width in (ROW, WIDTH)}
_TRUTHS = {width: _Truths(width) for width in (ROW, WIDTH)}


@register_model(_Floats)
@register_model(_Truths)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.llvm)


def _define(function: Callable[..., Any], cases: dict[Any, Any], build: Callable[..., Any]) -> None:
    """What an operator of Python does with two vectors: of these types, to those."""
    signatures = [signature(result, kind, kind) for kind, result in cases.items()]
    infer_global(function)(type(f"_{function.__name__}", (ConcreteTemplate,), {"cases": signatures}))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return build(builder, *args)

    for kind in cases:
        lower_builtin(function, kind, kind)(lower)


_MADE = {kind: kind for kind in _FLOATS.values()}
_COMPARED = {kind: _TRUTHS[width] for width, kind in _FLOATS.items()}
_JOINED = {kind: kind for kind in _TRUTHS.values()}

_define(operator.add, _MADE, lambda builder, a, b: builder.fadd(a, b))
_define(operator.sub, _MADE, lambda builder, a, b: builder.fsub(a, b))
_define(operator.mul, _MADE, lambda builder, a, b: builder.fmul(a, b))
_define(operator.truediv, _MADE, lambda builder, a, b: builder.fdiv(a, b))
_define(operator.lt, _COMPARED, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
_define(operator.le, _COMPARED, lambda builder, a, b: builder.fcmp_ordered("<=", a, b))
_define(operator.gt, _COMPARED, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_define(operator.ge, _COMPARED, lambda builder, a, b: builder.fcmp_ordered(">=", a, b))
_define(operator.eq, _COMPARED, lambda builder, a, b: builder.fcmp_ordered("==", a, b))
_define(operator.ne, _COMPARED, lambda builder, a, b: builder.fcmp_unordered("!=", a, b))
_define(operator.and_, _JOINED, lambda builder, a, b: builder.and_(a, b))
_define(operator.or_, _JOINED, lambda builder, a, b: builder.or_(a, b))


def _same(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: ir.VectorType) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _read(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: _Vector) -> Any:
    if kind.dtype == types.float32:
        return builder.load(_address(context, builder, kind, array, at, vector.llvm), align=4)
    codes = builder.load(_address(context, builder, kind, array, at, vector.like(_I8)), align=1)
    extend = builder.sext if kind.dtype == types.int8 else builder.zext
    return builder.sitofp(extend(codes, vector.like(_I32)), vector.llvm)


def _loader(width: int) -> Any:
    def typed(typing: Any, array: Any, at: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, index = args
            return _read(context, builder, array, source, index, _FLOATS[width])

        return _FLOATS[width](array, types.intp), build

    return _intrinsic(typed)


load = _loader(WIDTH)  #: elements of a contiguous array of float32, int8 or uint8, from a flat index on
load_row = _loader(ROW)  #: likewise


@_intrinsic
def store(typing: Any, array: Any, at: Any, values: Any) -> Any:
    """The reverse of ``load`` and ``load_row``; to bytes, of whole numbers that they hold."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, index, vector = args
        if array.dtype == types.float32:
            builder.store(vector, _address(context, builder, array, data, index, values.llvm), align=4)
        else:
            codes = builder.trunc(builder.fptosi(vector, values.like(_I32)), values.like(_I8))
            builder.store(codes, _address(context, builder, array, data, index, values.like(_I8)), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, values), build


@_intrinsic
def transpose_square(typing: Any, array: Any, starts: Any, at: Any, out: Any, to: Any) -> Any:
    """16 elements from ``starts[j] + at`` on, of each of 16 j, as columns of ``out``: rows of ``WIDTH`` float32."""
    square = _FLOATS[ROW]

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, firsts, offset, target, first = args
        begins = context.make_array(starts)(context, builder, firsts).data
        rows = []
        for j in range(ROW):
            begin = builder.add(builder.load(builder.gep(begins, [ir.Constant(_I64, j)])), offset)
            rows.append(_read(context, builder, array, source, begin, square))
        for distance in (8, 4, 2, 1):
            # Swaps the upper right quarter of each square of twice the distance with the lower left one.
            for j in (j for j in range(ROW) if not j & distance):
                pair = rows[j], rows[j + distance]
                left = [c if not c & distance else ROW + c - distance for c in range(ROW)]
                right = [c + distance if not c & distance else ROW + c for c in range(ROW)]
                rows[j], rows[j + distance] = (
                    builder.shuffle_vector(*pair, ir.Constant(square.like(_I32), mask)) for mask in (left, right)
                )
        for i, row in enumerate(rows):
            place = builder.add(first, ir.Constant(_I64, WIDTH * i))
            builder.store(row, _address(context, builder, out, target, place, square.llvm), align=4)
        return context.get_dummy_value()

    return types.void(array, starts, types.intp, out, types.intp), build


def _spread(builder: Any, value: Any, vector: _Vector) -> Any:
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _same(vector.like(_I32), 0))


def _splatter(width: int) -> Any:
    def typed(typing: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _spread(builder, args[0], _FLOATS[width])

        return _FLOATS[width](types.float32), build

    return _intrinsic(typed)


splat = _splatter(WIDTH)  #: one float32 in every lane
splat_row = _splatter(ROW)  #: likewise


@_intrinsic
def splat_like(typing: Any, other: Any, value: Any) -> Any:
    """One float32 in as many lanes as another vector has."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _spread(builder, args[1], other)

    return other(other, types.float32), build


@_intrinsic
def nearest(typing: Any, values: Any) -> Any:
    """Nearest integers, ties to even; of what is not small, the same nonsense as ggml's ``nearest_int``."""
    whole = values.like(_I32)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # 1.5 * 2^23: a sum with it has the integer in its last bits.
        bits = builder.bitcast(builder.fadd(args[0], builder.bitcast(_same(whole, 0x4B400000), values.llvm)), whole)
        integers = builder.sub(builder.and_(bits, _same(whole, 0x7FFFFF)), _same(whole, 0x400000))
        return builder.sitofp(integers, values.llvm)

    return values(values), build


@_intrinsic
def where(typing: Any, chosen: Any, a: Any, b: Any) -> Any:
    """``a`` in the lanes that are chosen, else ``b``."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(chosen, a, a), build


@_intrinsic
def nowhere(typing: Any) -> Any:
    """False in every lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _same(_TRUTHS[WIDTH].llvm, 0)

    return _TRUTHS[WIDTH](), build


@_intrinsic
def some(typing: Any, truths: Any) -> Any:
    """Whether a lane is true."""
    bits = ir.IntType(truths.width)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), ir.Constant(bits, 0))

    return types.boolean(truths), build


def _of_llvm(name: str) -> Any:
    def typed(typing: Any, values: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(values.llvm, [values.llvm])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{values.width}f32")
            return builder.call(function, args)

        return values(values), build

    return _intrinsic(typed)


magnitude = _of_llvm("fabs")  #: without the sign
root = _of_llvm("sqrt")  #: square root, rounded correctly
