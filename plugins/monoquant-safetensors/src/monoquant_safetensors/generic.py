"""The generic convention: any tensor in any encoding, as named parts; the encodings stand in the header's metadata.

Only ``pack`` and ``unpack`` import torch. A quantized tensor ``X`` becomes ``X.codes``, ``X.scale`` and, where it has
them, ``X.zero_point`` and ``X.offset``; a nested parameter becomes ``X.scale.codes``, ``X.scale.scale`` and so on.
Codes of 8 bits are stored as they are, wider ones as int16 or int32, narrower ones as a dense bit stream per row
(:mod:`monoquant_core.packing`). The key ``monoquant`` of ``__metadata__`` is JSON::

    {"version": 1, "encodings": [...], "ties": {},
     "tensors": {"X": {"encoding": 0, "dtype": "float32", "shape": [8, 8]}}}
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from monoquant_core.encoding import FULL, ElementType, Encoding, param_shape
from monoquant_core.errors import EncodingError
from monoquant_core.exporters import FileLayout, FilePlan, Held, Holds, Output, Part, Placed, Verdict
from monoquant_core.model import ModelInfo, TensorSpec
from monoquant_core.rows import Shape, block_rows, chunk_shape, row_count, row_length
from monoquant_core.schemes import Proposal
from monoquant_safetensors.config import QUANTIZATION, is_compressed_tensors
from monoquant_safetensors.files import (
    CONFIG,
    HELD_DTYPES,
    json_file,
    side_files,
    tensor_files,
    unsupported_dtype,
)

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import ParamValue, QuantizedTensor

KEY = "monoquant"  #: in ``__metadata__``
VERSION = 1  #: of what stands there
LAYOUT = "generic"


class GenericExporter:
    """Writes a single ``.safetensors`` file, or a folder."""

    name = "safetensors (generic)"
    recipe = ""

    def __init__(self, max_shard: int) -> None:
        self._max_shard = max_shard

    def fingerprint(self) -> str:
        """Nothing: all of it shows in the plan."""
        return ""

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output]:
        """Every tensor under its own name."""
        return [Output(spec.name, spec.shape, spec.dtype, (spec.name,)) for spec in specs]

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        """Everything whose floats safetensors has names for."""
        if proposal is None or isinstance(proposal.encoding, str):
            return Holds(out.dtype, None) if out.dtype in HELD_DTYPES else unsupported_dtype(out.dtype)
        return Holds(LAYOUT, proposal.encoding)

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        """One part for the codes and one for each parameter, at every level."""
        if held.encoding is None:
            return [Part(out.name, out.dtype, out.shape)]
        return [leaf.part(out) for leaf in _leaves(out.name, out.shape, held.encoding)]

    def pack(
        self, rows: QuantizedTensor | torch.Tensor, out: Output, held: Held, first_row: int
    ) -> Mapping[str, torch.Tensor]:
        """Dense bits, signed codes with half their range added."""
        if held.encoding is None:
            return {out.name: rows.contiguous()}  # type: ignore[union-attr]
        from monoquant_core.packing import pack_bits

        values = dict(_values(out.name, rows))  # type: ignore[arg-type]
        packed = {}
        for leaf in _leaves(out.name, tuple(rows.shape), held.encoding):
            value = values[leaf.name].reshape(leaf.grid)
            if leaf.packed:
                assert leaf.element is not None
                value = pack_bits(value.reshape(leaf.grid or (1,)), leaf.element.bits)
            packed[leaf.name] = value.contiguous()
        return packed

    def unpack(
        self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int
    ) -> QuantizedTensor | torch.Tensor:
        """Inverse of ``pack``. Parts may come flat.

        :raises EncodingError: for a code that its element does not have: a table may have fewer than bits count.
        """
        if held.encoding is None:
            return parts[out.name]
        from monoquant_core.packing import unpack_bits

        codes = next(_leaves(out.name, out.shape, held.encoding))
        width = codes.stored[-1] if codes.stored else 1
        rows = parts[codes.name].numel() // width if width else row_count(out.shape)
        shape = chunk_shape(out.shape, range(first_row, first_row + rows))
        found = {}
        for leaf in _leaves(out.name, shape, held.encoding):
            value = parts[leaf.name]
            if leaf.packed:
                assert leaf.element is not None
                signed = leaf.element.kind == "int" and leaf.element.signed
                value = unpack_bits(value.reshape(leaf.stored), leaf.element.bits, row_length(leaf.grid), signed=signed)
            if leaf.element is not None:
                _check_codes(leaf, value, leaf.element)
            found[leaf.name] = value.reshape(leaf.grid)
        return _tensor(out.name, held.encoding, found)

    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        """One file where the destination is one, else a folder with the source's config and side files."""

        def metadata(outputs: Sequence[Placed]) -> dict[str, str]:
            return _metadata(outputs, layout)

        if layout.destination.endswith(".safetensors"):
            (file,) = tensor_files(layout, "", sys.maxsize, metadata)
            return [FilePlan("", file.prefix, file.parts)]
        quantized = any(placed.held.encoding is not None for placed in layout.outputs)
        # Under the usual name transformers would take the file, find none of its weights and go on with random ones.
        files = tensor_files(layout, KEY if quantized else "model", self._max_shard, metadata)
        if layout.info.config is not None:
            config = {
                k: v
                for k, v in layout.info.config.items()
                if k != "compression_config" and not (k == QUANTIZATION and is_compressed_tensors(v))
            }
            files.append(json_file(CONFIG, config))
        return [*files, *side_files(layout.info)]

    def notes(self, layout: FileLayout) -> Sequence[str]:
        """Who reads the file."""
        if all(placed.held.encoding is None for placed in layout.outputs):
            return []
        return ["only monoquant reads this file; it is a stop on the way to another format"]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One stored array of an encoded tensor."""

    name: str
    element: ElementType | None  #: of codes
    dtype: str  #: torch's, as stored
    grid: Shape  #: extents before packing
    rows: int  #: rows of the tensor that one record covers; 0: the whole tensor

    @property
    def packed(self) -> bool:
        """Whether it is a bit stream."""
        return self.element is not None and self.element.bits < 8

    @property
    def stored(self) -> Shape:
        """Extents as stored."""
        if not self.packed:
            return self.grid
        assert self.element is not None
        return (*self.grid[:-1], -(-row_length(self.grid) * self.element.bits // 8))

    def part(self, out: Output) -> Part:
        """Where it lies in the file."""
        if self.rows == 0:
            return Part(self.name, self.dtype, self.stored, per="tensor")
        return Part(self.name, self.dtype, self.stored, rows=self.rows)


def _leaves(name: str, shape: Shape, encoding: Encoding) -> Iterator[_Leaf]:
    """The arrays of a tensor, codes first, in the order in which the encoding lists its parameters."""
    return _walk(name, shape, encoding, shape, (1,) * len(shape))


def _walk(name: str, grid: Shape, encoding: Encoding, shape: Shape, covers: Shape | None) -> Iterator[_Leaf]:
    """:param covers: elements of the tensor that one element of ``grid`` stands for, per axis; None: unknown."""
    yield _codes_leaf(f"{name}.codes", encoding.element, grid, shape, covers)
    inner = param_shape(grid, encoding.block)
    below = _covers(covers, encoding.block)
    for label, param in encoding.params():
        where = f"{name}.{label}"
        if isinstance(param, Encoding):
            yield from _walk(where, inner, param, shape, below)
        elif isinstance(param, ElementType):
            yield _codes_leaf(where, param, inner, shape, below)
        else:
            yield _Leaf(where, None, param, inner, _record(shape, below))


def _codes_leaf(name: str, element: ElementType, grid: Shape, shape: Shape, covers: Shape | None) -> _Leaf:
    signed = element.kind == "int" and element.signed
    if element.bits <= 8:
        dtype = "int8" if signed and element.bits == 8 else "uint8"
    else:
        dtype = "int16" if signed else "int32"
    rows = _record(shape, covers)
    if rows and len(grid) < 2 <= len(shape) and element.bits < 8:
        rows = max(1, row_count(shape))  # the records of a flat bit stream do not end at bytes
    return _Leaf(name, element, dtype, grid, rows)


def _check_codes(leaf: _Leaf, codes: torch.Tensor, element: ElementType) -> None:
    low, high = element.code_range
    if high - low + 1 == 1 << (element.bits if leaf.packed else 8 * codes.dtype.itemsize) or not codes.numel():
        return  # whatever is stored is a code
    found = int(codes.amin()), int(codes.amax())
    if found[0] < low or found[1] > high:
        raise EncodingError(f"{leaf.name}: codes {found[0]}..{found[1]} are outside {low}..{high} of {element.name}")


def _covers(covers: Shape | None, block: Shape) -> Shape | None:
    if all(b == FULL for b in block):
        return block
    if covers is not None and len(block) == len(covers):
        return tuple(FULL if FULL in (b, c) else b * c for b, c in zip(block, covers, strict=True))
    return block if covers is not None and all(c == 1 for c in covers) else None


def _record(shape: Shape, covers: Shape | None) -> int:
    """Rows that share one record of an array, records being equally long; 0 for what belongs to the whole tensor."""
    total = max(1, row_count(shape))
    if covers is None:
        return total
    if covers and all(c == FULL for c in covers):
        return 0
    rows = block_rows(shape, covers)
    if len(covers) == len(shape):
        for axis in range(1, len(shape) - 1):
            if covers[axis] != FULL and shape[axis] % covers[axis]:
                rows = math.lcm(rows, math.prod(shape[axis:-1]))  # a shorter last block on an inner axis
    return min(rows, total)


def _values(name: str, tensor: QuantizedTensor) -> Iterator[tuple[str, torch.Tensor]]:
    from monoquant_core.tensor import QuantizedTensor

    yield f"{name}.codes", tensor.codes
    for label, value in tensor.params().items():
        if isinstance(value, QuantizedTensor):
            yield from _values(f"{name}.{label}", value)
        else:
            yield f"{name}.{label}", value


def _tensor(name: str, encoding: Encoding, found: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    from monoquant_core.tensor import QuantizedTensor

    params: dict[str, ParamValue] = {
        label: _tensor(f"{name}.{label}", param, found) if isinstance(param, Encoding) else found[f"{name}.{label}"]
        for label, param in encoding.params()
    }
    return QuantizedTensor(encoding, found[f"{name}.codes"], **params)


def _metadata(outputs: Sequence[Placed], layout: FileLayout) -> dict[str, str]:
    """What the header of a file with these outputs says of them."""
    encodings: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    for placed in outputs:
        out, encoding = placed.output, placed.held.encoding
        if encoding is None:
            continue
        text = json.dumps(encoding.to_dict())
        tensors[out.name] = {
            "encoding": encodings.setdefault(text, len(encodings)),
            "dtype": out.dtype,
            "shape": list(out.shape),
        }
        if placed.proposal is not None and placed.proposal.activation is not None:
            tensors[out.name]["activation"] = placed.proposal.activation.to_dict()
    here = {placed.output.name for placed in outputs}
    ties = {name: first for name, first in layout.ties.items() if first in here}
    content = {
        "version": VERSION,
        "encodings": [json.loads(text) for text in encodings],
        "tensors": dict(sorted(tensors.items())),
        "ties": dict(sorted(ties.items())),
    }
    if not tensors and not ties:
        return {"format": "pt"}
    return {"format": "pt", KEY: json.dumps(content, separators=(",", ":"))}
