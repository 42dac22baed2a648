"""What a file format is. Imports no torch; only ``pack`` and ``unpack`` do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from monoquant_core.encoding import Encoding
from monoquant_core.errors import EncodingError
from monoquant_core.model import DTYPE_BITS, ModelInfo, TensorSpec
from monoquant_core.rows import RowMap
from monoquant_core.schemes import Proposal

if TYPE_CHECKING:
    import torch

    from monoquant_core.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Transform:
    """A change of values on the way into a file; it needs floats, so quantized sources are refused."""

    apply: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """Inputs -> output, of its shape. Floats may have another dtype: they are cast, or quantized as they are."""
    per: Literal["rows", "tensor"]  #: "rows": elementwise on a chunk, shape unchanged; "tensor": needs the inputs whole
    reason: str  #: shown in the plan: "+1: llama.cpp expects the offset applied"
    of: tuple[tuple[str, str], ...] = ()
    """Parts of other outputs, by the names of both, that ``apply`` gets after its inputs, as they were packed: the
    scales of a weight, for its bias. Such an output is made after all that have none, and wholly ("tensor")."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the file to be written, from names and shapes alone.

    Its rows are those of its inputs one after another (one input, or experts being stacked), permuted by ``rows``,
    then transformed. Without inputs, ``transform`` computes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  #: of the float the file holds if nothing quantizes it; quantized, of what it dequantizes to
    inputs: tuple[str, ...]
    rows: RowMap | None = None
    transform: Transform | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Drop:
    """A source tensor that the file does not contain, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Holds:
    """The format stores exactly this."""

    layout: str  #: the format's own name for it: "pack-quantized", "Q8_0"
    encoding: Encoding | None  #: None for floats, which are stored as ``Output.dtype``
    notes: tuple[str, ...] = ()  #: what the user should know when it is written: "transformers 5.23 does not load it"


@dataclass(frozen=True, slots=True)
class Repacks:
    """The format stores the same codes with other parameters."""

    layout: str
    encoding: Encoding
    exact: bool  #: whether every value stays the same
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refuses:
    """The format cannot store it."""

    reason: str
    instead: Proposal | None = None  #: what it could hold in its place; the scheme is asked whether it can do that
    hint: str = ""  #: what the user can do: "--keep NAME"


Held: TypeAlias = "Holds | Repacks"
Verdict: TypeAlias = "Holds | Repacks | Refuses"


@dataclass(frozen=True, slots=True)
class Part:
    """One stored array of an output.

    :raises EncodingError: for a part that cannot be laid out.
    """

    name: str  #: in the file
    dtype: str  #: torch's name of what ``pack`` returns
    shape: tuple[int, ...]
    per: Literal["rows", "tensor"] = "rows"  #: "tensor": written once, with the first chunk
    rows: int = 1  #: rows of the output that one record of this part covers; chunks are multiples of it

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise EncodingError(f"part {self.name}: unknown dtype {self.dtype!r}")
        if self.per not in ("rows", "tensor") or self.rows < 1:
            raise EncodingError(f"part {self.name}: per is rows or tensor and rows is positive")

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def span(self, total_rows: int, rows: range) -> tuple[int, int]:
        """Where the records of ``rows`` lie within this part: (first byte, byte count)."""
        if self.per == "tensor" or len(rows) == total_rows:
            return 0, self.nbytes
        record = self.nbytes // -(-total_rows // self.rows)
        first, last = rows.start // self.rows, -(-rows.stop // self.rows)
        return first * record, (last - first) * record


@dataclass(frozen=True, slots=True)
class Placed:
    """An output with everything the plan decided about it."""

    output: Output
    proposal: Proposal | None  #: None for floats
    held: Held
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """What ``Exporter.files`` lays out."""

    outputs: tuple[Placed, ...]
    info: ModelInfo
    destination: str = ""  #: name of the file or folder to be written, without its path
    plan_hash: str = ""  #: identifies the plan's content, for names that must not collide
    ties: Mapping[str, str] = field(default_factory=dict)  #: name not written -> its tensor's first name


@dataclass(frozen=True, slots=True)
class PartAt:
    """Where a part lies in a file."""

    output: str  #: name of the output
    part: str  #: name of the part
    offset: int  #: of its first byte, from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class BytesAt:
    """Bytes known beforehand that lie between the parts of a file, such as the headers of single tensors."""

    offset: int  #: from the start of the file
    data: bytes


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file: ``prefix``, parts and bytes at their offsets (gaps are zeros), ``suffix``; or a copy of another."""

    path: str  #: relative to the output folder; "" when the output itself is this one file
    prefix: bytes = b""
    parts: tuple[PartAt, ...] = ()
    suffix: bytes = b""
    between: tuple[BytesAt, ...] = ()
    copy_of: Path | None = None
    copy_nbytes: int = 0
    last: bool = field(default=False)  #: committed after the others, because it names them
    companions: str = ""
    """Pattern (fnmatch) of the names that companions of this file may have: those that an earlier output of the same
    name left are deleted once this file has taken its place."""

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        if self.copy_of is not None:
            return self.copy_nbytes
        end = max((p.offset + p.nbytes for p in self.parts), default=0)
        known = max((b.offset + len(b.data) for b in self.between), default=0)
        return max(end, known, len(self.prefix)) + len(self.suffix)


