"""safetensors: headers read within bounds, and written. Imports no torch; the format is described at
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monoquant_core.containers.entries import (
    MAX_HEADER,
    TensorEntry,
    check_name,
    check_shape,
    parse_json,
    shown,
    tensor_at,
)
from monoquant_core.containers.reader import FileReader, looks_like
from monoquant_core.errors import OutputError, SourceError
from monoquant_core.model import DTYPE_BITS

__all__ = ["DTYPES", "Header", "TensorEntry", "data_offsets", "header_bytes", "read_header"]

#: safetensors' name -> torch's, in the order in which its library lays out data: widest first, so all are aligned
DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F4": "float4_e2m1fn_x2",  # two elements in a byte: torch counts bytes, safetensors elements
    "BOOL": "bool",
}
_NAMES = {torch_name: name for name, torch_name in DTYPES.items()}
_RANK = {torch_name: i for i, torch_name in enumerate(_NAMES)}
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file contains."""

    tensors: dict[str, TensorEntry]  #: in the order of their data
    metadata: dict[str, str]


def read_header(reader: FileReader) -> Header:
    """Read and check the header: 8 bytes of length, JSON, then data that the tensors cover exactly, without overlap.

    :raises SourceError: naming the file and the tensor.
    """
    path = reader.path
    if reader.size < 8:
        raise SourceError(f"{path}: {reader.size} bytes are too few for a safetensors file")
    length = int.from_bytes(reader.read(0, 8), "little")
    if length > MAX_HEADER:
        message = f"{path}: not a safetensors file, or damaged: its header would be {length} bytes long"
        raise SourceError(message, hint=looks_like(reader))
    if length > reader.size - 8:
        raise SourceError(f"{path}: truncated: a header of {length} bytes in a file of {reader.size}")
    text = reader.read(8, length)
    if not text.startswith(b"{"):
        raise SourceError(f"{path}: not a safetensors file: its header does not start with '{{'")
    fields = parse_json(text, f"{path}: header")
    metadata = fields.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{path}: {_METADATA} is a map of strings, got {shown(metadata)}")
    entries = [(check_name(path, name), _entry(reader, name, info, 8 + length)) for name, info in fields.items()]
    entries.sort(key=lambda item: (item[1].offset, item[1].nbytes, item[0]))
    _check_cover(reader, entries, 8 + length)
    return Header(dict(entries), metadata)


def data_offsets(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
    """Where the data of each tensor begins and ends, counted from the end of the header, in the file's order.

    The order is that of the safetensors library: by width and type, then by name.

    :param entries: name -> torch's dtype name and shape.
    :raises OutputError: for a dtype that safetensors does not have, or a name that it reserves.
    """
    for name, (dtype, _) in entries.items():
        if dtype not in _NAMES:
            raise OutputError(f"tensor {name!r}: safetensors cannot hold dtype {dtype}")
        if name == _METADATA:
            raise OutputError(f"tensor {name!r}: safetensors reserves this name")
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in sorted(entries, key=lambda name: (_RANK[entries[name][0]], name)):
        dtype, shape = entries[name]
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        offsets[name] = (begin, end)
    return offsets


def header_bytes(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a file whose data lie as :func:`data_offsets` says, its length included; a multiple of 8 bytes.

    The same entries give the same bytes, and those of the safetensors library, which orders metadata at random.

    :raises OutputError: for what safetensors cannot hold.
    """
    fields: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for name, (begin, end) in data_offsets(entries).items():
        dtype, shape = entries[name]
        if dtype == "float4_e2m1fn_x2":
            shape = (*shape[:-1], shape[-1] * 2)
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OutputError(f"a header of {len(text)} bytes: safetensors takes at most {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _entry(reader: FileReader, name: str, info: object, start: int) -> TensorEntry:
    where = tensor_at(reader.path, name)
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise SourceError(f"{where}: dtype, shape and data_offsets expected, got {shown(info)}")
    kind, offsets = info["dtype"], info["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise SourceError(f"{where}: unknown dtype {shown(kind)}", hint=f"known: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[kind], check_shape(where, info["shape"])
    if not (isinstance(offsets, list) and [type(o) for o in offsets] == [int, int]):
        raise SourceError(f"{where}: data_offsets are two integers, got {shown(offsets)}")
    begin, end = offsets
    if not 0 <= begin <= end <= reader.size - start:
        raise SourceError(
            f"{where}: data_offsets {shown(offsets)} leave the file's {reader.size - start} bytes of data"
        )
    if kind == "F4":
        if not shape or shape[-1] % 2:
            raise SourceError(f"{where}: F4 packs pairs: the last extent of {shown(shape)} is odd")
        shape = (*shape[:-1], shape[-1] // 2)
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != nbytes:
        raise SourceError(
            f"{where}: {kind} of shape {shown(info['shape'])} is {nbytes} bytes, data_offsets give {end - begin}"
        )
    return TensorEntry(dtype, shape, reader.path, start + begin, nbytes)


def _check_cover(reader: FileReader, entries: list[tuple[str, TensorEntry]], start: int) -> None:
    end, before = start, ""
    for name, entry in entries:
        where = tensor_at(reader.path, name)
        if entry.offset < end:
            raise SourceError(f"{where}: overlaps tensor {shown(before)}")
        if entry.offset > end:
            raise SourceError(f"{where}: {entry.offset - end} bytes before it belong to no tensor")
        end, before = entry.offset + entry.nbytes, name
    if end != reader.size:
        raise SourceError(f"{reader.path}: {reader.size - end} bytes at its end belong to no tensor")
