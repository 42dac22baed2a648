"""The bytes of an .onnx file that nobody vouches for: its structure, with the data of tensors left where they are.

The protobuf wire format (https://protobuf.dev/programming-guides/encoding/) is walked field by field; every length is
checked before anything is allocated. What comes out is a copy of the message in which a large tensor holds only the
number of its :class:`Place`. So memory goes with the structure, not with the weights, and files beyond the 2 GB that a
protobuf may have are no special case. Imports neither torch nor onnx.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from monoquant_core.containers import folder as folders
from monoquant_core.containers.entries import check_name, check_shape, shown, tensor_at
from monoquant_core.containers.reader import FileReader, Window
from monoquant_core.errors import SourceError
from monoquant_onnx import types

INLINE = 1024  #: bytes of a tensor up to which it stays in the structure
MAX_STRUCTURE = 1 << 29  #: bytes of everything that is not the data of tensors
MAX_DEPTH = 24  #: how deep graphs may nest; protobuf parsers stop at 100 messages, three of them per graph
MARK = "monoquant"  #: location of a tensor in the copy; its offset is the number of its place

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

#: message -> the messages in it that may hold tensors, by field number
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _FUNCTION, _TENSOR, _SPARSE = range(7)
_CHILDREN = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
}
_TRAINING_INFO = 20

# Fields of TensorProto.
_DIMS, _DATA_TYPE, _SEGMENT, _FLOATS, _STRINGS, _NAME, _RAW, _DOUBLES, _EXTERNAL, _LOCATION = (
    *(1, 2, 3, 4, 6, 8, 9, 10, 13, 14),
)
_TYPED = {_FLOATS, 5, _STRINGS, 7, _DOUBLES, 11}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the data of a tensor lie, as raw_data has them."""

    name: str
    type: int  #: TensorProto.DataType
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass
class Structure:
    """An .onnx file without the data of its large tensors."""

    model: bytes = b""  #: a ModelProto
    places: list[Place] = field(default_factory=list)
    readers: dict[Path, FileReader] = field(default_factory=dict)  #: the file, and its external data
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Tells the files, as they were when they were opened."""
        return " ".join(reader.fingerprint for reader in self.readers.values())

    def close(self) -> None:
        """Close the files."""
        for reader in self.readers.values():
            reader.close()


def read_structure(path: Path) -> Structure:
    """Walk an .onnx file.

    :raises SourceError: naming the file, and the tensor that is wrong.
    """
    structure = Structure(readers={path: FileReader(path)})
    try:
        walker = _Walker(path, structure)
        structure.model = b"".join(walker.message(_MODEL, walker.reader.size, 0))
    except BaseException:
        structure.close()
        raise
    return structure


class _Walker:
    """Reads forward through a file, in windows."""

    def __init__(self, path: Path, structure: Structure) -> None:
        self.path, self.structure = path, structure
        self.reader = structure.readers[path]
        self.position = 0
        self._window, self._kept = Window(self.reader), 0

    def message(self, kind: int, end: int, depth: int) -> Iterator[bytes]:
        """The fields of a message up to ``end``, tensors replaced."""
        if depth > 3 * MAX_DEPTH + 1:  # a graph in an attribute of a node of a graph
            raise SourceError(f"{self.path}: graphs nested more than {MAX_DEPTH} deep")
        children = _CHILDREN[kind]
        while self.position < end:
            start = self.position
            number, wire = self._tag(end)
            if wire != _BYTES:
                self._skip_scalar(wire, end)
                yield self._again(start, self.position)
                continue
            length = self._length(end)
            stop = self.position + length
            if kind == _MODEL and number == _TRAINING_INFO:
                self.structure.notes.append(f"{self.path}: left out: training_info")
                self.position = stop
            elif number not in children:
                yield self._again(start, stop)
                self.position = stop
            else:
                child = children[number]
                if child == _SPARSE:
                    raise SourceError(f"{self.path}: holds a sparse tensor, which monoquant does not read")
                body = self._tensor(stop) if child == _TENSOR else b"".join(self.message(child, stop, depth + 1))
                yield varint(number << 3 | _BYTES) + varint(len(body)) + body

    def _tensor(self, end: int) -> bytes:
        start = self.position
        found: dict[int, list[tuple[int, int]]] = {}  # field -> where its payloads begin and end
        dims: list[int] = []
        scalars: dict[int, int] = {}
        while self.position < end:
            number, wire = self._tag(end)
            begin = self.position
            if wire == _BYTES:
                length = self._length(end)
                begin, stop = self.position, self.position + length
                if number == _DIMS:
                    while self.position < stop:
                        dims.append(_signed(self._number(stop)))
                self.position = stop
            elif wire == _VARINT:
                value = self._number(end)
                if number == _DIMS:
                    dims.append(_signed(value))
                scalars[number] = value
            else:
                self._skip_scalar(wire, end)
            found.setdefault(number, []).append((begin, self.position))
        return self._placed(start, end, found, dims, scalars)

    def _placed(
        self,
        start: int,
        end: int,
        found: dict[int, list[tuple[int, int]]],
        dims: list[int],
        scalars: dict[int, int],
    ) -> bytes:
        """The tensor with its data, where it is small, or with the number of their place."""
        name = self._text(found[_NAME][-1]) if _NAME in found else ""
        where = tensor_at(self.path, name) if name else f"{self.path}: a tensor without a name"
        if name:
            check_name(self.path, name)
        shape = check_shape(where, dims)
        kind = scalars.get(_DATA_TYPE, 0)
        if kind == types.STRING or _STRINGS in found:
            raise SourceError(f"{where}: a tensor of strings, which monoquant does not read")
        try:
            nbytes = types.stored_nbytes(kind, shape)
        except KeyError:
            raise SourceError(f"{where}: data type {kind}, which is not known") from None
        if _SEGMENT in found:
            raise SourceError(f"{where}: is a segment of a tensor, which monoquant does not read")
        if scalars.get(_LOCATION, 0) == 1:
            if _RAW in found or _TYPED & set(found):
                raise SourceError(f"{where}: has both external data and data in the file")
            return self._marked(self._external(where, name, kind, shape, nbytes, found.get(_EXTERNAL, [])))
        span = _span(where, found, nbytes, f"{types.name_of(kind)} {list(shape)}", _least(kind, shape))
        return self._again(start, end) if span is None else self._marked(Place(name, kind, shape, self.path, *span))

    def _marked(self, place: Place) -> bytes:
        head = b"".join(varint(_DIMS << 3) + varint(n) for n in place.shape)
        head += varint(_DATA_TYPE << 3) + varint(place.type) + _bytes_field(_NAME, place.name.encode())
        if place.nbytes <= INLINE:
            data = self.structure.readers[place.path].read(place.offset, place.nbytes, tensor_at("", place.name)[2:])
            return head + _bytes_field(_RAW, data)
        self.structure.places.append(place)
        entries = (("location", MARK), ("offset", str(len(self.structure.places) - 1)))
        return (
            head
            + b"".join(
                _bytes_field(_EXTERNAL, _bytes_field(1, key.encode()) + _bytes_field(2, value.encode()))
                for key, value in entries
            )
            + varint(_LOCATION << 3)
            + varint(1)
        )

    def _external(
        self,
        where: str,
        name: str,
        kind: int,
        shape: tuple[int, ...],
        nbytes: int,
        spans: list[tuple[int, int]],
    ) -> Place:
        entries: dict[str, str] = {}
        for begin, stop in spans:
            after, self.position = self.position, begin
            pair = {1: "", 2: ""}
            while self.position < stop:
                number, wire = self._tag(stop)
                if wire != _BYTES:
                    raise SourceError(f"{where}: its external data are not described by strings")
                length = self._length(stop)
                pair[number] = self._text((self.position, self.position + length))
                self.position += length
            self.position = after
            if pair[1] in entries:
                raise SourceError(f"{where}: external data name {shown(pair[1])} twice")
            entries[pair[1]] = pair[2]
        reader = self._beside(where, entries.get("location", ""))
        offset = _size(where, "offset", entries.get("offset", "0"))
        length = _size(where, "length", entries["length"]) if "length" in entries else nbytes
        if length != nbytes:
            raise SourceError(
                f"{where}: external data of {length} bytes; {types.name_of(kind)} {list(shape)} has {nbytes}"
            )
        if offset + nbytes > reader.size:
            raise SourceError(
                f"{where}: bytes {offset} to {offset + nbytes} of {reader.path.name} wanted, which has {reader.size}"
            )
        return Place(name, kind, shape, reader.path, offset, nbytes)

    def _beside(self, where: str, location: str) -> FileReader:
        """The reader of an external file: inside the folder, and nothing but a plain file of its own."""
        parts = PurePosixPath(location).parts
        windows = PureWindowsPath(location)
        if not parts or ".." in parts or location.startswith("/") or windows.drive or "\\" in location:
            raise SourceError(f"{where}: external data at {shown(location)}, which is not a path inside the folder")
        if not location.isprintable():
            raise SourceError(f"{where}: external data at {shown(location)}, which is no name of a file")
        folder = self.path.parent
        path = folder / location
        if path in self.structure.readers:
            return self.structure.readers[path]
        try:
            folders.inside(folder, location)
            reader = FileReader(path)
        except SourceError as exc:
            raise SourceError(f"{where}: external data: {exc}", hint=exc.hint) from exc
        try:
            folders.inside(folder, location)  # again: what is open now was inside before and after
            if os.stat(path).st_nlink > 1:
                raise SourceError(
                    f"{where}: external data {shown(location)} have several hard links", hint="copy the file"
                )
        except BaseException:
            reader.close()
            raise
        self.structure.readers[path] = reader
        return reader

    def _tag(self, end: int) -> tuple[int, int]:
        tag = self._number(end)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise SourceError(f"{self.path}: not an ONNX model: byte {self.position} starts no field")
        return number, wire

    def _length(self, end: int) -> int:
        length = self._number(end)
        if length > end - self.position:
            raise SourceError(
                f"{self.path}: truncated or damaged: a field of {length} bytes at {self.position}, "
                f"and {end - self.position} are left"
            )
        return length

    def _number(self, end: int) -> int:
        value = shift = 0
        while True:
            if self.position >= end:
                raise SourceError(f"{self.path}: truncated or damaged at byte {self.position}")
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF
            shift += 7
            if shift > 63:
                raise SourceError(f"{self.path}: damaged: a number at byte {self.position} has no end")

    def _skip_scalar(self, wire: int, end: int) -> None:
        if wire == _VARINT:
            self._number(end)
            return
        self.position += 8 if wire == _FIXED64 else 4
        if self.position > end:
            raise SourceError(f"{self.path}: truncated or damaged at byte {end}")

    def _take(self, nbytes: int) -> bytes:
        data = self._window.read(self.position, nbytes)
        self.position += nbytes
        return data

    def _again(self, start: int, stop: int) -> bytes:
        """A piece of the file as it is; the cursor stays."""
        self._kept += stop - start
        if self._kept > MAX_STRUCTURE:
            raise SourceError(f"{self.path}: more than {MAX_STRUCTURE} bytes beside the data of its tensors")
        here, self.position = self.position, start
        data = self._take(stop - start)
        self.position = here
        return data

    def _text(self, span: tuple[int, int]) -> str:
        if span[1] - span[0] > 1 << 16:
            raise SourceError(f"{self.path}: a name of {span[1] - span[0]} bytes")
        try:
            return self._again(*span).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise SourceError(f"{self.path}: a name is not UTF-8: {shown(self._again(*span))}") from exc


def _span(
    where: str, found: dict[int, list[tuple[int, int]]], nbytes: int, what: str, least: int
) -> tuple[int, int] | None:
    """Offset and bytes of the data of a tensor in the file; None where they are numbers of varying length.

    :param least: bytes that such numbers have at least.
    """
    fields = [number for number in (_RAW, *_TYPED) if number in found]
    if len(fields) > 1 or len(found.get(_RAW, ())) > 1:
        raise SourceError(f"{where}: has its data twice")
    if not fields:
        if nbytes:
            raise SourceError(f"{where}: has no data")
        return None
    spans = found[fields[0]]
    # Packed numbers of a fixed size lie there as raw_data would; complex ones are two each in both.
    if fields[0] == _RAW or (fields[0] in (_FLOATS, _DOUBLES) and len(spans) == 1):
        first, last = spans[0]
        if last - first != nbytes:
            raise SourceError(f"{where}: {last - first} bytes of data; {what} has {nbytes}")
        return first, nbytes
    if nbytes and sum(last - first for first, last in spans) < least:
        raise SourceError(f"{where}: has fewer numbers than {what}")
    return None


def _least(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes that the numbers of a tensor have at least when each is a varint."""
    count = types.stored_nbytes(2, shape)
    return -(-count * types.PACKED[kind][1] // 8) if kind in types.PACKED else count


def _size(where: str, what: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise SourceError(f"{where}: {what} of its external data: a number of bytes expected, got {shown(text)}")
    return int(text)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def varint(value: int) -> bytes:
    """A whole number as protobuf writes it: seven bits to a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | _BYTES) + varint(len(data)) + data