class Exporter(Protocol):
    """A format with its options bound. Pure: no files, no state; the engine owns all I/O.

    More methods are optional, because most formats do not need them: ``use(registry)`` (called once, before anything
    else, for formats that ask other plugins), ``resolve(specs, info) -> Exporter`` (called once, then: another exporter
    for this model, such as one convention of several), ``with_stats(stats) -> Exporter`` (called once, after that,
    where there are calibration statistics: for formats that quantize values which belong to no weight), and
    ``notes(layout: FileLayout) -> Sequence[str]`` (what to tell the user about the file as a whole).
    ``settle(placed) -> Sequence[Output]`` is called when every output has its verdict: outputs that follow from these,
    which take the place of those of the same name or come after all others (biases in steps of their weights' scales).
    ``fingerprint() -> str`` tells it from another one of its version that lays out the same files and packs or
    transforms values otherwise: options, or a digest of files that it reads, as far as they do that; "" where nothing
    does. It is called and needed as that of a :class:`~monoquant_core.schemes.Quantizer`.
    A format that needs a graph may have ``read_graph(source, example) -> Source``, called before anything else: the
    source itself where its graph is of the format's own kind, else one whose tensors are those of the graph that it
    made of the source. ``example`` is one batch of inputs (a tensor, a tuple or a dict of them), or None.
    An attribute ``recipe: str`` names another default recipe than the declaration's; ``fuses = False`` says that its
    runtimes do not join the members of a fuse group, so that they may get different schemes; ``of_checkpoints = True``
    that its files are model folders, for which a source with other names is read as ``Source.checkpoint`` has it.
    """

    def outputs(self, specs: Sequence[TensorSpec], info: ModelInfo) -> Sequence[Output | Drop]:
        """What the file contains. Every spec is the input of an output, or dropped, or tied to one that is."""
        ...

    def verdict(self, out: Output, proposal: Proposal | None) -> Verdict:
        """Whether the format holds it; ``proposal`` None means floats of ``out.dtype``. Reads no data, never raises."""
        ...

    def parts(self, out: Output, held: Held) -> Sequence[Part]:
        """The arrays that one output becomes, from shapes alone."""
        ...

    def pack(
        self, rows: QuantizedTensor | torch.Tensor, out: Output, held: Held, first_row: int
    ) -> Mapping[str, torch.Tensor]:
        """The bytes of a chunk, by part name: contiguous tensors whose memory is what the file holds.

        Parts per tensor come with the chunk whose ``first_row`` is 0 (they may come with every chunk).
        """
        ...

    def unpack(
        self, parts: Mapping[str, torch.Tensor], out: Output, held: Held, first_row: int
    ) -> QuantizedTensor | torch.Tensor:
        """Inverse of ``pack``: both the reader and the check use it. Parts per tensor are always given."""
        ...

    def files(self, layout: FileLayout) -> Iterable[FilePlan]:
        """Every file of the output, with the parts at their offsets."""
        ...
