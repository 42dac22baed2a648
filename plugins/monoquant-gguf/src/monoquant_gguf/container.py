"""The header of a GGUF file that nobody vouches for: every count and length is checked against the file first.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Imports no torch. The gguf
package's own reader trusts its input: a file of 43 bytes that claims 2**63 elements keeps it busy forever.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from monoquant_core.containers.entries import MAX_EXTENT, check_name, shown, tensor_at
from monoquant_core.containers.reader import FileReader, Window
from monoquant_core.errors import SourceError
from monoquant_core.model import DTYPE_BITS
from monoquant_gguf.layouts import Layout, by_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4  #: GGML_MAX_DIMS
MAX_NAME = 63  #: bytes of a tensor's name: GGML_MAX_NAME with its final zero
MAX_KEY = 65535  #: bytes
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
KEPT_ITEMS = 64  #: arrays with more items are not read with the header, only stepped over

STRING, ARRAY, BOOL = 8, 9, 7
#: value type -> how struct spells it
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", BOOL: "<?", 10: "<Q", 11: "<q", 12: "<d"}

#: ggml's other types that hold plain numbers: number -> torch's dtype
PLAIN = {24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64"}

_SMALLEST_PAIR = 8 + 1 + 4 + 1  # a key of one byte, its type, a value of one byte
_SMALLEST_INFO = 8 + 1 + 4 + 4 + 8  # a name of one byte, no extents, a type, an offset


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array that was stepped over."""

    type: int  #: of its items
    count: int
    offset: int  #: of its first item, in the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies."""

    name: str
    shape: tuple[int, ...]  #: torch's order; ggml's is the reverse
    type: int
    dtype: str  #: torch's name of what it holds or dequantizes to
    layout: Layout | None  #: None for the types in ``PLAIN``
    offset: int  #: from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself."""

    version: int
    metadata: dict[str, Any]  #: scalars and strings; short arrays as lists, others as :class:`LongArray`
    tensors: dict[str, TensorInfo]  #: in the order of the file
    spans: dict[str, tuple[int, int]]  #: where each key and its value begin and end
    data: int  #: where the tensors' data begin


def read_header(reader: FileReader) -> Header:
    """Read and check everything but the data.

    :raises SourceError: naming the file, and the key or tensor that is wrong.
    """
    path = reader.path
    if reader.size < 24:
        raise SourceError(f"{path}: {reader.size} bytes are too few for a GGUF file")
    cursor = _Cursor(reader)
    if (magic := cursor.take(4, "magic")) != MAGIC:
        raise SourceError(f"{path}: not a GGUF file: it starts with {magic!r}")
    version = cursor.number("<I", "version")
    if version not in VERSIONS:
        big = version & 0xFFFF == 0 and int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        why = "big-endian, which is not read" if big else f"version {version}; read are {', '.join(map(str, VERSIONS))}"
        raise SourceError(f"{path}: GGUF {why}")
    tensor_count = cursor.number("<Q", "tensor count")
    pair_count = cursor.number("<Q", "key count")
    cursor.expect(tensor_count, _SMALLEST_INFO, "tensors")
    cursor.expect(pair_count, _SMALLEST_PAIR, "keys")
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(pair_count):
        begin = cursor.position
        key = _text(cursor, "key", MAX_KEY)
        if key in metadata:
            raise SourceError(f"{path}: key {shown(key)} occurs twice")
        metadata[key] = _value(cursor, f"key {shown(key)}")
        spans[key] = begin, cursor.position
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise SourceError(f"{path}: general.alignment is a power of two up to {MAX_ALIGNMENT}, got {shown(alignment)}")
    found = [_tensor(cursor) for _ in range(tensor_count)]
    data = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise SourceError(f"{tensor_at(path, name)}: occurs twice")
        tensors[name] = _place(reader, name, shape, kind, offset, data, alignment)
    _check_overlap(reader, tensors)
    return Header(version, metadata, tensors, spans, data)


def read_array(reader: FileReader, value: Any) -> list[Any]:
    """All items of an array of the metadata.

    :raises SourceError: when the file has changed or the items are not what they should be.
    """
    if not isinstance(value, LongArray):
        return list(value)
    cursor = _Cursor(reader, value.offset)
    return [_item(cursor, value.type, "array") for _ in range(value.count)]


