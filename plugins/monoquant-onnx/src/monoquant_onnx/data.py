"""The data of initializers: in a file, in memory, or computed from those. Importing this module imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from monoquant_core import rows as r
from monoquant_core.containers.entries import TensorEntry, tensor_at
from monoquant_core.containers.reader import FileReader
from monoquant_core.encoding import FULL, ActivationQuant, Encoding, param_shape
from monoquant_core.errors import SourceError
from monoquant_core.model import DTYPE_BITS
from monoquant_onnx import types
from monoquant_onnx.wire import Place

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import ParamValue, QuantizedTensor

CHUNK = 1 << 22  #: elements that are read at once when a tensor is copied


class Data(Protocol):
    """Values of one tensor, read by rows (see the core's ``rows.py``)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> str:
        """torch's name of what is read; for packed integers, the name of the element type."""
        ...

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The rows as one chunk of the tensor's rank; integers of less than a byte are codes in int8 or uint8."""
        ...


@dataclass(frozen=True, slots=True)
class FileData:
    """A tensor in a file, as raw_data has it."""

    reader: FileReader
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.place.shape

    @property
    def dtype(self) -> str:
        """torch's name, or that of the element type."""
        return types.name_of(self.place.type)

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The rows.

        :raises SourceError: when the file has changed, shrunk or cannot be read.
        """
        from monoquant_core.containers.strided import read_rows

        place = self.place
        if place.type not in types.PACKED:
            entry = TensorEntry(self.dtype, place.shape, place.path, place.offset, place.nbytes)
            return read_rows(self.reader, place.name, entry, rows, scratch, "onnx.source")
        name, bits = types.PACKED[place.type]
        length = r.row_length(place.shape)
        first, count = rows.start * length, len(rows) * length
        start, stop = first * bits // 8, -(-(first + count) * bits // 8)
        raw = bytearray(stop - start)
        self.reader.read_into(memoryview(raw), place.offset + start, tensor_at("", place.name)[2:])
        codes = unpack_codes(raw, bits, first - start * 8 // bits, count, signed=not name.startswith(("u", "float")))
        return codes.view(r.chunk_shape(place.shape, rows))


@dataclass(frozen=True, slots=True, eq=False)
class MemoryData:
    """A tensor in memory, of any strides: the transposed view of a parameter costs nothing."""

    tensor: torch.Tensor
    element: str = ""  #: for codes of less than a byte: what they are

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """torch's name, or that of the element type."""
        return self.element or str(self.tensor.dtype).removeprefix("torch.")

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The rows."""
        from monoquant_core.containers.in_memory import rows_of

        return rows_of(self.tensor, rows, scratch, "onnx.source")


@dataclass(frozen=True, slots=True, eq=False)
class InlineData:
    """A small tensor in the structure of a file: no torch until it is read."""

    tensor: Any  #: of onnx_ir
    in_shape: tuple[int, ...] | None = None  #: another shape of the same elements

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape.numpy()) if self.in_shape is None else self.in_shape

    @property
    def dtype(self) -> str:
        """torch's name, or that of the element type."""
        return types.name_of(int(self.tensor.dtype))

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The rows."""
        import torch

        from monoquant_core.containers.in_memory import rows_of
        from monoquant_core.tensor import dtype_of

        raw, shape = bytearray(self.tensor.tobytes()), self.shape
        kind = int(self.tensor.dtype)
        if kind in types.PACKED:
            name, bits = types.PACKED[kind]
            tensor = unpack_codes(raw, bits, 0, math.prod(shape), signed=name.startswith("int"))
        else:
            dtype = dtype_of(self.dtype)
            tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return rows_of(tensor.view(shape), rows, scratch, "onnx.source")


@dataclass(frozen=True, slots=True, eq=False)
class BiasData:
    """A vector of 32-bit codes as the floats that they stand for: no element type of the IR has as many bits."""

    codes: Data
    scale: Data  #: one, or one per element

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.codes.shape

    @property
    def dtype(self) -> str:
        """The type of the scale."""
        return self.scale.dtype

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The one row that a vector is."""
        factor = whole(self.scale).reshape(-1)
        return (whole(self.codes).double() * factor.double()).to(factor.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class ScaledData:
    """A weight whose output channels are multiplied, as folding a BatchNorm does."""

    base: Data
    factor: torch.Tensor  #: float64 [channels]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """torch's name."""
        return self.base.dtype

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The rows, multiplied in float64 and rounded once."""
        from monoquant_core.containers.strided import first_index

        values = self.base.read(rows, scratch)
        first = first_index(self.shape, rows)[self.axis]
        factor = self.factor[first : first + values.shape[self.axis]]
        shape = [1] * values.ndim
        shape[self.axis] = -1
        return (values.double() * factor.view(shape)).to(values.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedData:
    """Codes with their parameters, as DequantizeLinear takes them."""

    codes: Data
    scale: Data  #: of ``param_shape(shape, encoding.block)``; nested where it is a QuantizedData
    zero_point: Data | None  #: of the same shape
    encoding: Encoding
    shift: int = 0  #: added to codes and zero points: 128 for int8 that the IR has as uint8
    activation: ActivationQuant | None = None  #: how the graph quantizes the input that meets this weight
    where: str = ""  #: file and tensor, for messages

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.codes.shape

    @property
    def dtype(self) -> str:
        """What it dequantizes to: the type of the scale."""
        return self.scale.dtype if not self.scale.dtype.startswith("float8") else "float32"

    @property
    def nbytes_stored(self) -> int:
        """Bytes in the file."""
        return sum(stored_bytes(d) for d in (self.codes, self.scale, self.zero_point) if d is not None)

    def read(self, rows: range, scratch: Scratch | None = None) -> torch.Tensor:
        """The rows, dequantized."""
        from monoquant_core.tensor import dtype_of

        return self.quantized(rows, scratch).dequantize().to(dtype_of(self.dtype))

    def quantized(self, rows: range, scratch: Scratch | None = None) -> QuantizedTensor:
        """The rows, as codes.

        :raises SourceError: when the file cannot be read, or a scale is not finite.
        """
        import torch

        from monoquant_core.check import Mismatch, check_params
        from monoquant_core.tensor import QuantizedTensor

        codes = self.codes.read(rows, scratch)
        narrow = self.encoding.element.bits <= 8
        if self.shift or codes.dtype == torch.uint16:
            codes = (codes.to(torch.int32) + self.shift).to(torch.uint8 if narrow else torch.int32)
        codes = _bits(codes)
        params: dict[str, ParamValue] = {"scale": self._param(self.scale, rows)}
        if self.encoding.zero_point is not None:
            if self.zero_point is None:
                params["zero_point"] = torch.zeros(self._grid(rows), dtype=torch.uint8)
            else:
                points = self._param(self.zero_point, rows)
                assert isinstance(points, torch.Tensor)
                params["zero_point"] = (points.to(torch.int32) + self.shift).to(torch.uint8 if narrow else torch.int32)
        tensor = QuantizedTensor(self.encoding, codes, **params)
        try:
            check_params(tensor)
        except Mismatch as exc:
            raise SourceError(f"{self.where}: {exc.reason}") from exc
        return tensor

    def _grid(self, rows: range) -> tuple[int, ...]:
        return param_shape(r.chunk_shape(self.shape, rows), self.encoding.block)

    def _param(self, data: Data, rows: range) -> ParamValue:
        """The parameters of a chunk of whole blocks."""
        from monoquant_core.containers.strided import first_index

        grid, chunk = data.shape, self._grid(rows)
        first = 0
        for index, block, extent in zip(
            first_index(self.shape, rows)[:-1], self.encoding.block[:-1], grid[:-1], strict=True
        ):
            first = first * extent + (0 if block == FULL else index // block)
        wanted = range(first, first + math.prod(chunk[:-1]))
        return data.quantized(wanted) if isinstance(data, QuantizedData) else _bits(data.read(wanted).clone())


def _bits(codes: torch.Tensor) -> torch.Tensor:
    """Floats of 8 bits as the IR takes them."""
    import torch

    return codes.view(torch.uint8) if codes.dtype.is_floating_point and codes.element_size() == 1 else codes


def reshaped(data: Data, shape: tuple[int, ...]) -> Data:
    """The same elements, in the same order, in another shape."""
    if isinstance(data, FileData):
        return FileData(data.reader, dataclasses.replace(data.place, shape=shape))
    if isinstance(data, InlineData):
        return InlineData(data.tensor, shape)
    assert isinstance(data, MemoryData)
    return MemoryData(data.tensor.reshape(shape), data.element)


def is_zero(data: Data) -> bool:
    """Whether all elements of an integer tensor are 0."""
    if isinstance(data, InlineData):
        return not any(data.tensor.tobytes())
    return all(piece.tobytes().count(0) == piece.nbytes for piece in raw_chunks(data))


def number(data: Data) -> float:
    """The one element of a tensor of one element."""
    return float(data.tensor.numpy().reshape(())) if isinstance(data, InlineData) else float(whole(data).reshape(()))


def readers_of(data: Iterable[Data]) -> set[FileReader]:
    """The files that data come from."""
    found: set[FileReader] = set()
    for one in data:
        if isinstance(one, FileData):
            found.add(one.reader)
        elif isinstance(one, ScaledData):
            found |= readers_of([one.base])
        elif isinstance(one, BiasData):
            found |= readers_of([one.codes, one.scale])
        elif isinstance(one, QuantizedData):
            found |= readers_of(d for d in (one.codes, one.scale, one.zero_point) if d is not None)
    return found


def stored_bytes(data: Data) -> int:
    """Bytes in the source."""
    if isinstance(data, QuantizedData):
        return data.nbytes_stored
    if isinstance(data, FileData):
        return data.place.nbytes
    bits = DTYPE_BITS[data.dtype] if data.dtype in DTYPE_BITS else integer_bits(data.dtype)
    return -(-math.prod(data.shape) * bits // 8)


def integer_bits(name: str) -> int:
    """Bits of a type that lies packed in bytes."""
    return next(bits for known, bits in types.PACKED.values() if known == name)


def whole(data: Data) -> torch.Tensor:
    """All of a tensor, in memory of its own."""
    return data.read(r.all_rows(data.shape)).clone()


def raw_chunks(data: Data) -> Iterator[memoryview]:
    """A tensor's bytes as raw_data has them, piece by piece."""
    if isinstance(data, FileData):
        place, done = data.place, 0
        while done < place.nbytes:
            piece = bytearray(min(4 * CHUNK, place.nbytes - done))
            data.reader.read_into(memoryview(piece), place.offset + done, tensor_at("", place.name)[2:])
            yield memoryview(piece)
            done += len(piece)
        return
    from monoquant_core.tensor import as_bytes

    quantum = r.quantum(data.shape, data.encoding) if isinstance(data, QuantizedData) else 1
    for rows in r.chunks(data.shape, quantum, CHUNK):
        yield as_bytes(data.read(rows)).numpy().data


def unpack_codes(raw: bytes | bytearray, bits: int, skip: int, count: int, *, signed: bool) -> torch.Tensor:
    """``count`` codes after ``skip`` ones, the first in the low bits: int8 or uint8 ``[count]``."""
    import torch

    if bits not in (2, 4):
        raise SourceError(f"tensors of {bits} bits are not read")
    per_byte = 8 // bits
    data = torch.frombuffer(raw, dtype=torch.uint8) if len(raw) else torch.empty(0, dtype=torch.uint8)
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    codes = (data.unsqueeze(1) >> shifts & (1 << bits) - 1).reshape(-1)[skip : skip + count]
    if signed:
        half = 1 << bits - 1
        return (codes.to(torch.int8) ^ half) - half
    return codes.contiguous()
