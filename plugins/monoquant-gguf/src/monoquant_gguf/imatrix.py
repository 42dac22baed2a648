"""llama.cpp's importance matrices: mean squared inputs of every column, as ``llama-imatrix`` measures them.

Both of its files are read: the older plain one (counts, names and means one after another) and the GGUF one (sums and
counts as tensors). Nothing is believed before it is checked against the file. Imports no torch until values are read.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from monoquant_core.containers.reader import FileReader
from monoquant_core.errors import CalibrationError, SourceError
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_gguf.container import MAGIC, Header, read_header

if TYPE_CHECKING:
    import torch

SUMS, COUNTS = ".in_sum2", ".counts"
_AT_ONCE = 1 << 20  #: bytes of a file that are read at once
MAX_NAME = 1024  #: bytes of a name in the older file

_HINT = "llama-imatrix writes such files"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the numbers of one tensor lie."""

    offset: int  #: of float32 values
    count: int  #: values: columns, times the experts of a stack
    calls: int = 0  #: older file: to divide by, 0 for none
    counts: int = 0  #: GGUF: offset of float32 counts
    matrices: int = 1  #: GGUF: how many counts


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix, opened."""

    path: Path
    entries: Mapping[str, Entry]  #: by llama.cpp's name of the tensor

    def importance(self, name: str, columns: int) -> torch.Tensor | None:
        """Mean squared inputs, float32 ``[matrices, columns]``, or None where the file has none of that name.

        A matrix that got no input during calibration has ones, as in llama-quantize.

        :raises CalibrationError: for another number of columns, and for values that cannot be.
        """
        import torch

        entry = self.entries.get(name)
        if entry is None:
            return None
        if columns < 1 or entry.count % columns:
            raise CalibrationError(
                f"{self.path}: {name}: {entry.count} values for {columns} columns",
                hint="it is of another model",
            )
        with FileReader(self.path) as reader:
            values = _floats(reader, entry.offset, entry.count, name).view(-1, columns)
            if entry.calls > 0:
                values = values / torch.tensor(float(entry.calls))
            if entry.counts:
                counts = _floats(reader, entry.counts, entry.matrices, name).unsqueeze(1)
                if len(counts) != len(values):
                    raise CalibrationError(f"{self.path}: {name}: {len(counts)} counts of {len(values)} matrices")
                values = torch.where(counts > 0, values / counts, 1.0)
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise CalibrationError(f"{self.path}: {name}: a mean of squares is negative or not finite")
        return values


@functools.lru_cache(maxsize=4)
def load(path: str | Path) -> Imatrix:
    """Open a file of either form.

    :raises SourceError: for a file that is none, or does not hold what it says.
    """
    path = Path(path)
    with FileReader(path) as reader:
        is_gguf = reader.size >= 4 and reader.read(0, 4) == MAGIC
        entries = _gguf(path, read_header(reader)) if is_gguf else _plain(reader)
    if not entries:
        raise SourceError(f"{path}: an importance matrix without entries", hint=_HINT)
    return Imatrix(path, entries)


def digest(path: str | Path) -> str:
    """Tells a file from others.

    :raises SourceError: when it cannot be read.
    """
    with FileReader(path) as reader:
        found = hashlib.sha256()
        for start in range(0, reader.size, _AT_ONCE):
            found.update(reader.read(start, min(_AT_ONCE, reader.size - start)))
    return found.hexdigest()


def importance(imatrix: Imatrix, info: ModelInfo, specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
    """Mean squared inputs by the source's names, float32 ``[columns]``; each expert of a stack has its own.

    :raises CalibrationError: when the file is of another model.
    """
    from monoquant_gguf.roles import roles

    members: dict[str, list[TensorSpec]] = {}
    places = roles(info, specs)
    for spec in specs:
        if spec.name in places:
            members.setdefault(places[spec.name].target, []).append(spec)
    found: dict[str, torch.Tensor] = {}
    for target, tensors in members.items():
        first = tensors[0]
        columns = first.shape[0] if first.transposed else first.shape[-1]
        values = imatrix.importance(target, columns)
        if values is None:
            continue
        if len(values) not in (1, len(tensors)):
            raise CalibrationError(
                f"{imatrix.path}: {target}: {len(values)} experts, the model has {len(tensors)}",
                hint="it is of another model",
            )
        found |= {spec.name: values[i % len(values)] for i, spec in enumerate(tensors)}
    if not found:
        raise CalibrationError(
            f"{imatrix.path}: none of its {len(imatrix.entries)} tensors is in {info.name}",
            hint=f"it is of another model; it has {', '.join(list(imatrix.entries)[:3])}",
        )
    return found


def _floats(reader: FileReader, offset: int, count: int, name: str) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(reader.read(offset, 4 * count, f"tensor {name!r}")), dtype=torch.float32)


def _gguf(path: Path, header: Header) -> dict[str, Entry]:
    if header.metadata.get("general.type") != "imatrix":
        raise SourceError(f"{path}: a GGUF file of type {header.metadata.get('general.type')!r}, not imatrix")
    entries = {}
    for key, sums in header.tensors.items():
        if not key.endswith(SUMS):
            continue
        name = key.removesuffix(SUMS)
        counts = header.tensors.get(name + COUNTS)
        if counts is None or sums.dtype != "float32" or counts.dtype != "float32":
            raise SourceError(f"{path}: {name}: sums and counts in float32 expected", hint=_HINT)
        numbers = math.prod(sums.shape), math.prod(counts.shape)
        if min(numbers) < 1 or numbers[0] % numbers[1]:
            raise SourceError(f"{path}: {name}: {numbers[0]} sums and {numbers[1]} counts")
        entries[name] = Entry(sums.offset, numbers[0], counts=counts.offset, matrices=numbers[1])
    return entries


def _plain(reader: FileReader) -> dict[str, Entry]:
    position = 0

    def number(what: str, low: int, high: int) -> int:
        nonlocal position
        if position + 4 > reader.size:
            raise SourceError(f"{reader.path}: ends where {what} should be", hint=_HINT)
        (value,) = struct.unpack("<i", reader.read(position, 4, what))
        if not low <= value <= high:
            raise SourceError(f"{reader.path}: {what} of {value}; {low} to {high} are possible", hint=_HINT)
        position += 4
        return int(value)

    entries: dict[str, Entry] = {}
    for _ in range(number("a count of entries", 1, reader.size // 14)):
        length = number("a name's length", 1, min(MAX_NAME, reader.size - position))
        raw = reader.read(position, length, "a name")
        position += length
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise SourceError(f"{reader.path}: a name is not UTF-8: {raw[:32]!r}", hint=_HINT) from exc
        if name in entries:
            raise SourceError(f"{reader.path}: {name!r} occurs twice")
        calls = number("a count of calls", 0, (1 << 31) - 1)
        count = number("a count of values", 1, (reader.size - position) // 4)
        entries[name] = Entry(position, count, calls=calls)
        position += 4 * count
    return entries