class _Cursor:
    """Reads forward through a file, in windows."""

    def __init__(self, reader: FileReader, position: int = 0) -> None:
        self.reader, self.position = reader, position
        self._window = Window(reader)

    def expect(self, count: int, nbytes: int, what: str) -> None:
        """Refuse a count of things that the rest of the file is too short for."""
        left = self.reader.size - self.position
        if count * nbytes > left:
            raise SourceError(f"{self.reader.path}: {count} {what} in the {left} bytes that are left of the file")

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes."""
        self.expect(nbytes, 1, f"bytes of {what}")
        data = self._window.read(self.position, nbytes)
        self.position += nbytes
        return data

    def skip(self, nbytes: int, what: str) -> None:
        """Step over the next bytes."""
        self.expect(nbytes, 1, f"bytes of {what}")
        self.position += nbytes

    def number(self, spelling: str, what: str) -> Any:
        """The next number."""
        return struct.unpack(spelling, self.take(struct.calcsize(spelling), what))[0]


def _text(cursor: _Cursor, what: str, limit: int) -> str:
    length = cursor.number("<Q", what)
    if not 1 <= length <= limit:
        raise SourceError(f"{cursor.reader.path}: a {what} of {length} bytes; 1 to {limit} are allowed")
    data = cursor.take(length, what)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise SourceError(f"{cursor.reader.path}: a {what} is not UTF-8: {shown(data)}") from exc


def _value(cursor: _Cursor, what: str) -> Any:
    kind = cursor.number("<I", what)
    if kind != ARRAY:
        return _item(cursor, kind, what)
    kind, count = cursor.number("<I", what), cursor.number("<Q", what)
    if kind not in SCALARS and kind != STRING:
        raise SourceError(f"{cursor.reader.path}: {what}: an array of type {kind}, which is not known")
    size = struct.calcsize(SCALARS[kind]) if kind in SCALARS else 8
    cursor.expect(count, size, f"items of {what}")
    if count <= KEPT_ITEMS:
        return [_item(cursor, kind, what) for _ in range(count)]
    start = cursor.position
    if kind in SCALARS:
        cursor.skip(count * size, what)
    else:
        for _ in range(count):
            cursor.skip(cursor.number("<Q", what), what)
    return LongArray(kind, count, start, cursor.position - start)


def _item(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == STRING:
        # Some vocabularies hold pieces of characters, so values need not be UTF-8.
        return cursor.take(cursor.number("<Q", what), what).decode("utf-8", "surrogateescape")
    if kind not in SCALARS:
        raise SourceError(f"{cursor.reader.path}: {what}: type {kind}, which is not known")
    value = cursor.number("<B" if kind == BOOL else SCALARS[kind], what)
    if kind == BOOL:
        if value > 1:
            raise SourceError(f"{cursor.reader.path}: {what}: a boolean of {value}")
        return bool(value)
    return value


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    path = cursor.reader.path
    name = check_name(path, _text(cursor, "tensor name", MAX_NAME))
    dims = cursor.number("<I", "extents")
    if dims > MAX_DIMS:
        raise SourceError(f"{tensor_at(path, name)}: {dims} dimensions; GGUF has at most {MAX_DIMS}")
    shape = tuple(reversed([cursor.number("<Q", "extents") for _ in range(dims)]))
    if math.prod(max(1, n) for n in shape) > MAX_EXTENT:
        raise SourceError(f"{tensor_at(path, name)}: impossible shape {shown(shape)}")
    return name, shape, cursor.number("<I", "type"), cursor.number("<Q", "offset")


def _place(
    reader: FileReader, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int, alignment: int
) -> TensorInfo:
    where = tensor_at(reader.path, name)
    layout: Layout | None = None
    row = shape[-1] if shape else 1
    if kind in PLAIN:
        dtype, nbytes = PLAIN[kind], math.prod(shape) * DTYPE_BITS[PLAIN[kind]] // 8
    else:
        try:
            layout = by_type(kind)
        except KeyError:
            raise SourceError(f"{where}: ggml type {kind}, which monoquant does not read") from None
        if row % layout.block_size:
            raise SourceError(f"{where}: rows of {row} are not whole blocks of {layout.block_size} ({layout.name})")
        dtype, nbytes = layout.dtype, math.prod(shape) // layout.block_size * layout.type_size
    if offset % alignment:
        raise SourceError(f"{where}: offset {offset} is not a multiple of {alignment}")
    if data + offset + nbytes > reader.size:
        raise SourceError(
            f"{where}: bytes {data + offset} to {data + offset + nbytes} wanted, the file has {reader.size}"
        )
    return TensorInfo(name, shape, kind, dtype, layout, data + offset, nbytes)


def _check_overlap(reader: FileReader, tensors: dict[str, TensorInfo]) -> None:
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.nbytes and info.offset < end:
            raise SourceError(f"{tensor_at(reader.path, info.name)}: overlaps tensor {shown(before)}")
        if info.nbytes:
            end, before = info.offset + info.nbytes, info.name
