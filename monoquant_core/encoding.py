"""How a tensor is quantized, without its data. Imports neither torch nor numpy."""

from __future__ import annotations

import functools
import math
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from monoquant_core.errors import EncodingError

FULL = -1  #: block extent meaning "the whole axis"

IR_VERSION = 1  #: version of ``Encoding.to_dict``; raised when an older reader would misread it

FLOAT_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}

MAX_DEPTH = 8  #: how deep parameters may nest; the formats that exist need two levels

_LARGEST = sys.float_info.max

_INTEGER_NAME = re.compile(r"(u?)int([1-9][0-9]?)")

_interned: dict[str, tuple[object, ...]] = {}


@dataclass(frozen=True, slots=True)
class ElementType:
    """What one stored code means.

    Integers decode to themselves; every other kind decodes through ``table``,
    so a new low-bit type is a value a plugin builds, not a case the core learns.
    A name means one table for the whole process.

    :raises EncodingError: for an impossible type, or a name already taken by another one.
    """

    name: str
    bits: int
    kind: Literal["int", "float", "codebook"]
    signed: bool = True
    table: tuple[float, ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise EncodingError(f"an element type has a name, got {self.name!r}")
        if type(self.bits) is not int or not 1 <= self.bits <= 16:
            raise EncodingError(f"{self.name}: bits must be in 1..16, got {self.bits}")
        if self.kind not in ("int", "float", "codebook"):
            raise EncodingError(f"{self.name}: kind must be int, float or codebook, got {self.kind!r}")
        if not isinstance(self.signed, bool):
            raise EncodingError(f"{self.name}: signed must be True or False, got {self.signed!r}")
        if (self.table is None) != (self.kind == "int"):
            raise EncodingError(f"{self.name}: exactly the non-integer kinds have a table")
        # A file may bring a name before anything here has used it: "int3" must never come to mean something else.
        if spelled := _INTEGER_NAME.fullmatch(self.name):
            wanted = (int(spelled[2]), "int", not spelled[1])
            if (self.bits, self.kind, self.signed) != wanted:
                raise EncodingError(f"{self.name}: the name of an integer of {wanted[0]} bits, here of another type")
        if self.table is not None:
            if not isinstance(self.table, tuple) or any(type(v) not in (int, float) for v in self.table):
                raise EncodingError(f"{self.name}: the table must be a tuple of numbers")
            if not 1 <= len(self.table) <= 1 << self.bits:
                raise EncodingError(f"{self.name}: {len(self.table)} values do not fit {self.bits} bits")
        meaning = (self.bits, self.kind, self.signed, self.table and _table_bits(self.name, self.table))
        if _interned.setdefault(self.name, meaning) != meaning:
            raise EncodingError(f"element type {self.name!r} already means something else in this process")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, inclusive."""
        if self.kind == "int" and self.signed:
            return -(1 << self.bits - 1), (1 << self.bits - 1) - 1
        if self.table is not None:
            return 0, len(self.table) - 1
        return 0, (1 << self.bits) - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON form. The table is included, so a reader needs no plugin."""
        data: dict[str, Any] = {"name": self.name, "bits": self.bits, "kind": self.kind, "signed": self.signed}
        if self.table is not None:
            data["table"] = [v if math.isfinite(v) else str(v) for v in self.table]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElementType:
        """Inverse of :meth:`to_dict`.

        :raises EncodingError: for anything that ``to_dict`` does not write.
        """
        _only_keys(data, {"name", "bits", "kind", "signed", "table"}, "element type")
        name, bits, signed, table = data.get("name"), data.get("bits"), data.get("signed", True), data.get("table")
        if not isinstance(name, str) or type(bits) is not int or not isinstance(signed, bool):
            raise EncodingError(f"element type: name, bits and signed expected, got {dict(data)!r}")
        if table is None:
            return cls(name, bits, data.get("kind", "int"), signed)
        if not isinstance(table, list) or len(table) > 1 << 16:
            raise EncodingError(f"element type {name!r}: the table must be a list of numbers")
        values: tuple[Any, ...] = tuple(_SPECIAL.get(v, v) if isinstance(v, str) else v for v in table)
        return cls(name, bits, data.get("kind", "codebook"), signed, values)


#: how JSON, which has no word for them, spells the values that are not finite
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _table_bits(name: str, table: tuple[float, ...]) -> bytes:
    """What a table is compared by: -0.0 differs from 0.0, and every NaN is the same one."""
    try:
        return struct.pack(f"<{len(table)}d", *(math.nan if math.isnan(v) else v for v in table))
    except OverflowError:
        raise EncodingError(f"{name}: a value of the table does not fit a float") from None


def integer(bits: int, *, signed: bool = True) -> ElementType:
    """``int{bits}`` or ``uint{bits}``."""
    return ElementType(f"{'' if signed else 'u'}int{bits}", bits, "int", signed)


def codebook(name: str, values: tuple[float, ...]) -> ElementType:
    """A type whose code is an index into ``values``."""
    return ElementType(name, max(1, (len(values) - 1).bit_length()), "codebook", table=values)


def minifloat(name: str, exponent: int, mantissa: int, *, nan: Literal["ieee", "fn", "none"]) -> ElementType:
    """A sign/exponent/mantissa float of at most 8 bits, as a decode table (OCP MX specification v1.0, section 5.3)."""
    bias, half = (1 << exponent - 1) - 1, 1 << exponent + mantissa
    values = []
    for code in range(half):
        e, m = code >> mantissa, code & (1 << mantissa) - 1
        if nan == "ieee" and e == (1 << exponent) - 1:
            values.append(math.inf if m == 0 else math.nan)
        elif nan == "fn" and code == half - 1:
            values.append(math.nan)
        elif e == 0:
            values.append(math.ldexp(m, 1 - bias - mantissa))
        else:
            values.append(math.ldexp((1 << mantissa) + m, e - bias - mantissa))
    return ElementType(name, 1 + exponent + mantissa, "float", table=tuple(values) + tuple(-v for v in values))


INT8, INT4, INT2 = integer(8), integer(4), integer(2)
UINT8, UINT4, UINT2 = integer(8, signed=False), integer(4, signed=False), integer(2, signed=False)
FLOAT8_E4M3FN = minifloat("float8_e4m3fn", 4, 3, nan="fn")
FLOAT8_E5M2 = minifloat("float8_e5m2", 5, 2, nan="ieee")
FLOAT6_E3M2FN = minifloat("float6_e3m2fn", 3, 2, nan="none")
FLOAT6_E2M3FN = minifloat("float6_e2m3fn", 2, 3, nan="none")
FLOAT4_E2M1FN = minifloat("float4_e2m1fn", 2, 1, nan="none")
FLOAT8_E8M0FNU = ElementType(
    "float8_e8m0fnu", 8, "float", signed=False, table=(*(math.ldexp(1, c - 127) for c in range(255)), math.nan)
)


@dataclass(frozen=True, slots=True)
class Encoding:
    """``value = scale * (decode(code) - zero_point) + offset``, blockwise.

    Each of scale, zero_point and offset is a float dtype name, an :class:`ElementType`
    (stored codes are the values), or an Encoding of its own: nesting is what holds
    nvfp4, nf4 double quantization, HQQ meta-quantization and the ggml K-quants.

    :raises EncodingError: for an encoding that cannot exist.
    """

    element: ElementType
    block: tuple[
        int, ...
    ]  #: extent per axis; ``FULL`` is the whole axis; rank 1 flattens, rank 2 flattens all but axis 0
    scale: Param
    zero_point: Param | None = None
    offset: Param | None = None
    clip: tuple[int, int] | None = field(default=None, compare=False)  #: codes confined to fewer than the type holds

    def __post_init__(self) -> None:
        if not isinstance(self.element, ElementType):
            raise EncodingError(f"element must be an ElementType, got {self.element!r}")
        if not isinstance(self.block, tuple) or not self.block:
            raise EncodingError(f"block must be a non-empty tuple, got {self.block!r}")
        if any(type(b) is not int or (b != FULL and b < 1) for b in self.block):
            raise EncodingError(f"block extents must be positive or FULL, got {self.block}")
        for label, param in self.params():
            if isinstance(param, str) and param not in FLOAT_BITS:
                raise EncodingError(f"{label}: {param!r} is not a float dtype name ({', '.join(FLOAT_BITS)})")
            if not isinstance(param, str | ElementType | Encoding):
                raise EncodingError(f"{label}: a float dtype name, an ElementType or an Encoding, got {param!r}")
            if isinstance(param, Encoding) and len(param.block) not in (1, len(self.block)):
                raise EncodingError(f"{label}: a nested block has the parent's rank, or rank 1 (flattened)")
        if self.zero_point is not None and self.element.kind != "int":
            raise EncodingError(f"{self.element.name}: only integer elements take a zero_point")
        if self.clip is not None:
            smallest, largest = self.element.code_range
            if not isinstance(self.clip, tuple) or [type(c) for c in self.clip] != [int, int]:
                raise EncodingError(f"clip: two integers expected, got {self.clip!r}")
            if not smallest <= self.clip[0] < self.clip[1] <= largest:
                raise EncodingError(f"clip {self.clip} is not inside {(smallest, largest)} of {self.element.name}")
        if _depth(self) > MAX_DEPTH:
            raise EncodingError(f"encoding: nested more than {MAX_DEPTH} deep")

    def __str__(self) -> str:
        block = "x".join("*" if b == FULL else str(b) for b in self.block)
        text = f"{self.element.name}[{block}]*{_show(self.scale)}"
        if self.zero_point is not None:
            text = f"({self.element.name}-{_show(self.zero_point)})[{block}]*{_show(self.scale)}"
        return text if self.offset is None else f"{text}+{_show(self.offset)}"

    def params(self) -> Iterator[tuple[str, Param]]:
        """The parameters that exist, in the order scale, zero_point, offset."""
        yield "scale", self.scale
        if self.zero_point is not None:
            yield "zero_point", self.zero_point
        if self.offset is not None:
            yield "offset", self.offset

    def nbits(self, shape: tuple[int, ...]) -> int:
        """Bits to store a tensor of ``shape``, packed, parameters included."""
        params = param_shape(shape, self.block)
        return math.prod(shape) * self.element.bits + sum(_param_bits(p, params) for _, p in self.params())

    @property
    def tensor_wide(self) -> bool:
        """Whether one block is the whole tensor."""
        return self.block.count(FULL) == len(self.block)

    @property
    def codes_range(self) -> tuple[int, int]:
        """Smallest and largest code used: ``clip`` where it is given, else what the element holds."""
        return self.clip or self.element.code_range

    def check_weight(self) -> None:
        """Refuse a weight encoding that is not in canonical form.

        An integer weight is unsigned exactly when it has a zero point or an offset, so that one
        structure has one spelling and exporters compare structures.

        :raises EncodingError: naming the element and what it should be.
        """
        if self.element.kind == "int" and self.element.signed == (
            self.zero_point is not None or self.offset is not None
        ):
            wanted = "unsigned with a zero point or an offset" if self.element.signed else "signed without one"
            raise EncodingError(f"{self}: a weight's integer codes are {wanted}")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, recursive, codebook tables included."""
        data: dict[str, Any] = {"element": self.element.to_dict(), "block": list(self.block)}
        data.update((label, _param_to_json(param)) for label, param in self.params())
        if self.clip is not None:
            data["clip"] = list(self.clip)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, depth: int = 0) -> Encoding:
        """Inverse of :meth:`to_dict`.

        :raises EncodingError: for anything that ``to_dict`` does not write, deeper nesting than ``MAX_DEPTH`` included.
        """
        if depth >= MAX_DEPTH:  # before descending: a file must not be able to exhaust the stack
            raise EncodingError(f"encoding: nested more than {MAX_DEPTH} deep")
        if not isinstance(data, Mapping):
            raise EncodingError(f"encoding: expected an object, got {data!r}")
        _only_keys(data, {"element", "block", "scale", "zero_point", "offset", "clip"}, "encoding")
        element, block, clip = data.get("element"), data.get("block"), data.get("clip")
        if not isinstance(element, Mapping) or not isinstance(block, list) or "scale" not in data:
            raise EncodingError(f"encoding: element, block and scale expected, got keys {sorted(data)}")
        if clip is not None and not (isinstance(clip, list) and [type(c) for c in clip] == [int, int]):
            raise EncodingError(f"encoding: clip is two integers, got {clip!r}")
        params = {
            label: _param_from_json(data[label], depth) for label in ("scale", "zero_point", "offset") if label in data
        }
        return cls(ElementType.from_dict(element), tuple(block), clip=tuple(clip) if clip else None, **params)


Param: TypeAlias = "str | ElementType | Encoding"


@dataclass(frozen=True, slots=True)
class ActivationQuant:
    """How the input of a layer is quantized when the model runs.

    :raises EncodingError: for an impossible combination.
    """

    element: ElementType
    granularity: Literal["tensor", "token", "group"]
    dynamic: bool
    symmetric: bool = True
    group_size: int | None = None
    low: float | None = None  #: static only: smallest value to represent, at most 0
    high: float | None = None  #: static only: largest value to represent, at least 0

    def __post_init__(self) -> None:
        if not isinstance(self.element, ElementType):
            raise EncodingError(f"element must be an ElementType, got {self.element!r}")
        if self.granularity not in ("tensor", "token", "group"):
            raise EncodingError(f"granularity must be tensor, token or group, got {self.granularity!r}")
        for label in ("dynamic", "symmetric"):
            if not isinstance(getattr(self, label), bool):
                raise EncodingError(f"{label} must be True or False, got {getattr(self, label)!r}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise EncodingError("an activation has a group_size exactly when its granularity is group")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise EncodingError(f"group_size must be a positive integer, got {self.group_size!r}")
        if self.dynamic and (self.low is not None or self.high is not None):
            raise EncodingError("a dynamic activation has no range")
        if not self.dynamic:
            if self.low is None or self.high is None:
                raise EncodingError("a static activation needs low and high")
            ends = (self.low, self.high)
            if (
                any(type(end) not in (int, float) for end in ends)
                or not -_LARGEST <= ends[0] <= 0 <= ends[1] <= _LARGEST
            ):
                raise EncodingError(f"low <= 0 <= high and finite expected, got {self.low!r:.40} and {self.high!r:.40}")

    def __str__(self) -> str:
        size = f"[{self.group_size}]" if self.group_size else ""
        return f"{'dynamic' if self.dynamic else 'static'} {self.element.name} per {self.granularity}{size}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form; fields that are unset are left out."""
        names = ("granularity", "dynamic", "symmetric", "group_size", "low", "high")
        values = {name: getattr(self, name) for name in names}
        return {"element": self.element.to_dict(), **{k: v for k, v in values.items() if v is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActivationQuant:
        """Inverse of :meth:`to_dict`.

        :raises EncodingError: for anything that ``to_dict`` does not write.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("element"), Mapping):
            raise EncodingError("activation: an object with an element expected")
        allowed = {"element", "granularity", "dynamic", "symmetric", "group_size", "low", "high"}
        _only_keys(data, allowed, "activation")
        rest = {k: v for k, v in data.items() if k != "element"}
        try:
            return cls(ElementType.from_dict(data["element"]), **rest)
        except TypeError:
            raise EncodingError(f"activation: granularity and dynamic expected, got keys {sorted(data)}") from None


@functools.lru_cache(maxsize=1024)
@functools.lru_cache(maxsize=1024)
def param_shape(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a per-block parameter; a last, shorter block counts as one.

    :raises EncodingError: when the ranks do not fit.
    """
    if len(block) == 1 and len(shape) != 1:
        shape = (math.prod(shape),)
    elif len(block) == 2 < len(shape):  # conv groups: [out, in * k * k]
        shape = (shape[0], math.prod(shape[1:]))
    if len(shape) != len(block):
        raise EncodingError(f"block {block} has another rank than shape {shape}")
    return tuple((1 if n else 0) if b == FULL else -(-n // b) for n, b in zip(shape, block, strict=True))


def per_tensor(ndim: int) -> tuple[int, ...]:
    """One block."""
    return (FULL,) * ndim


def per_channel(ndim: int, axis: int = 0) -> tuple[int, ...]:
    """One block for each index of ``axis``."""
    return tuple(1 if i == axis % ndim else FULL for i in range(ndim))


def per_row(ndim: int) -> tuple[int, ...]:
    """One block for each row: the whole last axis."""
    return (1,) * (ndim - 1) + (FULL,)


def per_group(ndim: int, size: int) -> tuple[int, ...]:
    """Blocks of ``size`` along the last axis."""
    return (1,) * (ndim - 1) + (size,)


def _depth(encoding: Encoding) -> int:
    return 1 + max((_depth(p) for _, p in encoding.params() if isinstance(p, Encoding)), default=0)


def _show(param: Param) -> str:
    if isinstance(param, ElementType):
        return param.name
    return param if isinstance(param, str) else f"({param})"


def _param_bits(param: Param, shape: tuple[int, ...]) -> int:
    if isinstance(param, Encoding):
        return param.nbits(shape)
    return math.prod(shape) * (FLOAT_BITS[param] if isinstance(param, str) else param.bits)


def _param_to_json(param: Param) -> Any:
    if isinstance(param, str):
        return param
    return {"codes": param.to_dict()} if isinstance(param, ElementType) else {"encoding": param.to_dict()}


def _param_from_json(data: Any, depth: int) -> Param:
    if isinstance(data, str):
        return data
    if isinstance(data, Mapping) and set(data) == {"codes"} and isinstance(data["codes"], Mapping):
        return ElementType.from_dict(data["codes"])
    if isinstance(data, Mapping) and set(data) == {"encoding"}:
        return Encoding.from_dict(data["encoding"], depth=depth + 1)
    raise EncodingError(f"parameter: a dtype name, {{'codes': ...}} or {{'encoding': ...}} expected, got {data!r}")


def _only_keys(data: Mapping[str, Any], allowed: set[str], what: str) -> None:
    unknown = sorted(set(data) - allowed)
    if unknown:
        raise EncodingError(f"{what}: unknown keys {', '.join(map(repr, unknown))}")
