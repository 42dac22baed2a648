"""What a quantization scheme is. Imports no torch: a plan must be cheap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from monoquant_core.encoding import FLOAT_BITS, ActivationQuant, Encoding
from monoquant_core.errors import EncodingError
from monoquant_core.model import TensorSpec

if TYPE_CHECKING:
    import torch

    from monoquant_core.scratch import Scratch
    from monoquant_core.tensor import QuantizedTensor

NEEDS = frozenset({"importance", "ranges", "absmax", "whole"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a scheme would make of a tensor.

    :raises EncodingError: for an encoding not in canonical form, or an unknown need.
    """

    encoding: Encoding | str  #: a float dtype name is a cast, which the core does itself
    activation: ActivationQuant | None = None  #: how the layer's input is quantized at run time
    layout: str | None = None  #: a preferred name of the format's own: "TQ1_0"
    needs: frozenset[str] = frozenset()
    """What ``quantize`` needs beside the rows: ``absmax`` (of the whole tensor, from a first pass), ``whole`` (all rows
    at once), ``importance`` (per column; required, not merely used), ``ranges`` (calibrated)."""

    def __post_init__(self) -> None:
        if isinstance(self.encoding, Encoding):
            self.encoding.check_weight()
        elif self.encoding not in FLOAT_BITS:
            raise EncodingError(f"a cast is to one of {', '.join(FLOAT_BITS)}, got {self.encoding!r}")
        if self.needs - NEEDS:
            raise EncodingError(f"needs: unknown {sorted(self.needs - NEEDS)}, known {sorted(NEEDS)}")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a scheme cannot quantize a tensor, and what would work.

    :raises EncodingError: without a reason.
    """

    reason: str
    hint: str = ""

    def __post_init__(self) -> None:
        if not self.reason:
            raise EncodingError("a refusal has a reason")


@dataclass(slots=True)
class Context:
    """What ``quantize`` gets beside the rows."""

    spec: TensorSpec  #: the tensor the rows belong to
    rows: range  #: which rows of it these are
    scratch: Scratch  #: the worker's buffers; names that a scheme takes should start with its own name
    absmax: float | None = None  #: largest magnitude of the whole tensor, where the proposal asked for it
    importance: torch.Tensor | None = None  #: float32 [row length]: mean squared input of every column
    extra: Mapping[str, object] = field(default_factory=dict)  #: room for later needs


class Quantizer(Protocol):
    """One scheme with its options bound. ``propose`` and ``accepts`` import no torch and read no data."""

    #: whether zeros stay exactly zero; the conformance kit and the check rely on it
    keeps_zero: bool
    #: whether quantizing a dequantized tensor gives the same codes
    idempotent: bool
    #: whether every code is the nearest one to its value, so that the check may hold it to half a step
    nearest: bool

    def propose(self, spec: TensorSpec) -> Proposal | Refusal:
        """The encoding for a tensor, or why there is none. The same answer every time."""
        ...

    def accepts(self, spec: TensorSpec, encoding: Encoding) -> bool:
        """Whether ``quantize`` can produce this encoding instead of the proposed one (negotiation with a format)."""
        ...

    def quantize(self, rows: torch.Tensor, encoding: Encoding, context: Context) -> QuantizedTensor:
        """Quantize a chunk of whole blocks.

        :param rows: a float chunk of the tensor's rank; not to be written to.
        :return: exactly ``encoding`` and the chunk's shape; it may live in ``context.scratch``. A parameter of the
            whole tensor comes with every chunk.
        :raises QuantizationError: for NaN or infinity, naming the tensor.
        """
        ...
