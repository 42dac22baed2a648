"""Key-value pairs of a GGUF file, and the bytes before its data.

Imports neither torch nor the gguf package, which needs numpy: a plan must be cheap. The package reads what is written
here, in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from monoquant_core.containers.entries import shown
from monoquant_core.errors import PlanError
from monoquant_gguf.container import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, MAX_NAME, STRING

Kind = Literal["UINT32", "FLOAT32", "BOOL", "STRING", "UINT32[]", "INT32[]", "FLOAT32[]", "BOOL[]", "STRING[]"]

ALIGNMENT = DEFAULT_ALIGNMENT
VERSION = 3
LARGEST = 3.4028234663852886e38  #: of float32

#: kind -> number of the format, and how struct spells it
_TYPES = {"UINT32": (4, "I"), "INT32": (5, "i"), "FLOAT32": (6, "f"), "BOOL": (BOOL, "?"), "STRING": (STRING, "")}


@dataclass
class Metadata:
    """Typed pairs in the order in which they are added; a later one of the same key takes the place of the first."""

    pairs: dict[str, tuple[Kind, Any]] = field(default_factory=dict)

    def u32(self, key: str, value: int) -> None:
        """A count or an index."""
        if type(value) is not int or not 0 <= value < 1 << 32:
            raise PlanError(f"{key}: {shown(value)} is no count that GGUF holds")
        self.pairs[key] = ("UINT32", value)

    def f32(self, key: str, value: float) -> None:
        """A number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise PlanError(f"{key}: {shown(value)} is no number that GGUF holds")
        self.pairs[key] = ("FLOAT32", float(value))

    def flag(self, key: str, value: bool) -> None:
        """Yes or no."""
        self.pairs[key] = ("BOOL", bool(value))

    def text(self, key: str, value: str) -> None:
        """A string; an empty one is left out."""
        if value:
            self.pairs[key] = ("STRING", value)

    def i32s(self, key: str, values: Sequence[int]) -> None:
        """Whole numbers."""
        if values:
            self.pairs[key] = ("INT32[]", list(values))

    def f32s(self, key: str, values: Sequence[float]) -> None:
        """Numbers."""
        if values:
            self.pairs[key] = ("FLOAT32[]", [float(v) for v in values])

    def texts(self, key: str, values: Sequence[str | bytes]) -> None:
        """Strings."""
        if values:
            self.pairs[key] = ("STRING[]", list(values))


@dataclass(frozen=True, slots=True)
class Stored:
    """What the header says of a tensor."""

    name: str
    shape: tuple[int, ...]  #: torch's order
    ggml_type: int
    nbytes: int


def offsets(tensors: Iterable[Stored]) -> tuple[list[int], int]:
    """Where each tensor's data begin, from the start of the data, and the length of all of them, padded."""
    found, end = [], 0
    for tensor in tensors:
        found.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return found, end


def header(metadata: Metadata, tensors: Sequence[Stored], *, copied: tuple[bytes, int] = (b"", 0)) -> bytes:
    """Everything before the data, padded to the alignment.

    :param copied: key-value pairs as another file holds them, and how many; they come first.
    :raises PlanError: for a tensor that GGUF cannot name.
    """
    for tensor in tensors:
        if not 0 < len(tensor.name.encode()) <= MAX_NAME:
            raise PlanError(f"{tensor.name}: GGUF takes names of 1 to {MAX_NAME} bytes")
    pairs = [_text(key) + _value(kind, value) for key, (kind, value) in metadata.pairs.items()]
    counts = struct.pack("<IQQ", VERSION, len(tensors), len(pairs) + copied[1])
    found, _ = offsets(tensors)
    infos = [_info(tensor, offset) for tensor, offset in zip(tensors, found, strict=True)]
    text = b"".join([MAGIC, counts, copied[0], *pairs, *infos])
    return text + bytes(-len(text) % ALIGNMENT)


def _value(kind: Kind, value: Any) -> bytes:
    number, spelling = _TYPES[kind.removesuffix("[]")]
    if not kind.endswith("[]"):
        return struct.pack("<I", number) + (_text(value) if number == STRING else struct.pack(f"<{spelling}", value))
    head = struct.pack("<IIQ", ARRAY, number, len(value))
    return head + (b"".join(map(_text, value)) if number == STRING else struct.pack(f"<{len(value)}{spelling}", *value))


def _text(value: str | bytes) -> bytes:
    try:
        data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    except UnicodeEncodeError:  # half of a pair, which JSON can spell
        raise PlanError(f"{shown(value)}: not a text that GGUF holds") from None
    return struct.pack("<Q", len(data)) + data


def _info(tensor: Stored, offset: int) -> bytes:
    extents = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return _text(tensor.name) + extents + struct.pack("<IQ", tensor.ggml_type, offset)
