"""What a run tells: progress while it goes, measurements when it is done. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    stage: Literal["scan", "write", "sync", "done"]  #: first pass; main pass; fsync and rename; committed
    tensor: str  #: name of the output last finished
    done_bytes: int  #: source bytes processed in this stage
    total_bytes: int
    before_bytes: int = 0  #: of ``done_bytes``, what a run that was interrupted had done
    note: str = ""  #: what the user should know right away: that a run is resumed, say


ProgressCallback: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What was measured of one written tensor against its source."""

    name: str  #: of the output
    action: str  #: "quantize", "cast", "repack", ...
    layout: str  #: the format's name for what was stored
    numel: int
    signal: float = 0.0  #: sum of squares of the source, float64
    noise: float = 0.0  #: sum of squares of the difference, float64
    max_error: float = 0.0  #: largest absolute difference
    nbytes: int = 0  #: in the file, parameters included

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise); infinite where nothing changed."""
        return sqnr_db(self.signal, self.noise)


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run. Every number in it was measured, except ``predicted_bytes``."""

    destination: Path
    files: Mapping[str, int]  #: path within the destination ("" for a single file) -> bytes on disk
    source_bytes: int
    tensors: tuple[TensorReport, ...]
    seconds: float
    start_bytes: int  #: resident memory when the run began
    peak_bytes: int  #: highest resident memory of the process
    earlier_bytes: int  #: the same before the run, which may have taken less where that is the higher one
    predicted_bytes: int  #: what the plan predicted for the peak above ``start_bytes``
    threads: int
    device: str
    notes: tuple[str, ...] = ()
    resumed: float = 0.0  #: share of the work that an interrupted run had done, and that was not done again

    @property
    def nbytes(self) -> int:
        """Bytes on disk, all files."""
        return sum(self.files.values())

    @property
    def sqnr_db(self) -> float:
        """Over everything that was quantized or cast."""
        changed = [t for t in self.tensors if t.noise > 0]
        return sqnr_db(sum(t.signal for t in changed), sum(t.noise for t in changed))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, over all tensors that were written."""
        elements = sum(t.numel for t in self.tensors)
        return 8 * sum(t.nbytes for t in self.tensors) / elements if elements else 0.0

    def worst(self, count: int = 5) -> list[TensorReport]:
        """The tensors with the lowest SQNR among those that changed."""
        return sorted((t for t in self.tensors if t.noise > 0), key=lambda t: (t.sqnr_db, t.name))[:count]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one tensor differs between two models."""

    name: str
    status: Literal["compared", "only in A", "only in B", "shapes differ", "not numeric"]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = field(default=(None, None))
    sqnr_db: float = math.inf
    max_error: float = 0.0
    cosine: float = 1.0


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(signal power / error power)."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
