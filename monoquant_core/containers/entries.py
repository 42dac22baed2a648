"""Where a tensor lies in a file, and the checks that every container shares. Imports no torch."""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from monoquant_core.errors import SourceError
from monoquant_core.model import DTYPE_BITS

MAX_RANK = 64  #: torch's iterators take no more
MAX_EXTENT = 2**63 - 1
MAX_HEADER = 100_000_000  #: bytes of a safetensors header, as its own library has it; also of a shard index

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxlevel = 3


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place in a file."""

    dtype: str  #: torch's name
    shape: tuple[int, ...]
    path: Path
    offset: int  #: of its first element, in bytes from the start of the file
    nbytes: int  #: of its elements
    strides: tuple[int, ...] | None = None  #: in elements; None when rows lie one after another
    lazy: Literal["", "conj", "neg"] = ""  #: what torch has put off: the file holds the conjugate or the negative

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPE_BITS[self.dtype] // 8

    @property
    def span(self) -> int:
        """Elements from the first to the last one, both included; 0 without elements."""
        if 0 in self.shape:
            return 0
        strides = contiguous(self.shape) if self.strides is None else self.strides
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of rows that lie one after another."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, extent))
    return tuple(reversed(strides)) if shape else ()


def strided_entry(
    where: str,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    first: int,
    record: tuple[Path, int, int],
    *,
    file_size: int,
    lazy: Literal["", "conj", "neg"] = "",
) -> TensorEntry:
    """The place of a strided view of a storage, checked against the storage's bounds.

    :param where: file and tensor, for messages.
    :param first: index of the view's first element in the storage.
    :param record: file, offset and bytes of the storage.
    :raises SourceError: when the view leaves the storage, or repeats it beyond the size of the file.
    """
    check_shape(where, shape)
    if len(strides) != len(shape) or any(s < 0 for s in strides) or first < 0:
        raise SourceError(f"{where}: impossible strides {shown(strides)} at {first} for shape {shown(shape)}")
    path, start, size = record
    itemsize = DTYPE_BITS[dtype] // 8
    plain = all(n == 1 or s == c for n, s, c in zip(shape, strides, contiguous(shape), strict=True))
    entry = TensorEntry(
        dtype,
        shape,
        path,
        start + first * itemsize,
        math.prod(shape) * itemsize,
        None if 0 in shape or (plain and not lazy) else strides,
        lazy,
    )
    if entry.span and (first + entry.span) * itemsize > size:
        raise SourceError(f"{where}: needs {(first + entry.span) * itemsize} bytes of a storage of {size}")
    if entry.nbytes > file_size:
        # An expanded tensor may claim any size; reading it must stay in proportion to the file.
        raise SourceError(
            f"{where}: expands {entry.span} stored elements to {shown(shape)}, which is larger than the whole file",
            hint="save x.contiguous() instead of an expanded view",
        )
    return entry


def tensor_at(path: Path | str, name: object) -> str:
    """File and tensor, for messages."""
    return f"{path}: tensor {shown(name)}"


def shown(value: object) -> str:
    """``repr`` on one line and of bounded length: values from a file must not flood the terminal."""
    return " ".join(line.strip() for line in _SHORT.repr(value).splitlines())  # tensors have several lines


def check_name(path: Path | str, name: object) -> str:
    """A tensor's name, if it can be one.

    :raises SourceError: for anything but a printable, non-empty string.
    """
    if not isinstance(name, str):
        raise SourceError(f"{path}: a tensor's name is a string, got {shown(name)}")
    # Category C: control characters, which would reach the terminal, and surrogates, which no file can hold.
    if not name or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise SourceError(f"{path}: impossible tensor name {shown(name)}")
    return name


def check_shape(where: str, shape: object) -> tuple[int, ...]:
    """A shape that torch can hold.

    :raises SourceError: for negative extents, too many, or more elements than 64 bits count.
    """
    if not isinstance(shape, list | tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise SourceError(f"{where}: a shape is a list of non-negative integers, got {shown(shape)}")
    if len(shape) > MAX_RANK or math.prod(max(1, n) for n in shape) > MAX_EXTENT:
        raise SourceError(f"{where}: impossible shape {shown(shape)}")
    return tuple(shape)


def parse_json(data: bytes, what: str, *, strict: bool = True) -> dict[str, Any]:
    """A JSON object.

    :param what: file and part, for messages.
    :param strict: also refuse repeated keys and numbers that are not JSON; config files of others may have them.
    :raises SourceError: for anything else.
    """
    try:
        text = data.decode("utf-8")
        if strict:
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_a_number)
        else:
            value = json.loads(text)
    except (ValueError, RecursionError) as exc:  # bad UTF-8, bad JSON, integers of thousands of digits, deep nesting
        raise SourceError(f"{what}: not valid JSON: {' '.join(str(exc).split())[:160]}") from exc
    if not isinstance(value, dict):
        raise SourceError(f"{what}: a JSON object expected, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} occurs twice")
    return result


def _not_a_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
